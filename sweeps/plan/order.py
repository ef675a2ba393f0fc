"""The order in which cells run: what a study has first when it is stopped early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from sweeps.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sweeps.plan.packs import Pack
    from sweeps.study.cell import Cell


CHEAPEST: Final = "cheapest"
ORDERS: Final[Mapping[str, str]] = {
    CHEAPEST: "baselines first, then the cheapest cells",
    "grid": "as the study writes its models and blocks",
    "longest": "the longest packs first, so that workers finish together",
}
"""The values of ``order=``, and what each means."""


def parse_order(value: object) -> str:
    """Return a checked value of ``order=``.

    Raises:
        UserError: there is no such order.
    """
    if value not in ORDERS:
        known = "; ".join(f"{name}: {meaning}" for name, meaning in ORDERS.items())
        raise UserError(f"order={value!r} is not valid: one of {known}.{did_you_mean(str(value), ORDERS)}")
    return str(value)


def order_cells(cells: Iterable[Cell], seconds: Callable[[Cell], float], order: str) -> list[Cell]:
    """Return the cells of one model in their order.

    Each comparison needs the 16-bit baseline of its model, so that comes first, and packs that have one run first.

    Args:
        cells: in the order of the grid.
        seconds: predicted for a cell.
        order: a key of ``ORDERS``.
    """
    if order != CHEAPEST:
        return list(cells)
    return sorted(cells, key=lambda cell: (not cell.quant.is_baseline, seconds(cell)))


def order_packs(packs: Sequence[Pack], order: str) -> tuple[Pack, ...]:
    """Return packs in their order; those given are in the order of the grid."""
    if order == "longest":
        return tuple(sorted(packs, key=lambda p: -p.seconds))
    if order == CHEAPEST:
        return tuple(sorted(packs, key=lambda p: (not _has_baseline(p), p.seconds / len(p.items))))
    return tuple(packs)


def _has_baseline(pack: Pack) -> bool:
    return any(cell.quant.is_baseline for cell, _ in pack.items)
