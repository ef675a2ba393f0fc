"""The protocol of methods: they take a pass over a model, and give what is stored of each layer.

A method is a function ``(model_pass, spec, calibration) -> Iterator[(layer, stored)]``. It takes the model's blocks in
forward order and yields each layer with what is stored of it; before the next step of the iterator, the layer has its
quantized weight. So a method that runs a block after its last layer was yielded sees the quantized block, and the next
block's inputs are those of the quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from kbit.doors import load
from kbit.models.activations import Activations
from kbit.models.architectures import Layer
from kbit.models.originals import Fitted
from kbit.spec import Spec

Undo = Callable[[], None]


@contextmanager
def naming(layer: Layer) -> Iterator[None]:
    """Have what is wrong with a layer's weight (ValueError) say which layer it is."""
    try:
        yield
    except ValueError as error:
        error.add_note(f"in layer {layer.name}")
        raise


class Stored(Protocol):
    """What is stored of one layer. How it is held is its spec's to say: it is ``Dense``, ``Packable``, or both."""

    @property
    def nbits(self) -> int:
        """Bits stored for the layer's weight, all overhead counted."""

    @property
    def codebook(self) -> Tensor | None:
        """float32, the values of the codes; None where the format has none."""

    @property
    def shares_codebook(self) -> bool:
        """Whether all layers of the model have this codebook."""


class Dense(Stored, Protocol):
    """What can be put into a model dequantized: of every spec but those with ``replaces_layers``."""

    def put(self, layer: Layer) -> Undo:
        """Give the layer its dequantized weight; returns the way back."""


class Packable(Stored, Protocol):
    """What can be held in k bits: of specs whose ``why_not_packed`` is None."""

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        """Put a module that holds k bits in the layer's place; returns the way back."""


def write(stored: Stored, model: nn.Module, layer: Layer, *, packed: bool) -> Undo:
    """Put what is stored of a layer into its model, in k bits or dequantized: the form that its spec has.

    Returns:
        The way back.
    """
    return cast(Packable, stored).pack(model, layer) if packed else cast(Dense, stored).put(layer)


@runtime_checkable
class HasCodes(Protocol):
    """What a method that calibrates stores of one layer: its codes are hashed, since devices may differ in some."""

    def code_tensors(self) -> tuple[Tensor, ...]:
        """Return the layer's codes, and what says where they belong."""


@runtime_checkable
class HasTokens(Protocol):
    """What a method that looks at a layer's inputs stores of one: experts see few tokens, or none."""

    @property
    def tokens(self) -> int | None:
        """Calibration tokens that reached the layer; None where it wasn't looked at."""


@runtime_checkable
class Allotted(Protocol):
    """What a method that gives each layer bits of its own stores of one."""

    @property
    def bits(self) -> int:
        """Bits of the layer's codes."""

    @property
    def predicted(self) -> float:
        """Nats that the layer's error is predicted to add to the loss."""


class Losses(Protocol):
    """The losses of a model on the same windows again and again, while it computes as in calibration."""

    def __call__(self, number: int = 0, entering: Activations | None = None) -> Tensor:
        """Return the mean loss of each window, its first token not scored: nats, float64 [windows], on the host.

        Args:
            number: the first block to run.
            entering: what enters it; None runs the whole model, as the first call has to.
        """


class Block(Protocol):
    """One transformer block of a pass."""

    @property
    def number(self) -> int:
        """Its place in the model, from 0."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers, in the model's order; empty where none is to be quantized."""

    def run(self, before: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Activations:
        """Run the block, as its layers are now, on kept activations.

        Args:
            before: the hidden states that enter it.
            watch: told the input of each layer, [tokens, in_features], per batch.

        Returns:
            The hidden states that leave it.
        """

    def outputs(self, before: Activations, *, watch: Callable[[Layer, Tensor], None] | None = None) -> Iterator[Tensor]:
        """Run the block as ``run`` does, and yield what leaves it, batch by batch, on the block's device."""

    def look(self, before: Activations, watch: Callable[[Layer, Tensor], None]) -> None:
        """Run the block as ``run`` does, for what its layers get alone: what leaves it is not kept."""


class ModelPass(Protocol):
    """A model as a method sees it: whole in memory (``kbit.models.whole``), or one layer at a time.

    A layer's weight may be read when a method asks for it. In the model's order that costs nothing.
    """

    @property
    def module(self) -> nn.Module:
        """The model itself, whose configuration says what it is; weights are asked of its layers."""

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """The checkpoint's 16-bit dtype; None takes each weight's own, or float16."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in on calibration data."""

    @property
    def fitted(self) -> Fitted:
        """What cells fitted to this model's tensors: a method looks there first, and adds what it fits."""

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in forward order, each once."""

    def start(self, tokens: Tensor) -> Activations:
        """Return what enters the first block for windows of tokens, int64 [windows, length]."""

    def scoring(self, tokens: Tensor) -> AbstractContextManager[Losses]:
        """Have the model compute as in calibration for a while, and score windows, int64 [windows, length]."""

    def outlier_columns(self, fraction: float) -> Mapping[str, Tensor | None]:
        """Return the input dimensions of each layer that stay in 16 bits by proxy quantization (section 3)."""

    @property
    def embedding(self) -> Layer | None:
        """The input embedding as a layer [vocabulary, hidden] that a method may take; None where there is none."""

    @property
    def head(self) -> Layer | None:
        """The output head as a layer that a method may take; None where it is tied to the embedding."""

    def outside(self, name: str) -> Layer:
        """Return a matrix that is no layer of a block, by its module's name, as one that a method may take."""


class Method(Protocol):
    """Quantizes a model."""

    def __call__(self, model: ModelPass, spec: Any, calibration: Tensor | None) -> Iterable[tuple[Layer, Stored]]:
        """Yield what is stored of each layer.

        Args:
            model: the model.
            spec: the method's own.
            calibration: token windows, int64 [samples, length]; None for a method that does not calibrate.
        """


def method_of(spec: Spec) -> Method:
    """Import what runs a spec's method."""
    method: Method = load(spec.runs)
    return method
