"""From a chart's function to a figure, or to the reason why there is none, which is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from analysis.figures.results import NoFigureError, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("analysis.figures")


class Drawable(Protocol):
    """What is known to have its data."""

    def draw(self) -> Figure:
        """Draw it."""
        ...


def shown(chart: Callable[[Results], Drawable], results: Results) -> Figure | None:
    """Return the figure of a chart; None, with the reason logged, where the data don't allow it."""
    try:
        return chart(results).draw()
    except NoFigureError as reason:
        log.warning("%s", reason)
        return None
