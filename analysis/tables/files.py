"""Write a result table: CSV, parquet, Markdown, LaTeX or HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np
import pandas as pd

from analysis.tables.text import pipe_table
from kbit.errors import SpecError
from kbit.spec import axes

TABLE_SUFFIXES: Final = (".csv", ".parquet", ".md", ".tex", ".html")
LATEX_NEEDS: Final = "% \\usepackage{booktabs}\n"
_STYLE: Final = (
    "body{font:14px system-ui,sans-serif;margin:1.5em;color:#222}table{border-collapse:collapse;margin:1em 0}"
    "caption{text-align:left;font-weight:bold;padding:.3em 0}th,td{padding:.15em .7em;text-align:left;"
    "border-bottom:1px solid #ddd;white-space:nowrap}thead th{border-bottom:2px solid #444}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}"
)


def write_table(df: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Writes a result table as its suffix says; a table of that name is replaced in one step. Missing folders are made.

    Dictionaries and lists in cells (the long table's metrics) become JSON in all but parquet.

    Raises:
        SpecError: a suffix other than .csv, .parquet, .md, .tex or .html.
        OSError: the place can't be written.
    """
    path = Path(path)
    suffix = check_suffix(path)
    with replaced(path) as temporary:
        write_frame(df, temporary, suffix)
    return path


def check_suffix(path: Path) -> str:
    """Return the suffix of a table's file name.

    Raises:
        SpecError: none of ``TABLE_SUFFIXES``.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise SpecError("to", str(path), "a file name ending in " + ", ".join(TABLE_SUFFIXES))
    return suffix


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary name to write, which then takes the place of ``path`` in one step. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_frame(df: pd.DataFrame, path: Path, suffix: str) -> None:
    """Write a table as one of ``TABLE_SUFFIXES`` says, whatever the file's name."""
    if suffix == ".parquet":
        df.to_parquet(path, index=False)
    elif suffix == ".csv":
        _flat(df).to_csv(path, index=False)
    else:
        make = {".tex": _latex, ".html": _html, ".md": _markdown}[suffix]
        path.write_text(make(df), encoding="utf-8")


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int) -> str:
    """Return a table of HTML; the texts of rows are HTML already.

    Args:
        title: its caption.
        header: of its columns.
        rows: texts.
        numeric_from: the first column of numbers.
    """

    def cells(texts: Iterable[str], tag: str) -> str:
        kinds = (' class="n"' if i >= numeric_from else "" for i in range(len(header)))
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = cells([escape(name) for name in header], "th")
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def html_page(title: str, body: str) -> str:
    """Return a page that needs nothing else."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(df: pd.DataFrame) -> str:
    shown = _shown(df)
    rows = [[escape(text) for text in row] for row in shown.to_numpy().tolist()]
    return html_page("Results", html_table("", list(shown.columns), rows, numeric_from=len(shown.columns)))


def _markdown(df: pd.DataFrame) -> str:
    shown = _shown(df)
    return pipe_table(list(shown.columns), shown.replace(r"\|", r"\\|", regex=True).to_numpy().tolist())


def _latex(df: pd.DataFrame) -> str:
    """A tabular of booktabs' rules; what LaTeX would read as commands is escaped."""
    latex: str = _shown(df).to_latex(index=False, escape=True)
    return LATEX_NEEDS + latex


def _shown(df: pd.DataFrame) -> pd.DataFrame:
    """Return every value as its text on one line: numbers with 6 digits or by name, nothing for a missing one."""
    flat = _flat(df)
    named = {name: flat[name].astype(object).map(a.name_of) for name, a in axes().items() if a.names and name in flat}
    flat = flat.assign(**named)
    rows = [["" if _missing(x) else _text_of(x) for x in row] for row in flat.itertuples(index=False)]
    return pd.DataFrame(rows, columns=[str(c) for c in flat.columns], dtype="object")


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
