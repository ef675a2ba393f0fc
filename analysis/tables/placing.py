"""Where observations stand in a table: the values of its axes, replicates pooled, what shares a place told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import MEASURED
from analysis.metrics import Metric
from analysis.replicates import SEED, replicate_groups
from analysis.tables.axes import axis_values, in_order, is_baseline
from analysis.tables.choosing import CELL_AXES, OF_CELLS
from analysis.tables.observations import observe

_KEY: Final = "key"
_NEVER_ADDED: Final = ("family", "exponent_bits", "codebook")
"""A model tells its family; a data type carries the others."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What was observed, and where it stands.

    Attributes:
        observed: ``observe``'s rows, with the values of ``by`` and ``columns``.
        by, columns: names of axes.
        notes: what a reader should know.
    """

    observed: pd.DataFrame
    by: tuple[str, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...]


class _Cells:
    """The cells of a table, each once, and the values of their axes in the order in which those stand."""

    def __init__(self, df: pd.DataFrame) -> None:
        own = df.loc[~df["key"].duplicated(), [c for c in (*OF_CELLS, "key", "params") if c in df.columns]]
        self.about = own.reindex(columns=[*own.columns, *(a for a in CELL_AXES if a not in own)]).set_index("key")
        sizes = [name for name in ("family", "params", "model") if name in self.about]
        self.models = list(self.about[sizes].drop_duplicates().sort_values(sizes)["model"].unique())
        self.is_baseline = is_baseline(self.about).to_numpy()
        self._known: dict[str, pd.Categorical[object]] = {}

    def axis(self, name: str, cells: np.ndarray) -> pd.Categorical[object]:
        """Return the values of an axis of cells, by their numbers [rows]."""
        if name not in self._known:
            values = self.about.index.to_series().str[:12] if name == _KEY else axis_values(self.about, name)
            self._known[name] = self.ordered(values, name)
        return self._known[name].take(cells)

    def ordered(self, values: pd.Series[str], name: str) -> pd.Categorical[object]:
        codes, found = pd.factorize(values.astype("object"), use_na_sentinel=False)
        order: list[object] = in_order(list(found), name, self.models)
        places = {value: i for i, value in enumerate(order)}
        mapped = np.array([places[v] for v in found], dtype=np.int64)[codes] if len(found) else codes
        return pd.Categorical.from_codes(mapped, categories=pd.Index(order, dtype="object"))


def place(df: pd.DataFrame, by: tuple[str, ...], columns: tuple[str, ...], metrics: Sequence[Metric]) -> Placed:
    """Observe metrics and give each observation its place.

    Args:
        df: a result table, wide or long.
        by: axes of the rows.
        columns: axes of the columns.
        metrics: of the table.
    """
    cells, names = _Cells(df), (*by, *columns)
    observed = _with_settings(observe(df, metrics), df, names, cells)
    if "eval" in names:
        observed["metric"] = observed["metric"].map({m.column: m.metric for m in metrics})
        observed["eval"] = cells.ordered(observed["eval"], "eval")
    number = cells.about.index.get_indexer(pd.Index(observed["key"]))
    for name in names:
        if name not in observed:
            observed[name] = cells.axis(name, number)
    observed = observed.assign(_cell=number)
    notes: list[str] = []
    if SEED not in names:
        observed, pooled = _pooled(observed, cells.about)
        if pooled:
            what = "replicates (cells that differ in calibration_seed)"
            notes.append(f"{pooled} of the values are means of {what}, ± their standard deviation.")
    added = _added(observed, cells, names)
    for name in added:
        observed[name] = cells.axis(name, observed["_cell"].to_numpy())
    if added:
        these = "these axes were" if len(added) > 1 else "this axis was"
        notes.append(
            f"Cells of one place differ in {', '.join(added)}: {these} added to by=; where= chooses among them."
        )
    observed = _spread_baselines(observed, cells, by, columns)
    return Placed(observed=observed, by=(*by, *added), columns=columns, notes=tuple(notes))


def _with_settings(observed: pd.DataFrame, df: pd.DataFrame, names: Sequence[str], cells: _Cells) -> pd.DataFrame:
    """Add the axes that are of an evaluation rather than of a cell."""
    of_eval = [a for a in names if a not in OF_CELLS and a != "eval"]
    if not of_eval or "eval" not in df.columns:
        return observed
    settings = df[["key", "eval", *of_eval]].drop_duplicates(["key", "eval"])
    observed = observed.merge(settings, on=["key", "eval"], how="left")
    return observed.assign(**{n: cells.ordered(axis_values(observed, n), n) for n in of_eval})


def _pooled(observed: pd.DataFrame, about: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Put replicates into one row: the mean of those that are measured, with their standard deviation; count them."""
    seeded = about[about[SEED].notna()]
    if seeded[SEED].nunique() < 2:
        return observed, 0
    groups = replicate_groups(seeded)
    group = observed["key"].where(~observed["key"].isin(seeded.index), observed["key"].map(groups))
    is_measured = observed["status"].isin(MEASURED)
    rows = observed.assign(_group=group, _first=~is_measured).sort_values("_first", kind="stable")
    is_measured = rows["status"].isin(MEASURED)
    places = [rows["_group"], rows["metric"], rows["eval"]]
    value = rows["value"].where(is_measured)
    several = value.groupby(places).transform("count") > 1
    infinite = np.isinf(value).groupby(places).transform("any")
    diverged = (rows["status"] == "diverged").groupby(places).transform("any")
    pooled = rows.assign(
        value=rows["value"].where(~several, value.groupby(places).transform("mean")),
        stderr=rows["stderr"].where(~several, value.mask(infinite).groupby(places).transform("std")),
        status=rows["status"].mask(several & diverged, "diverged"),
    )
    first = ~pooled.duplicated(["_group", "metric", "eval"])
    kept = pooled[first].drop(columns=["_group", "_first"]).sort_index()
    return kept.reset_index(drop=True), int((several & first).sum())


def _added(observed: pd.DataFrame, cells: _Cells, names: Sequence[str]) -> list[str]:
    """Return the axes, each of them needed, that tell apart cells which would share a place."""
    codes = _codes(observed, [*names, "metric"])
    shared = pd.Series(codes).duplicated(keep=False).to_numpy()
    clashing, codes = observed["_cell"].to_numpy()[shared], codes[shared]
    added: list[str] = []
    candidates = [a for a in CELL_AXES if a not in names and a not in _NEVER_ADDED]
    for name in [*candidates, *([] if "dtype" in names else ["exponent_bits"]), "codebook", "calibration", _KEY]:
        if not len(clashing):
            break
        if name != _KEY and (name not in cells.about or cells.about[name].nunique(dropna=False) < 2):
            continue
        finer = pd.factorize(codes * (len(cells.about) + 1) + cells.axis(name, clashing).codes)[0]
        if finer.max() == pd.factorize(codes)[0].max():
            continue
        added.append(name)
        rest = pd.Series(finer).duplicated(keep=False).to_numpy()
        clashing, codes = clashing[rest], finer[rest]
    return added


def _codes(frame: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Number the combinations of some columns [rows]."""
    codes = np.zeros(len(frame), dtype=np.int64)
    for name in names:
        category = frame[name].astype("category").cat
        codes = pd.factorize(codes * (len(category.categories) + 1) + category.codes.to_numpy())[0]
    return codes


def _spread_baselines(observed: pd.DataFrame, cells: _Cells, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Put 16-bit models into every column, where their row says that they are."""
    spread = [c for c in columns if c != "eval"]
    baseline = cells.is_baseline[observed["_cell"].to_numpy()]
    quantized = observed[~baseline]
    if not spread or "bits" not in by or quantized.empty or not baseline.any():
        return observed
    combinations = quantized[spread].drop_duplicates()
    base = observed[baseline].drop(columns=spread).merge(combinations, how="cross")
    both: pd.DataFrame = pd.concat([base, quantized], ignore_index=True)
    return both
