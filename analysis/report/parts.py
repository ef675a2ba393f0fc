"""What a report is made of: sections with tables; and making them so that one that fails costs the others nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pandas as pd

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TablePart:
    """A table of a report.

    Attributes:
        title: above it.
        frame: shown without its index.
        note: what it says and doesn't, below it.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report below the cells.

    Attributes:
        anchor: its address in the page.
        title: its heading.
        tables: in order.
        intro: a sentence or two above them.
    """

    anchor: str
    title: str
    tables: Sequence[TablePart]
    intro: str = ""


@dataclass
class Parts:
    """Makes the parts of a report, and remembers which could not be made, and why."""

    problems: list[str] = field(default_factory=list)

    def made(self, what: str, make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except Exception as error:  # whatever is wrong with one part, the others are worth having
            log.warning("no %s", what, exc_info=True)
            self.problems.append(f"{what}: could not be made ({type(error).__name__}: {error})")
            return otherwise

    def optional(self, what: str, make: Callable[[], Section | None]) -> list[Section]:
        """Return a section, if it could be made and has anything to show."""
        section = self.made(what, make, None)
        return [section] if section is not None and section.tables else []
