"""Where the files of a report lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the files of a report go.

    Attributes:
        page: the HTML file.
        figures: directory of figures.
        tables: directory of tables, named after the study.
        paper: directory of the paper's figures and tables, for a publication.
        rows: says of which stored rows the page of a study was made; None leaves that out.
    """

    page: Path
    figures: Path
    tables: Path
    rows: Path | None = None

    @property
    def paper(self) -> Path:
        return self.figures / "paper"

    @classmethod
    def of_study(cls, out: Path, name: str) -> Places:
        """Return the places of a study's own report in its results directory."""
        reports = out / "reports"
        return cls(
            page=reports / f"{name}.html",
            figures=out / "figures" / name,
            tables=out / "tables",
            rows=reports / f"{name}.rows",
        )

    @classmethod
    def within(cls, directory: Path) -> Places:
        """Return places that are all below one directory."""
        return cls(page=directory / "index.html", figures=directory / "figures", tables=directory / "tables")
