"""Bit-level scaling: a metric against total model bits, a curve per precision (Figures 2 and 13)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import pandas as pd

from analysis.figures import style
from analysis.figures.drawing import X_LABEL, Drawing, canvas, cap_line, legend, loss_cap
from analysis.metrics import Metric
from analysis.scaling.interpolation import scaling_points
from kbit.specs.base import BASELINE_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_COLUMNS: Final = 3


@style.styled
def bit_scaling(
    df: pd.DataFrame, metric: Metric, *, dtype: str | None = None, sweep: str | None = None
) -> Figure | None:
    """Draw a metric against total model bits by precision at block size 64, one panel per family (Figures 2 and 13).

    None, with the reason logged, where there are no quantized cells. ``dtype`` None takes the one most cells have.
    """
    curves, dtype = scaling_points(df, metric, dtype=dtype)
    if dtype is None or (curves["bits"] == BASELINE_BITS).all():
        log.warning(
            "no figure of scaling: no plain %s cell at block size 64 has %s", dtype or "block-wise", metric.column
        )
        return None
    families = list(dict.fromkeys(curves["family"]))
    drawing = Drawing(metric=metric, cap=loss_cap(curves, metric), samples={})
    columns = min(len(families), _COLUMNS)
    rows = -(-len(families) // columns)
    size = (6.4, 3.8) if len(families) == 1 else (3.0 * columns + 0.9, 2.7 * rows + 0.2)
    fig, axes = canvas(rows, columns, size)
    for i, ax in enumerate(axes.flat):
        if i >= len(families):
            ax.remove()
            continue
        own = curves[curves["family"] == families[i]]
        for bits, look in style.BITS_STYLE.items():
            if (own["bits"] == bits).any():
                drawing.line(ax, own[own["bits"] == bits], look, f"{bits}-bit")
        style.bits_axis(ax, own["total_bits"].tolist())
        ax.set_title(style.family_name(families[i]))
        # The last panel of each column, whichever row it is in.
        ax.set_xlabel(X_LABEL if i + columns >= len(families) else "")
        ax.set_ylabel(metric.label if i % columns == 0 else "")
    cap_line(axes, drawing)
    legend(fig, axes, [f"{b}-bit" for b in sorted(style.BITS_STYLE, reverse=True)], "Precision")
    title = f"{metric.name} against total model bits, by precision ({dtype}, block size 64)"
    style.finish(fig, title, drawing.notes(curves, sweep))
    return fig
