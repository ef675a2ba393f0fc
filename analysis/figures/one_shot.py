"""The figure of one-shot methods beside zero-shot types: a metric against total model bits (Figure 5)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from analysis.cells import baselines, measured, numbers, points
from analysis.figures import style
from analysis.figures.drawing import X_LABEL, Drawing, canvas, cap_line, legend, loss_cap
from analysis.metrics import Metric
from analysis.replicates import pool, replicate_groups
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MOST_FORMATS: Final = 8
"""Curves that can be told apart."""
_COLUMNS: Final = 3


@style.styled
def one_shot_scaling(df: pd.DataFrame, metric: Metric, *, sweep: str | None = None) -> Figure | None:
    """Draw each quantization of a study in which some calibrate, over model sizes, one panel per family (Figure 5).

    A curve per quantization, whatever its method, data type, bits and blocks; replicates are one point with their
    spread. None, with the reason logged, where nothing calibrates, or there are more than eight of them.
    """
    rows = measured(df)
    quantized = rows[numbers(rows, "bits") < BASELINE_BITS]
    if not quantized["calibration"].notna().any():
        log.info("no figure of one-shot methods: none of the cells calibrates")
        return None
    cells = points(quantized, metric)
    cells = pool(cells, replicate_groups(rows).set_axis(rows["key"]))
    # A label says first how, then on which data.
    labels = quantized.set_index("key")["label"].astype("string").str.split(", ").str[0]
    cells["format"] = cells["key"].map(labels)
    formats = _ordered(cells)
    if not 0 < len(formats) <= MOST_FORMATS:
        log.warning("no figure of one-shot methods: %d quantizations have %s", len(formats), metric.column)
        return None
    base = points(baselines(rows), metric).assign(format=f"{BASELINE_BITS}-bit", replicates=1)
    curves = pd.concat([c for c in (base, cells) if len(c)], ignore_index=True).dropna(subset=["total_bits"])
    looks = {f"{BASELINE_BITS}-bit": style.BITS_STYLE[BASELINE_BITS]}
    looks |= dict(zip(formats, style.ordinal_styles(len(formats)), strict=True))
    drawing = Drawing(metric=metric, cap=loss_cap(curves, metric), samples={})
    families = list(dict.fromkeys(curves["family"]))
    columns = min(len(families), _COLUMNS)
    lines = -(-len(families) // columns)
    fig, axes = canvas(lines, columns, (7.2, 3.8) if len(families) == 1 else (3.0 * columns + 1.7, 2.7 * lines + 0.2))
    for i, ax in enumerate(axes.flat):
        if i >= len(families):
            ax.remove()
            continue
        own = curves[curves["family"] == families[i]]
        for name, look in looks.items():
            if (own["format"] == name).any():
                drawing.line(ax, own[own["format"] == name], look, name)
        style.bits_axis(ax, own["total_bits"].tolist())
        ax.set_title(style.family_name(families[i]))
        ax.set_xlabel(X_LABEL if i + columns >= len(families) else "")
        ax.set_ylabel(metric.label if i % columns == 0 else "")
    cap_line(axes, drawing)
    legend(fig, axes, list(looks), "Quantization")
    style.finish(fig, f"{metric.name} against total model bits, one-shot and zero-shot", drawing.notes(curves, sweep))
    return fig


def _ordered(cells: pd.DataFrame) -> list[str]:
    """Quantizations by bits, methods that don't calibrate first, then by blocks: whole rows last."""
    first = cells.drop_duplicates("format")
    size = numbers(first, "blocksize").where(lambda b: b > 0, np.inf)
    order = first.assign(_one_shot=first["method"] != "blockwise", _size=size)
    return order.sort_values(["bits", "_one_shot", "_size"], kind="stable")["format"].astype(str).tolist()
