"""Where the bytes of a checkpoint's tensors lie in its files, so that they can be read without anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbit.errors import NotStreamableError
from kbit.models.checkpoint import Headers, StoredTensor
from kbit.models.stored import SAFETENSORS_DTYPES


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The bytes of a tensor in a file.

    Attributes:
        file: the file.
        start, nbytes: the bytes, from the first that the tensor needs to the last.
        dtype, shape, stride: how the tensor lies in them, from the first one on.
    """

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, raw: Tensor) -> Tensor:
        """Return the tensor that its bytes are: a view of uint8 [nbytes]."""
        return raw.view(self.dtype).as_strided(self.shape, self.stride)


def extents_of(files: Sequence[Path], headers: Headers) -> Mapping[str, Extent]:
    """Find the tensors of a checkpoint's files, by name: from the headers of safetensors, and from torch files.

    Args:
        files: the files.
        headers: those of its safetensors files.

    Raises:
        NotStreamableError: a torch file of the format before 1.6, or a tensor of a dtype that torch hasn't.
    """
    return {
        name: extent
        for file in files
        for name, extent in (_safetensors(headers[file]) if file in headers else _torch_file(file)).items()
    }


def _safetensors(header: Sequence[StoredTensor]) -> dict[str, Extent]:
    found = {}
    for stored in header:
        dtype = SAFETENSORS_DTYPES.get(stored.dtype)
        if dtype is None:
            raise NotStreamableError(f"{stored.name} in {stored.file.name} is {stored.dtype}")
        # Contiguous, as the format has it.
        stride = tuple(prod(stored.shape[i + 1 :]) for i in range(len(stored.shape)))
        nbytes = stored.stop - stored.start
        found[stored.name] = Extent(
            file=stored.file, start=stored.start, nbytes=nbytes, dtype=dtype, shape=stored.shape, stride=stride
        )
    return found


def _torch_file(file: Path) -> dict[str, Extent]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Fake tensors know where their storages' bytes are, and have none.
    with FakeTensorMode():
        loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return {name: _in_storage(file, name, t) for name, t in loaded.items() if isinstance(t, Tensor)}


def _in_storage(file: Path, name: str, tensor: Tensor) -> Extent:
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise NotStreamableError(f"{file.name} is of torch's format before 1.6, which doesn't say where {name} lies")
    size, shape, stride = tensor.dtype.itemsize, tuple(tensor.shape), tuple(tensor.stride())
    span = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1 if tensor.numel() else 0
    start = begin + tensor.storage_offset() * size
    return Extent(file=file, start=start, nbytes=span * size, dtype=tensor.dtype, shape=shape, stride=stride)
