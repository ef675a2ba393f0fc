"""Watch what enters the layers of each block while a model runs: magnitudes by dimension, and where they are large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kbit.errors import ArchitectureError, OrderError
from kbit.evaluation.evaluators import OUTLIER_MAGNITUDE
from kbit.models.architectures import Layer, block_layers, has_parallel_residual
from kbit.models.roles import ATTENTION_OUT, FFN_1, FFN_2, FFN_FUSED, QKV, QUERY, block_roles
from kbit.quantizer.storage import STORAGE_DTYPES

_FOLLOWS: Final = {ATTENTION_OUT: "value_output", FFN_2: "ffn1_ffn2", QKV: "ffn2_qkv"}
"""Role of a layer to the pair (``kbit.evaluation.evaluators.SPREAD_PAIRS``) that it closes in every architecture."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What entered a layer, by input dimension: float64 [in_features].

    Attributes:
        mean: mean magnitude over tokens.
        low, high: the least and the largest value.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def largest(self) -> NDArray[np.float64]:
        """The largest magnitude."""
        return np.maximum(self.high, -self.low)


@dataclass(kw_only=True, eq=False)
class Place:
    """A layer whose inputs are watched.

    Attributes:
        layer: the layer.
        pair: of ``kbit.evaluation.evaluators.SPREAD_PAIRS``, the one that it closes.
        is_state: its inputs are a hidden state in which outlier features are looked for.
    """

    layer: Layer
    pair: str
    is_state: bool
    _total: Tensor | None = None
    _low: Tensor | None = None
    _high: Tensor | None = None
    _tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs [tokens, in_features]; sums are in float64, where the model computes."""
        total, low, high = x.abs().sum(0, dtype=torch.float64), x.amin(0), x.amax(0)
        if self._total is not None and self._low is not None and self._high is not None:
            total, low, high = total + self._total, torch.minimum(low, self._low), torch.maximum(high, self._high)
        self._total, self._low, self._high = total, low, high
        self._tokens += len(x)

    def inputs(self) -> Inputs:
        """Return what was taken in.

        Raises:
            ArchitectureError: nothing was: the model does not use the layer as a module.
        """
        if self._total is None or self._low is None or self._high is None:
            raise ArchitectureError(f"outliers can't be measured: {self.layer.name} never ran")
        mean, low, high = (t.double().cpu().numpy() for t in (self._total / self._tokens, self._low, self._high))
        return Inputs(mean=mean, low=low, high=high)


@dataclass(kw_only=True, eq=False)
class BlockWatch:
    """Watches one block, batch by batch: ``begin``, a forward pass under ``hooked``, ``end``.

    Attributes:
        layers: the block's.
        places: where it watches; at least one is a hidden state.
    """

    layers: Sequence[Layer]
    places: Sequence[Place]
    _shape: tuple[int, int] = (0, 0)
    _chosen: Tensor | None = None
    _positions: Tensor | None = None
    _windows: Tensor | None = None
    _large: Tensor | None = None
    _reached: list[Tensor] = field(default_factory=list)

    @property
    def states(self) -> list[Place]:
        return [place for place in self.places if place.is_state]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """See what enters the layers for a while."""
        with ExitStack() as stack:
            for place in self.places:
                hook = place.layer.module.register_forward_pre_hook(self._hook(place))
                stack.callback(hook.remove)
            yield

    def begin(self, windows: int, length: int) -> None:
        """Say what the next forward pass is given."""
        self._shape, self._large = (windows, length), None

    def end(self) -> None:
        """Take in what the last forward pass showed."""
        if self._large is None:
            return
        if self._chosen is not None:
            self._reached.append(self._large)
        else:
            affected = self._large.sum(0)
            self._windows = affected if self._windows is None else self._windows + affected

    def look_at(self, dimensions: NDArray[np.intp]) -> None:
        """From here on look only for windows and positions that these dimensions affect (``reached``)."""
        self._chosen, self._reached = torch.from_numpy(dimensions), []

    def positions(self) -> NDArray[np.int64]:
        """Return at how many positions, of all hidden states, each dimension is large: int64 [hidden]."""
        return self._counted(self._positions)

    def windows(self) -> NDArray[np.int64]:
        """Return in how many windows each dimension is large somewhere in the block: int64 [hidden]."""
        return self._counted(self._windows)

    def reached(self) -> NDArray[np.int64]:
        """Return at how many positions, of all hidden states, some dimension looked at is large: int64 [windows]."""
        return torch.cat(self._reached).cpu().numpy()

    def _counted(self, count: Tensor | None) -> NDArray[np.int64]:
        if count is None:
            raise ArchitectureError(f"outliers can't be measured: {self.states[0].layer.name} never ran")
        return count.cpu().numpy()

    def _hook(self, place: Place) -> Any:
        def see(_: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0].detach()
            windows, length = self._shape
            if x.numel() != windows * length * x.shape[-1]:
                raise ArchitectureError(
                    f"outliers can't be measured: {place.layer.name} is given {tuple(x.shape)}, not every token of "
                    f"{windows} windows of {length} tokens"
                )
            if self._chosen is None:
                place.add(x.reshape(-1, x.shape[-1]))
            if place.is_state:
                self._look(x.reshape(windows, length, -1))

        return see

    def _look(self, state: Tensor) -> None:
        """Look for large values in a hidden state [windows, length, hidden]."""
        if self._chosen is not None:
            large = state[..., self._chosen.to(state.device)].abs() >= OUTLIER_MAGNITUDE
            reached = large.any(-1).sum(1)
            self._large = reached if self._large is None else self._large + reached
            return
        large = state.abs() >= OUTLIER_MAGNITUDE
        in_window, positions = large.any(1), large.sum((0, 1))
        self._large = in_window if self._large is None else self._large | in_window
        self._positions = positions if self._positions is None else self._positions + positions


def watch_places(model: nn.Module) -> list[BlockWatch]:
    """Return what watches each block of a model, in order.

    Watched is what enters QKV (once for Q, K and V), the attention output, FFN 1 (once with its gate, and once for all
    experts) and FFN 2. What enters the FFN 2 of a mixture's experts isn't: it is seen by no module. All but the last
    are hidden states, unless they are not as wide as the first: with some grouped queries the attention output's.

    Raises:
        OrderError: the roles of the layers aren't known.
    """
    by_block: dict[int, list[Layer]] = {}
    for layer in block_layers(model):
        by_block.setdefault(layer.block, []).append(layer)
    return [_watch(model, by_block[number]) for number in sorted(by_block)]


def stored_as(layers: Sequence[Layer]) -> torch.dtype:
    """Return the 16-bit dtype that the weights of layers were read in, whatever the model computes in.

    Values that bfloat16 holds exactly came in it: of float16's few matrices have only such.
    """
    weight = layers[0].weight
    if weight.dtype in STORAGE_DTYPES:
        return weight.dtype
    exact = torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)
    return torch.bfloat16 if exact else torch.float16


def _watch(model: nn.Module, layers: Sequence[Layer]) -> BlockWatch:
    try:
        roles = block_roles(layers)
    except ArchitectureError as error:
        raise OrderError(model, str(error)) from error
    attention, feed_forward = roles.attention, roles.feed_forwards[0]
    first = attention[QKV if QKV in attention else QUERY]
    hidden = first.shape[1]
    ffn_1 = feed_forward[FFN_FUSED if FFN_FUSED in feed_forward else FFN_1]
    found = [
        (_FOLLOWS[QKV], first, True),
        (_FOLLOWS[ATTENTION_OUT], attention[ATTENTION_OUT], attention[ATTENTION_OUT].shape[1] == hidden),
        ("ffn2_ffn1" if has_parallel_residual(model) else "output_ffn1", ffn_1, True),
    ]
    if len(roles.feed_forwards) == 1 and feed_forward[FFN_2].stack is None:
        found.append((_FOLLOWS[FFN_2], feed_forward[FFN_2], False))
    places = [Place(layer=layer, pair=pair, is_state=is_state) for pair, layer, is_state in found]
    return BlockWatch(layers=tuple(layers), places=places)
