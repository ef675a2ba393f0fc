"""The order in which cells run: what a study has first when it is stopped early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kbit.evaluation.evaluators import EVALUATORS
from sweeps.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from sweeps.plan.pack import Item, Pack


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


def is_baseline(item: Item) -> bool:
    """Tell whether an item of a pack is a 16-bit baseline: not what a method needs first of it, which may take long."""
    cell, evals = item
    return cell.quant.is_baseline and not any(EVALUATORS[spec.kind].of_methods for spec in evals)


def order_items(items: Iterable[Item], seconds: Callable[[Item], float], order: str) -> list[Item]:
    """Return the items of one model in their order.

    Each comparison needs the 16-bit baseline of its model, so that comes first, and packs that have one run first.

    Args:
        items: in the order of the grid.
        seconds: predicted for an item.
        order: a key of ``ORDERS``.
    """
    if order != CHEAPEST:
        return list(items)
    return sorted(items, key=lambda item: (not is_baseline(item), seconds(item)))


def order_packs(packs: Sequence[Pack], order: str) -> tuple[Pack, ...]:
    """Return packs in their order; those given are in the order of the grid."""
    if order == "longest":
        return tuple(sorted(packs, key=lambda p: -p.seconds))
    if order == CHEAPEST:
        return tuple(sorted(packs, key=lambda p: (not _has_baseline(p), p.seconds / len(p.items))))
    return tuple(packs)


def _has_baseline(pack: Pack) -> bool:
    return any(map(is_baseline, pack.items))
