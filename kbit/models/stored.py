"""What the files of a checkpoint hold, by tensor, read from their headers: names, dtypes and shapes, no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.models.checkpoint import Headers, StoredTensor, is_buffer
from kbit.quantizer.storage import STORAGE_DTYPES

SAFETENSORS_DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What safetensors calls the dtypes that checkpoints and packed models have."""
_FLOATS: Final = ("F", "BF")
"""How safetensors' names of floating-point dtypes begin; masks and indices (BOOL, I64, U8) are no weights."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: in the file, which may lack the prefix of the base model, or have it beyond the model's own name.
        dtype: None if it is not floating point.
        shape: its shape.
        file: where it lies.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter: floating point, and no mask or table of frequencies as older checkpoints store."""
        return self.dtype is not None and not is_buffer(self.name, self.shape)


def stored_tensors(files: Sequence[Path], headers: Headers) -> Mapping[str, Stored]:
    """Return the tensors of a checkpoint's files, by name.

    Args:
        files: the files.
        headers: those of its safetensors files.

    Raises:
        SpecError: a torch file would run code.
    """
    return {tensor.name: tensor for file in files for tensor in _tensors(file, headers.get(file))}


def stored_dtype(tensors: Mapping[str, Stored]) -> torch.dtype:
    """Return the 16-bit dtype of most weights, by bytes (configurations may be wrong); else float16."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype is not None:
            counts[tensor.dtype] += tensor.numel * tensor.dtype.itemsize
    most = counts.most_common(1)[0][0] if counts else torch.float32
    return most if most in STORAGE_DTYPES else torch.float16


def values_of(tensors: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Read tensors' values, one at a time."""
    from safetensors import safe_open

    for file in sorted({tensor.file for tensor in tensors}):
        here = [tensor for tensor in tensors if tensor.file == file]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield from ((tensor, opened.get_tensor(tensor.name)) for tensor in here)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            yield from ((tensor, loaded[tensor.name]) for tensor in here)


def _tensors(file: Path, header: Sequence[StoredTensor] | None) -> list[Stored]:
    if header is not None:
        return [
            Stored(
                name=t.name,
                dtype=SAFETENSORS_DTYPES.get(t.dtype, torch.float32) if t.dtype.startswith(_FLOATS) else None,
                shape=t.shape,
                file=file,
            )
            for t in header
        ]
    return [
        Stored(name=name, dtype=t.dtype if t.is_floating_point() else None, shape=tuple(t.shape), file=file)
        for name, t in _torch_file(file).items()
        if isinstance(t, Tensor)
    ]


def _torch_file(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        allowed = "safetensors, or a torch file of tensors alone; this one is a pickle that would run code: refused"
        raise SpecError("path", str(path), allowed) from error
    return loaded
