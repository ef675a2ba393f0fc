"""Parts of a report that other rooms compute: scaling laws, best precisions, the best cells for their bits."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analysis.cells import block_name
from analysis.figures.results import Results
from analysis.metrics import Metric, ranked_metrics
from analysis.report.parts import Section, TablePart
from analysis.significance import SampleKey, Samples

DRAWS = 100
"""Bootstrap samples of models for the intervals of laws: a run that ends shall not wait long for them."""
_LAW_COLUMNS = ("family", "law", "formula", "parameters", "models", "cells", "rmse", "r2", "held_out_error", "note")
_BUDGET_COLUMNS = ("family", "budget", "bits", "value", "runner_up", "margin", "low", "high", "confidence")
_PARALLEL_COLUMNS = ("family", "parallel_p", "drift", "drift_low", "drift_high", "drift_bits")
_FRONT_COLUMNS = ("family", "model", "label", "bits_per_param", "total_bits", "value")
_REFERENCE_COLUMNS = (
    *("model", "label", "eval", "metric", "value", "reference", "tolerance", "verdict", "reason"),
    *("paper", "table", "address"),
)


def scaling_section(df: pd.DataFrame, samples: Mapping[SampleKey, Samples]) -> Section | None:
    """What a number of bits buys: the best precision for each, laws, and the cells that no smaller one beats."""
    metrics = ranked_metrics(df)
    if not metrics:
        return None
    from analysis.scaling import pareto

    metric = metrics[0]
    front = pareto(df, metric)
    fronts = TablePart(
        title=f"Cells that no smaller one beats: {metric.phrase}",
        frame=_sizes(front[[*_FRONT_COLUMNS]], "total_bits"),
    )
    tables = [*_budgets(df, metric, samples), *_laws(df, metric), fronts]
    shown = [table for table in tables if len(table.frame)]
    return Section(anchor="scaling-laws", title="What a number of bits buys", tables=shown)


def paper_section(results: Results) -> Section | None:
    """The figures of the paper that the data don't allow, and what would measure what they need."""
    from analysis.figures import missing_figures

    rows = [(f"Figure {m.paper}", m.title, m.reason, m.command) for m in missing_figures(results.df, results=results)]
    frame = pd.DataFrame(rows, columns=["paper", "shows", "why it is not drawn", "what would measure it"])
    intro = "Everything else of the paper can be drawn from what is stored."
    table = TablePart(title="Not drawn", frame=frame)
    return Section(anchor="paper", title="The paper's figures", intro=intro, tables=[table] if rows else [])


def references_section(long_df: pd.DataFrame) -> Section | None:
    """Which 16-bit models and methods agree with published scores, where any was published of what is measured."""
    from analysis.references import check_references

    checked = check_references(long_df, known_only=True)
    if checked.empty:
        return None
    counts = checked["verdict"].value_counts()
    said = ", ".join(f"{n} {'agree' if verdict == 'agrees' else verdict}" for verdict, n in counts.items())
    return Section(
        anchor="references",
        title="Published scores",
        intro=f"{said}. Only the same model, quantization and protocol are compared; other scores are unknown.",
        tables=[TablePart(title="Scores beside published ones", frame=checked[[*_REFERENCE_COLUMNS]])],
    )


def _budgets(df: pd.DataFrame, metric: Metric, samples: Mapping[SampleKey, Samples]) -> list[TablePart]:
    from analysis.scaling import best_by_budget

    best = best_by_budget(df, metric, samples).dropna(subset=["bits"])
    if best.empty:
        return []
    about = best.iloc[0]
    note = (
        "low and high: 95 % interval of the margin over texts; where low is below 0 the runner-up may be as good. "
        "confidence: share of draws of texts in which these bits are best."
    )
    title = f"Best precision for a number of model bits: {metric.phrase}, {about['dtype']}, block size "
    frame = _sizes(best[[*_BUDGET_COLUMNS]], "budget")
    return [TablePart(title=title + block_name(int(about["blocksize"])), frame=frame, note=note)]


def _laws(df: pd.DataFrame, metric: Metric) -> list[TablePart]:
    from analysis.scaling import fit_laws, flat_laws

    laws = fit_laws(df, metric, draws=DRAWS)
    fitted = flat_laws(laws[laws["rmse"].notna()])
    curves = fitted.dropna(subset=["parallel_p"])
    return [
        TablePart(
            title=f"Laws of {metric.phrase}",
            frame=fitted[[*_LAW_COLUMNS]],
            note="held_out_error: mean absolute error on the largest model, left out of the fit.",
        ),
        TablePart(
            title="Are the curves of the precisions parallel?",
            frame=curves[[*_PARALLEL_COLUMNS]],
            note="parallel_p: F test against equal offsets at all sizes; small where they are not. drift: by how "
            "much the largest distance between two curves changes over the sizes, with its 95 % interval.",
        ),
    ]


def _sizes(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Write a column of total bits as '4.21 Mbit'."""
    return frame.assign(**{column: [_bits(float(v)) for v in frame[column]]})


def _bits(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}bit"
    return f"{value:.0f} bit"
