"""Tables: a metric by bits and data type, for terminal and Markdown; results as CSV, parquet, Markdown or LaTeX."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import numpy as np
import pandas as pd

from analysis.cells import (
    WHOLE_TENSOR,
    baselines,
    block_name,
    measured,
    numbers,
    one_exponent,
    ordered_dtypes,
    plain,
    points,
)
from analysis.metrics import Metric, parse_metric
from kbit.errors import SpecError
from kbit.spec import axes
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TABLE_SUFFIXES: Final = (".csv", ".parquet", ".md", ".tex")
_LATEX_NEEDS: Final = "% \\usepackage{booktabs}\n"
_FIELDS: Final = ("value", "stderr", "diverged")
_OTHER: Final = ("model", "method", "label", "bits_per_param", *_FIELDS)


def bits_by_dtype(df: pd.DataFrame, *, metric: Metric | str, blocksize: int | None = 64) -> pd.DataFrame:
    """Tabulate a metric by model, bits and data type, of plain cells at one block size and the 16-bit baseline.

    Floats have one number of exponent bits per family and precision (``cells.one_exponent``).

    Args:
        df: a wide result table.
        metric: a metric or its column.
        blocksize: values a block; None for the whole tensor.

    Returns:
        Index (model, bits): models by family and size, 16 bits first, then 8 down to 3. Columns (data type, field) with
        fields 'value' and 'stderr' (float64) and 'diverged' (bool). The baseline has no data type, so its value stands
        under each. Missing cells are NaN, diverged ones without a finite value infinite. Without rows where nothing was
        measured; a table of baselines has the one data type '16-bit'.

    Raises:
        ValueError: ``metric`` isn't a metric's name.
    """
    metric = parse_metric(metric, df) if isinstance(metric, str) else metric
    rows = measured(df)
    cells = _tabled(rows, metric, blocksize)
    base = points(baselines(rows), metric)
    dtypes = ordered_dtypes(cells) or ["16-bit"]
    spread = pd.concat([base.assign(dtype=d) for d in dtypes])
    both = pd.concat([c for c in (spread, cells) if len(c)]) if len(spread) + len(cells) else cells
    both = both.sort_values(["family", "params", "model", "bits"], ascending=[True, True, True, False], kind="stable")
    values = {(r.model, r.bits, r.dtype): (r.value, r.stderr, r.diverged) for r in both.itertuples()}
    index = pd.MultiIndex.from_tuples(
        list(dict.fromkeys(zip(both["model"], both["bits"], strict=True))), names=["model", "bits"]
    )
    blank = (np.nan, np.nan, False)
    data = [[x for d in dtypes for x in values.get((*row, d), blank)] for row in index]
    columns = pd.MultiIndex.from_product([dtypes, _FIELDS], names=["dtype", "field"])
    kinds = {(d, f): "bool" if f == "diverged" else "float64" for d in dtypes for f in _FIELDS}
    return pd.DataFrame(data, index=index, columns=columns).astype(kinds)


def other_cells(df: pd.DataFrame, *, metric: Metric | str, blocksize: int | None = 64) -> pd.DataFrame:
    """Return the quantized cells with a value of a metric that ``bits_by_dtype`` has no place for.

    They are of other methods, block sizes or options, or floats with another number of exponent bits.

    Args:
        df: a wide result table.
        metric: a metric or its column.
        blocksize: of the table: values a block; None for the whole tensor.

    Returns:
        A row each, models by family and size, of each the most bits first: model, method, label, bits_per_param (as
        stored; the nominal count where that is unknown), value and stderr (float64), diverged (bool).

    Raises:
        ValueError: ``metric`` isn't a metric's name.
    """
    metric = parse_metric(metric, df) if isinstance(metric, str) else metric
    rows = measured(df)
    bits = numbers(rows, "bits")
    cells = points(rows[bits.notna() & (bits != BASELINE_BITS)], metric)
    cells = cells[~cells["key"].isin(_tabled(rows, metric, blocksize)["key"])]
    about = rows.reindex(columns=["key", "label", "bits_per_param"]).rename(columns={"bits_per_param": "stored"})
    cells = cells.merge(about, on="key", how="left")
    cells["bits_per_param"] = numbers(cells, "stored").fillna(cells["bits_per_param"])
    order = ["family", "params", "model", "bits_per_param"]
    cells = cells.sort_values(order, ascending=[True, True, True, False], kind="stable")
    return cells[list(_OTHER)].reset_index(drop=True)


def others_text(others: pd.DataFrame, *, blocksize: int | None = 64) -> str:
    """Say of ``other_cells`` how many of which methods they are, and why a table by bits lacks them; '' for none."""
    if others.empty:
        return ""
    counts = ", ".join(f"{n} of {method}" for method, n in others["method"].value_counts(sort=False).items())
    what = "1 cell is" if len(others) == 1 else f"{len(others)} cells are"
    block = block_name(blocksize or WHOLE_TENSOR)
    return f"{what} not in this table of plain block-wise cells at block size {block}: {counts}."


def others_markdown(others: pd.DataFrame, *, metric: Metric | str) -> str:
    """``other_cells`` as a Markdown table by label, with stored bits per parameter."""
    metric = parse_metric(metric) if isinstance(metric, str) else metric
    return f"{others_text(others)}\n\n" + _pipe_table(_by_label(metric), _lines(others, metric), numeric_from=2)


def render_others(others: pd.DataFrame, console: Console, *, metric: Metric | str) -> None:
    """Prints ``other_cells``, a line a cell."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = parse_metric(metric) if isinstance(metric, str) else metric
    grid = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(_by_label(metric)):
        grid.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for line in _lines(others, metric):
        grid.add_row(*map(Text, line))
    _print_whole(grid, console)


def to_markdown(table: pd.DataFrame, *, metric: Metric | str) -> str:
    """``bits_by_dtype`` as a Markdown table: value ± standard error, the best of each row in bold."""
    metric = parse_metric(metric) if isinstance(metric, str) else metric
    rows = [
        [model, str(bits), *(f"**{text}**" if best else text for text, best in cells)]
        for (model, bits), cells in _formatted(table, metric)
    ]
    return f"{_caption(metric)}\n\n" + _pipe_table(["model", "bits", *_dtypes(table)], rows, numeric_from=1)


def render(table: pd.DataFrame, console: Console, *, metric: Metric | str, blocksize: int | None = 64) -> None:
    """Prints ``bits_by_dtype``: value ± standard error, the best of each row in bold, a section a model."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metric = parse_metric(metric) if isinstance(metric, str) else metric
    title = f"{metric.label}, block size {block_name(blocksize or WHOLE_TENSOR)}"
    grid = Table(title=title, caption=_caption(metric), box=box.SIMPLE_HEAD)
    grid.add_column("model", no_wrap=True)
    for name in ("bits", *_dtypes(table)):
        grid.add_column(name, justify="right", no_wrap=True)
    last = None
    for (model, bits), cells in _formatted(table, metric):
        if last is not None and model != last:
            grid.add_section()
        texts = [Text(text, style="bold" if best else "") for text, best in cells]
        grid.add_row("" if model == last else model, str(bits), *texts)
        last = model
    _print_whole(grid, console)


def write_table(df: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Writes a result table as its suffix says; a table of that name is replaced in one step. Missing folders are made.

    Dictionaries and lists in cells (the long table's metrics) become JSON in CSV, Markdown and LaTeX.

    Raises:
        SpecError: a suffix other than .csv, .parquet, .md or .tex.
        OSError: the place can't be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise SpecError("to", str(path), "a file name ending in " + ", ".join(TABLE_SUFFIXES))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        if suffix == ".parquet":
            df.to_parquet(temporary, index=False)
        elif suffix == ".csv":
            _flat(df).to_csv(temporary, index=False)
        else:
            text = _latex(df) if suffix == ".tex" else _markdown(df)
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _tabled(rows: pd.DataFrame, metric: Metric, blocksize: int | None) -> pd.DataFrame:
    """Return the points among ``measured`` rows that a table by bits and data type holds."""
    cells = plain(rows)
    cells = points(cells[cells["blocksize"] == (blocksize or WHOLE_TENSOR)], metric)
    return one_exponent(cells, ["family", "dtype", "bits"])


def _by_label(metric: Metric) -> list[str]:
    return ["model", "cell", "bits per parameter", metric.label]


def _lines(others: pd.DataFrame, metric: Metric) -> list[list[str]]:
    """Text of ``other_cells``, row by row."""
    return [
        [
            *(str(r[name]) for name in ("model", "label")),
            f"{r['bits_per_param']:.3f}",
            _text(r["value"], r["stderr"], r["diverged"], decimals=metric.decimals),
        ]
        for r in others.to_dict("records")
    ]


def _print_whole(grid: Table, console: Console) -> None:
    # Rich cuts what is wider than the terminal; numbers must not be cut, so a narrow terminal wraps lines instead.
    wide = console.measure(grid, options=console.options.update(max_width=1000)).maximum
    grid.width = wide if wide > console.width else None
    console.print(grid, crop=False, no_wrap=True, overflow="ignore")


def _dtypes(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table.columns.get_level_values("dtype")))


def _formatted(table: pd.DataFrame, metric: Metric) -> Iterator[tuple[tuple[str, int], list[tuple[str, bool]]]]:
    """Row by row: (model, bits), then text and whether it is the best, by data type. Baselines have no best."""
    dtypes = _dtypes(table)
    for row in table.itertuples():
        model, bits = row[0]
        fields: list[tuple[float, float, bool]] = [row[1 + 3 * i : 4 + 3 * i] for i in range(len(dtypes))]
        finite = [v for v, _, diverged in fields if np.isfinite(v) and not diverged]
        ranked = metric.higher_is_better is not None and len(finite) > 1 and bits != BASELINE_BITS
        best = min(finite, key=lambda value: metric.sign * value) if ranked else None
        yield (model, bits), [(_text(*f, decimals=metric.decimals), f[0] == best) for f in fields]


def _text(value: float, error: float, diverged: bool, *, decimals: int) -> str:
    if np.isnan(value):
        return "-"
    if np.isinf(value):
        return "diverged"
    text = f"{value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if np.isfinite(error) else "")
    return text + " †" if diverged else text


def _caption(metric: Metric) -> str:
    better, bold = "not ranked", ""
    if metric.higher_is_better is not None:
        better, bold = f"{'higher' if metric.higher_is_better else 'lower'} is better", " bold: best of its row;"
    return f"{metric.label}, {better}; ± standard error;{bold} †: diverged; -: not measured."


def _markdown(df: pd.DataFrame) -> str:
    shown = _shown(df)
    return _pipe_table(list(shown.columns), shown.replace(r"\|", r"\\|", regex=True).to_numpy().tolist())


def _latex(df: pd.DataFrame) -> str:
    """A tabular of booktabs' rules; what LaTeX would read as commands is escaped."""
    latex: str = _shown(df).to_latex(index=False, escape=True)
    return _LATEX_NEEDS + latex


def _shown(df: pd.DataFrame) -> pd.DataFrame:
    """Return every value as its text on one line: numbers with 6 digits or by name, nothing for a missing one."""
    flat = _flat(df)
    named = {name: flat[name].astype(object).map(a.name_of) for name, a in axes().items() if a.names and name in flat}
    flat = flat.assign(**named)
    rows = [["" if _missing(x) else _text_of(x) for x in row] for row in flat.itertuples(index=False)]
    return pd.DataFrame(rows, columns=[str(c) for c in flat.columns], dtype="object")


def _pipe_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int | None = None) -> str:
    frame = pd.DataFrame(list(rows), columns=list(header), dtype="object")
    last = len(header) if numeric_from is None else numeric_from
    # Without rows there is nothing to align, and tabulate refuses to.
    align = ["left" if i < last else "right" for i in range(len(header))] if len(frame) else None
    text: str = frame.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=align)
    return text + "\n"


def _flat(df: pd.DataFrame) -> pd.DataFrame:
    nested = [c for c in df.columns if df[c].dtype == object]
    return df.assign(
        **{c: [json.dumps(x, default=_plain_value) if _is_nested(x) else x for x in df[c]] for c in nested}
    )


def _is_nested(x: object) -> bool:
    return isinstance(x, dict | list | tuple | np.ndarray)


def _plain_value(x: object) -> object:
    return x.tolist() if isinstance(x, np.ndarray | np.generic) else str(x)


def _missing(x: object) -> bool:
    return x is None or x is pd.NA or x is pd.NaT or (isinstance(x, float) and np.isnan(x))


def _text_of(x: object) -> str:
    text = f"{x:.6g}" if isinstance(x, float) else str(x)
    return text.replace("\n", " ")
