"""Ways of running a model by the memory that there is: one rule, for a launch that plans and a worker that loads.

Bytes in, way out. Needs no torch. What a model takes comes from ``kbit.models.sizes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Final

SHARE: Final = 0.9
"""Of a device's memory that is counted on: the rest is the driver's, the kernels' and the allocator's."""
LEAST_BATCH_TOKENS: Final = 2048
"""A batch is halved as far as this, a window, before another way is taken."""
BLOCKS: Final = "three blocks"
"""What takes memory layer by layer, and in no other way."""


class Way(StrEnum):
    """How a model is run."""

    WHOLE = "whole"
    """In its compute dtype on one device; cells are quantized in place."""
    SPREAD = "spread"
    """The same, its blocks over several GPUs."""
    PACKED = "packed"
    """Quantized tensor by tensor as it is read, and held in k bits, on one GPU or several."""
    LAYERED = "layer by layer"
    """A block at a time is read, quantized and applied to all activations, which are kept in between."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes of a model in the form that a cell computes with, and of a batch that goes through it.

    Attributes:
        weights: of the 16-bit model, in its compute dtype.
        packed: of the model with its quantized layers in k bits; None where it can't be held so (the baseline, methods
            that calibrate or whose layers can't be packed, experts).
        originals: of a copy of the weights that cells begin from, where it can lie nowhere else (a CPU's); else 0.
        largest: of the largest tensor, as it is read.
        working: of what a method needs to quantize, beside the model.
        block: of the largest block, in the compute dtype.
        outside: of the largest tensor outside the blocks (embedding or head), in the compute dtype.
        token: of the activations of one token, at the widest place.
        calibrating: tokens that run at once where it calibrates, which memory does not change; 0 where it doesn't.
        token_logits: of the logits of one token.
        logits: of the logits that exist at once, at most.
        layered: it can run layer by layer: what is quantized lies in the blocks.
    """

    weights: int
    packed: int | None
    originals: int = 0
    largest: int
    working: int = 0
    block: int
    outside: int
    token: int
    calibrating: int = 0
    token_logits: int
    logits: int
    layered: bool = True


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way that a model is run.

    Attributes:
        way: the way.
        terms: bytes on the fullest device, by what takes them; the sum is ``needed``.
        batch_tokens: tokens of a batch that fit so.
        devices: GPUs that hold the model; 1 on a CPU.
    """

    way: Way
    terms: Mapping[str, int]
    batch_tokens: int
    devices: int = 1

    @property
    def needed(self) -> int:
        """Bytes on the fullest device."""
        return sum(self.terms.values())


def choose_way(parts: Parts, memory: int | None, *, gpus: int = 1, batch_tokens: int) -> Choice | None:
    """Choose how a model is run: the first way that fits, of whole or spread, packed, layer by layer.

    A batch is halved down to ``LEAST_BATCH_TOKENS`` before the next way is tried. Where the 16-bit model fits, it is
    taken: its numbers are the definition, and a packed model's sums differ in their last bits.

    Args:
        parts: what the model takes.
        memory: bytes of one device, of which ``SHARE`` is filled; None where unknown, which is taken to fit.
        gpus: that the model is spread over; 1 on a CPU.
        batch_tokens: tokens of a batch, where memory allows.

    Returns:
        The choice; None where nothing fits.
    """
    for way in possible_ways(parts, gpus):
        tokens = batch_tokens
        while True:
            terms = needs(parts, way, gpus=gpus, batch_tokens=tokens)
            if memory is None or sum(terms.values()) <= SHARE * memory:
                devices = 1 if way is Way.LAYERED else gpus
                return Choice(way=way, terms=terms, batch_tokens=tokens, devices=devices)
            if tokens // 2 < min(batch_tokens, LEAST_BATCH_TOKENS):
                break
            tokens //= 2
    return None


def needs(parts: Parts, way: Way, *, gpus: int = 1, batch_tokens: int) -> dict[str, int]:
    """Return the bytes that a way takes on the fullest device, by what takes them.

    Over several GPUs a model is cut between blocks, so one may hold up to a block, or an embedding, beyond its share.

    Raises:
        ValueError: packed, of what can't be.
    """
    piece = max(parts.block, parts.outside)
    match way:
        case Way.WHOLE:
            held = {"weights": parts.weights, "originals": parts.originals}
        case Way.SPREAD:
            held = {"weights": ceil(parts.weights / gpus), "uneven cut": piece}
        case Way.PACKED:
            if parts.packed is None:
                raise ValueError("packed=None: these layers can't be held in k bits")
            held = {"packed weights": ceil(parts.packed / gpus), "uneven cut": piece if gpus > 1 else 0}
        case Way.LAYERED:
            # A block as it was read, as a cell has it, and the next one as it comes.
            held = {BLOCKS: 3 * parts.block, "embedding and head": 2 * parts.outside}
    logits = min(parts.logits, batch_tokens * parts.token_logits)
    batch = {"activations": max(batch_tokens, parts.calibrating) * parts.token, "logits": logits}
    return {
        what: count
        for what, count in {**held, "largest tensor": parts.largest, "quantizing": parts.working, **batch}.items()
        if count
    }


def possible_ways(parts: Parts, gpus: int) -> list[Way]:
    """Return the ways that are possible, as they are tried."""
    packed = [] if parts.packed is None else [Way.PACKED]
    return [Way.SPREAD if gpus > 1 else Way.WHOLE, *packed, *([Way.LAYERED] if parts.layered else [])]
