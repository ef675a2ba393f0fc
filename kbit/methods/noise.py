"""How much the loss rises with the error of each layer's weight: measured by Gaussian noise in one layer at a time.

The linear model of Malinovskii et al. 2025 (arXiv 2411.17525, section 3): the loss rises by the sum over layers of
alpha t^2, with t the relative error of a layer's weight.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from kbit.errors import ActivationError
from kbit.methods.protocol import ModelPass
from kbit.models.architectures import Layer, block_layers, decoder_blocks
from kbit.spec import QuantSpec, Spec
from kbit.specs.base import BASELINE_BITS

LEVELS: Final = (0.05, 0.1, 0.2)
"""Norms of the noise, in norms of the weight: about what 5, 4 and 3 bits do to it."""
SEEDS: Final = (0, 1)
_MOST_SEEDS: Final = 1024
_QUIET_SECONDS: Final = 2.0
_BETWEEN_SECONDS: Final = 10.0


_ANY: Final = QuantSpec(bits=BASELINE_BITS)


def known_slopes(model: ModelPass, tokens: Tensor) -> list[float]:
    """Return ``loss_slopes`` by layer: those that ``keep_slopes`` was given, else measured now and kept."""
    key = _key(model, tokens)
    if key not in model.fitted:
        keep_slopes(model, tokens, list(loss_slopes(model, tokens).values()))
    return [float(slope) for slope in model.fitted[key]]


def keep_slopes(model: ModelPass, tokens: Tensor, slopes: Sequence[float]) -> None:
    """Have a model's slopes on windows be known.

    Args:
        model: the pass that ``known_slopes`` will be asked with, or one that shares what is fitted.
        tokens: the windows.
        slopes: of each layer, in the model's order.
    """
    rounded = [float(f"{slope:.2e}") for slope in slopes]  # float32 holds the 3 digits, not their number
    model.fitted[_key(model, tokens)] = torch.tensor(rounded, dtype=torch.float64)


def noise_passes(module: nn.Module) -> float:
    """Return how many passes over the windows ``loss_slopes`` takes: those of a layer begin at its block."""
    layers = Counter(layer.block for layer in block_layers(module))
    count = len(decoder_blocks(module)[1])
    each = len(SEEDS) * len(LEVELS)
    return 2 + sum(each * layers[block] * (count - block) / count for block in range(count))


def _key(model: ModelPass, tokens: Tensor) -> tuple[str, Spec, torch.dtype | None]:
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()
    return f"loss slopes {digest} {tuple(tokens.shape)} {model.dtype}", _ANY, model.storage_dtype


def loss_slopes(model: ModelPass, tokens: Tensor) -> dict[str, float]:
    """Return alpha of each layer, by its name, in the model's order: nats per squared relative error of its weight.

    It is the least-squares slope, through the origin, of the change of the mean loss over t^2, for each of ``LEVELS``
    with each of ``SEEDS``, rounded to 3 significant digits. The other layers have their 16-bit weights. Noise is drawn
    on the host, the same on every device.

    Args:
        model: a pass that scores windows.
        tokens: windows, int64 [windows, length].

    Raises:
        ActivationError: a loss is not finite.
    """
    slopes: dict[str, float] = {}
    say = _Progress()
    with model.scoring(tokens) as losses:
        before = _mean(losses(), "the 16-bit model")
        kept = model.start(tokens)
        for block in model.blocks():
            for layer in block.layers:

                def change(number: int = block.number, name: str = layer.name) -> float:
                    return _mean(losses(number, kept), f"noise in {name}") - before  # noqa: B023  # called at once

                slopes[layer.name] = float(f"{_slope(layer, len(slopes), change):.2e}")
                say(f"noise in layer {len(slopes)}, {layer.name}")
            kept = block.run(kept)
    return slopes


def noise_of(shape: tuple[int, int], norm: float, number: int, seed: int) -> Tensor:
    """Return Gaussian noise for the layer of a number with a seed: float32 on the host, of this Frobenius norm."""
    # torch's generator on a CPU takes the lower 32 bits of a seed.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(number * _MOST_SEEDS + seed))
    return noise.mul_(norm / max(float(noise.double().norm()), math.ulp(0.0)))


def _slope(layer: Layer, number: int, change: Callable[[], float]) -> float:
    """Return the slope of one layer; 0 where its weight is."""
    with other_weight(layer):
        weight = layer.working.to(torch.float32, copy=True)
        norm = float(weight.double().norm())
        if not norm:
            return 0.0
        rises = 0.0
        for seed in SEEDS:
            noise = noise_of(layer.shape, norm, number, seed).to(weight.device)
            for level in LEVELS:
                layer.working.copy_(torch.add(weight, noise, alpha=level))
                rises += level**2 * change()
    return rises / (len(SEEDS) * math.fsum(level**4 for level in LEVELS))


@contextmanager
def other_weight(layer: Layer) -> Iterator[None]:
    """Let a layer compute with a copy of its weight for a while, on its device: its own memory is not written."""
    own = layer.parameter.data
    layer.parameter.data = own.clone()
    try:
        yield
    finally:
        layer.parameter.data = own


def _mean(losses: Tensor, of: str) -> float:
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise ActivationError(
            f"the loss of {of} on calibration data is {mean}: compute in a dtype of wider range "
            "(calibration.compute_dtype=bfloat16 or float32)"
        )
    return mean


class _Progress:
    """Says on stderr how far it is, where it takes long."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _QUIET_SECONDS

    def __call__(self, what: str) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _BETWEEN_SECONDS
            print(f"mixed: {what}", file=sys.stderr, flush=True)
