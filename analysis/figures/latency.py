"""How much faster a model decodes in fewer bits, beside what reading its weights alone would allow (Figure 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import baselines, numbers, points, with_baseline
from analysis.figures import style
from analysis.figures.drawing import curve
from analysis.figures.results import NotAskedError, Results
from analysis.figures.sheet import Sheet
from analysis.figures.showing import Drawable
from analysis.metrics import Metric, metric_columns
from kbit.evaluation.evaluators import BATCHES
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATE: Final = "tokens_per_second_"
_MOST_CURVES: Final = 8


@dataclass(frozen=True, kw_only=True)
class Speeds(Drawable):
    """Times as fast as 16-bit, by batch: ``panels`` has the cells of each rate with columns curve and times."""

    results: Results
    panels: dict[str, pd.DataFrame]
    curves: list[str]
    notes: str

    def _drawn(self) -> Figure:
        return _draw(self)


def speeds(results: Results) -> Speeds:
    """Return the chart of measured decode rates against bits per parameter, a panel per batch, a curve per model.

    Of each model and number of bits the fastest cell counts, or those of the data type given.

    Raises:
        NotAskedError: no model has a rate both at 16 bits and quantized.
    """
    rows = results.rows
    rates = [m for m in metric_columns(results.df) if m.metric in {f"{_RATE}{b}" for b in BATCHES}]
    rates = [m for m in rates if results.df[m.column].notna().any()]
    quantized = results.at(rows[numbers(rows, "bits") < BASELINE_BITS], "dtype")
    panels = {}
    for rate in rates:
        cells = with_baseline(points(quantized, rate), points(baselines(rows), rate))
        cells = cells[cells["baseline"].notna() & np.isfinite(cells["value"])]
        if len(cells):
            panels[_panel_name(rate)] = _fastest(cells, quantized)
    if not panels:
        raise NotAskedError("no figure of latency: no model has tokens a second both at 16 bits and quantized")
    largest = pd.concat(panels.values()).drop_duplicates("model").sort_values("params")
    curves = [str(m) for m in largest["model"]]
    dropped = curves[: max(0, len(curves) - _MOST_CURVES)]
    devices = sorted(rows["device"].dropna().unique()) if "device" in rows else []
    notes = [
        "Dashed: 16 / bits per parameter, where reading the weights takes all of the time.",
        f"On {', '.join(map(str, devices))}." if devices else "",
        "Of several devices: compare within one." if len(devices) > 1 else "",
        f"Not drawn: {', '.join(dropped)}." if dropped else "",
    ]
    return Speeds(results=results, panels=panels, curves=curves[len(dropped) :], notes=" ".join(filter(None, notes)))


def _panel_name(rate: Metric) -> str:
    return f"Batch {rate.metric.removeprefix(_RATE)}"


def _fastest(cells: pd.DataFrame, quantized: pd.DataFrame) -> pd.DataFrame:
    stored = pd.to_numeric(cells["key"].map(quantized.set_index("key")["bits_per_param"]))
    cells = cells.assign(
        times=cells["value"] / cells["baseline"], bits_per_param=stored.fillna(cells["bits_per_param"])
    ).dropna(subset=["bits_per_param"])
    best = cells.sort_values("times", ascending=False, kind="stable").drop_duplicates(["family", "model", "bits"])
    return best.sort_values(["params", "bits_per_param"], kind="stable")


def _draw(chart: Speeds) -> Figure:
    sheet = Sheet(len(chart.panels), parts=1, columns=chart.results.columns)
    looks = dict(zip(chart.curves, style.ordinal_styles(len(chart.curves)), strict=True))
    for i, (name, cells) in enumerate(chart.panels.items()):
        ax = sheet.values[i]
        for model, look in looks.items():
            line = cells[cells["model"] == model].sort_values("bits_per_param")
            if len(line):
                none = np.zeros(len(line), dtype=bool)
                curve(ax, (line["bits_per_param"].to_numpy(), line["times"].to_numpy()), none, look, model)
        span = np.linspace(cells["bits_per_param"].min(), max(cells["bits_per_param"].max(), 8.0), 50)
        ax.plot(span, BASELINE_BITS / span, color=style.INK, linestyle=style.DASHED, linewidth=0.9, label="limit")
        ax.axhline(1, color=style.INK, linewidth=0.9, zorder=1)
        ax.set_title(name)
        ax.set_xlabel("Bits per parameter" if sheet.is_last(i) else "")
        ax.set_ylabel("Times as fast\nas 16-bit" if sheet.is_left(i) else "")
    sheet.legend([*looks, "limit"], "Model")
    notes = chart.notes + (f" Study: {chart.results.sweep}." if chart.results.sweep else "")
    return sheet.finish("Decoding by bits: tokens a second beside the 16-bit model", notes)
