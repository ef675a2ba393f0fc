"""``python -m analysis laws OUT [OUT2 …]``: scaling laws, effective parameters, fronts, best precision by budget."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from analysis.cells import measured, numbers
from analysis.inputs import Inputs
from analysis.metrics import Metric, metric_columns, parse_metric, ranked_metrics
from analysis.scaling.budgets import best_by_budget
from analysis.scaling.effective import effective_parameters
from analysis.scaling.laws import fit_laws, flat_laws, law_parameters
from analysis.scaling.pareto import pareto
from analysis.scaling.points import law_points
from analysis.significance import SampleKey, sample_keys

HELP: Final = (
    "scaling laws with intervals, effective parameters, Pareto fronts, the best precision for a number of bits"
)

_ROWS: Final = 12
_BEST: Final = ["budget", "bits", "value", "runner_up", "margin", "low", "high", "confidence"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", help="a column, e.g. wikitext2_loss; else the loss with most values")
    parser.add_argument("--dtype", help="data type of the quantized cells; else the one that most cells have")
    parser.add_argument(
        "--blocksize", type=int, help="values per block, 0 for the whole tensor; else the most frequent"
    )
    parser.add_argument("--draws", type=int, default=200, help="bootstrap samples of models (default: 200)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write all tables as CSV, and the figure, too")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Print what is fitted, and write the tables where they are wanted."""
    metric = _metric(inputs.df, arguments.metric)
    if metric is None:
        print("no law: no cell has a metric with a value and a known direction" + _named(inputs.df, arguments.metric))
        return 0
    chosen = {"dtype": arguments.dtype, "blocksize": arguments.blocksize}
    laws = fit_laws(inputs.df, metric, draws=arguments.draws, **chosen)
    if laws.empty:
        print(
            f"no law: no block-wise cell of one data type and block size has {metric.column} besides its 16-bit model"
        )
        return 0
    points = law_points(inputs.df, metric, **chosen)
    best = best_by_budget(inputs.df, metric, inputs.samples(_wanted(inputs, points.cells["key"], metric)), **chosen)
    tables = {
        "laws": flat_laws(laws),
        "law_parameters": law_parameters(laws),
        "effective_parameters": effective_parameters(points.cells, metric),
        "best_by_budget": best,
        "pareto": pareto(inputs.df, metric),
    }
    _say(tables, metric, laws)
    if arguments.to is not None:
        arguments.to.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            path = arguments.to / f"{name}.csv"
            table.to_csv(path, index=False)
            print(path)
        for path in _figure(inputs, metric, arguments):
            print(path)
    return 0


def _figure(inputs: Inputs, metric: Metric, arguments: argparse.Namespace) -> list[Path]:
    """Draw the entry of ``FIGURES``, where the data allow it."""
    from analysis.figures import save_figures
    from analysis.figures.results import Results

    results = Results.of(inputs.df, sweep=inputs.name)
    results = replace(results, dtype=arguments.dtype, blocksize=arguments.blocksize)
    return save_figures(results, arguments.to, names=["scaling_laws"], metrics=[metric])


def _metric(df: pd.DataFrame, asked: str | None) -> Metric | None:
    if asked is None:
        return next(iter(ranked_metrics(df)), None)
    if asked not in df.columns or not numbers(measured(df), asked).notna().any():
        return None
    try:
        metric = parse_metric(asked, df)
    except ValueError:
        return None
    return metric if metric.higher_is_better is not None else None


def _named(df: pd.DataFrame, asked: str | None) -> str:
    """What there is instead of a metric that was asked for."""
    known = [
        m.column for m in metric_columns(df) if m.higher_is_better is not None and numbers(df, m.column).notna().any()
    ]
    return "" if asked is None else f" under --metric {asked}; there are {', '.join(known) or 'none'}"


def _wanted(inputs: Inputs, keys: pd.Series[str], metric: Metric) -> dict[str, SampleKey]:
    """Return whose outcomes of the metric are wanted, of some cells."""
    return sample_keys(inputs.long[inputs.long["key"].isin(set(keys)) & (inputs.long["eval"] == metric.eval)])


def _say(tables: dict[str, pd.DataFrame], metric: Metric, laws: pd.DataFrame) -> None:
    first = laws.iloc[0]
    block = first["blocksize"] or "the whole tensor"
    print(f"{metric.name}; {first['dtype']}, block size {block}. Brackets: 95 % intervals over models.")
    for law, flat in zip(laws.to_dict("records"), tables["laws"]["parameters"], strict=True):
        print(f"\n{law['family']}, {law['law']}: {law['formula']}")
        if flat:
            print(f"  {flat}")
            print(
                f"  off by {law['rmse']:.4f} (root mean square over {law['cells']} quantized cells, R² {law['r2']:.3f})"
            )
        if pd.notna(law["held_out_error"]):
            cells = f"{law['held_out_cells']} cells of {law['held_out']}"
            print(f"  off by {law['held_out_error']:.4f} on average on {cells}, left out of the fit")
        if pd.notna(law["drift"]):
            is_tested = pd.notna(law["parallel_p"])
            test = f"F test p = {law['parallel_p']:.2g}" if is_tested else "too few cells for an F test"
            interval = f" [{law['drift_low']:+.4f}, {law['drift_high']:+.4f}]" if pd.notna(law["drift_low"]) else ""
            print(
                f"  parallel: {test}; over the sizes, {law['drift_bits']} bits move by {law['drift']:+.4f}{interval} "
                "against the others"
            )
        if law["note"]:
            print(f"  {law['note']}")
    _say_effective(tables["effective_parameters"])
    for family, own in tables["best_by_budget"].groupby("family", sort=False):
        print(f"\nBest precision for a number of model bits, {family} (interval and confidence over texts):\n")
        shown = own.iloc[np.unique(np.linspace(0, len(own) - 1, min(len(own), _ROWS)).astype(int))][_BEST]
        print(shown.to_markdown(index=False, floatfmt=".4g"))


def _say_effective(effective: pd.DataFrame) -> None:
    if effective.empty:
        return
    shown = [_share(r, k) for r, k in zip(effective["ratio"], effective["known"], strict=True)]
    rows = effective.assign(shown=shown).drop_duplicates(["curve", "model", "bits"])
    wide = rows.pivot(index=["curve", "model"], columns="bits", values="shown").reset_index()
    print("\nEffective parameters, as a share of the model's (≤: worse than the smallest 16-bit model):\n")
    print(wide.to_markdown(index=False))


def _share(ratio: float, known: str) -> str:
    return {"at most": "≤ ", "at least": "≥ "}.get(known, "") + f"{ratio:.2f}"
