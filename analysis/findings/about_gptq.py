"""Claims about one-shot quantization (section 7, Table 1, Figure 5)."""

from __future__ import annotations

from collections import Counter
from typing import Final

from analysis.findings.contrasts import contrast
from analysis.findings.evidence import Cell, Evidence
from analysis.findings.finding import Finding
from analysis.findings.selections import EVERY_AXIS, at, block, families, named, one_exponent, plain, small_and_large
from analysis.findings.testing import Claim, Part, finding
from analysis.metrics import Metric
from kbit.specs.base import ROW

NEEDS_BLOCKING: Final = Claim(
    name="gptq_needs_blocking",
    statement="GPTQ needs blocking: at 3 bits, without, it scales worse than a float with small blocks.",
    source="Section 7, Figure 5",
    run="sweep=fig5_gptq on your models",
)
TWO_BITS: Final = Claim(
    name="gptq_2_bits_beats_float_3",
    statement="2-bit GPTQ with blocks is better than 3-bit float with blocks as large.",
    source="Section 7, Table 1",
    run="sweep=table1_gptq on your models",
)


def gptq_needs_blocking(evidence: Evidence) -> list[Finding]:
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = at(evidence.cells(metric), bits=3)
        rows = _one_kind([c for c in cells if _is_gptq(c) and block(c) == ROW])
        blocked = _one_kind([c for c in cells if _is_gptq(c) and block(c) > 0 and _kind(c) in {_kind(r) for r in rows}])
        floats = one_exponent(at(plain(cells), dtype="float"))
        sizes = small_and_large(floats)
        small = sizes[0] if sizes else min((block(c) for c in floats if block(c) > 0), default=0)
        floats = [c for c in floats if block(c) == small]
        parts = [_better(evidence, metric, f"float with blocks of {named(small)} than GPTQ by rows", (floats, rows))]
        smallest = min((block(c) for c in blocked), default=0)
        of_blocks = [c for c in blocked if block(c) == smallest]
        if of_blocks:
            name = f"GPTQ with blocks of {named(smallest)} than by rows"
            parts.append(_better(evidence, metric, name, (of_blocks, rows)))
        found.append(finding(metric, NEEDS_BLOCKING, parts, scope=_scope(rows), headline=i == 0))
    return found


def gptq_2_bits_beats_float_3(evidence: Evidence) -> list[Finding]:
    """At equal block sizes, the cell's own bits: GPTQ has a bit less."""
    found = []
    for i, metric in enumerate(evidence.metrics):
        cells = evidence.cells(metric)
        twos = _one_kind([c for c in at(cells, bits=2) if _is_gptq(c) and block(c) > 0])
        floats = one_exponent(at(plain(cells), bits=3, dtype="float"))
        parts = []
        for size in sorted({block(c) for c in twos} & {block(c) for c in floats}):
            both = tuple([c for c in kind if block(c) == size] for kind in (twos, floats))
            between = contrast(evidence, metric, *both, ignoring=EVERY_AXIS, at_equal_bits=False)
            margin = evidence.margin(metric)
            parts.append(Part(name=f"blocks of {named(size)}", found=between, kind="better", margin=margin))
        found.append(finding(metric, TWO_BITS, parts, scope=_scope(twos), headline=i == 0))
    return found


def _better(evidence: Evidence, metric: Metric, name: str, both: tuple[list[Cell], list[Cell]]) -> Part:
    between = contrast(evidence, metric, *both, ignoring=EVERY_AXIS)
    return Part(name=name, found=between, kind="better", margin=evidence.margin(metric))


def _is_gptq(c: Cell) -> bool:
    return c.axis("method") == "gptq"


def _kind(c: Cell) -> frozenset[tuple[str, object]]:
    return c.without({"blocksize", "calibration"})


def _one_kind(cells: list[Cell]) -> list[Cell]:
    """Cells of one sort of GPTQ: that of most models and block sizes; of equals asymmetric int, as GPTQ's own."""
    counts = Counter(_kind(c) for c in {(_kind(c), c.family, c.model, block(c)): c for c in cells}.values())
    if not counts:
        return []
    best = max(counts, key=lambda kind: (counts[kind], ("dtype", "int") in kind, ("zero_point", True) in kind))
    return [c for c in cells if _kind(c) == best]


def _scope(cells: list[Cell]) -> str:
    if not cells:
        return "no such cells"
    kind = dict(_kind(cells[0]))
    zero = " with zero points" if kind.get("zero_point") else ""
    return f"{families(cells)}, GPTQ of {kind.get('dtype')}{zero}"
