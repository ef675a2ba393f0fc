"""Report a finished study: the table in the terminal, findings, figures on disk, and where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from sweeps.files import make_directory, share_with_group, write_atomically
from sweeps.results.table import load_samples, study_results
from sweeps.store.parts import Store
from sweeps.study.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd

MOST_FAILURES_SHOWN = 10
MOST_OTHERS_SHOWN = 30
"""Cells without a place in the table by bits and data type."""


def show_results(store: Store, manifest: Manifest, console: Console, *, figures: bool) -> int:
    """Print what a launch planned and what came of it; returns how many of its cells failed.

    Args:
        store: the results.
        manifest: the study.
        console: where to print.
        figures: draw them, and compute the findings that need per-sample outcomes; else say where they are.
    """
    results, long = study_results(store.out, manifest)
    if results["finished"].notna().any():
        by_label = f"tables/{manifest.sweep}.md"
        written = figures or (store.out / by_label).exists()
        _show_table(results, by_label if written else "what mode=table writes", console)
        if figures:
            with console.status("comparing cells, drawing figures"):
                _draw(store, manifest.sweep, results, long, console)
    _show_places(store, manifest.sweep, console)
    mine = {m.cell.key for m in manifest.wanted()}
    return _show_failures(results[results["key"].isin(mine)], console)


def _show_table(results: pd.DataFrame, elsewhere: str, console: Console) -> None:
    """Print a table by bits and data type, and below it the cells that have no place there, or where they are."""
    from analysis.metrics import headline_metrics
    from analysis.tables import bits_by_dtype, other_cells, others_text, render, render_others

    for metric in headline_metrics(results):
        render(bits_by_dtype(results, metric=metric), console, metric=metric)
        others = other_cells(results, metric=metric)
        if len(others):
            many = len(others) > MOST_OTHERS_SHOWN
            where = f"They are in {elsewhere}, by label." if many else "They are:"
            console.print(f"{others_text(others)} {where}", markup=False, highlight=False, soft_wrap=True)
            if not many:
                render_others(others, console, metric=metric)


def _draw(store: Store, sweep: str, results: pd.DataFrame, long: pd.DataFrame, console: Console) -> None:
    """Findings to the console; figures and the table to files."""
    from analysis.figures import write_figures
    from analysis.findings import findings, wanted_samples
    from analysis.metrics import direction_warnings
    from analysis.mixtures import mixture_warnings

    # Only what is compared: the samples of a large study don't fit into memory.
    wanted = wanted_samples(results, long)
    samples = {wanted[m]: outcome for m, outcome in load_samples(store.out, list(wanted)).items()}
    for warning in [*mixture_warnings(long), *direction_warnings(results)]:
        console.print(f"[yellow]{escape(warning)}[/]")
    for finding in findings(results, samples):
        console.print(f"• {escape(finding)}", highlight=False)
    figures = store.out / "figures" / sweep
    make_directory(figures)
    write_figures(results, figures, sweep=sweep, samples=samples)
    share_with_group(*figures.iterdir())
    write_tables(store, sweep, results)


def write_tables(store: Store, sweep: str, results: pd.DataFrame) -> list[Path]:
    """Write a study's results as parquet and CSV, and what the terminal shows as Markdown; return the files."""
    from analysis.metrics import headline_metrics
    from analysis.tables import bits_by_dtype, other_cells, others_markdown, to_markdown, write_table

    tables = store.out / "tables"
    make_directory(tables)
    made = [write_table(results, tables / f"{sweep}.{kind}") for kind in ("parquet", "csv")]
    share_with_group(*made)
    shown = []
    for metric in headline_metrics(results):
        shown.append(to_markdown(bits_by_dtype(results, metric=metric), metric=metric))
        others = other_cells(results, metric=metric)
        shown += [others_markdown(others, metric=metric)] if len(others) else []
    write_atomically(tables / f"{sweep}.md", "\n".join(shown).encode())
    return [*made, tables / f"{sweep}.md"]


def _show_places(store: Store, sweep: str, console: Console) -> None:
    console.print(f"\nIn {store.out}:", highlight=False, soft_wrap=True)
    made = [*sorted((store.out / "figures" / sweep).glob("*.png")), *sorted((store.out / "tables").glob(f"{sweep}.*"))]
    for path in made:
        if path.exists():
            console.print(f"  {path.relative_to(store.out)}", highlight=False)
    console.print(
        "  packs/, parts/   every measurement with per-sample outcomes: sweeps.load_results(out)\n"
        "mode=table to=FILE writes all results as CSV, parquet, Markdown or LaTeX; long=true one row per measurement.",
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
