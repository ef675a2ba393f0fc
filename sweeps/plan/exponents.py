"""Say which exponent bits a study's floats have: the paper's main setting is not the one that it recommends."""

from __future__ import annotations

from collections.abc import Iterable

from kbit.data_types import HEURISTIC_EXPONENT_BITS, PAPER_EXPONENT_BITS
from sweeps.study.cell import Cell


def exponent_rows(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    """Return what the plan says of floats, as rows of its table; none where no cell is a float.

    Args:
        cells: of the study.
    """
    found: dict[int, set[int]] = {}
    for cell in dict.fromkeys(cell.quant for cell in cells):
        axes = cell.axis_values()
        if axes.get("dtype") == "float" and isinstance(bits := axes.get("exponent_bits"), int):
            found.setdefault(cell.bits, set()).add(bits)
    if not found:
        return []
    alike: dict[str, list[str]] = {}
    for k in sorted(found):
        alike.setdefault(" and ".join(map(str, sorted(found[k]))), []).append(str(k))
    said = "; ".join(f"{numbers} at {', '.join(bits)} bits" for numbers, bits in alike.items())
    rows = [("float", f"exponent bits {said}")]
    lacks = [k for k in sorted(found) if found[k] == {PAPER_EXPONENT_BITS[k]} != {HEURISTIC_EXPONENT_BITS[k]}]
    if lacks:
        better = ", ".join(f"{HEURISTIC_EXPONENT_BITS[k]} at {k}" for k in lacks)
        main = "that is the paper's main setting (exponent_bits=paper, the default; Appendix A), not what it recommends"
        at = ", ".join(map(str, lacks))
        rows.append(("", f"at {at} bits {main}: exponent_bits=heuristic (Appendix C.4) has {better}"))
    return rows
