"""Write figures to files: the same bytes for the same data."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from analysis.figures import style
from analysis.figures.sheet import caption
from kbit.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS: Final = ("png", "svg", "pdf")


def save(fig: Figure, stem: Path, *, formats: Sequence[str] = ("png", "svg"), columns: int | None = None) -> Path:
    """Write a figure in each of the formats, with its title and notes as the file's description.

    Args:
        fig: the figure.
        stem: the file's path without its suffix.
        formats: among 'png' (200 dots an inch; of a page's columns 300), 'svg' and 'pdf'.
        columns: the width that it was drawn for; None for the screen.

    Returns:
        The first format's file.

    Raises:
        SpecError: another format.
    """
    from matplotlib import rc_context

    for wrong in [f for f in formats if f not in FORMATS]:
        raise SpecError("formats", wrong, "one of " + ", ".join(FORMATS))
    title, notes = caption(fig)
    with rc_context(style.rc(columns)):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # laid out already, and laying out costs most of saving
        for ax in fig.axes:
            # The solver of the layout goes over sets, and its last digit with them.
            left, bottom, width, height = (round(edge, 5) for edge in ax.get_position().bounds)
            ax.set_position((left, bottom, width, height))
        for suffix in formats:
            _WRITERS[suffix](fig, stem.with_name(f"{stem.name}.{suffix}"), title, notes)
    return stem.with_name(f"{stem.name}.{formats[0]}")


def _save_png(fig: Figure, path: Path, title: str, notes: str) -> None:
    fig.savefig(path, metadata={"Title": title, "Description": notes} if title else None)


def _save_pdf(fig: Figure, path: Path, title: str, notes: str) -> None:
    about: dict[str, Any] = {"CreationDate": None, "Title": title, "Subject": notes}
    fig.savefig(path, metadata=about)


def _save_svg(fig: Figure, path: Path, title: str, notes: str) -> None:
    """Write the same bytes for the same data, as SVG: matplotlib numbers clip paths by where objects lie in memory."""
    text = io.StringIO()
    about: dict[str, Any] = {"Date": None, **({"Title": title, "Description": notes} if title else {})}
    fig.savefig(text, format="svg", metadata=about)
    names: dict[str, str] = {}
    path.write_text(
        re.sub(r"\bp[0-9a-f]{10}\b", lambda m: names.setdefault(m[0], f"clip{len(names)}"), text.getvalue())
    )


_WRITERS: Final = {"png": _save_png, "svg": _save_svg, "pdf": _save_pdf}
