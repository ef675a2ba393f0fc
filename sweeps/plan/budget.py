"""A study's budget in device-hours: how much of a plan is predicted to fit into what is left of it.

A device is a GPU, or a worker on a CPU. Predictions are right within a factor of two, so they only say what to begin:
what stops a study is what it has really spent (sweeps.launches.spending).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sweeps.errors import UserError
from sweeps.plan.cost import load_seconds
from sweeps.plan.pack import Pack
from sweeps.plan.packs import first_items
from sweeps.text import counted

HOUR: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The part of a plan that fits.

    Attributes:
        packs: in the plan's order; the last may be shorter than it was planned.
        allowances: device-seconds that each pack may take, by its id. Together they are all that is left, so that a
            pack may take longer than predicted where there is room.
        seconds: predicted device-seconds.
        beyond: measurements that don't fit.
    """

    packs: tuple[Pack, ...]
    allowances: Mapping[str, float]
    seconds: float
    beyond: int


def parse_budget(value: object) -> float | None:
    """Return device-seconds of a budget in device-hours; None for none.

    Raises:
        UserError: not a positive number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(
            f"budget={value!r} is not valid: GPU-hours (worker-hours on a CPU), more than 0, e.g. budget=12"
        )
    return float(value) * HOUR


def fit(packs: Sequence[Pack], left: float, devices: Callable[[Pack], int], *, start: float = 0.0) -> Fit:
    """Choose, in their order, the cells that are predicted to fit.

    Args:
        packs: the plan's.
        left: device-seconds.
        devices: how many a pack runs on.
        start: seconds that each pack's devices are held before its model is loaded.
    """
    kept: list[Pack] = []
    costs: list[float] = []
    room = left
    for pack in packs:
        count = devices(pack)
        part = first_items(pack, room / count - start - load_seconds(pack.model))
        if part is not None:
            kept.append(part)
            costs.append(count * (start + load_seconds(part.model) + part.seconds))
            room -= costs[-1]
        if part is None or len(part.items) < len(pack.items):
            break
    total = sum(costs)
    wanted = sum(len(p.measurements()) for p in packs)
    return Fit(
        packs=tuple(kept),
        allowances={p.id: left * cost / total for p, cost in zip(kept, costs, strict=True)},
        seconds=total,
        beyond=wanted - sum(len(p.measurements()) for p in kept),
    )


def budget_text(seconds: float, device: str) -> str:
    """Return device-seconds in words: '1.5 GPU-hours', '0.02 worker-hours'."""
    return f"{seconds / HOUR:.3g} {'GPU' if device == 'cuda' else 'worker'}-hours"


def spent_text(budget: float, spent: float, left: int, device: str) -> str:
    """Return what a study says that has reached its budget.

    Args:
        budget: device-seconds.
        spent: device-seconds, as measured.
        left: measurements to do.
        device: 'cpu' or 'cuda'.
    """
    return (
        f"budget={budget / HOUR:g} is spent ({budget_text(spent, device)} measured); "
        f"{counted(left, 'measurement')} left. The same command with a larger budget= goes on."
    )
