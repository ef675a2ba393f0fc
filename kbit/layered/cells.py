"""The cells of a pass: each quantizes a block from its original weights, after the one before has used it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.errors import LayeredError
from kbit.methods.protocol import Losses, method_of, write
from kbit.models.activations import Activations, BlockArguments
from kbit.models.architectures import Layer
from kbit.models.entering import watching
from kbit.models.originals import Fitted
from kbit.models.outliers import block_spreads, largest_columns
from kbit.models.quantize import BitCount, QuantHandle
from kbit.models.whole import embedding_dtype, parked
from kbit.spec import Spec

_STARTED: Final = torch.empty(0, 0, dtype=torch.int64)
"""What a method that calibrates is given for token windows: they run already, and ``start`` has no use for them."""


@dataclass(kw_only=True, eq=False)
class PassCell:
    """One cell of a pass.

    Attributes:
        key: by which its states are known, also to a later process.
        spec: how it is quantized.
        calls: the forward passes that it is measured by, by their keys (``kbit.layered.hollow.Call``).
        calibration: those of the windows that its method calibrates on, for the original model's states or its own
            (``Spec.calibrates_on``).
        count: of its layers so far; None before the pass.
        error: what ended it; it takes no part any more.
        quantize_seconds: what quantizing took so far, on a GPU without what still runs there.
    """

    key: str
    spec: Spec
    calls: Sequence[str]
    calibration: Sequence[str] = ()
    count: BitCount | None = None
    error: Exception | None = None
    quantize_seconds: float = 0.0

    def handle(self) -> QuantHandle:
        """Return its size, once all blocks are done."""
        assert self.count is not None
        return self.count.handle(self.spec, [])

    def notes(self) -> dict[str, Any]:
        """Return what is counted so far as plain JSON values."""
        assert self.count is not None
        return {
            "shapes": self.count.shapes,
            "stored_bits": self.count.stored_bits,
            "quantized": self.count.quantized,
            "codebooks": base64.b64encode(self.count.codebooks).decode(),
            "code_hashes": base64.b64encode(self.count.code_hashes).decode(),
            "tokens": self.count.tokens,
            "quantize_seconds": self.quantize_seconds,
        }

    def go_on(self, notes: Mapping[str, Any]) -> None:
        """Take what was counted before, as ``notes`` gave it."""
        assert self.count is not None
        self.count.shapes = {name: (int(shape[0]), int(shape[1])) for name, shape in notes["shapes"].items()}
        self.count.stored_bits, self.count.quantized = int(notes["stored_bits"]), int(notes["quantized"])
        self.count.codebooks = bytearray(base64.b64decode(notes["codebooks"]))
        self.count.code_hashes = bytearray(base64.b64decode(notes.get("code_hashes", "")))
        self.count.tokens = {name: int(tokens) for name, tokens in notes.get("tokens", {}).items()}
        self.quantize_seconds = float(notes["quantize_seconds"])


@dataclass(kw_only=True, eq=False)
class Spreads:
    """The spread of what precedes each layer, from block to block, for proxy quantization: once for all cells.

    Attributes:
        model: whose configuration says how layers follow one another.
        wanted: some cell asks for it.
        entering: float64 [hidden], of the last block that was done; on the host.
    """

    model: nn.Module
    wanted: bool
    entering: Tensor | None = None
    _of_block: dict[str, Tensor | None] = field(default_factory=dict)
    _leaving: Tensor | None = None
    _error: Exception | None = None

    def begin(self, layers: Sequence[Layer], storage_dtype: torch.dtype | None) -> None:
        """Look at a block that lies on the device with its original weights."""
        if not self.wanted or not layers or self._error is not None:
            return
        entering = None if self.entering is None else self.entering.to(layers[0].weight.device)
        try:
            self._of_block, self._leaving = block_spreads(self.model, layers, entering, storage_dtype=storage_dtype)
        except Exception as error:  # of those cells that ask for it
            self._error = error

    def columns(self, layers: Sequence[Layer], fraction: float) -> dict[str, Tensor | None]:
        """Return the columns of the block's layers that stay in 16 bits."""
        if self._error is not None:
            raise self._error
        return largest_columns(self._of_block, layers, fraction)

    def end(self) -> None:
        """Leave the block."""
        if self._leaving is not None:
            self.entering, self._leaving = self._leaving.cpu(), None


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldBlock:
    """A block on the device: ``kbit.methods.protocol.Block`` for methods that run it on what enters it, as it is.

    The pass itself hands on what leaves it: a method sees that of a run that it watches.

    Attributes:
        number, layers: see ``kbit.methods.protocol.Block``.
        module: the block.
        entering: what enters it on the cell's calibration windows, batch by batch: the hidden states, which may be
            overwritten, and the other arguments.
    """

    number: int
    layers: tuple[Layer, ...]
    module: nn.Module
    entering: Callable[[], Iterator[tuple[Tensor, BlockArguments]]] = lambda: iter(())

    def run(self, before: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Activations:
        if watch is None:
            return before
        return replace(before, hidden=[parked(out) for out in self.outputs(before, watch=watch)])

    def look(self, before: Activations, watch: Callable[[Layer, Tensor], None]) -> None:
        for _ in self.outputs(before, watch=watch):
            pass

    def outputs(self, _: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Iterator[Tensor]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if watch is not None:
                stack.enter_context(watching(self.layers, watch))
            for states, arguments in self.entering():
                out = self.module(states, *arguments.rest, **arguments.named)
                yield out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPass:
    """A pass over one block (``kbit.methods.protocol.ModelPass``): a method is called once per block.

    Attributes:
        storage_dtype, fitted: see ``kbit.methods.protocol.ModelPass``.
    """

    block: HeldBlock
    storage_dtype: torch.dtype | None
    fitted: Fitted
    spreads: Spreads

    @property
    def module(self) -> nn.Module:
        return self.spreads.model

    @property
    def dtype(self) -> torch.dtype:
        return embedding_dtype(self.module)

    def blocks(self) -> Iterator[HeldBlock]:
        yield self.block

    def start(self, _: Tensor) -> Activations:
        return Activations(hidden=(), arguments=())

    def scoring(self, _: Tensor) -> AbstractContextManager[Losses]:
        raise LayeredError(
            "the method measures losses of the whole model, which is never there where it runs in layers"
        )

    def outlier_columns(self, fraction: float) -> dict[str, Tensor | None]:
        return self.spreads.columns(self.block.layers, fraction)

    @property
    def embedding(self) -> Layer | None:
        raise LayeredError("the method quantizes the embedding, which stays at 16 bits where a model runs in layers")

    @property
    def head(self) -> Layer | None:
        raise LayeredError("the method quantizes the head, which stays at 16 bits where a model runs in layers")

    def outside(self, name: str) -> Layer:
        raise LayeredError(f"the method quantizes {name}, which stays at 16 bits where a model runs in layers")


class BlockWeights:
    """The weights of one block on the device for all cells: the originals, and what a cell computes with.

    The second exist from the first quantized cell on. Each cell overwrites them; what it leaves alone is given back.

    Args:
        layers: the block's, which hold their original weights.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._parameters = {id(layer.parameter): layer.parameter for layer in layers}
        self._originals = {key: p.data for key, p in self._parameters.items()}
        self._changed: dict[str, Layer] = {}
        self.layers = tuple(
            replace(layer, original=self._originals[id(layer.parameter)], reads_original=True) for layer in layers
        )

    def quantize(self, number: int, cell: PassCell, like: BlockPass) -> None:
        """Have the block hold a cell's weights.

        Raises:
            LayeredError: the method can't be had block by block.
            WeightError, ArchitectureError, SpecError: as ``kbit.models.quantize.quantize_model``.
        """
        assert cell.count is not None
        left, self._changed = self._changed, {}
        try:
            if not cell.spec.is_baseline and self.layers:
                self._part()
                if cell.spec.calibrates:  # the block runs as it was before it is quantized
                    self._give_back(left.values())
                held = replace(like, block=replace(like.block, number=number, layers=self.layers))
                for layer, stored in method_of(cell.spec)(held, cell.spec, _STARTED if cell.spec.calibrates else None):
                    cell.count.add(layer, stored)
                    self._changed[layer.name] = layer
                    write(stored, held.module, layer, packed=False)
        finally:
            self._give_back(layer for name, layer in left.items() if name not in self._changed)

    def _give_back(self, layers: Iterable[Layer]) -> None:
        """Have the working weights of layers hold their originals."""
        for layer in layers:
            assert layer.original is not None
            layer.working.copy_(layer.matrix(layer.original))

    def _part(self) -> None:
        """Give the block weights of its own, beside the originals."""
        for key, parameter in self._parameters.items():
            if parameter.data_ptr() == self._originals[key].data_ptr():
                parameter.data = self._originals[key].clone()

    def leave(self) -> None:
        """Give the parameters their originals back."""
        for key, parameter in self._parameters.items():
            parameter.data = self._originals[key]
