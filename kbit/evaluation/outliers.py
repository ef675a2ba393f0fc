"""Outliers of a 16-bit model on a text set: whether the spread of weights foretells large activations, and how many
features are outliers.

**Correlation** (Appendix D, Table 2): of each layer, Spearman's rank correlation over its input dimensions between the
spread of the weights that make them (``kbit.models.outliers.block_spreads``, by which proxy quantization chooses) and
their mean magnitude over all tokens; a metric is the mean over blocks.

**Outlier features** (LLM.int8(), Dettmers et al., 2022, section 4): hidden states are what enters attention's
projections and FFN 1. A dimension is an outlier feature where its magnitude is at least 6.0 in at least 25 % of the
layers and at at least 6 % of the sequence positions. Layers are blocks: one is affected in a window where any of its
hidden states has such a value at any position, and the share is the mean over windows, so that it does not grow with
the text. Positions are counted in each hidden state of each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kbit.errors import ArchitectureError, OrderError
from kbit.evaluation.evaluators import OUTLIER_LAYERS, OUTLIER_POSITIONS
from kbit.evaluation.perplexity import PerplexityEval, prepare_perplexity
from kbit.evaluation.rank_correlation import chance_deviation, spearman
from kbit.evaluation.scoring import base_of
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.evaluation.watching import BlockWatch, Inputs, stored_as, watch_places
from kbit.models.outliers import block_spreads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LISTED: Final = 64
"""Of the dimensions with large values, those at most positions are stored, up to so many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Dimensions of the hidden states, by how much of a model they have large values in.

    Attributes:
        layers, positions: shares of layers and of positions that each dimension affects, float64 [hidden].
        are_outliers: bool [hidden], those that meet the definition.
        low, high: the least and the largest value of each dimension, float64 [hidden].
    """

    layers: NDArray[np.float64]
    positions: NDArray[np.float64]
    are_outliers: NDArray[np.bool_]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class OutliersEval:
    """A text set cut into perplexity's windows, on which a model's inputs of layers are watched."""

    text: PerplexityEval

    @torch.inference_mode()
    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:
        """Metrics as ``kbit.evaluation.evaluators.OUTLIERS`` names them. Their standard errors are over windows; those
        of correlations over blocks.

        Samples: for each pair of ``SPREAD_PAIRS`` that the model has, over its blocks (NaN where a block has none), the
        correlation by mean magnitude 'PAIR', by the largest 'PAIR_largest', the least input 'PAIR_least' (0 after a
        ReLU), float32, and the dimensions 'PAIR_units', int32; of all blocks the correlation over their dimensions at
        once 'PAIR_pooled' [1], and by how much the mean of their correlations scatters by chance 'PAIR_chance' [1].
        Of each block 'block_positions', the share of its positions that outlier features affect. Of up to 64 dimensions
        with large values 'feature_dimension' int32, 'feature_layers', 'feature_positions', and 'feature_low' and
        'feature_high'.

        Raises:
            ArchitectureError: the roles of the model's layers aren't known.
        """
        try:
            return self._measure(model, batch_tokens)
        except OrderError as error:
            name = type(model).__name__
            raise ArchitectureError(
                f"outliers can't be measured: which layer follows which isn't known in {name}: {error.why}"
            ) from error

    def _measure(self, model: PreTrainedModel, batch_tokens: int) -> EvalResult:
        watches = watch_places(model)
        self._pass(model, watches, batch_tokens)
        found = self._features(watches)
        chosen = np.flatnonzero(found.are_outliers)
        reached, passes = _Reached.none(len(self.text.windows), len(watches)), 1
        if len(chosen):
            # Which dimensions they are is known only now: the model runs again, and only they are looked at.
            for watch in watches:
                watch.look_at(chosen)
            self._pass(model, watches, batch_tokens)
            reached, passes = _Reached.of(watches, self.text.windows.shape[1]), 2
        metrics, stderr = _shares(found, reached)
        samples = {**_listed(found), "block_positions": reached.of_blocks.astype(np.float32)}
        for pair, correlated in _correlations(model, watches).items():
            metrics[f"spearman_{pair}"], error = correlated.metric()
            stderr |= {} if error is None else {f"spearman_{pair}": error}
            samples |= correlated.samples(pair)
        return EvalResult(
            metrics=metrics,
            stderr=stderr,
            samples=samples,
            diverged=not bool(np.isfinite(found.low).all() and np.isfinite(found.high).all()),
            n_samples=len(self.text.windows),
            n_tokens=passes * self.text.windows.size,
            dataset_hash=self.text.dataset_hash,
        )

    def _pass(self, model: Any, watches: Sequence[BlockWatch], batch_tokens: int) -> None:
        """Run the model without its head over all windows."""
        base: Any = base_of(model)
        device = model.get_input_embeddings().weight.device
        with _watching(watches):
            for _, ids in self.text.batches(batch_tokens):
                for watch in watches:
                    watch.begin(*ids.shape)
                base(torch.from_numpy(ids).to(device), use_cache=False)
                for watch in watches:
                    watch.end()

    def _features(self, watches: Sequence[BlockWatch]) -> Features:
        windows, length = self.text.windows.shape
        states = [place.inputs() for watch in watches for place in watch.states]
        layers = sum(watch.windows() for watch in watches) / (windows * len(watches))
        positions = sum(watch.positions() for watch in watches) / (windows * length * len(states))
        return Features(
            layers=layers,
            positions=positions,
            are_outliers=(layers >= OUTLIER_LAYERS) & (positions >= OUTLIER_POSITIONS),
            low=np.min([state.low for state in states], axis=0),
            high=np.max([state.high for state in states], axis=0),
        )


def prepare_outliers(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> OutliersEval:
    """Encode a text set and cut it into windows, as perplexity does.

    Raises:
        SpecError, ValueError: as ``kbit.evaluation.perplexity.prepare_perplexity``.
    """
    return OutliersEval(text=prepare_perplexity(spec, tokenizer, context=context, vocab_size=vocab_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reached:
    """What outlier features reach together.

    Attributes:
        layers, positions: float64 [windows], of each window the share of layers and of positions.
        of_blocks: float64 [blocks], of each block the share of positions.
    """

    layers: NDArray[np.float64]
    positions: NDArray[np.float64]
    of_blocks: NDArray[np.float64]

    @classmethod
    def none(cls, windows: int, blocks: int) -> _Reached:
        return cls(layers=np.zeros(windows), positions=np.zeros(windows), of_blocks=np.zeros(blocks))

    @classmethod
    def of(cls, watches: Sequence[BlockWatch], length: int) -> _Reached:
        """Sum up what was seen in windows of ``length`` tokens."""
        each = [watch.reached() for watch in watches]  # of each block, positions by window
        states = np.array([len(watch.states) for watch in watches])
        return cls(
            layers=np.mean([positions > 0 for positions in each], axis=0),
            positions=np.sum(each, axis=0) / (length * states.sum()),
            of_blocks=np.array([positions.mean() for positions in each]) / (length * states),
        )


@contextmanager
def _watching(watches: Sequence[BlockWatch]) -> Iterator[None]:
    with ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.hooked())
        yield


def _shares(found: Features, reached: _Reached) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics of outlier features, and standard errors over windows."""
    metrics, stderr = {"outlier_features": float(found.are_outliers.sum())}, {}
    for name, of_windows in (("outlier_layers", reached.layers), ("outlier_positions", reached.positions)):
        metrics[name], error = _mean(of_windows)
        if error is not None:
            stderr[name] = error
    widest = int(found.positions.argmax())
    metrics["widest_layers"], metrics["widest_positions"] = float(found.layers[widest]), float(found.positions[widest])
    metrics["largest_input"] = float(np.maximum(found.high, -found.low).max())
    return metrics, stderr


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Return a mean, NaN of nothing, and its standard error, where there are several values."""
    if not len(values):
        return math.nan, None
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _listed(found: Features) -> dict[str, NDArray[Any]]:
    """Return the dimensions with large values, those at most positions first, as samples."""
    order = np.argsort(-found.positions, kind="stable")
    chosen = order[found.positions[order] > 0][:LISTED]
    values = {
        "layers": found.layers,
        "positions": found.positions,
        "low": found.low,
        "high": found.high,
    }
    samples = {f"feature_{name}": of_all[chosen].astype(np.float32) for name, of_all in values.items()}
    return {"feature_dimension": chosen.astype(np.int32), **samples}


@dataclass(kw_only=True, eq=False)
class _Correlated:
    """Of one pair of layers, block by block: correlations, and what they are of.

    Attributes:
        mean, largest: correlation with the mean and with the largest magnitude, float64 [blocks]; NaN without the pair.
        least: the least input, float64 [blocks].
        units: input dimensions, int32 [blocks].
        spreads, magnitudes: of all blocks so far.
    """

    mean: NDArray[np.float64]
    largest: NDArray[np.float64]
    least: NDArray[np.float64]
    units: NDArray[np.int32]
    spreads: list[NDArray[np.float64]] = field(default_factory=list)
    magnitudes: list[NDArray[np.float64]] = field(default_factory=list)

    @classmethod
    def none(cls, blocks: int) -> _Correlated:
        mean, largest, least = np.full((3, blocks), np.nan)
        return cls(mean=mean, largest=largest, least=least, units=np.zeros(blocks, dtype=np.int32))

    def add(self, block: int, spread: NDArray[np.float64], inputs: Inputs) -> None:
        self.mean[block], self.largest[block] = spearman(spread, inputs.mean), spearman(spread, inputs.largest)
        self.least[block], self.units[block] = inputs.low.min(), len(spread)
        self.spreads.append(spread)
        self.magnitudes.append(inputs.mean)

    def metric(self) -> tuple[float, float | None]:
        """Return the mean over blocks and its standard error; blocks without a correlation don't count."""
        return _mean(self.mean[~np.isnan(self.mean)])

    def samples(self, pair: str) -> dict[str, NDArray[Any]]:
        pooled = spearman(np.concatenate(self.spreads), np.concatenate(self.magnitudes))
        values = {pair: self.mean, f"{pair}_largest": self.largest, f"{pair}_least": self.least}
        chance = chance_deviation(self.spreads, self.magnitudes)
        values |= {f"{pair}_pooled": np.array([pooled]), f"{pair}_chance": np.array([chance])}
        return {**{name: of.astype(np.float32) for name, of in values.items()}, f"{pair}_units": self.units}


def _correlations(model: Any, watches: Sequence[BlockWatch]) -> dict[str, _Correlated]:
    """Return the correlations of each pair that the model has."""
    found: dict[str, _Correlated] = {}
    entering: Tensor | None = None
    for number, watch in enumerate(watches):
        dtype = stored_as(watch.layers)
        spreads, entering = block_spreads(model, watch.layers, entering, storage_dtype=dtype)
        for place in watch.places:
            spread, inputs = spreads[place.layer.name], place.inputs()
            if spread is None:
                continue
            if len(spread) != len(inputs.mean):
                made = f"has {len(inputs.mean)} inputs, and its predecessor {len(spread)} outputs"
                raise OrderError(model, f"{place.layer.name} {made}")
            of_pair = found.setdefault(place.pair, _Correlated.none(len(watches)))
            of_pair.add(number, spread.cpu().numpy(), inputs)
    return found
