"""Values of axes as tables show them, and the order in which they stand."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import block_name, numbers
from analysis.tables.choosing import CELL_AXES, OF_CELLS, PROVENANCE
from analysis.tables.observations import SIZES
from kbit.axes import axes_of
from kbit.data_types import DTYPES
from kbit.spec import METHODS, axes
from kbit.specs.base import BASELINE_BITS

PLACES: Final = tuple(dict.fromkeys((*CELL_AXES, *(p for p in PROVENANCE if p not in ("status", "eval_kind")))))
"""What rows and columns of a table can be."""
BASELINE: Final = "16-bit"
_SPARED: Final = (
    *("label", "tokens_seen", "eval_kind", "device", "held", "commit", "dirty", "host", "launch", "seed"),
)
"""Columns that no table has unless they are asked for: reading a column takes a hundredth of a large pivot's time."""
WHOLE: Final = "whole tensor"
NONE: Final = ""
"""An axis that does not apply to a cell."""


def columns_of_pivots(asked: Collection[str], *, sizes: bool) -> tuple[str, ...]:
    """Return the columns of a long result table that a pivot, its choice of rows and its warnings are made of.

    Args:
        asked: axes and columns that are named. With one that can't be one, it is all that there are: errors list them.
        sizes: metrics are named, which may be sizes of cells.
    """
    known = dict.fromkeys((*OF_CELLS, *PROVENANCE, "key", "metrics", "stderr", "higher_is_better", *SIZES))
    # Rows stand in the order of models' parameters.
    spared = _SPARED if sizes else (*_SPARED, *(name for name in SIZES if name != "params"))
    named = set(asked)
    return tuple(name for name in known if name in named or name not in spared or not named <= set(PLACES))


def is_baseline(cells: pd.DataFrame) -> pd.Series[bool]:
    """Tell which cells are 16-bit models."""
    return numbers(cells, "bits") == BASELINE_BITS


def axis_values(cells: pd.DataFrame, name: str) -> pd.Series[str]:
    """Return an axis of cells as a table shows it.

    A float carries its exponent bits ('float e2'); a block size is a number, 'row' or 'whole tensor'; '' is what does
    not apply.

    Args:
        cells: rows of a result table.
        name: of the axis (``PLACES``).

    Returns:
        By row, of type object: text, or the numbers and truth values that the axis has.
    """
    values = cells[name].astype("object").where(cells[name].notna(), NONE)
    if name == "dtype":
        exponents = numbers(cells, "exponent_bits")
        with_exponents = values + exponents.map(lambda e: "" if np.isnan(e) else f" e{e:.0f}")
        return with_exponents.mask(is_baseline(cells), BASELINE)
    if name == "blocksize":
        has_blocks = cells["method"].map({m: "blocksize" in axes_of(METHODS[m]) for m in _methods(cells)}).fillna(False)
        values = values.map(lambda b: block_name(int(b)) if b != NONE and b < 0 else b)
        return values.mask((values == NONE) & has_blocks.astype(bool) & ~is_baseline(cells), WHOLE)
    if name == "calibration":
        return values.map({text: _calibration(text) for text in values.unique()})
    if name in ("key", "weights_hash", "revision", "commit", "dataset", "eval_definition"):
        return values.astype("str").str.slice(0, 19 if name == "dataset" else 12).astype("object")
    declared = axes().get(name)
    named = values.map(declared.name_of) if declared is not None and declared.names else values
    if declared is not None and declared.type == "bool":
        # What a method has no say in and what it leaves out are one.
        return named.map(lambda v: NONE if v is False else v)
    if name == "outlier_fraction" or (declared is not None and declared.neutral == "std"):
        return named.map(lambda v: NONE if v in (0, "std") else v)
    return named


def in_order(values: Sequence[object], name: str, models: Sequence[object]) -> list[object]:
    """Return the values of an axis, each once, in the order in which rows and columns stand.

    Args:
        values: as ``axis_values`` gives them.
        name: of the axis.
        models: names of models in theirs.
    """
    found = list(dict.fromkeys(values))
    ranks = {model: i for i, model in enumerate(models)}

    def place(value: object) -> tuple[float, float, str]:
        if name == "model":
            return ranks.get(value, len(ranks)), 0, str(value)
        if name == "dtype":
            base = str(value).split(" ")[0]
            known = list(DTYPES).index(base) if base in DTYPES else len(DTYPES)
            return (-1 if value == BASELINE else known), 0, str(value)
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            return 1, -float(value) if name == "bits" else float(value), ""
        return (0 if value == NONE else 2), 0, str(value)

    return sorted(found, key=place)


def _methods(cells: pd.DataFrame) -> list[str]:
    return [str(m) for m in cells["method"].dropna().unique() if m in METHODS]


def _calibration(text: object) -> str:
    """Return 'sha256:0a1b2c3d 128x2048' of the JSON that the column has; without the seed, an axis of its own."""
    if not isinstance(text, str) or not text.startswith("{"):
        return NONE
    about = json.loads(text)
    short = str(about.get("dataset", "")).removeprefix("sha256:").removeprefix("hub:")[:12]
    return f"{short} {about.get('samples')}x{about.get('length')}"
