"""The evidence of a study: its cells by model and quantization, and the samples of single models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import baselines, measured, numbers, points
from analysis.metrics import ZERO_SHOT_MEAN, ZERO_SHOT_TASKS, Metric, metric_columns, ranked_metrics
from analysis.significance import Margins, SampleKey, Samples
from kbit.axes import VARIED
from kbit.spec import axes
from kbit.specs.base import BASELINE_BITS

Spec = frozenset[tuple[str, object]]
"""A quantization: (axis, value) of what is not neutral, 'method' and 'calibration' among them."""
_ALSO: Final = ("method", "calibration")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measured cell.

    Attributes:
        key, family, model, params: as in a result table.
        unit: what replicates: the model, of whose checkpoints each is the same unit.
        spec: its quantization but for the bits.
        bits: of the codes; 16 of a baseline.
        total_bits: of the whole model, by the paper's count where it is known; NaN where unknown.
        value: of the metric; infinite where the cell diverged without one.
        diverged: on the metric's evaluation.
        stderr: of ``value``, alone.
    """

    key: str
    family: str
    model: str
    params: float
    unit: str
    spec: Spec
    bits: int
    total_bits: float
    value: float
    diverged: bool
    stderr: float

    def axis(self, name: str) -> object:
        """Return an axis's value; None where it is neutral or not the cell's."""
        return dict(self.spec).get(name)

    def without(self, names: Collection[str]) -> Spec:
        """Return the quantization but for some axes."""
        return frozenset(item for item in self.spec if item[0] not in names)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What claims are held against.

    Attributes:
        df: a wide result table.
        samples: per-sample outcomes by (cell key, eval), for models that stand alone.
        margins: what is too small to matter.
    """

    df: pd.DataFrame
    samples: Mapping[SampleKey, Samples] = field(default_factory=dict)
    margins: Margins = field(default_factory=Margins)

    @cached_property
    def rows(self) -> pd.DataFrame:
        found = measured(self.df)
        return found[numbers(found, "bits").notna()] if len(found) else found

    @cached_property
    def metrics(self) -> list[Metric]:
        """What is concluded from: the headline metrics, then the losses of other text sets.

        Without a zero-shot mean the accuracies of single tasks stand for it.
        """
        if not len(self.rows):
            return []
        found = ranked_metrics(self.df)
        single = "loss" if any(m.column == ZERO_SHOT_MEAN for m in found) else "acc"
        known = {m.column for m in found}
        found += [m for m in metric_columns(self.df) if m.metric in ("loss", single) and m.column not in known]
        return [m for m in found if self.margins.of(m) is not None and self.rows[m.column].notna().any()]

    def margin(self, metric: Metric) -> float:
        found = self.margins.of(metric)
        assert found is not None  # of ``metrics``
        return found

    def cells(self, metric: Metric) -> tuple[Cell, ...]:
        """Return the quantized cells with a value."""
        return self._of(metric)[0]

    def baselines(self, metric: Metric) -> Mapping[tuple[str, str], Cell]:
        """Return the 16-bit cells that have a finite value, by (family, model)."""
        return {(c.family, c.model): c for c in self._of(metric)[1] if np.isfinite(c.value)}

    def every_cell(self) -> list[Cell]:
        """Return all measured cells, without a value."""
        nothing = {"params": None, "total_bits": None, "value": None, "stderr": None, "diverged": False}
        names = ("key", "family", "model", "bits")
        rows = self.rows[list(names)].to_dict("records") if len(self.rows) else []
        return [_cell(row | nothing, self._specs, self._units) for row in rows]

    def evals(self, metric: Metric) -> tuple[tuple[str, str], ...]:
        """Return (eval, name in its samples) of what a metric is the mean of."""
        if metric.eval:
            return ((metric.eval, metric.metric),)
        return tuple((task, "acc") for task in ZERO_SHOT_TASKS)

    @cached_property
    def _known(self) -> dict[str, tuple[tuple[Cell, ...], tuple[Cell, ...]]]:
        return {}

    def _of(self, metric: Metric) -> tuple[tuple[Cell, ...], tuple[Cell, ...]]:
        if metric.column not in self._known:
            is_baseline = numbers(self.rows, "bits") == BASELINE_BITS
            specs, units = self._specs, self._units
            both = []
            for rows in (self.rows[~is_baseline], baselines(self.rows)):
                found = points(rows, metric) if len(rows) else rows.iloc[:0]
                both.append(tuple(_cell(row, specs, units) for row in found.to_dict("records")))
            self._known[metric.column] = (both[0], both[1])
        return self._known[metric.column]

    @cached_property
    def _units(self) -> dict[str, str]:
        ids = self.rows["model_id"].astype("string")
        named = self.rows["family"].astype("string") + "/" + self.rows["model"].astype("string")
        return dict(zip(self.rows["key"], ids.where(ids.fillna("") != "", named), strict=True))

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        """Each cell's quantization by its key."""
        neutral = {name: a.neutral for name, a in axes().items() if name != "bits"}
        columns = {name: self.rows[name].tolist() for name in (*neutral, *_ALSO)}
        found: dict[str, Spec] = {}
        for i, key in enumerate(self.rows["key"]):
            items = []
            for name, values in columns.items():
                value = values[i]
                if value is None or value is pd.NA or value != value:
                    continue
                plain = neutral.get(name, VARIED)
                if plain is VARIED or value != plain:
                    items.append((name, float(value) if _is_number(value) else value))
            found[key] = frozenset(items)
        return found


def _cell(row: Mapping[object, object], specs: Mapping[str, Spec], units: Mapping[str, str]) -> Cell:
    key = str(row["key"])
    return Cell(
        key=key,
        family=str(row["family"]),
        model=str(row["model"]),
        params=_number(row["params"]),
        unit=units[key],
        spec=specs[key],
        bits=int(_number(row["bits"])),
        total_bits=_number(row["total_bits"]),
        value=_number(row["value"]),
        diverged=bool(row["diverged"]),
        stderr=_number(row["stderr"]),
    )


def _number(x: object) -> float:
    return np.nan if x is None or x is pd.NA else float(str(x))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)
