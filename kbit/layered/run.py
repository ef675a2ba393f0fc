"""One pass over a model's blocks for all cells: each block is fetched once, and runs once for each cell."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kbit.errors import LayeredError
from kbit.layered.blocks import Blocks
from kbit.layered.cells import BlockPass, BlockWeights, HeldBlock, PassCell, Spreads
from kbit.layered.hollow import Hollow
from kbit.layered.snapshots import Snapshot, Snapshots
from kbit.layered.states import StatePlace, States, disk_room, place_states, temporary_directory
from kbit.memory import is_out_of_memory
from kbit.models.activations import BlockArguments
from kbit.models.architectures import Layer, block_layers, decoder_blocks
from kbit.models.originals import Fitted
from kbit.models.places import Room, host_room
from kbit.models.quantize import BitCount, count_parameters
from kbit.spec import QuantSpec
from kbit.specs.base import BASELINE_BITS

SPARE_OF_GPU: Final = 0.05
"""Of a GPU's memory, which stays free beside what was seen to be needed."""
SNAPSHOT_SHARE: Final = 0.05
"""Snapshots take at most this share of a pass's time."""
SNAPSHOT_SECONDS: Final = 120.0
"""The time between two snapshots, at least."""

ORIGINAL: Final = "original"
"""The key of the 16-bit model's states on calibration windows, which no cell is measured by."""

Between = Callable[[int, int], bool]
"""Told how many blocks are done, of how many, after each; tells whether to stop there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """One forward pass of one cell."""

    cell: PassCell
    call: str

    @property
    def key(self) -> str:
        return f"{self.cell.key}/{self.call}"


@dataclass(kw_only=True, eq=False)
class LayeredPass:
    """A pass over a model for several cells.

    Attributes:
        blocks: of the model.
        hollow: the same model, with what evaluations asked for (``Hollow.record``).
        cells: the cells, with the forward passes that each is measured by.
        storage_dtype: see ``kbit.models.quantize.quantize_model``.
        snapshots: where a pass that is cut goes on; None where nowhere.
        snapshot_seconds: the time between two snapshots, at least.
        host: the memory for states; None is the machine's.
        device_bytes: the GPU's memory that may be used; None is what torch may use.
        failed: told a cell that fails, with ``error``, as soon as it does.
        done: blocks that are done.
        began_at: the block that the pass began at, after earlier ones of a pass that was cut.
        wait_seconds: that it waited for blocks.
        seconds: that it took, with those of the passes that it goes on from.
        states: the cells' hidden states, once the first block ran.
        keep_seconds: that the last snapshot took.
        snapshot_error: why the last snapshot could not be written.
    """

    blocks: Blocks
    hollow: Hollow
    cells: Sequence[PassCell]
    storage_dtype: torch.dtype | None = None
    snapshots: Snapshots | None = None
    snapshot_seconds: float = SNAPSHOT_SECONDS
    host: Room | None = None
    device_bytes: int | None = None
    failed: Callable[[PassCell], None] = lambda _: None
    done: int = 0
    began_at: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0
    states: States | None = None
    keep_seconds: float = 0.0
    snapshot_error: str | None = None
    fitted: Fitted = field(default_factory=dict)
    _units: list[Unit] = field(default_factory=list)
    _original: PassCell | None = None
    _went_on_from: list[Path] = field(default_factory=list)
    _last_snapshot: float = 0.0

    def __post_init__(self) -> None:
        # The baseline first: it needs the block as it was fetched.
        self.cells = sorted(self.cells, key=lambda cell: not cell.spec.is_baseline)
        if on_original := [call for cell in self.cells if _is_on_original(cell) for call in cell.calibration]:
            # Last: cells look at what enters a block of it, which its own run replaces by what leaves.
            self._original = PassCell(key=ORIGINAL, spec=QuantSpec(bits=BASELINE_BITS), calls=on_original)
            self.cells = [*self.cells, self._original]
        for cell in self.cells:
            cell.count = BitCount(parameters=count_parameters(self.blocks.model))
            if cell.spec.why_not_layered is not None:
                cell.error = LayeredError(f"{cell.spec.label!r} can't run layer by layer: {cell.spec.why_not_layered}")
                self.failed(cell)
        self._units = [Unit(cell=cell, call=call) for cell in self.cells if not cell.error for call in _calls_of(cell)]
        self._spreads = Spreads(
            model=self.blocks.model, wanted=any(getattr(cell.spec, "outlier_fraction", 0) for cell in self.cells)
        )

    @property
    def count(self) -> int:
        """Blocks of the model."""
        return len(self._modules)

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return list(decoder_blocks(self.blocks.model)[1])

    @cached_property
    def _layers(self) -> dict[int, list[Layer]]:
        found: dict[int, list[Layer]] = {}
        for layer in block_layers(self.blocks.model):
            found.setdefault(layer.block, []).append(layer)
        return found

    @torch.no_grad()
    def run(self, between: Between) -> bool:
        """Run what is left of the pass; tell whether all blocks are done, or it was stopped.

        Raises:
            NoRoomError: the states fit nowhere.
            torch.OutOfMemoryError: a block and a batch don't fit the GPU.
        """
        self._go_on()
        self._last_snapshot = time.monotonic()
        while self.done < self.count:
            began = time.perf_counter()
            self._run_block(self.done)
            self.done += 1
            self.seconds += time.perf_counter() - began
            stop = between(self.done, self.count)
            self._keep_if_due(stopping=stop)
            if stop and self.done < self.count:
                return False
        return True

    def leaving(self, cell: PassCell) -> Callable[[str], Tensor]:
        """Return what gives the hidden states that left the last block in one of a cell's forward passes, by its key.

        See ``Hollow.playing``.
        """
        numbers = {unit.call: number for number, unit in enumerate(self._units) if unit.cell is cell}

        def give(call: str) -> Tensor:
            assert self.states is not None
            return self.states.take(numbers[call])

        return give

    def seconds_of(self, cell: PassCell) -> float:
        """Return a cell's part of what the pass took, by its tokens: without waiting for blocks, and quantizing."""
        tokens = {id(c): sum(self.hollow.calls[call].tokens for call in _calls_of(c)) for c in self.cells}
        computing = self.seconds - self.wait_seconds - sum(c.quantize_seconds for c in self.cells)
        return max(0.0, computing) * tokens[id(cell)] / max(1, sum(tokens.values()))

    def finish(self) -> None:
        """Remove the snapshots of a pass whose results are stored."""
        if self.snapshots is not None:
            self.snapshots.remove(self._went_on_from)

    def _run_block(self, number: int) -> None:
        asked = time.perf_counter()
        with self.blocks.on_device(number) as module:
            self.wait_seconds += time.perf_counter() - asked
            if number + 1 < self.count:
                self.blocks.ahead(number + 1)
            weights = BlockWeights(self._layers.get(number, []))
            self._spreads.begin(weights.layers, self.storage_dtype)
            like = BlockPass(
                block=HeldBlock(number=number, layers=weights.layers, module=module),
                storage_dtype=self.storage_dtype,
                fitted=self.fitted,
                spreads=self._spreads,
            )
            try:
                current: PassCell | None = None
                for unit_number, unit in enumerate(self._units):
                    if unit.cell is not current:
                        current = unit.cell
                        self._quantize(number, current, weights, like)
                    if current.error is None:
                        self._run_unit(number, unit_number, module)
            finally:
                weights.leave()
            self._spreads.end()
            self.fitted.clear()
            if self.states is not None:
                self.states.settle()

    def _quantize(self, number: int, cell: PassCell, weights: BlockWeights, like: BlockPass) -> None:
        if cell.error is not None:
            return
        began = time.perf_counter()
        try:
            block = replace(like.block, entering=partial(self._entering, number, cell))
            weights.quantize(number, cell, replace(like, block=block))
        except Exception as error:
            if is_out_of_memory(error) or "CUDA error" in str(error):
                raise
            cell.error = error
            self.failed(cell)
        cell.quantize_seconds += time.perf_counter() - began

    def _entering(self, block: int, cell: PassCell) -> Iterator[tuple[Tensor, BlockArguments]]:
        """Yield what enters a block on a cell's calibration windows: copies of the states, and the other arguments."""
        source = self._original if _is_on_original(cell) else cell
        for number, unit in enumerate(self._units):
            if unit.cell is not source or unit.call not in cell.calibration:
                continue
            call = self.hollow.calls[unit.call]
            if block == 0 or self.states is None:
                states = call.entering.to(self.blocks.device, copy=True)
            else:
                states = self.states.take(number).clone()
            yield states, call.arguments[block]

    def _run_unit(self, block: int, number: int, module: nn.Module) -> None:
        unit, states = self._units[number], self.states
        call = self.hollow.calls[unit.call]
        arguments = call.arguments[block]
        if block == 0 or states is None:
            # A copy also on a CPU: a block may write into what it is given.
            entering = call.entering.to(self.blocks.device, copy=True)
        else:
            entering = states.take(number)
            following = next((n for n in range(number + 1, len(self._units)) if not self._units[n].cell.error), None)
            if following is not None:
                states.ahead(following)
        out = module(entering, *arguments.rest, **arguments.named)
        out = out[0] if isinstance(out, tuple) else out
        if states is None:
            states = self._lay_out(out)
        states.give(number, out)

    def _lay_out(self, out: Tensor) -> States:
        """Decide where states are kept, once the first forward pass through a block is seen."""
        shapes = [self.hollow.calls[unit.call].entering.shape for unit in self._units]
        sizes = [shape.numel() * out.dtype.itemsize for shape in shapes]
        places = self._places(sizes)
        self.states = States(shapes, out.dtype, self.blocks.device, places, temporary_directory())
        return self.states

    def _places(self, sizes: Sequence[int]) -> tuple[StatePlace, ...]:
        directory = temporary_directory()
        return place_states(
            sizes,
            device_free=self._device_free(max(sizes)),
            host=self.host or host_room(0),
            disk=disk_room(directory),
            directory=directory,
        )

    def _device_free(self, largest: int) -> int:
        """Return the GPU's bytes for states.

        Beside them stay what was used at most until the first block had run, which includes one batch's states; a
        second form of the block, the next block as it is fetched, its largest layer once more, and states on their way.
        """
        device = self.blocks.device
        if device.type == "cpu":
            return 0
        _, total = torch.cuda.mem_get_info(device)
        total = int(total * torch.cuda.get_per_process_memory_fraction(device))
        total = min(total, self.device_bytes or total)
        layers = [layer for of_block in self._layers.values() for layer in of_block]
        block = max(sum(p.nbytes for p in module.parameters()) for module in self._modules)
        layer = max((layer.working.nbytes for layer in layers), default=0)
        # Of a first block that is smaller than others (dense before experts) little is seen.
        needed = torch.cuda.max_memory_allocated(device) + 2 * block + 2 * layer + 4 * largest
        return max(0, int(total * (1 - SPARE_OF_GPU)) - needed)

    def _keep_if_due(self, *, stopping: bool) -> None:
        """Write a snapshot where the pass stops, or after a while."""
        since = time.monotonic() - self._last_snapshot
        if stopping or since >= max(self.snapshot_seconds, self.keep_seconds / SNAPSHOT_SHARE):
            self.keep()

    def keep(self) -> None:
        """Write a snapshot of the blocks that are done; where that can't be, ``snapshot_error`` says why."""
        if self.snapshots is None or self.states is None:
            return
        began, states = time.monotonic(), self.states
        kept = [number for number, unit in enumerate(self._units) if not unit.cell.error]
        notes = {
            "seconds": self.seconds,
            "cells": {cell.key: cell.notes() for cell in self.cells if not cell.error},
            "spread": _text_of(self._spreads.entering),
        }
        try:
            self.snapshots.write(
                self.done,
                ((self._units[n].key, states.on_host(n)) for n in kept),
                sum(states.nbytes(n) for n in kept),
                notes,
            )
            self.snapshot_error = None
        except OSError as error:
            self.snapshot_error = str(error)
        self._last_snapshot = time.monotonic()
        self.keep_seconds = self._last_snapshot - began

    def _go_on(self) -> None:
        """Take the states of a pass that was cut, where there are any that hold all that is wanted."""
        if self.snapshots is None or self.done:
            return
        for snapshot in self.snapshots.find([unit.key for unit in self._units]):
            try:
                self._take(snapshot)
            except (OSError, ValueError, KeyError, TypeError):
                self.states = None
                continue
            self.done = self.began_at = snapshot.block
            self._went_on_from = [snapshot.file.parent]
            return

    def _take(self, snapshot: Snapshot) -> None:
        notes = snapshot.notes
        for number, unit in enumerate(self._units):
            values = snapshot.read(unit.key)
            if self.states is None:
                shapes = [self.hollow.calls[u.call].entering.shape for u in self._units]
                sizes = [shape.numel() * values.dtype.itemsize for shape in shapes]
                self.states = States(
                    shapes, values.dtype, self.blocks.device, self._places(sizes), temporary_directory()
                )
            self.states.give(
                number, values.to(self.blocks.device) if self.states.places[number] == StatePlace.DEVICE else values
            )
        for cell in self.cells:
            if not cell.error:
                cell.go_on(notes["cells"][cell.key])
        self._spreads.entering = _tensor_of(notes["spread"])
        self.seconds += float(notes["seconds"])


def _is_on_original(cell: PassCell) -> bool:
    """Tell whether a cell calibrates on the original model's states."""
    return cell.spec.calibrates and cell.spec.calibrates_on == "original"


def _calls_of(cell: PassCell) -> list[str]:
    """Return the forward passes that go through a cell's blocks."""
    return list(dict.fromkeys([*cell.calls, *(() if _is_on_original(cell) else cell.calibration)]))


def digest_of(*what: object) -> str:
    """Return the SHA-256 of what decides a pass's states (``Snapshots.of``)."""
    return hashlib.sha256("\n".join(map(repr, what)).encode()).hexdigest()


def _text_of(spread: Tensor | None) -> str | None:
    return None if spread is None else base64.b64encode(spread.numpy().tobytes()).decode()


def _tensor_of(text: Any) -> Tensor | None:
    return None if text is None else torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float64).copy())
