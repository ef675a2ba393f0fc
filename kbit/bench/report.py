"""Report a run: tables for the terminal, and files that keep every number with its provenance."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table as RichTable

_PACKAGES: Final = ("kbit-sweep", "torch", "triton", "bitsandbytes", "transformers")
Record = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: cells for people, and the numbers they were made of.

    Attributes:
        name: of its CSV file.
        header: names of the columns; the first one holds the rows' names.
        body: rows of cells; a line break parts a figure from its ratio.
        notes: lines that stand below.
        records: every number unrounded, in SI units, one record a measurement.
    """

    name: str
    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    records: Sequence[Record]

    def print(self, console: Console) -> None:
        table = RichTable()
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left")
        for row in self.body:
            table.add_row(*row)
        if not console.is_terminal:  # nothing is cut in a file
            wide = console.measure(table, options=console.options.update(width=1000))
            console.width = max(console.width, wide.maximum)
        console.print(self.title, style="bold", soft_wrap=True, highlight=False)
        console.print(table)
        for note in self.notes:
            console.print(note, soft_wrap=True, highlight=False)

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.header) - 1)
        rows = [self.header, rule, *self.body]
        lines = ["| " + " | ".join(cell.replace("\n", ", ") for cell in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"{note}  " for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the command.

    Attributes:
        name: kernels, roofline or decode: of the files.
        options: as they were used.
        environment: ``environment()``.
        seconds: that it took.
    """

    name: str
    tables: Sequence[Table]
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    seconds: float

    def write(self, directory: Path) -> list[Path]:
        """NAME.json and NAME.md with everything, and a CSV a table; returns them. The directory is made."""
        directory.mkdir(parents=True, exist_ok=True)
        return list(self._written(directory))

    def _written(self, directory: Path) -> Iterator[Path]:
        head = {"run": self.name, "seconds": round(self.seconds, 1), "options": dict(self.options)}
        tables = {table.name: [dict(record) for record in table.records] for table in self.tables}
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps({**head, "environment": dict(self.environment), **tables}, indent=1) + "\n")
        yield path
        path = directory / f"{self.name}.md"
        where = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        path.write_text(
            "\n\n".join([*(t.markdown() for t in self.tables), f"{where}; took {self.seconds:.0f} s."]) + "\n"
        )
        yield path
        for table in self.tables:
            path = directory / f"{table.name}.csv"
            rows = [{**record, **self.environment} for record in table.records]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
            yield path


def environment(device: str) -> dict[str, str]:
    """Return where and when: date (UTC), device, versions. ``device`` is cpu or cuda."""
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device_name(device)}
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # torch's own says which build it is.
    return found | {"torch": torch.__version__, "python": platform.python_version()}


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's architecture and torch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)"
