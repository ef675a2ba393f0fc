"""Find the files that hold a model's weights, and count its parameters. Needs no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, TypeAlias

from kbit.errors import CheckpointError
from kbit.models.obeyed import check_refused, obeyed_files

FORMATS: Final = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""One file, or the index of several; what comes first is taken, as from_pretrained does."""

_MAX_HEADER: Final = 100_000_000
_CHUNK: Final = 1 << 24
_HEADS: Final = ("lm_head.weight", "embed_out.weight")
_EMBEDDING: Final = re.compile(r"emb|wte")
_MASK: Final = re.compile(r"(^|\.)(attn|attention)\.bias$")
_BUFFER: Final = re.compile(
    r"(^|\.)(masked_bias|causal_mask|(original_)?inv_freq|(cos|sin)_cached|version|_float_tensor"
    r"|embed_positions\.weights)$"
)
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_FURTHER: Final = re.compile(r"(?:^|\.)mtp|nextn")
_OF_PREDICTOR: Final = re.compile(r"(?:^|\.)(?:eh_proj|enorm|hnorm)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as a safetensors header describes it: dtype's name, shape, and its bytes' place in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


Headers: TypeAlias = Mapping[Path, Sequence[StoredTensor]]
"""What safetensors files hold, by file."""


def weight_files(names: Collection[str], read_json: Callable[[str], Any]) -> tuple[str, ...]:
    """Return the names of the files to load the weights from: safetensors where there are any, else torch's ``.bin``.

    Args:
        names: file names at the top of the directory or repository.
        read_json: gives the contents of an index among them; its name comes first in the answer.

    Raises:
        CheckpointError: no weights, weights of another format, or an index that names files that are not there.
    """
    for single, index in FORMATS:
        if single in names:
            return (single,)
        if index in names:
            content = read_json(index)
            shards = content.get("weight_map") if isinstance(content, Mapping) else None
            if not isinstance(shards, Mapping) or not shards:
                raise CheckpointError(f"{index} has no weight_map")
            missing = sorted(set(shards.values()) - set(names))
            if missing:
                raise CheckpointError(
                    f"{index} names {len(missing)} files that are not there: {', '.join(missing[:3])}"
                )
            return (index, *sorted(set(shards.values())))
    allowed = " or ".join(single for single, _ in FORMATS)
    others = sorted(n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")))
    found = f"only {', '.join(others[:3])}, which can't be used" if others else "none"
    raise CheckpointError(f"needs weights in {allowed} (or with an index, in parts); found {found}")


def model_files(directory: Path) -> tuple[str, ...]:
    """Return the names of the files that define a local model: weights, config.json, and what else is obeyed.

    These are what its identity hashes, and all that is read of it.

    Raises:
        CheckpointError: something is missing, of an unknown format or refused.
    """
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    check_refused(names)
    config = read_config(directory)
    weights = weight_files(names, lambda name: json.loads((directory / name).read_bytes()))
    named = config.get("transformers_weights")
    if named not in (None, weights[0]):
        raise CheckpointError(
            f"config.json has transformers_weights={named!r}, and weights are read from {weights[0]}: remove the key, "
            "or make it name that file"
        )
    return (*weights, "config.json", *obeyed_files(names))


def weights_among(directory: Path, names: Iterable[str]) -> list[Path]:
    """Of a model's files (``model_files``), those that hold weights."""
    return [directory / name for name in names if name.endswith((".safetensors", ".bin"))]


def read_config(directory: Path) -> Mapping[str, Any]:
    """Read a model's config.json. Raises CheckpointError where it is missing, damaged or has no model_type."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError:
        raise CheckpointError("it has no config.json") from None
    except ValueError as error:
        raise CheckpointError(f"config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError("config.json has no model_type")
    return config


def count_parameters(stored: Collection[StoredTensor]) -> int:
    """Parameters in safetensors files, each shared one once.

    Left out are what older checkpoints store besides parameters: causal masks, rotary frequencies, anything that is not
    floating point; and layers that predict tokens further on, which are not loaded. An output head with the same bytes
    as the input embedding is tied and not counted again.

    Args:
        stored: the files' tensors, or those that they stand for (``kbit.models.prequantized.layouts.as_16_bit``).
    """
    tensors = [t for t in own_tensors(stored) if _is_parameter(t)]
    total = sum(prod(t.shape) for t in tensors)
    for head in tensors:
        if head.name.endswith(_HEADS) and any(_same(head, t) for t in tensors if _EMBEDDING.search(t.name)):
            total -= prod(head.shape)
    return total


def headers_of(files: Iterable[Path]) -> dict[Path, tuple[StoredTensor, ...]]:
    """Read the headers of the safetensors files among a model's weights, each once.

    Raises:
        CheckpointError: as ``safetensors_header``.
    """
    return {file: safetensors_header(file) for file in files if file.suffix == ".safetensors"}


def tensors_in(headers: Headers) -> list[StoredTensor]:
    """Return the tensors of all files."""
    return [tensor for header in headers.values() for tensor in header]


def safetensors_header(file: Path) -> tuple[StoredTensor, ...]:
    """Read the tensors of a safetensors file from its header alone.

    The library gives names, dtypes and shapes without torch, but not where a tensor's bytes lie in the file, by which
    tied weights are compared and packed models read. tests/kbit/models/test_safetensors_header.py compares the two.

    Raises:
        CheckpointError: not a safetensors file, or one that is cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file.name} is no safetensors file (a Git LFS pointer, or cut short?)")
        try:
            header = json.loads(stream.read(length))
            tensors = [
                _tensor(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
            ]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file.name} has a damaged safetensors header: {error}") from error
    end = max((t.stop for t in tensors), default=8 + length)
    if end != size:
        raise CheckpointError(f"{file.name} should have {end} bytes by its header but has {size}: fetch it again")
    return tuple(tensors)


def _tensor(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return StoredTensor(
        file=file, name=name, dtype=str(entry["dtype"]), shape=shape, start=base + start, stop=base + stop
    )


def own_tensors(tensors: Collection[StoredTensor]) -> list[StoredTensor]:
    """Return a model's own tensors: not those of the layers beyond them that predict tokens further on.

    DeepSeek-V3 and its kind number these layers on from the model's own; others call them mtp. transformers reads none.
    """
    rest = [t for t in tensors if not _FURTHER.search(t.name)]
    predictors = {layer_of(t.name) for t in rest if _OF_PREDICTOR.search(t.name)} - {None}
    return [t for t in rest if layer_of(t.name) not in predictors]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to by its name; None if to none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is what older checkpoints store beside parameters: masks, tables of positions, versions."""
    # GPT-2 and GPT-NeoX store their causal mask [1, 1, n, n] under the name of a bias.
    return bool(_BUFFER.search(name)) or bool(_MASK.search(name) and len(shape) == 4)


def _is_parameter(tensor: StoredTensor) -> bool:
    return tensor.dtype.startswith(("F", "BF")) and not is_buffer(tensor.name, tensor.shape)


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.file, a.start) == (b.file, b.start) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        bounds = [*range(0, a.stop - a.start, _CHUNK), a.stop - a.start]
        return all(left.read(stop - start) == right.read(stop - start) for start, stop in pairwise(bounds))
