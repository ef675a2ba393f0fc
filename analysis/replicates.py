"""Group replicates: cells that differ in nothing but the seed of what is random, the draw of calibration data.

Their mean is the cell's value, and their standard deviation its error bar: it says how much another draw would change,
which the standard error of one cell's own evaluation does not.
"""

from __future__ import annotations

import json
from typing import Final

import numpy as np
import pandas as pd

from kbit.spec import axes

SEED: Final = "calibration_seed"
_MODEL: Final = ("family", "model", "model_id", "revision", "weights_hash", "checkpoint")


def replicate_groups(df: pd.DataFrame) -> pd.Series[str]:
    """Return one text by row, equal for replicates: model, method, its axes, and the calibration but for its seed.

    Args:
        df: a wide result table. Columns that it lacks count as missing.
    """
    names = [n for n in (*_MODEL, "method", *axes()) if n in df.columns]
    groups = df[names].astype("string").fillna("").agg("|".join, axis=1)
    if "calibration" in df.columns:
        groups = groups + "|" + df["calibration"].map(_without_seed)
    return groups


def pool(cells: pd.DataFrame, groups: pd.Series[str]) -> pd.DataFrame:
    """Put each group of replicates into one row.

    Args:
        cells: as ``cells.points`` gives them.
        groups: of the table that they are from, by cell key.

    Returns:
        The same columns and 'replicates' (int64). Of several: ``value`` is their mean, ``stderr`` their standard
        deviation (n - 1; NaN where one diverged without a value), ``diverged`` whether any did, ``key`` the first's.
    """
    of_cell = cells["key"].map(groups)
    several = cells.groupby(of_cell, sort=False)
    pooled = cells[~of_cell.duplicated()].copy()
    position = of_cell[~of_cell.duplicated()]
    count = position.map(several.size())
    finite = cells["value"].replace([np.inf, -np.inf], np.nan)
    of_group = finite.groupby(of_cell).agg(lambda values: values.std(ddof=1, skipna=False))
    spread = position.map(of_group).astype("float64")
    pooled["replicates"] = count.astype("int64")
    pooled["value"] = position.map(several["value"].mean()).astype("float64")
    pooled["stderr"] = spread.where(count > 1, pooled["stderr"])
    pooled["diverged"] = position.map(several["diverged"].any()).astype(bool)
    return pooled


def pooled(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``pool`` cells by the replicates of the table that they are from, a wide one with a row per key."""
    return pool(cells, replicate_groups(rows).set_axis(rows["key"]))


def _without_seed(calibration: object) -> str:
    if not isinstance(calibration, str):
        return ""
    return json.dumps(
        {name: value for name, value in json.loads(calibration).items() if name != "seed"}, sort_keys=True
    )
