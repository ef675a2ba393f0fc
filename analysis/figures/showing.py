"""From a chart's function to a figure, or to the reason why there is none, which is logged."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from analysis.figures import style
from analysis.figures.results import NoFigureError, NotAskedError, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("analysis.figures")


class Drawable(ABC):
    """What is known to have its data.

    Attributes:
        results: where it is from, and how it is to be drawn.
    """

    results: Results

    def draw(self) -> Figure:
        """Draw it under the settings of the screen or the page; the caller's stay as they are."""
        from matplotlib import rc_context

        with rc_context(style.rc(self.results.columns)):
            return self._drawn()

    @abstractmethod
    def _drawn(self) -> Figure:
        """Draw it under whatever settings there are."""


def shown(chart: Callable[[Results], Drawable | Figure | None], results: Results) -> Figure | None:
    """Return the figure of a chart; None, with the reason logged, where the data don't allow it."""
    try:
        found = chart(results)
        return found.draw() if isinstance(found, Drawable) else found
    except NoFigureError as reason:
        # Most studies ask few of the questions that there are figures of.
        log.log(logging.INFO if isinstance(reason, NotAskedError) else logging.WARNING, "%s", reason)
        return None
