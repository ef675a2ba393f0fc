"""Charts: curves over model bits in a panel per family or setting, below each its changes from a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.chance import chance_level
from analysis.figures import style
from analysis.figures.drawing import Drawing, change_edge, compress
from analysis.figures.results import NoFigureError, Results
from analysis.figures.sheet import Sheet
from analysis.figures.showing import Drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Chart(Drawable):
    """What is drawn.

    Attributes:
        results: where it is from, and how it is to be drawn.
        cells: ``cells.points`` with the columns panel and curve (names), and with baseline, baseline_key and change
            where ``changes`` says what the change is.
        looks: how each curve is drawn, in the legend's order.
        title: of the figure.
        legend: title of the legend.
        changes: what the lower panels show, 'Change from 16-bit'; '' for none. They are left out without any baseline.
        side: what stands side by side in a panel whose cells are all of one model, where all models' cells have
            (nearly) one size: the axis' name; '' where they stay over total bits.
        x, x_label: the column that the curves go over, and its name on the axis.
        notes: what is said of this chart before what is said of all.
    """

    results: Results
    cells: pd.DataFrame
    looks: Mapping[str, style.Look]
    title: str
    legend: str
    changes: str = ""
    side: str = ""
    x: str = "total_bits"
    x_label: str = ""
    notes: str = ""

    def _drawn(self) -> Figure:
        return _draw(self)


def _draw(chart: Chart) -> Figure:
    cells = chart.cells
    if cells.empty:
        raise NoFigureError(f"no {chart.title[0].lower()}{chart.title[1:]}")
    panels = list(dict.fromkeys(cells["panel"]))
    changes = bool(chart.changes and cells["baseline"].notna().any())
    drawing = Drawing.of(chart.results, cells)
    sheet = Sheet(len(panels), parts=2 if changes else 1, columns=chart.results.columns)
    worst = 0.0
    if changes:
        worst, drawing.edge = change_edge(cells[cells["baseline"].notna()], drawing)
    for i, panel in enumerate(panels):
        _panel(chart, drawing, sheet, i, cells[cells["panel"] == panel])
    _axes(chart, drawing, sheet, worst)
    sheet.legend(list(chart.looks), chart.legend)
    level = _chance(drawing, sheet)
    notes = " ".join(filter(None, (chart.notes, drawing.notes(cells, chart.results.sweep), level)))
    return sheet.finish(chart.title, notes)


def _panel(chart: Chart, drawing: Drawing, sheet: Sheet, i: int, own: pd.DataFrame) -> None:
    """Draw the i-th panel: its curves, and their changes below."""
    parts = [sheet.values[i], *([sheet.changes[i]] if sheet.changes else [])]
    names = [name for name in chart.looks if (own["curve"] == name).any()]
    single = bool(chart.side) and own["model"].nunique() == 1
    own = own.assign(x=own["curve"].map({n: k for k, n in enumerate(names)}) if single else own[chart.x])
    for name in names:
        line = own[own["curve"] == name]
        drawing.line(parts[0], line, chart.looks[name], name)
        if len(parts) > 1 and line["baseline"].notna().any():
            drawing.change_line(parts[1], line[line["baseline"].notna()], chart.looks[name])
    parts[0].set_title(str(own["panel"].iloc[0]))
    for ax in parts:
        if single:
            ax.set_xticks(range(len(names)), names, **_slant(names, sheet))
            ax.set_xlim(-0.6, len(names) - 0.4)
        elif chart.x == "total_bits":
            style.bits_axis(ax, own["x"].tolist())
        ax.tick_params(labelbottom=ax is parts[-1])
    if single:
        parts[-1].set_xlabel(f"{chart.side} ({own['model'].iloc[0]})")
    else:
        parts[-1].set_xlabel((chart.x_label or chart.results.size) if sheet.is_last(i) else "")


def _slant(names: list[str], sheet: Sheet) -> dict[str, Any]:
    """Long names of ticks are written askew, or they run into each other."""
    letter, gap = (0.07 if sheet.columns is None else 0.06), 0.12  # inches
    wanted = sum(map(len, names)) * letter + len(names) * gap
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if wanted > sheet.panel_width else {}


def _axes(chart: Chart, drawing: Drawing, sheet: Sheet, worst: float) -> None:
    """Name the vertical axes, and compress them where something is off the scale."""
    unit = drawing.metric.unit
    for i, ax in enumerate(sheet.values):
        if sheet.is_left(i):
            ax.set_ylabel(sheet.wrapped(drawing.metric.label))
            if sheet.changes:
                label = sheet.wrapped(chart.changes)
                sheet.changes[i].set_ylabel(label + (f"\n({unit})" if unit else ""))
    for ax in sheet.changes:
        ax.axhline(0, color=style.INK, linewidth=0.9, zorder=1)
    if drawing.capped and drawing.cap is not None:
        if drawing.beyond:
            compress(sheet.values, drawing.cap, drawing.infinity)
            if sheet.changes and drawing.edge > 1.2 * max(worst, 0.1):
                compress(sheet.changes, worst * 1.1 if worst > 0 else 0.1, drawing.edge)
        for ax in sheet.values:
            _dashed(ax, drawing.cap)
        if drawing.beyond and sheet.changes and drawing.edge > 1.2 * max(worst, 0.1):
            for ax in sheet.changes:
                _dashed(ax, worst * 1.1 if worst > 0 else 0.1)
    sheet.fig.align_ylabels([ax for i, ax in enumerate(sheet.values) if sheet.is_left(i)])


def _dashed(ax: Axes, at: float) -> None:
    ax.axhline(at, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _chance(drawing: Drawing, sheet: Sheet) -> str:
    """Draw what guessing gives on a task; return the note that says so."""
    level = chance_level(drawing.metric)
    if level is None:
        return ""
    for ax in sheet.values:
        ax.axhline(level, color=style.INK, linewidth=0.9, linestyle=style.DOTTED, zorder=1)
    return f"Dotted: chance ({level:.4g})."
