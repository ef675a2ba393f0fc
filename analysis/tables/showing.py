"""Text of pivots: for the terminal, and as files of every kind that ``to=`` names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import MEASURED
from analysis.metrics import Metric
from analysis.tables.files import LATEX_NEEDS, check_suffix, html_page, html_table, replaced, write_frame
from analysis.tables.pivoting import PIVOT_FIELDS, metric_of, value_columns
from analysis.tables.text import pipe_table, print_whole, value_text
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from rich.console import Console

_LEGEND: Final = "± standard error; †: diverged; -: no such cell."
_MOST_MARKS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as text.

    Attributes:
        title: what its values are.
        header: of its columns.
        rows: texts by row; of axes first.
        best: by row, the columns whose value is the best of it.
        axes: number of columns that are axes.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: tuple[frozenset[int], ...]
    axes: int


def show(table: pd.DataFrame, console: Console) -> None:
    """Prints a pivot: a table per metric, or one where metrics are its only columns; below them what marks mean."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grids, notes = _grids(table)
    for grid in grids:
        shown = Table(title=grid.title, box=box.SIMPLE_HEAD)
        for i, name in enumerate(grid.header):
            shown.add_column(Text(name), justify="left" if i < grid.axes else "right", no_wrap=True)
        firsts = [row[0] for row in grid.rows]
        runs = [first for i, first in enumerate(firsts) if not i or first != firsts[i - 1]]
        grouped = len(set(runs)) == len(runs) < len(firsts)
        for i, (row, best) in enumerate(zip(grid.rows, grid.best, strict=True)):
            again = grouped and i > 0 and row[0] == firsts[i - 1]
            if grouped and i and not again:
                shown.add_section()
            texts = ["" if again else row[0], *row[1:]]
            shown.add_row(*(Text(text, style="bold" if c in best else "") for c, text in enumerate(texts)))
        print_whole(shown, console)
    if not grids:
        console.print("Nothing to show: no cell has a value or a place.", highlight=False)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def pivot_markdown(table: pd.DataFrame) -> str:
    """Return a pivot as Markdown: a table per metric, the best of each row in bold, and what marks mean."""
    grids, notes = _grids(table)
    parts = []
    for grid in grids:
        rows = [
            [f"**{text}**" if i in best else text.replace("|", "\\|") for i, text in enumerate(row)]
            for row, best in zip(grid.rows, grid.best, strict=True)
        ]
        parts.append(f"{grid.title}\n\n" + pipe_table(grid.header, rows, numeric_from=grid.axes))
    return "\n".join([*parts, *(f"{note}\n" for note in notes)])


def pivot_latex(table: pd.DataFrame) -> str:
    """Return a pivot as LaTeX: a tabular of booktabs' rules per metric, its title and notes as comments."""
    grids, notes = _grids(table)
    parts = [LATEX_NEEDS]
    for grid in grids:
        frame = pd.DataFrame([list(row) for row in grid.rows], columns=list(grid.header), dtype="object")
        alignment = "l" * grid.axes + "r" * (len(grid.header) - grid.axes)
        text = frame.to_latex(index=False, escape=True, column_format=alignment)
        parts.append(f"% {grid.title}\n" + text.replace("±", r"$\pm$").replace("†", r"$^\dagger$"))
    return "".join([*parts, *(f"% {note}\n" for note in notes)])


def pivot_html(table: pd.DataFrame, *, title: str = "Results") -> str:
    """Return a pivot as one HTML page that needs nothing else."""
    grids, notes = _grids(table)
    parts = []
    for grid in grids:
        rows = [
            [f"<b>{escape(text)}</b>" if i in best else escape(text) for i, text in enumerate(row)]
            for row, best in zip(grid.rows, grid.best, strict=True)
        ]
        parts.append(html_table(grid.title, grid.header, rows, numeric_from=grid.axes))
    return html_page(title, "\n".join([*parts, *(f"<p>{escape(note)}</p>" for note in notes)]))


def flat(table: pd.DataFrame) -> pd.DataFrame:
    """Return a pivot as plain columns, for CSV and parquet.

    The axes of the rows come first, then four columns for each value: 'jargon_loss int', '… stderr', '… status' and
    '… mixed'; the last only where any is.
    """
    columns = {}
    for column in table.columns:
        field = column[-1]
        name = " ".join(str(part) for part in column[:-1] if str(part))
        if field == "mixed" and not (table[column] != "").any():
            continue
        columns[name if field == PIVOT_FIELDS[0] else f"{name} {field}"] = table[column].to_numpy()
    index = {}
    for axis in map(str, table.index.names):
        values = pd.Series(list(table.index.get_level_values(axis)), dtype="object")
        kinds = {type(v) for v in values}
        # A column of numbers and 'whole tensor' is one of texts; parquet has no other.
        index[axis] = values if len(kinds) == 1 else values.astype("str")
    return pd.DataFrame({**index, **columns})


def write_pivot(table: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Writes a pivot as its suffix says; a file of that name is replaced in one step. Missing folders are made.

    Raises:
        SpecError: a suffix other than .csv, .parquet, .md, .tex or .html.
        OSError: the place can't be written.
    """
    path = Path(path)
    suffix = check_suffix(path)
    with replaced(path) as temporary:
        if suffix in (".csv", ".parquet"):
            write_frame(flat(table), temporary, suffix)
        else:
            make = {".md": pivot_markdown, ".tex": pivot_latex, ".html": pivot_html}[suffix]
            temporary.write_text(make(table), encoding="utf-8")
    return path


def _grids(table: pd.DataFrame) -> tuple[list[Grid], list[str]]:
    """Return the tables of a pivot as text, and its notes."""
    marks = _marks(table)
    groups = value_columns(table)
    metrics = list(dict.fromkeys(g[0] for g in groups))
    several = len(table.columns.names) > 2
    parts = [[g for g in groups if g[0] == m] for m in metrics] if several else [groups] if groups else []
    grids = [_grid(table, part, marks) for part in parts] if len(table) else []
    notes = [_LEGEND] if grids else []
    notes += [f"[{letter}] {text}" for text, letter in list(marks.items())[:_MOST_MARKS]]
    if len(marks) > _MOST_MARKS:
        notes.append(f"… and {len(marks) - _MOST_MARKS} more ways in which provenance differs.")
    if marks:
        notes.append("Marked values were not measured as most of the table is; where={mixed: false} leaves them out.")
    return grids, [*notes, *table.attrs.get("notes", [])]


def _grid(table: pd.DataFrame, groups: Sequence[tuple[str, ...]], marks: dict[str, str]) -> Grid:
    names = [str(n) for n in table.index.names]
    kinds = [metric_of(table, g[0]) for g in groups]
    several = len(table.columns.names) > 2
    heads = [" ".join(_text(p) for p in g[1:]) or "-" for g in groups] if several else [m.label for m in kinds]
    columns = [_texts(table, group, metric, marks) for group, metric in zip(groups, kinds, strict=True)]
    index = [[_text(v) for v in (row if isinstance(row, tuple) else (row,))] for row in table.index]
    rows = tuple((*axes, *values) for axes, values in zip(index, zip(*columns, strict=True), strict=True))
    best = _best(table, groups, kinds[0]) if several else [frozenset[int]()] * len(table)
    better = {True: ", higher is better", False: ", lower is better", None: ", not ranked"}[kinds[0].higher_is_better]
    return Grid(
        title=f"{kinds[0].label}{better}" if several else "",
        header=(*names, *heads),
        rows=rows,
        best=tuple(frozenset(i + len(names) for i in b) for b in best),
        axes=len(names),
    )


def _texts(table: pd.DataFrame, group: tuple[str, ...], metric: Metric, marks: dict[str, str]) -> list[str]:
    value, error, status, mixed = (table[(*group, field)].tolist() for field in PIVOT_FIELDS)
    texts = []
    for v, e, s, m in zip(value, error, status, mixed, strict=True):
        said = value_text(v, e, s == "diverged", decimals=metric.decimals)
        if np.isnan(v) and s and s not in MEASURED:
            said = s
        texts.append(f"{said} [{marks[m]}]" if m and not np.isnan(v) else said)
    return texts


def _best(table: pd.DataFrame, groups: Sequence[tuple[str, ...]], metric: Metric) -> list[frozenset[int]]:
    """Return the columns with the best value of each row, of two or more that did not diverge; baselines have none."""
    none = [frozenset[int]()] * len(table)
    if metric.higher_is_better is None or len(groups) < 2 or not len(table):
        return none
    values = np.array([table[(*g, "value")].to_numpy(dtype="float64") for g in groups]).T * metric.sign
    lost = np.array([(table[(*g, "status")] == "diverged").to_numpy() for g in groups]).T
    values = np.where(np.isfinite(values) & ~lost, values, np.inf)
    ranked = np.isfinite(values).sum(axis=1) > 1
    if "bits" in table.index.names:
        ranked &= np.array([b != BASELINE_BITS for b in table.index.get_level_values("bits")])
    least = values.min(axis=1, keepdims=True)
    return [
        frozenset(np.flatnonzero(row).tolist()) if r else frozenset()
        for row, r in zip((values == least) & np.isfinite(values), ranked, strict=True)
    ]


def _marks(table: pd.DataFrame) -> dict[str, str]:
    """Return a letter for each way in which the provenance of a value differs."""
    columns = [c for c in table.columns if c[-1] == "mixed"]
    texts = dict.fromkeys(text for c in columns for text in table[c] if text)
    return {text: _letters(i) for i, text in enumerate(texts)}


def _letters(i: int) -> str:
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("a") + i % 26)


def _text(value: object) -> str:
    """Return an axis's value as text; one that does not apply is nothing."""
    return f"{value:g}" if isinstance(value, float) else str(value)
