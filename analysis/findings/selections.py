"""Which cells a claim is about, read from what a study measured."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from analysis.cells import WHOLE_TENSOR, block_name, exponent_order
from analysis.findings.evidence import Cell
from kbit.spec import axes

EVERY_AXIS: Final = frozenset({*axes(), "method", "calibration"})
_VARIED: Final = frozenset({"dtype", "blocksize", "exponent_bits"})
_PAPER_BLOCK: Final = 64
"""Of equally many cells those at the paper's own block size are taken."""


def plain(cells: Iterable[Cell], *, free: Collection[str] = ()) -> list[Cell]:
    """Block-wise cells that have only bits, data type, block size, exponent bits and ``free`` axes."""
    only = frozenset({("method", "blockwise")})
    varied = _VARIED | set(free)
    return [c for c in cells if c.without(varied) == only]


def at(cells: Iterable[Cell], **values: object) -> list[Cell]:
    """Cells with these values; ``bits`` is one of them, and None is what a neutral or missing axis has."""
    return [c for c in cells if all((c.bits if n == "bits" else c.axis(n)) == v for n, v in values.items())]


def main_stratum(cells: Sequence[Cell]) -> tuple[str | None, int | None, list[Cell]]:
    """Return the data type and block size at which most (model, bits) were measured, and their plain cells.

    Of equals float, the paper's, and the block size nearest to its 64. A float has one number of exponent bits at each
    precision.
    """
    own = plain(cells)
    strata: dict[tuple[str, int], set[tuple[str, str, int]]] = defaultdict(set)
    for c in own:
        strata[str(c.axis("dtype")), block(c)].add((c.family, c.model, c.bits))
    if not strata:
        return None, None, []
    dtype, size = max(strata, key=lambda s: (len(strata[s]), s[0] == "float", -_from_paper(s[1])))
    chosen = [c for c in own if str(c.axis("dtype")) == dtype and block(c) == size]
    return dtype, size, one_exponent(chosen)


def main_block(cells: Sequence[Cell]) -> int | None:
    """Return the block size at which most (model, data type, bits) were measured; of equals that nearest to 64."""
    counts = Counter(block(c) for c in cells)
    return max(counts, key=lambda b: (counts[b], -_from_paper(b))) if counts else None


def one_exponent(cells: Iterable[Cell]) -> list[Cell]:
    """Floats with one number of exponent bits at each precision: the one of most models, of equals by
    ``analysis.cells.exponent_order``. Other data types stay.
    """
    cells = list(cells)
    models: dict[tuple[int, float], set[tuple[str, str]]] = defaultdict(set)
    for c in cells:
        if (e := c.axis("exponent_bits")) is not None:
            models[c.bits, float(str(e))].add((c.family, c.model))
    best: dict[int, float] = {}
    for bits in {b for b, _ in models}:
        own = [e for b, e in models if b == bits]
        best[bits] = min(own, key=lambda e: exponent_order(bits, e, len(models[bits, e])))
    return [c for c in cells if c.axis("exponent_bits") is None or c.axis("exponent_bits") == best[c.bits]]


def small_and_large(cells: Sequence[Cell]) -> tuple[int, int] | None:
    """Return the block sizes that stand for small and large: those nearest to the paper's 64 and 1024.

    Small is at most 128 (its recommendation, section 7), large is more; the whole tensor only where no other is.
    """
    sizes = {block(c) for c in cells}
    small = [b for b in sizes if 0 < b <= 128]
    large = [b for b in sizes if b > 128] or [b for b in sizes if b == WHOLE_TENSOR]
    if not small or not large:
        return None
    return min(small, key=_from_paper), min(large, key=lambda b: abs(math.log2(b / 1024)) if b > 0 else 0.0)


def block(c: Cell) -> int:
    """Return a cell's block size as a number (``WHOLE_TENSOR`` where it has none)."""
    size = c.axis("blocksize")
    return WHOLE_TENSOR if size is None else int(float(str(size)))


def named(size: int | None) -> str:
    return "whole tensor" if size is None else block_name(size)


def families(cells: Iterable[Cell]) -> str:
    """'bloom, opt', or how many there are."""
    found = sorted({c.family for c in cells})
    return ", ".join(found) if len(found) <= 6 else f"{len(found)} families"


def _from_paper(size: int) -> float:
    return abs(math.log2(size / _PAPER_BLOCK)) if size > 0 else math.inf
