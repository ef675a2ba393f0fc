"""Choose rows of a result table by the values of its columns: axes, evaluations, provenance."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

import pandas as pd

from analysis.metrics import ZERO_SHOT_MEAN, ZERO_SHOT_TASKS, metric_columns
from analysis.mixtures import MIXED, mixed, versions_of
from kbit.axes import Axis
from kbit.errors import SpecError
from kbit.spec import axes

CELL_AXES: Final = ("family", "model", "checkpoint", "method", *axes(), "calibration_seed")
"""What ``where=`` chooses cells by in every mode."""
OF_CELLS: Final = (
    *CELL_AXES,
    *("label", "model_id", "revision", "weights_hash", "tokens_seen", "calibration", "sweep"),
)
"""Columns that all measurements of a cell share."""
PROVENANCE: Final = (
    *("eval", "eval_kind", "eval_version", "num_fewshot", "window", "limit", "dataset", "compute_dtype"),
    *("eval_device", "eval_bos", "eval_attention", "eval_execution", "eval_definition"),
    *("model_id", "revision", "weights_hash", "kernel", "versions", "device", "held", "commit", "dirty", "host"),
    *("launch", "sweep", "seed", "tokens_seen", "label", "calibration", "status"),
)
"""What a table chooses measurements by besides: of the evaluation, the weights and the run."""
_SHOWN: Final = 12


def select(df: pd.DataFrame, where: Mapping[str, object]) -> pd.DataFrame:
    """Return the rows whose columns have the values that ``where`` gives.

    Args:
        df: a result table, wide or long. A wide one has no column of an evaluation's settings.
        where: a value, or a list of them, by axis or column: ``{"bits": [3, 4], "limit": 400}``. None is a missing
            value (``{"blocksize": None}``: the whole tensor). ``{"mixed": False}`` keeps what is measured as most of
            its evaluation, model and table is (``analysis.mixtures``); ``{"versions": {"torch": "2.13.0"}}`` one
            version of a package.

    Raises:
        SpecError: no such column, or no row has such a value; says what there is.
    """
    known = [name for name in (*CELL_AXES, *PROVENANCE) if name in df.columns]
    keep = pd.Series(True, index=df.index)
    for name, wanted in where.items():
        if name != MIXED and name not in known:
            raise SpecError("where", {name: wanted}, unknown_name(name, [*known, MIXED], "a column to choose by"))
        of = _mixed_rows(df, wanted) if name == MIXED else _rows(df[name], name, wanted)
        if len(df) and not of.any():
            raise SpecError("where", {name: wanted}, _there_is(df, name))
        keep &= of
    if len(df) and not keep.any():
        raise SpecError("where", dict(where), "each matches some rows, but none matches all of them")
    return df[keep]


def of_measurements(wide: pd.DataFrame, long: pd.DataFrame) -> pd.DataFrame:
    """Return a wide table with nothing but what some rows of the long one measured, and their marks.

    Args:
        wide: a row per cell.
        long: rows of the same results, as ``select`` leaves them.

    Returns:
        The cells that ``long`` has a row of; numbers and states of evaluations that it lacks are missing. A column
        ``mixed`` says how a cell's measurements differ from most of the table's ('jargon: limit=400'), where any does.
    """
    wide = wide[wide["key"].isin(set(long["key"]))]
    has = pd.MultiIndex.from_arrays([long["key"], long["eval"]])
    blank: dict[str, list[str]] = {}
    for metric in metric_columns(wide):
        own = [c for c in (metric.column, metric.stderr_column, metric.status_column) if c in wide.columns]
        for name in ZERO_SHOT_TASKS if metric.column == ZERO_SHOT_MEAN else [metric.eval]:
            blank.setdefault(name, []).extend(own if metric.eval else own[:2])
    for name, columns in blank.items():
        lacks = ~pd.MultiIndex.from_product([wide["key"], [name]]).isin(has)
        if lacks.any():
            wide = wide.assign(**{c: wide[c].mask(lacks) for c in dict.fromkeys(columns)})
    marks = mixed(long)
    marked = marks != ""
    if not marked.any():
        return wide
    said = long.loc[marked, "eval"].astype("str") + ": " + marks[marked]
    by_cell = said.groupby(long.loc[marked, "key"]).agg("; ".join)
    return wide.assign(**{MIXED: wide["key"].map(by_cell).fillna("")})


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """Return 'bitz is not an axis; ...', with the nearest known name and all that there are."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    hint = f". Did you mean {' or '.join(close)}?" if close else ""
    return f"{name!r} is not {what}{hint}. There are: {', '.join(names)}"


def _mixed_rows(df: pd.DataFrame, wanted: object) -> pd.Series[bool]:
    if not isinstance(wanted, bool):
        raise SpecError("where", {MIXED: wanted}, "true (what differs from most of the table) or false (the rest)")
    return (mixed(df) != "") == wanted


def _rows(values: pd.Series[str], name: str, wanted: object) -> pd.Series[bool]:
    if name == "versions" and isinstance(wanted, Mapping):
        asked = {str(k): str(v) for k, v in wanted.items()}
        takes = {t: asked.items() <= versions_of(t).items() for t in values.unique()}
        return values.map(takes).astype(bool)
    declared = axes().get(name)
    given = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    found = list(values.unique())
    taken = [value for value in found if any(_same(value, w, declared) for w in given)]
    missing = values.isna() & any(pd.isna(v) for v in taken)
    return values.isin([v for v in taken if not pd.isna(v)]) | missing


def _same(value: object, wanted: object, declared: Axis | None) -> bool:
    """Equal, whether it was written as a number or quoted; true is not 1, and a name is the number it stands for."""
    number = wanted if declared is None else declared.number(wanted)
    if pd.isna(value) or number is None:  # type: ignore[call-overload]
        return bool(pd.isna(value)) and number is None  # type: ignore[call-overload]
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) != isinstance(number, bool):
        return False
    return bool(plain == number) or str(plain) == str(number)


def _there_is(df: pd.DataFrame, name: str) -> str:
    if name == MIXED:
        return "false: nothing in this table differs from the rest of it"
    declared = axes().get(name)
    values = ["null" if pd.isna(v) else str(declared.name_of(v) if declared else v) for v in df[name].unique()]
    more = f", and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return f"{name} is one of {', '.join(sorted(values)[:_SHOWN])}{more} there"
