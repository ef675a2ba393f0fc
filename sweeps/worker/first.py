"""What cells need first of their 16-bit models (``sweeps.study.cell.Cell.first``), as a worker knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kbit.errors import ActivationError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import SLOPES, EvalResult
from sweeps.store.first import stored_slopes
from sweeps.store.parts import Store
from sweeps.study.cell import Cell, Measurement


@dataclass(kw_only=True)
class KnownFirst:
    """Tables of slopes by measurement, or why one can't be had; also of models that are not loaded any more."""

    _known: dict[str, Sequence[float] | Exception] = field(default_factory=dict)

    def has(self, cell: Cell, store: Store) -> bool:
        """Tell whether what a cell needs first is known, or why it can't be: from the store, where it is there."""
        if cell.first is None or cell.first.key in self._known:
            return True
        stored = stored_slopes(store, cell)
        if stored is not None:
            self._known[cell.first.key] = stored
        return stored is not None

    def keep(self, measurement: Measurement, outcome: EvalResult | Exception) -> None:
        """Take in what a measurement gave, if it is one of these."""
        if EVALUATORS[measurement.eval.kind].of_methods:
            known = outcome.samples[SLOPES].tolist() if isinstance(outcome, EvalResult) else outcome
            self._known[measurement.key] = known

    def slopes(self, cell: Cell) -> Sequence[float] | None:
        """Return the slopes of the loss that a cell's method needs; None of other methods.

        Raises:
            ActivationError: they couldn't be measured.
        """
        known = None if cell.first is None else self._known.get(cell.first.key)
        if isinstance(known, Exception):
            raise ActivationError(
                f"it needs the table of sensitivity of {cell.model.label}, which could not be measured: "
                f"{type(known).__name__}: {known}"
            ) from known
        return known
