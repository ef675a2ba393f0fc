"""Write the files of a report."""

from __future__ import annotations

from pathlib import Path

from analysis.inputs import Inputs


def report_findings(inputs: Inputs) -> list[str]:
    """Return what the data say, in sentences."""
    from analysis.findings import findings, wanted_samples

    return findings(inputs.df, inputs.samples(wanted_samples(inputs.df, inputs.long)))


def write_files(inputs: Inputs, directory: Path) -> list[Path]:
    """Write figures and tables; return the files."""
    from analysis.figures import write_figures
    from analysis.findings import wanted_samples
    from analysis.tables import write_table

    samples = inputs.samples(wanted_samples(inputs.df, inputs.long))
    tables = directory / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    made = [write_table(inputs.df, tables / f"{inputs.name}.{kind}") for kind in ("parquet", "csv")]
    return [*write_figures(inputs.df, directory / "figures", sweep=inputs.name, samples=samples), *made]
