"""Write a result table: CSV, parquet, Markdown or LaTeX."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final
from uuid import uuid4

import numpy as np
import pandas as pd

from analysis.tables.text import pipe_table
from kbit.errors import SpecError
from kbit.spec import axes

TABLE_SUFFIXES: Final = (".csv", ".parquet", ".md", ".tex")
_LATEX_NEEDS: Final = "% \\usepackage{booktabs}\n"


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


def _markdown(df: pd.DataFrame) -> str:
    shown = _shown(df)
    return pipe_table(list(shown.columns), shown.replace(r"\|", r"\\|", regex=True).to_numpy().tolist())


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
