"""``python -m analysis table OUT …``: a pivot of what is stored, of one directory or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import yaml

from analysis.inputs import Inputs
from analysis.mixtures import mixture_warnings
from analysis.tables.choosing import select
from analysis.tables.pivoting import DEFAULT_BY, DEFAULT_COLUMNS, pivot
from analysis.tables.showing import show, write_pivot
from kbit.errors import SpecError

HELP: Final = "show results by any axes and metrics, as mode=table does; several directories as one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", help=f"axes of the rows, e.g. {','.join(DEFAULT_BY)} (default)")
    parser.add_argument(
        "--columns", help=f"axes of the columns, e.g. {','.join(DEFAULT_COLUMNS)} (default); '' for none"
    )
    parser.add_argument("--metrics", default="", help="columns, metrics, evaluations or sizes, e.g. wikitext2_loss,acc")
    parser.add_argument("--where", help="values of axes or provenance, e.g. '{bits: [3, 4], mixed: false}'")
    parser.add_argument("--sort", default="", help="axes of the rows, or metrics (best first), as --sort=-bits,acc")
    parser.add_argument("--top", type=int, help="so many rows, the first")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write it: .csv, .parquet, .md, .tex or .html")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Show the table, or write it."""
    from rich.console import Console

    where = _where(arguments.where)
    long = select(inputs.long, where) if where else inputs.long
    columns = _names(arguments.columns) if arguments.columns is not None else None
    by = _names(arguments.by or "")
    found = pivot(
        long,
        by=by or [b for b in DEFAULT_BY if b not in (columns or ())],
        columns=columns if columns is not None else [c for c in DEFAULT_COLUMNS if c not in by],
        metrics=_names(arguments.metrics),
        sort=_names(arguments.sort),
        top=arguments.top,
    )
    if arguments.to is not None:
        print(write_pivot(found, arguments.to))
        return 0
    show(found, Console())
    for line in [*inputs.notes, *mixture_warnings(long)]:
        print(line)
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _where(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict):
        raise SpecError("where", text, "values by axis, e.g. '{bits: [3, 4], dtype: int}'")
    return {str(name): value for name, value in given.items()}
