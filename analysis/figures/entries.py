"""What the registry of figures holds: an entry names a figure, says what it needs, and draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.figures.results import NoFigureError, Results
from analysis.figures.showing import Drawable, shown
from analysis.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A figure.

    Attributes:
        title: what it shows, one phrase.
        chart: from the results to what can be drawn, or straight to a matplotlib figure; None, or ``NoFigureError``,
            where the data don't allow it.
        paper: the paper's number of it; None for a figure that the paper does not have.
        needs: the measurements that it is drawn from, one phrase.
        metrics: what it can be of: 'loss' (and perplexity), 'accuracy', 'any', or 'latency', which it finds itself.
        sweep: the study of conf/sweep that measures what it needs, with overrides; '' for none.
        obeys: which of ``results.HELD`` it holds where they are asked for; the others are kept from it, and out of the
            names of its files.
        own: a study draws it at its end where the data allow it. Those under the paper's numbers are drawn when asked.
    """

    title: str
    chart: Callable[[Results], Drawable | Figure | None]
    paper: int | None = None
    needs: str = ""
    metrics: str = "any"
    sweep: str = ""
    obeys: tuple[str, ...] = ()
    own: bool = False

    def takes(self, metric: Metric) -> bool:
        """Tell whether it can be of a metric; one that finds its own takes none."""
        kinds = {"loss": ("loss", "perplexity"), "accuracy": ("acc", "acc_norm"), "latency": ()}
        return metric.higher_is_better is not None if self.metrics == "any" else metric.metric in kinds[self.metrics]

    def draw(self, results: Results) -> Figure | None:
        """Draw it; None, with the reason logged, where the data don't allow it."""
        return shown(self.chart, results.obeying(self.obeys))

    def reason(self, results: Results) -> str:
        """Return why it can't be drawn; '' where it can. No chart is drawn to find out."""
        try:
            return "" if self.chart(results.obeying(self.obeys)) is not None else "the data don't allow it"
        except NoFigureError as reason:
            return str(reason)
