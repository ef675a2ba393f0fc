"""Which of the paper's figures the data don't allow, why, and the command that would measure what they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pandas as pd

from analysis.figures.entries import Entry
from analysis.figures.paper import PAPER
from analysis.figures.results import Results
from analysis.metrics import ZERO_SHOT_MEAN, ZERO_SHOT_TASKS, Metric, metric_columns

_CONFIGURED: Final = {
    **{name: name for name in ("bloom", "bloomz", "gpt2", "opt", "pythia")},
    "gpt_neox": "gpt_neox",
    "pythia-deduped": "pythia_deduped",
    "pythia_deduped": "pythia_deduped",
}
"""Families that conf/model has, with the names of their files."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure of the paper that can't be drawn.

    Attributes:
        name: of ``FIGURES``.
        paper: its number in the paper.
        title: what it would show.
        reason: why it can't be drawn.
        command: what would measure what it needs, for the families that the table has.
    """

    name: str
    paper: int
    title: str
    reason: str
    command: str


def missing_figures(df: pd.DataFrame, *, results: Results | None = None) -> list[Missing]:
    """List the paper's figures that a table does not allow, by number; nothing is drawn to find out.

    A figure is there if some metric of its kind allows it: accuracies for Figures 1, 2 and 7 to 9, losses for 13 to 15.

    Args:
        df: a wide result table.
        results: the same with bits or block sizes of one's own.
    """
    results = results or Results.of(df)
    found = []
    for name, entry in PAPER.items():
        reason = _reason(entry, results)
        if reason:
            command = f"python launch.py sweep={_for_families(entry.sweep, results)}"
            made = Missing(name=name, paper=entry.paper or 0, title=entry.title, reason=reason, command=command)
            found.append(made)
    return found


def _reason(entry: Entry, results: Results) -> str:
    """Return why no metric of its kind allows a figure; '' where one does."""
    if entry.metrics == "latency":
        return entry.reason(results)
    metrics = _of_kind(entry, results.df)
    if not metrics:
        if entry.metrics == "accuracy":
            return f"no accuracy is measured; it needs {entry.needs}, and the tasks {', '.join(ZERO_SHOT_TASKS)}"
        return f"nothing is measured that it could be of; it needs {entry.needs}"
    first = ""
    for metric in metrics:
        reason = entry.reason(results.with_metric(metric))
        if not reason:
            return ""
        first = first or reason
    return f"{first}; it needs {entry.needs}"


def _of_kind(entry: Entry, df: pd.DataFrame) -> list[Metric]:
    """Return the metrics of an entry's kind that have a value, the zero-shot mean first."""
    found = [m for m in metric_columns(df) if entry.takes(m) and df[m.column].notna().any()]
    return sorted(found, key=lambda m: (m.column != ZERO_SHOT_MEAN, m.metric not in ("loss", "acc")))


def _for_families(sweep: str, results: Results) -> str:
    """Return a study's arguments with the table's families in the place of its own, where conf/model has them."""
    rows = results.rows
    families = sorted({_CONFIGURED[str(f)] for f in rows["family"].dropna().unique() if str(f) in _CONFIGURED})
    words = [w for w in sweep.split(" ") if not w.strip("'").startswith("model=")]
    if families:
        return " ".join([*words, f"'model=[{','.join(families)}]'"])
    if len(rows):
        return " ".join([*words, "'path=[DIR,DIR]'"])
    return sweep
