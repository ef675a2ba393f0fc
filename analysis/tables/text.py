"""Text of tables: a value with its error, a Markdown table, a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def value_text(value: float, error: float, diverged: bool, *, decimals: int) -> str:
    if np.isnan(value):
        return "-"
    if np.isinf(value):
        return "diverged"
    text = f"{value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if np.isfinite(error) else "")
    return text + " †" if diverged else text


def pipe_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int | None = None) -> str:
    frame = pd.DataFrame(list(rows), columns=list(header), dtype="object")
    last = len(header) if numeric_from is None else numeric_from
    # Without rows there is nothing to align, and tabulate refuses to.
    align = ["left" if i < last else "right" for i in range(len(header))] if len(frame) else None
    text: str = frame.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=align)
    return text + "\n"


def print_whole(grid: Table, console: Console) -> None:
    # Rich cuts what is wider than the terminal; numbers must not be cut, so a narrow terminal wraps lines instead.
    wide = console.measure(grid, options=console.options.update(max_width=1000)).maximum
    grid.width = wide if wide > console.width else None
    console.print(grid, crop=False, no_wrap=True, overflow="ignore")
