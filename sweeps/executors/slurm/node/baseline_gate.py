"""The baseline gate: a model's quantized cells are worth running only when its 16-bit baseline is what it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sweeps.store.schema import Row


def gate_problem(
    rows: Iterable[Row],
    reference: Mapping[str, float],
    tolerance: float,
    *,
    missing: Sequence[str] = (),
) -> str | None:
    """Return why a baseline doesn't open the gate; None when it does.

    Args:
        rows: the baseline's stored measurements (columns eval, status, metrics).
        reference: expected values by ``{eval}_{metric}``; what is not named is not compared.
        tolerance: relative difference that is allowed.
        missing: what of the baseline should be stored and is not, by name.
    """
    values: dict[str, float] = {}
    for row in rows:
        if row["status"] != "done":
            return f"its baseline is {row['status']} on {row['eval']}"
        values |= {f"{row['eval']}_{metric}": value for metric, value in dict(row["metrics"] or ()).items()}
    if missing:
        return f"its baseline is not measured on {', '.join(missing)}"
    for name, expected in reference.items():
        if name not in values:
            return f"its baseline has no {name}, which its reference names (there are {', '.join(sorted(values))})"
        off = abs(values[name] - expected) / max(abs(expected), 1e-12)
        if not off <= tolerance:
            return f"its baseline's {name} is {values[name]:.6g}, {100 * off:.1f} % off the reference {expected:.6g}"
    return None
