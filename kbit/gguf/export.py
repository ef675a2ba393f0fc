"""Write a model as a GGUF file, quantized as a cell or as it is, and read one as a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kbit.errors import CheckpointError
from kbit.ggml.formats import FORMATS
from kbit.ggml.quantize import ggml_dequantize
from kbit.ggml.recipes import RECIPES
from kbit.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from kbit.gguf.file import QUANTIZATION_VERSION, Entry, GgufFile, read_file, write_file
from kbit.gguf.vocabulary import vocabulary_of
from kbit.methods.ggml import StoredRows
from kbit.models.architectures import text_config
from kbit.models.limits import context_of
from kbit.models.whole import WholeModel
from kbit.spec import Spec
from kbit.specs.ggml import GgmlSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_TYPES: Final = {"f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7}
"""general.file_type of files that have one format, with those of recipes; what a file holds is said by its tensors."""
K_FILE_TYPES: Final = {"q4_K": 14, "q5_K": 16, "q6_K": 18}
_NUMPY: Final = {"f32": np.float32, "f16": np.float16}
PRECISE: Final = ("position_embd",)
"""Matrices that stay in 32 bits, as vectors do."""


def rows_of(model: nn.Module, spec: Spec, storage_dtype: torch.dtype) -> dict[str, StoredRows]:
    """Return the bytes of each layer of a model in its 16-bit form; empty for a method other than ggml.

    Raises:
        As the method.
    """
    if not isinstance(spec, GgmlSpec):
        return {}
    from kbit.methods.ggml import quantize_layers

    whole = WholeModel(module=model, storage_dtype=storage_dtype)
    return {layer.name: stored for layer, stored in quantize_layers(whole, spec)}


@torch.no_grad()
def write_gguf(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    *,
    storage_dtype: torch.dtype,
    rows: Mapping[str, StoredRows] | None = None,
    spec: Spec | None = None,
) -> int:
    """Write a model; returns the file's bytes.

    Matrices are written in their rows' format, or in 16 bits; vectors, and position embeddings, in 32.

    Args:
        path: of the file.
        model: transformers', as it is, or as it was when `rows` were made.
        tokenizer: its tokenizer.
        storage_dtype: float16 or bfloat16, of what isn't in `rows`.
        rows: of layers, by name (``rows_of``).
        spec: how these were made; it names the file's type.

    Raises:
        SpecError: an architecture, or a tokenizer, that isn't written.
        OSError: the file can't be written.
    """
    config = text_config(model)
    architecture = architecture_of(config.model_type)
    about = {**architecture.describe(config), "context_length": context_of(config, tokenizer.model_max_length)}
    entries = list(_entries(model, architecture, about, rows or {}, storage_dtype))
    metadata = {
        "general.architecture": architecture.name,
        "general.name": path.stem,
        "general.file_type": _file_type(spec, storage_dtype),
        "general.quantization_version": QUANTIZATION_VERSION,
        f"{architecture.name}.vocab_size": config.vocab_size,
        **{f"{architecture.name}.{key}": value for key, value in about.items()},
        **vocabulary_of(tokenizer, config.vocab_size),
    }
    return write_file(path, metadata, entries)


@torch.no_grad()
def read_gguf(path: Path, *, storage_dtype: torch.dtype, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Read a model; its weights are dequantized, rounded to the storage dtype and cast to the dtype.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged, or holds an architecture that isn't read here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = read_file(path)
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path} holds architecture {name!r}: {', '.join(ARCHITECTURES)} are read")
    architecture = ARCHITECTURES[str(name)]
    about = {k.removeprefix(f"{name}."): v for k, v in file.metadata.items() if k.startswith(f"{name}.")}
    config = AutoConfig.for_model(
        architecture.model_type,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
        **architecture.configure(about),
    )
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(config, dtype=dtype).to(device)
    taken = set()
    for parameter, values in model.named_parameters():
        own = architecture.name_of(parameter)
        if own is None or own not in file.tensors:
            raise CheckpointError(f"{path} has no {own} for {parameter} of a {architecture.model_type}")
        taken.add(own)
        values.copy_(_values(file, own, architecture, about, values).to(storage_dtype))
    left = sorted(file.tensors.keys() - taken)
    if left:
        raise CheckpointError(f"{path} has tensors that a {architecture.model_type} does not: {', '.join(left[:5])}")
    model.train(False)
    model.requires_grad_(False)
    return model


def _entries(
    model: nn.Module,
    architecture: Architecture,
    about: Mapping[str, Any],
    rows: Mapping[str, StoredRows],
    storage_dtype: torch.dtype,
) -> Iterator[Entry]:
    sixteen = "bf16" if storage_dtype == torch.bfloat16 else "f16"
    for parameter, values in model.named_parameters():
        name = architecture.name_of(parameter)
        if name is None:
            raise CheckpointError(f"{parameter} has no name in a GGUF file of {architecture.name}")
        part = name.split(".")[-2]
        weight = values.detach().t() if part in architecture.transposed and values.ndim == 2 else values.detach()
        stored = rows.get(parameter.removesuffix(".weight"))
        precise = weight.ndim < 2 or part in PRECISE
        kind = "f32" if precise else sixteen if stored is None or stored.format == "f16" else stored.format
        order = architecture.order(name, weight.shape[0], about)
        source = weight if stored is None else stored.rows

        def data(source: Tensor = source, kind: str = kind, order: Tensor | None = order) -> NDArray[Any]:
            return _bytes(source if order is None else source[order.to(source.device)], kind)

        yield Entry(name=name, format=FORMATS[kind], shape=tuple(weight.shape), data=data)


def _bytes(values: Tensor, kind: str) -> NDArray[Any]:
    """Return values, or the bytes of rows, as they lie in a file."""
    values = values.cpu()
    if kind == "bf16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return values.numpy() if kind not in _NUMPY else values.float().numpy().astype(_NUMPY[kind])


def _values(file: GgufFile, name: str, architecture: Architecture, about: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return a tensor's values in the model's order and orientation, float32."""
    stored = file.tensors[name]
    data = torch.from_numpy(file.read(name))
    match stored.format.name:
        case "f32":
            values = data.view(torch.float32)
        case "f16":
            values = data.view(torch.float16).float()
        case "bf16":
            values = data.view(torch.bfloat16).float()
        case kind:
            values = ggml_dequantize(data.to(like.device), kind)
    values = values.view(stored.shape)
    order = architecture.order(name, stored.shape[0], about)
    if order is not None:
        back = torch.empty_like(values)
        back[order.to(values.device)] = values
        values = back
    values = values.t() if name.split(".")[-2] in architecture.transposed and values.ndim == 2 else values
    if values.shape != like.shape:
        raise CheckpointError(f"{file.path}: {name} is {list(stored.shape)}, and the model's is {list(like.shape)}")
    return values


def _file_type(spec: Spec | None, storage_dtype: torch.dtype) -> int:
    if not isinstance(spec, GgmlSpec):
        return FILE_TYPES["bf16" if storage_dtype == torch.bfloat16 else "f16"]
    if spec.recipe is not None:
        return RECIPES[spec.recipe].number
    return {**FILE_TYPES, **K_FILE_TYPES}[str(spec.ggml_type)]
