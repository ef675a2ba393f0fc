"""Results of a cell that come with others: where an evaluation brings another's (``Evaluator.brings``), the model runs
once for both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalResult, EvalSpec
from sweeps.study.cell import canonical_json, eval_to_dict


def bringers_first(evals: Iterable[EvalSpec]) -> list[EvalSpec]:
    """Return evaluations in their order, but those that bring results of others before the rest."""
    return sorted(evals, key=lambda spec: not EVALUATORS[spec.kind].brings)


@dataclass(kw_only=True)
class Brought:
    """The results that came with others in one cell.

    Attributes:
        due: the evaluations that the cell is measured by; what comes for no other is dropped.
    """

    due: Iterable[EvalSpec] = ()
    _results: dict[str, tuple[EvalResult, float]] = field(default_factory=dict)

    def take(self, spec: EvalSpec) -> tuple[EvalResult, float] | None:
        """Return what came for an evaluation, and its seconds; None where it has to run."""
        return self._results.pop(_data(spec.kind, spec), None)

    def keep(self, spec: EvalSpec, result: EvalResult, seconds: float) -> float:
        """Keep what came with a result.

        Args:
            spec: the evaluation that ran.
            result: its result.
            seconds: that it took.

        Returns:
            Its share of the seconds: each measurement that a run gave has an equal part, so that they add up.
        """
        due = {_data(other.kind, other) for other in self.due}
        came = {_data(kind, spec): brought for kind, brought in result.also.items()}
        came = {key: brought for key, brought in came.items() if key in due}
        share = seconds / (1 + len(came))
        self._results |= {key: (brought, share) for key, brought in came.items()}
        return share


def _data(kind: str, spec: EvalSpec) -> str:
    """Return what an evaluation of a kind measures on the data and under the settings of ``spec``."""
    named = {name: value for name, value in eval_to_dict(spec).items() if name not in ("name", "version")}
    return canonical_json({**named, "kind": kind})
