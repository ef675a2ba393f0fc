"""The cells that ``cell=``, ``where=`` and ``status=`` choose, for every mode that works on cells."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sweeps.errors import UserError, did_you_mean
from sweeps.status import State
from sweeps.study.evals import as_list
from sweeps.study.grid import check_axes, matches
from sweeps.text import written

_KEY: Final = re.compile(r"[0-9a-f]{1,64}")
_SHOWN: Final = 12
MORE: Final = ("label", "calibration")
"""What ``where=`` takes beside the axes (``Cell.chosen_by``)."""


def is_key_prefix(text: str) -> bool:
    """Tell whether a text can begin a cell's key."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A cell, or a measurement of one, that may be chosen: its cell's key and axes, and its state."""

    key: str
    axes: Mapping[str, object]
    state: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a user chose; by default everything.

    Attributes:
        cells: first characters of cell keys.
        where: values by axis.
        states: of cells, or of measurements where single measurements are chosen from.
    """

    cells: tuple[str, ...] = ()
    where: Mapping[str, object] = field(default_factory=dict)
    states: frozenset[State] = frozenset()

    @classmethod
    def parse(cls, cells: Collection[str], where: object, status: object) -> Choice:
        """Check what the keys say.

        Args:
            cells: what ``cell=`` lists, as it was written.
            where: mapping of axes, or None.
            status: a state or a list of them, or None.

        Raises:
            UserError: names the key, its value, and what is allowed.
        """
        for prefix in cells:
            if not is_key_prefix(prefix):
                raise UserError(
                    f"cell={prefix!r} is not valid: the first characters of a cell's key, which has the digits 0-9 and "
                    "a-f, e.g. cell=3fa9. The column 'key' of mode=table has the keys"
                )
        if where is not None and not isinstance(where, Mapping):
            raise UserError(f"where={where!r} is not valid: axis values, e.g. 'where={{bits: 3, dtype: int}}'")
        check_axes(where or {}, "where", MORE)
        states = [str(s) for s in as_list(status, "status")]
        for state in states:
            if state not in list(State):
                raise UserError(
                    f"status={state!r} is not valid: a state, or a list of {', '.join(State)}, e.g. "
                    f"'status=[failed,oom]'.{did_you_mean(state, State)}"
                )
        return cls(cells=tuple(cells), where=where or {}, states=frozenset(map(State, states)))

    def without_states(self) -> Choice:
        """Return the choice by what never changes."""
        return replace(self, states=frozenset())

    def __bool__(self) -> bool:
        return bool(self.cells or self.where or self.states)

    def __str__(self) -> str:
        """Return the keys, as users write them."""
        given = {"cell": self.cells, "where": self.where, "status": [s.value for s in State if s in self.states]}
        return " ".join(f"{key}={written(value)}" for key, value in given.items() if value)

    def of(self, candidates: Iterable[Candidate]) -> list[bool]:
        """Tell which candidates are chosen.

        Raises:
            UserError: none is; says which of the keys no candidate fits, and what there is.
        """
        known = list(candidates)
        chosen = [self._takes(c) for c in known]
        if self and not any(chosen):
            raise UserError(self._why_none(known))
        return chosen

    def _takes(self, c: Candidate) -> bool:
        return (
            (not self.cells or c.key.startswith(self.cells))
            and (not self.where or _fits(c.axes, self.where))
            and (not self.states or c.state in self.states)
        )

    def _why_none(self, known: Sequence[Candidate]) -> str:
        for prefix in self.cells:
            if not any(c.key.startswith(prefix) for c in known):
                keys = ", ".join(dict.fromkeys(c.key[:8] for c in known[:3]))
                return (
                    f"cell={prefix} matches none of the {len({c.key for c in known})} cells (keys such as {keys}): "
                    "the column 'key' of mode=table has them all"
                )
        for axis, value in self.where.items():
            if not any(_fits(c.axes, {axis: value}) for c in known):
                values = list(dict.fromkeys(written(c.axes.get(axis)) for c in known))
                more = f", and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
                return (
                    f"where={{{axis}: {written(value)}}} matches no cell: {axis} is one of "
                    f"{', '.join(sorted(values[:_SHOWN]))}{more} there"
                )
        found = {s.value: n for s in State if (n := sum(c.state == s for c in known))}
        states = ", ".join(f"{n} {state}" for state, n in found.items())
        several = sum(map(bool, (self.cells, self.where, self.states))) > 1
        rest = ": each key matches some, but none matches all of them" if several else ""
        return f"{self} matches no cell{rest}. States there: {states}"


def _fits(axes: Mapping[str, object], where: Mapping[str, object]) -> bool:
    """Tell whether a cell has all values; a calibration also goes by its first words: 'jargon', 'jargon 128x512'."""
    plain = {name: value for name, value in where.items() if name != "calibration"}
    if not matches(axes, plain):
        return False
    if "calibration" not in where:
        return True
    wanted, words = where["calibration"], axes.get("calibration")
    listed = wanted if isinstance(wanted, list | tuple) else [wanted]
    return any(value is words is None or f"{words} ".startswith(f"{value} ") for value in listed)
