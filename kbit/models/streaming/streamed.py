"""A model of which the weights that are needed are read from its files, and the others are not in memory.

streamed = open_streamed(path, compute_dtype="storage")
parts = [(names_of_block, device) for ...]
for names in streamed.each(parts, ahead=bytes_of_a_block):   # in this order, read ahead
    ...                                                      # the named weights are in streamed.model
    streamed.empty(names)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kbit.errors import CheckpointError, NotStreamableError
from kbit.models.architectures import block_layers
from kbit.models.checkpoint import weights_among
from kbit.models.loadable import Checkpoint, LoadedModel
from kbit.models.loading import find_checkpoint
from kbit.models.streaming.extents import Extent, extents_of
from kbit.models.streaming.reader import THREADS, Reading
from kbit.models.streaming.skeleton import Part, Skeleton, build, tie_equal
from kbit.models.verification import check_arrived, check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPARED_AT_ONCE = 1 << 24
_CPU = torch.device("cpu")


@dataclass(kw_only=True, eq=False)
class _Place:
    """Where a weight belongs: every module that holds it, and what it is without values."""

    absent: Tensor
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)

    def hold(self, tensor: Tensor) -> None:
        for module, name in self.holders:
            tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            tensors[name] = tensor

    @property
    def held(self) -> Tensor:
        module, name = self.holders[0]
        return getattr(module, name)  # type: ignore[no-any-return]


class Streamed:
    """A model whose weights are read when they are needed; equal to ``load_model``'s, bit for bit.

    Names are those of the model's parameters; a tied one has several, and is read, and dropped, under each.

    Attributes:
        loaded: the model, its tokenizer and its storage dtype. Its parameters are on the meta device until they are
            read, in their dtypes of storage; its buffers are on the CPU, where the caller moves them.
        compute_dtype: what narrower weights are cast up to as they come.
        checkpoint: what is read.
        threads: that read.
    """

    def __init__(self, checkpoint: Checkpoint, loaded: LoadedModel, parts: Sequence[Part[Extent]]) -> None:
        self.loaded, self.checkpoint = loaded, checkpoint
        self.compute_dtype = checkpoint.compute_dtype
        self.threads = THREADS
        model = loaded.model
        self._places: dict[str, _Place] = {}
        of_tensor: dict[int, _Place] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for own, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    place = of_tensor.setdefault(id(tensor), _Place(absent=tensor))
                    place.holders.append((module, own))
                    self._places[f"{path}.{own}" if path else own] = place
        makers: dict[int, Part[Extent]] = {}
        for part in parts:
            for name in part.targets:
                # Of tied weights that the files hold twice either is the weight.
                makers.setdefault(id(self._places[name]), part)
        self._part_of = {name: makers[id(place)] for name, place in self._places.items() if id(place) in makers}
        # The files hold some buffers too: these are small, and there from the start.
        self.fill([name for name, _ in model.named_buffers() if self._places[name].absent.is_meta], _CPU)

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    def nbytes(self, names: Collection[str]) -> int:
        """Return the bytes of these parameters in the compute dtype, tied ones once."""
        places = {id(self._places[name]): self._places[name].absent for name in names}
        return sum(self.nbytes_of(absent) for absent in places.values())

    def nbytes_of(self, absent: Tensor) -> int:
        """Return the bytes that one of the model's parameters takes in the compute dtype, from what stands for it."""
        return absent.numel() * self._dtype(absent).itemsize

    def read_bytes(self, name: str) -> int:
        """Return the bytes of the files that one parameter is made from."""
        return sum(extent.nbytes for _, extent in self._part_of[name].sources)

    def fill(self, names: Collection[str], device: torch.device) -> None:
        """Read these parameters onto a device, and put them into the model; those that are there stay as they are.

        Raises:
            As ``each``.
        """
        for _ in self.each([(names, device)]):
            pass

    def each(
        self, groups: Sequence[tuple[Collection[str], torch.device]], *, ahead: int = 0
    ) -> Iterator[Collection[str]]:
        """Read groups of parameters one after another, and yield the names of each when it is in the model.

        Threads read ahead while the caller has a group. What is in the model when the iterator begins is not read; what
        several groups name is read for each of them, as it may have been dropped.
        On a GPU the current stream waits for what is read; so it has to be the same one throughout.

        Args:
            groups: names, and the device where they go.
            ahead: bytes of later groups, as they lie in the files, that may take memory on their devices meanwhile.
                Without them the threads read ahead into the host's memory, at most 16 MiB each.

        Raises:
            CheckpointError: a file is cut short, or can't be read.
            SpecError: a finite value that became infinite in the 16-bit dtype.
        """
        plan: list[tuple[Collection[str], list[Part[Extent]], torch.device]] = []
        for names, device in groups:
            parts = [self._part_of[n] for n in names if n in self._part_of and self._places[n].held.is_meta]
            plan.append((names, list({id(part): part for part in parts}.values()), device))
        order = [(extent, device) for _, parts, device in plan for part in parts for _, extent in part.sources]
        with Reading(order, ahead=ahead, threads=self.threads) as reading:
            for names, parts, device in plan:
                for part in parts:
                    self._arrive(part, [reading.take() for _ in part.sources], device)
                yield names

    def empty(self, names: Collection[str]) -> None:
        """Drop these parameters: they are on the meta device again."""
        for name in names:
            place = self._places[name]
            if place.absent.is_meta:
                place.hold(place.absent)

    @torch.no_grad()
    def _arrive(self, part: Part[Extent], raw: list[Tensor], device: torch.device) -> None:
        """Put what a part makes into the model. `raw` is given up: its tensors are dropped one by one."""
        dtype = self._places[part.first].absent.dtype
        cast: list[Tensor] = []
        for _, _extent in part.sources:
            values = raw.pop(0)
            narrow = values.to(dtype)
            check_arrived(part.first, values, narrow, name=self.checkpoint.name)
            cast.append(narrow)
            del values, narrow
        for name, values in part.values(cast, self.model).items():
            place = self._places[name]
            if place.absent.shape != values.shape:
                raise CheckpointError(f"{name} has shape {list(values.shape)}, not {list(place.absent.shape)}")
            wide = values.to(device, self._dtype(place.absent))  # in its order of memory: sums follow it
            place.hold(nn.Parameter(wide, requires_grad=False) if isinstance(place.absent, nn.Parameter) else wide)

    def _dtype(self, absent: Tensor) -> torch.dtype:
        is_narrow = absent.is_floating_point() and absent.dtype.itemsize < self.compute_dtype.itemsize
        return self.compute_dtype if is_narrow and isinstance(absent, nn.Parameter) else absent.dtype


def open_streamed(
    path_or_id: str, *, revision: str | None = None, compute_dtype: str, trust_remote_code: bool = False
) -> Streamed:
    """Open a causal language model without reading its weights; arguments and errors as ``load_model``'s.

    Whether a token changes what is predicted before it (``check_causal``) is the caller's to check, once the model can
    run; values beyond the 16-bit dtype's range are found as they come.

    Raises:
        NotStreamableError: it has to be loaded whole, since its files or its weights are of a kind that can't be read
            tensor by tensor.
    """
    found = find_checkpoint(
        path_or_id, revision=revision, compute_dtype=compute_dtype, trust_remote_code=trust_remote_code
    )
    if found.quantized:
        raise NotStreamableError(f"{path_or_id} holds weights that others quantized")
    extents = extents_of(weights_among(found.directory, found.files), found.headers)
    loaded, skeleton = found.read(partial(_build, extents))
    tie_equal(loaded.model, partial(_are_equal, skeleton))
    check_complete(loaded.model, skeleton.info, found.stored, name=path_or_id)
    block_layers(loaded.model)  # a matrix that no cell would quantize is refused before anything is measured
    return Streamed(found, loaded, skeleton.parts)


def _build(extents: Any, auto_class: Any, directory: Path, found: Checkpoint) -> tuple[PreTrainedModel, Skeleton]:
    skeleton = build(auto_class, directory, extents, found.storage_dtype, remote_code=found.remote_code)
    return skeleton.model, skeleton


def _are_equal(skeleton: Skeleton, one: str, other: str) -> bool:
    """Tell whether two parameters have equal values in the files; what has to be converted counts as different."""
    makers = {name: part for part in skeleton.parts for name in part.targets if part.converter is None}
    if one not in makers or other not in makers:
        return False
    (_, a), (_, b) = makers[one].sources[0], makers[other].sources[0]
    if a == b:
        return True
    if a.shape != b.shape or a.stride != b.stride:
        return False
    dtype = skeleton.model.get_parameter(one).dtype
    pieces = [(piece, _CPU) for pair in zip(_in_pieces(a), _in_pieces(b), strict=True) for piece in pair]
    with Reading(pieces) as reading:
        return all(torch.equal(reading.take().to(dtype), reading.take().to(dtype)) for _ in range(len(pieces) // 2))


def _in_pieces(extent: Extent) -> list[Extent]:
    """Cut an extent into flat ones of equal numbers of values."""
    size = extent.dtype.itemsize
    values = extent.nbytes // size
    return [
        Extent(
            file=extent.file,
            start=extent.start + first * size,
            nbytes=(length := min(_COMPARED_AT_ONCE, values - first)) * size,
            dtype=extent.dtype,
            shape=(length,),
            stride=(1,),
        )
        for first in range(0, values, _COMPARED_AT_ONCE)
    ]
