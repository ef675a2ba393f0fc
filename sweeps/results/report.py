"""Report a study: the table in the terminal, findings, the report on disk, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from analysis.report.places import Places
from sweeps.files import make_directory, share_with_group, write_atomically
from sweeps.results.inputs import read_inputs
from sweeps.results.table import load_planned
from sweeps.store.parts import Store
from sweeps.store.rows import rows_digest
from sweeps.study.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd

    from analysis.inputs import Inputs
    from analysis.report import Report

MOST_FAILURES_SHOWN = 10
MOST_OTHERS_SHOWN = 30
"""Cells without a place in the table by bits and data type."""


def show_results(store: Store, manifest: Manifest, console: Console, *, report: bool) -> int:
    """Print what a launch planned and what came of it; returns how many of its cells failed.

    Args:
        store: the results.
        manifest: the study.
        console: where to print.
        report: write the study's report (page, figures, tables), and print its findings; else say where those are.
    """
    inputs = read_inputs([store.out], manifest=manifest) if report else None
    results = load_planned(store.out, manifest) if inputs is None else inputs.df
    if results["finished"].notna().any():
        by_label = f"tables/{manifest.sweep}.md"
        written = report or (store.out / by_label).exists()
        _show_table(results, by_label if written else "what mode=table writes", console)
        if inputs is not None:
            with console.status("comparing cells, drawing figures, writing the report"):
                _report(inputs, Places.of_study(store.out, manifest.sweep), console)
    _show_places(store, manifest.sweep, console)
    mine = {m.cell.key for m in manifest.wanted()}
    return _show_failures(results[results["key"].isin(mine)], console)


def has_report(store: Store, manifest: Manifest) -> bool:
    """Tell whether a study has a report, made of exactly what is stored of it."""
    places = Places.of_study(store.out, manifest.sweep)
    assert places.rows is not None
    if not places.page.exists() or not places.rows.exists():
        return False
    stored = store.read(["row_id"], measurements={m.key for m in manifest.wanted()}).column("row_id").to_pylist()
    return places.rows.read_text() == rows_digest(stored)


def make_report(inputs: Inputs, places: Places, *, paper: bool = False) -> tuple[Report, list[Path], list[str]]:
    """Build a report and write its files; return it, the files and what went wrong.

    With ``paper`` the paper's figures and tables too, for a publication.

    Raises:
        OSError: nothing can be written there.
    """
    from analysis.report import report_of, write_report

    for directory in (places.page.parent, places.figures, places.tables):
        make_directory(directory)
    report = report_of(inputs)
    files, problems = write_report(report, places, paper=inputs if paper else None)
    # One that lacks figures is written again by the next launch.
    if places.rows is not None and not problems:
        write_atomically(places.rows, rows_digest(inputs.long["row_id"].dropna()).encode())
    # Figures come in several formats and, of the paper, in directories: all below their place.
    share_with_group(*files, *sorted(places.figures.rglob("*")))
    return report, files, problems


def _report(inputs: Inputs, places: Places, console: Console) -> None:
    """Write the report of what was just measured: whatever is wrong with it, the measurements are stored."""
    try:
        report, _, problems = make_report(inputs, places)
    except Exception as error:
        text = f"no report was written ({type(error).__name__}: {error}); mode=report tries again"
        console.print(f"[yellow]{escape(text)}[/]", highlight=False)
        return
    for warning in (*report.warnings, *problems):
        console.print(f"[yellow]{escape(warning)}[/]")
    for finding in report.sentences:
        console.print(f"• {escape(finding)}", highlight=False)


def _show_table(results: pd.DataFrame, elsewhere: str, console: Console) -> None:
    """Print a table by bits and data type, and below it the cells that have no place there, or where they are."""
    from analysis.metrics import headline_metrics
    from analysis.tables import bits_by_dtype, block_sizes_held, other_cells, others_text, render, render_others

    headline = headline_metrics(results)
    for metric in headline:
        block = block_sizes_held(results, metric=metric)[0]
        render(bits_by_dtype(results, metric=metric, blocksize=block), console, metric=metric, blocksize=block)
        others = other_cells(results, metric=metric, blocksize=block)
        if len(others):
            many = len(others) > MOST_OTHERS_SHOWN
            where = f"They are in {elsewhere}, by label." if many else "They are:"
            text = others_text(others, blocksize=block)
            console.print(f"{text} {where}", markup=False, highlight=False, soft_wrap=True)
            if not many:
                render_others(others, console, metric=metric)
    _say_more_metrics(results, [m.column for m in headline], console)


def _say_more_metrics(results: pd.DataFrame, shown: Sequence[str], console: Console) -> None:
    """Say which texts and tasks no table shows, and what would."""
    from analysis.metrics import metric_columns

    more = [m.column for m in metric_columns(results) if m.metric in ("loss", "acc") and m.column not in shown]
    more = [column for column in more if results[column].notna().any()]
    if more:
        asked = f"'metrics=[{','.join(more)}]'"
        console.print(f"Measured, too: mode=table {asked}", markup=False, highlight=False, soft_wrap=True)


def write_tables(store: Store, sweep: str, results: pd.DataFrame) -> list[Path]:
    """Write a study's results as parquet and CSV, and what the terminal shows as Markdown; return the files."""
    from analysis.report import write_tables as write

    tables = Places.of_study(store.out, sweep).tables
    make_directory(tables)
    made = write(results, tables, name=sweep)
    share_with_group(*made)
    return made


def _show_places(store: Store, sweep: str, console: Console) -> None:
    console.print(f"\nIn {store.out}:", highlight=False, soft_wrap=True)
    places = Places.of_study(store.out, sweep)
    made = [places.page, *sorted(places.figures.glob("*.png")), *sorted(places.tables.glob(f"{sweep}.*"))]
    for path in made:
        if path.exists():
            console.print(f"  {path.relative_to(store.out)}", highlight=False)
    console.print(
        "  packs/, parts/   every measurement with per-sample outcomes: sweeps.load_results(out)\n"
        "mode=table shows results by any axes and metrics; to=FILE writes them (.csv, .parquet, .md, .tex, .html).",
        highlight=False,
    )


def _show_failures(results: pd.DataFrame, console: Console) -> int:
    failed = results[results["status"] == "failed"]
    if len(failed):
        console.print(f"\n[red]{len(failed)} cell(s) failed[/]:")
        for row in failed.head(MOST_FAILURES_SHOWN).to_dict("records"):
            why = f"  {row['key'][:10]}  {row['model']} {row['label']}: {row['error_type']}"
            console.print(why, markup=False, highlight=False)
        if len(failed) > MOST_FAILURES_SHOWN:
            console.print(f"  … and {len(failed) - MOST_FAILURES_SHOWN} more")
        console.print(
            f"See why: mode=logs cell={failed.iloc[0]['key'][:10]}    Run them again: 'retry=\\[failed]'",
            highlight=False,
        )
    return len(failed)
