"""Write a report: its page, figures and tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from analysis.inputs import Inputs
from analysis.report.content import Report, build_report
from analysis.report.page import page
from analysis.report.parts import Parts
from analysis.report.places import Places


def report_of(inputs: Inputs) -> Report:
    """Build the report of what a command works on, reading the samples that its comparisons need."""
    from analysis.findings.judging import compared_samples

    samples = compared_samples(inputs)
    return build_report(inputs.df, inputs.long, samples, title=inputs.title, name=inputs.name, notes=inputs.notes)


def write_report(report: Report, places: Places | Path, *, paper: Inputs | None = None) -> tuple[list[Path], list[str]]:
    """Write figures, tables and the page that links them; return the files, the page first, and what went wrong.

    Args:
        report: what to write.
        places: where; a directory for all of it, or ``Places``.
        paper: what is reported, to write the paper's figures and tables too (``analysis.paper``), which takes a while;
            None leaves them out.
    """
    if isinstance(places, Path):
        places = Places.within(places)
    parts = Parts()
    none: list[Path] = []
    figures = parts.made("figures", lambda: _write_figures(report, places), none)
    tables = parts.made("tables", lambda: _tables(report, places), none)
    if paper is not None:
        write = partial(_write_paper, paper, report, places)
        tables += parts.made("the paper's figures and tables", write, none)
    beside = [(_name(path, places), os.path.relpath(path, places.page.parent)) for path in (*figures, *tables)]
    return [write_page(report, places, beside, parts.problems), *figures, *tables], parts.problems


def write_page(
    report: Report, places: Places, beside: Sequence[tuple[str, str]] = (), problems: Sequence[str] = ()
) -> Path:
    """Write the page alone; return its file.

    Args:
        report: what to write.
        places: where.
        beside: names of files that it links, and where they are from there.
        problems: what of them went wrong.
    """
    places.page.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: somebody may be reading the one of before.
    temporary = places.page.with_name(f".{places.page.name}.{os.getpid()}.tmp")
    temporary.write_text(page(report, figures=beside, problems=problems))
    temporary.replace(places.page)
    return places.page


def _name(path: Path, places: Places) -> str:
    """Name a file for a link: the paper's figures have one name at both widths."""
    return str(path.relative_to(places.paper)) if path.is_relative_to(places.paper) else path.name


def _write_paper(inputs: Inputs, report: Report, places: Places) -> list[Path]:
    from analysis.paper import write_paper

    return write_paper(inputs, places.paper, results=report.results)


def _write_figures(report: Report, places: Places) -> list[Path]:
    from analysis.figures import save_figures

    return save_figures(report.results, places.figures)


def _tables(report: Report, places: Places) -> list[Path]:
    return write_tables(report.results.df, places.tables, name=report.name, warnings=report.warnings)


def write_tables(df: pd.DataFrame, directory: Path, *, name: str, warnings: Sequence[str] = ()) -> list[Path]:
    """Write results as parquet and CSV; and as Markdown a table of each text and task at each block size, and warnings.

    Args:
        df: the wide table.
        directory: where.
        name: of the files.
        warnings: to stand below the tables of values, e.g. what they mix.
    """
    from analysis.metrics import headline_metrics
    from analysis.mixtures import with_mixed
    from analysis.tables import bits_by_dtype, block_sizes_held, other_cells, others_markdown, to_markdown, write_table
    from analysis.tables.observations import available_metrics

    directory.mkdir(parents=True, exist_ok=True)
    made = [write_table(with_mixed(df), directory / f"{name}.{kind}") for kind in ("parquet", "csv")]
    shown = []
    headline = headline_metrics(df)
    single = [m for m in available_metrics(df) if m.metric in ("loss", "acc")]
    for metric in dict.fromkeys([*headline, *single]):
        for i, block in enumerate(block_sizes_held(df, metric=metric)):
            table = bits_by_dtype(df, metric=metric, blocksize=block)
            shown.append(to_markdown(table, metric=metric, blocksize=block))
            # Below the first table stand the cells without a place in it, as in the terminal.
            others = other_cells(df, metric=metric, blocksize=block) if metric in headline and not i else df.head(0)
            shown += [others_markdown(others, metric=metric, blocksize=block)] if len(others) else []
    text = directory / f"{name}.md"
    text.write_text("\n".join([*shown, *(f"- {warning}\n" for warning in warnings)]))
    return [*made, text]
