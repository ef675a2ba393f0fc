"""Write figures to files: the same bytes for the same data."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@style.styled
def save(fig: Figure, stem: Path) -> Path:
    """Write a figure as PNG with an SVG next to it; return the PNG."""
    fig.savefig(stem.with_suffix(".png"))
    fig.set_layout_engine("none")  # laid out already, and laying out costs most of saving
    _save_svg(fig, stem.with_suffix(".svg"))
    return stem.with_suffix(".png")


def _save_svg(fig: Figure, path: Path) -> None:
    """Write the same bytes for the same data, as SVG: matplotlib numbers clip paths by where objects lie in memory."""
    text = io.StringIO()
    fig.savefig(text, format="svg", metadata={"Date": None})
    names: dict[str, str] = {}
    path.write_text(
        re.sub(r"\bp[0-9a-f]{10}\b", lambda m: names.setdefault(m[0], f"clip{len(names)}"), text.getvalue())
    )
