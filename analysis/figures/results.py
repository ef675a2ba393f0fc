"""What figures are drawn from, what a study holds fixed in them, and the reason where one can't be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import pandas as pd

from analysis.cells import SIZE, WHOLE_TENSOR, baselines, block_name, measured, plain, points
from analysis.metrics import Metric, ranked_metrics
from analysis.significance.pairs import SampleKey, Samples

SamplesByCell = Mapping[SampleKey, Samples]
"""Per-sample outcomes by (cell key, eval)."""

CUT: Final = 100.0
"""Perplexity beyond which a figure's axis is compressed, as the paper cuts it (Appendix C.5)."""
_FIRST: Final = {"bits": 4, "blocksize": 64, "dtype": "float"}
"""Of settings with as many cells, the paper's is taken."""
HELD: Final = ("bits", "blocksize", "dtype")
"""What ``Results`` can hold fixed."""

T = TypeVar("T")


class NoFigureError(Exception):
    """The data don't allow a figure; the text says why."""


class NotAskedError(NoFigureError):
    """A figure's question is none of the study's."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The data that figures are drawn from, and how.

    Attributes:
        df: a wide result table.
        metrics: those with a value and a known direction, the first headline metric first; at least one. A figure of
            one metric draws the first.
        sweep: the study's name, for the notes under the figures.
        samples: per-sample outcomes, for paired intervals of changes from 16-bit.
        columns: of a page that a figure is as wide as (1: 3.25 inches, 2: 6.75 inches), without its title and notes,
            which belong into the caption; None for the screen.
        cut: perplexity beyond which the axis of losses is compressed; None for an axis that isn't.
        size: what ``total_bits`` counts, as the axis says it.
        bits, blocksize, dtype: what a figure holds fixed (``blocksize`` 0 is the whole tensor, -1 the whole row); None
            takes what most of the study's cells have.
    """

    df: pd.DataFrame
    metrics: list[Metric]
    sweep: str | None
    samples: SamplesByCell | None
    columns: int | None = None
    cut: float | None = CUT
    size: str = SIZE
    bits: int | None = None
    blocksize: int | None = None
    dtype: str | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        df: pd.DataFrame,
        *,
        sweep: str | None = None,
        samples: SamplesByCell | None = None,
        columns: int | None = None,
        cut: float | None = CUT,
    ) -> Results:
        """Results of a table with its headline metrics, of which there may be none."""
        return cls(df=df, metrics=ranked_metrics(df), sweep=sweep, samples=samples, columns=columns, cut=cut)

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    def with_metric(self, metric: Metric) -> Results:
        return replace(self, metrics=[metric])

    def obeying(self, names: Sequence[str]) -> Results:
        """Return the same without what is asked for of ``HELD`` beyond these names."""
        dropped: dict[str, Any] = dict.fromkeys(name for name in HELD if name not in names)
        return replace(self, **dropped)

    def at(self, cells: pd.DataFrame, *names: str) -> pd.DataFrame:
        """Return the cells that have what is asked for of these names of ``HELD``; all where nothing is."""
        for name in names:
            wanted = getattr(self, name)
            cells = cells if wanted is None else cells[cells[name] == wanted]
        return cells

    def kept(self, name: object, make: Callable[[], T]) -> T:
        """Return what ``make`` makes of the table, made once for all figures."""
        if name not in self.cache:
            self.cache[name] = make()
        found: T = self.cache[name]
        return found

    @property
    def rows(self) -> pd.DataFrame:
        """The rows whose numbers count (``cells.measured``)."""
        return self.kept("rows", lambda: measured(self.df))

    @property
    def base(self) -> pd.DataFrame:
        """Points of the 16-bit cells."""
        return self.kept(("base", self.metric.column), lambda: points(baselines(self.rows), self.metric))

    def plain(self, *, every_method: bool = False, free: tuple[str, ...] = ()) -> pd.DataFrame:
        """Points of the plain block-wise cells, or of each method's (``cells.plain``), with the axes that are free."""
        which = (every_method, free)
        rows = self.kept(("plain", which), lambda: plain(self.rows, every_method=every_method, free=free))

        def make() -> pd.DataFrame:
            cells = points(rows, self.metric)
            return cells.merge(rows[["key", *free]], on="key", how="left") if free else cells

        return self.kept(("points", which, self.metric.column), make)


def held(cells: pd.DataFrame, names: Sequence[str], *, over: str, at_least: int = 2) -> pd.DataFrame:
    """Return the cells of the one combination of ``names`` in which most cells can be compared over an axis.

    Args:
        cells: as ``cells.points`` gives them.
        names: columns that a comparison holds fixed.
        over: the column that it varies.
        at_least: values of ``over`` that a model needs to count; where no model has as many, each counts.

    Returns:
        A part of ``cells``; all of them where there are none. Of equal combinations the paper's comes first (4 bits,
        block size 64, float), then the first by value.
    """
    if cells.empty:
        return cells
    distinct = cells.drop_duplicates(["family", "model", over, *names])
    several = distinct.groupby(["family", "model", *names], dropna=False)[over].transform("nunique") >= at_least
    counted = distinct[several] if several.any() else distinct
    counts = counted.groupby(list(names), dropna=False, sort=True).size()

    combinations = [value if isinstance(value, tuple) else (value,) for value in counts.index]

    def rank(i: int) -> tuple[int | bool, ...]:
        papers = [value != _FIRST.get(name, value) for name, value in zip(names, combinations[i], strict=True)]
        return (-int(counts.iloc[i]), *papers)

    chosen = cells
    for name, value in zip(names, combinations[min(range(len(counts)), key=rank)], strict=True):
        chosen = chosen[chosen[name].isna() if pd.isna(value) else chosen[name] == value]
    return chosen


def block_text(blocksize: int) -> str:
    """'block size 64', 'the whole tensor'."""
    return "one block per tensor" if blocksize == WHOLE_TENSOR else f"block size {block_name(blocksize)}"
