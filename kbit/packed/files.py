"""Packed models on disk: ``kbit.safetensors`` with every tensor once, and ``kbit.json``, which says what they are.

A transformers model's ``config.json`` (and generation_config.json) are in the same directory. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.errors import CheckpointError
from kbit.models.checkpoint import safetensors_header
from kbit.models.stored import SAFETENSORS_DTYPES
from kbit.packed.base import PackedLinear
from kbit.packed.metadata import FORMAT, METADATA, arguments_of, layer_of, read_metadata
from kbit.packed.replacing import replace

WEIGHTS: Final = "kbit.safetensors"
_STORED_BYTES: Final = 2
"""Of a value that isn't quantized: 16 bits."""


def save_packed(model: nn.Module, directory: str | Path) -> None:
    """Write a model with layers in k bits, as ``quantize_model(..., packed=True)`` leaves it, to a directory.

    All parameters and buffers are written as they are, tied ones once. The host holds one copy while it is written.
    A model that was in the directory before is replaced once all is written; other files, such as a tokenizer's, are
    left alone.

    Raises:
        ValueError: the model has no layer in k bits, or a tensor without values (on the meta device).
    """
    from safetensors.torch import save_file

    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers in k bits: pack it with quantize_model(..., packed=True)"
        )
    tensors, tied = _distinct(dict(_tensors(model)))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".kbit-", dir=directory) as unfinished:
        part = Path(unfinished)
        metadata = {
            "format": FORMAT,
            "version": max(layer.format_version for layer in layers.values()),
            "model": _save_config(model, part),
            "layers": {name: arguments_of(layer) for name, layer in layers.items()},
            "tied": tied,
        }
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
        # While kbit.json is missing, what lies there is no packed model: it goes first and comes last.
        (directory / METADATA).unlink(missing_ok=True)
        for file in sorted(part.iterdir(), key=lambda file: file.name == METADATA):
            file.replace(directory / file.name)


@torch.no_grad()
def load_packed(
    directory: str | Path, *, device: torch.device | str = "cpu", model: nn.Module | None = None
) -> nn.Module:
    """Read a model that ``save_packed`` wrote; it gives the same bits as the one that was saved.

    It is built without values and its tensors are read one by one straight onto the device: there is never a 16-bit
    copy of a quantized layer. It comes back in eval mode, without gradients.

    Args:
        directory: that of ``save_packed``.
        device: where it goes.
        model: an unquantized model of the same architecture to fill, on any device (meta is best); it is changed and
            given back. Needed for what transformers can't build from config.json.

    Raises:
        CheckpointError: no packed model, one of a later version, damaged files, or not the tensors of this model (which
            is compared by names, shapes and dtypes before it is changed).
        ValueError: there is no such device, or it is meta.
    """
    device = _usable(device)
    directory = Path(directory)
    metadata = read_metadata(directory)
    try:
        header = {stored.name: stored for stored in safetensors_header(directory / WEIGHTS)}
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {WEIGHTS}: copy it again") from None
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if model is None:
        model = _skeleton(directory, metadata["model"])
    where = _where(directory, metadata["model"])
    layers = _layers(model, metadata["layers"], where)
    tied: Mapping[str, str] = metadata["tied"]
    wanted = dict(_tensors(model, layers))
    _same_names(wanted.keys(), header.keys() | tied.keys(), where)
    _same_names(set(tied.values()), header.keys() & set(tied.values()), where)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in wanted.items():
        stored = header[tied.get(name, name)]
        exact = modules[name.rpartition(".")[0]] in layers and not name.endswith(".bias")
        if stored.shape != tensor.shape or (exact and SAFETENSORS_DTYPES.get(stored.dtype) != tensor.dtype):
            is_, want = f"{stored.dtype} {list(stored.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(f"{where}: {name} is {is_} in {WEIGHTS}, and the model's is {want}")
    for old, layer in layers.items():
        replace(model, old, layer)
    _fill(model, directory / WEIGHTS, wanted.keys(), tied, device)
    return model.eval()


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors on disk: as ``save_packed`` writes them, with the rest in 16 bits.

    A model that was cast up to compute in float32 counts by the 16 bits that its values have; tied tensors count once.
    Without packed layers it is the 16-bit model.
    """
    distinct = {(t.device, t.data_ptr(), t.shape, t.stride(), t.dtype): (name, t) for name, t in _tensors(model)}
    biases = {f"{path}.bias" for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    cast_up = [isinstance(t, nn.Parameter) or name in biases for name, t in distinct.values()]
    return sum(
        t.numel() * (min(t.itemsize, _STORED_BYTES) if cast and t.is_floating_point() else t.itemsize)
        for cast, (_, t) in zip(cast_up, distinct.values(), strict=True)
    )


def _usable(device: torch.device | str) -> torch.device:
    usable = torch.device(device)
    if usable.type == "meta":
        raise ValueError("device='meta' holds no values: give a GPU or 'cpu'")
    if usable.type == "cuda" and (usable.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}: torch sees {torch.cuda.device_count()} GPUs here; 'cpu' works too")
    return usable


def _tensors(model: nn.Module, packed: Mapping[nn.Module, PackedLinear] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer by name, non-persistent ones too, tied ones under each of their names.

    Args:
        model: the model.
        packed: layers to see in place of others.
    """
    for path, own in model.named_modules(remove_duplicate=False):
        module = (packed or {}).get(own, own)
        derived = module._non_persistent_buffers_set if isinstance(module, PackedLinear) else ()
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in derived:
                yield f"{path}.{name}" if path else name, tensor


def _distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to write, other names of those that have several). What overlaps another in part is copied."""
    first: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    written: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, without values: load the model first")
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        written[name] = (tensor.detach().clone() if storage in storages else tensor.detach()).contiguous()
        storages.add(storage)
    return written, tied


def _save_config(model: nn.Module, directory: Path) -> dict[str, Any]:
    """Write a transformers model's configuration; return its class and version. Of other models, only the class."""
    from transformers import PreTrainedModel, __version__

    about: dict[str, Any] = {"class": type(model).__name__, "transformers": None, "attention": None}
    if isinstance(model, PreTrainedModel):
        about["transformers"] = __version__
        model.config.save_pretrained(directory)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        attention = getattr(model.config, "_attn_implementation", None)
        about["attention"] = attention if isinstance(attention, str) else None
    return about


def _skeleton(directory: Path, about: Mapping[str, Any]) -> nn.Module:
    """Return the transformers model of config.json, without values."""
    import transformers

    kind = getattr(transformers, about["class"], None) if about["transformers"] else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{directory} holds a {about['class']}, which transformers does not have: build one without values "
            '(with torch.device("meta"): ...) and call load_packed(directory, model=...)'
        )
    # What a damaged configuration raises depends on the model.
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        config._attn_implementation = about["attention"]
        with torch.device("meta"):
            model: Any = kind(config)
        if getattr(model, "generation_config", None) is not None and (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no usable config.json for class {about['class']!r} with attention "
            f"{about['attention']!r} in {METADATA}; transformers says: {error!r}"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _where(directory: Path, about: Mapping[str, Any]) -> str:
    """Return the start of errors about names: transformers gives a model's modules other names at times."""
    import transformers

    if about["transformers"] in (None, transformers.__version__):
        return str(directory)
    return f"{directory} (saved with transformers {about['transformers']}, and this is {transformers.__version__})"


def _layers(model: nn.Module, entries: Mapping[str, Mapping[str, Any]], where: str) -> dict[nn.Module, PackedLinear]:
    """Return the packed layers, without values, by the modules in whose place they go."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, PackedLinear] = {}
    for name, arguments in entries.items():
        # Sizes may be such that torch has an error of its own.
        try:
            layer = layer_of(arguments)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{where}: {METADATA}: layers: {name} is damaged: {error}") from error
        if not isinstance(modules.get(name), nn.Linear | Conv1D):
            raise CheckpointError(
                f"{where}: this {type(model).__name__} has no linear layer {name!r}: another architecture?"
            )
        layers[modules[name]] = layer
    return layers


def _same_names(wanted: Any, stored: Any, where: str) -> None:
    for names, what in ((wanted - stored, "lacks"), (stored - wanted, "has, beyond the model's,")):
        if names:
            some = ", ".join(sorted(names)[:4])
            raise CheckpointError(f"{where}: {WEIGHTS} {what} {len(names)} tensors: {some}")


def _fill(model: nn.Module, file: Path, names: Any, tied: Mapping[str, str], device: torch.device) -> None:
    """Read every tensor onto the device; tied parameters become one."""
    from safetensors import SafetensorError, safe_open

    modules = dict(model.named_modules(remove_duplicate=False))
    read: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for name in names:
                source = tied.get(name, name)
                path, _, own = name.rpartition(".")
                module = modules[path]
                if source not in read:
                    read[source] = stored.get_tensor(source)
                tensor = read[source]
                if own in module._parameters:
                    if not isinstance(tensor, nn.Parameter):
                        tensor = read[source] = nn.Parameter(tensor, requires_grad=False)
                    module._parameters[own] = tensor
                else:
                    module._buffers[own] = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    for module in modules.values():
        if isinstance(module, PackedLinear):
            module.derive()
