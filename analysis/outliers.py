"""``python -m analysis outliers OUT [OUT2 …]``: what 16-bit models' outliers look like, from stored measurements.

Correlations of the spread of weights with the size of activations by layer (Table 2), and the emergence of outlier
features with scale, as LLM.int8() defines them: a table and a figure of each. ``kbit.evaluation.outliers`` says what is
measured, and how.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.cells import MEASURED, baselines, measured
from analysis.figures.outliers import draw_correlations, draw_emergence, layer_order
from analysis.figures.saving import save
from analysis.inputs import Inputs, directory_of
from analysis.metrics import primary_loss
from analysis.mixtures import mixture_warnings
from analysis.report.parts import Section, TablePart
from analysis.significance import LEVEL, Samples
from analysis.tables import write_table
from analysis.tables.text import pipe_table, value_text
from kbit.errors import SpecError
from kbit.evaluation.evaluators import (
    OUTLIER_LAYERS,
    OUTLIER_MAGNITUDE,
    OUTLIER_POSITIONS,
    OUTLIERS,
    SPREAD_PAIRS,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP: Final = "tables and figures of 16-bit models' outliers (Table 2; LLM.int8()'s outlier features by scale)"
KIND: Final = "outliers"
CONTROL: Final = "ffn1_ffn2"
"""The paper's control, where FFN 1 is followed by a ReLU."""
_SIGNIFICANT: Final = 0.05
_FINITE: Final = 1e-9
"""As near as a correlation comes to 1 where Fisher's z has to be finite."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """What was measured of one or several models' outliers.

    Attributes:
        correlations: a row per model, text set and pair of layers: 'layers' (for people), 'weights' and 'reads' (its
            two sides), 'is_control', 'correlation' (mean over blocks), 'low' and 'high' (95 % over blocks, NaN of one),
            'p' (two-sided, of no relation), 'by_largest' (with the largest magnitudes), 'pooled' (all blocks'
            dimensions at once), 'blocks', 'units' (dimensions of a block) and 'of_blocks' (each block's).
        emergence: a row per model and text set: 'features', 'one_sided' (those of one sign, of up to 64), 'layers' and
            'positions' (the shares that they affect) with '_stderr', 'widest_layers', 'widest_positions' and
            'largest_input'.
    """

    correlations: pd.DataFrame
    emergence: pd.DataFrame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write; else OUT/reports/STUDY")


def run(arguments: argparse.Namespace, inputs: Inputs) -> int:
    """Print the tables, write them and the figures, and say where they are.

    Raises:
        SpecError: nothing of the kind is stored.
    """
    found = outliers_of(inputs)
    for warning in mixture_warnings(inputs.long[inputs.long["eval_kind"] == KIND]):
        print(f"note: {warning}")
    print(correlations_markdown(found.correlations))
    print(emergence_markdown(found.emergence))
    directory = arguments.to or directory_of(arguments.out[0]) / "reports" / inputs.name
    for path in write_outliers(found, directory, arguments.study):
        print(path)
    return 0


def outliers_of(inputs: Inputs) -> Outliers:
    """Return what is stored of outliers, smaller models first in each family.

    Raises:
        SpecError: nothing is.
    """
    stored = _stored(inputs.df, inputs.long)
    if not stored:
        raise SpecError(
            "out", inputs.title, f"results with measurements of kind {KIND}: run 'eval.kinds={{{KIND}: [SET]}}' first"
        )
    samples = inputs.read_samples([measurement for *_, measurement in stored])
    correlations, emergence = [], []
    for about, metrics, stderr, measurement in stored:
        own = samples[measurement]
        correlations += [about | _correlation(pair, own) for pair in SPREAD_PAIRS if pair in own]
        emergence.append(about | _emergence(metrics, stderr, own))
    return Outliers(correlations=pd.DataFrame(correlations), emergence=pd.DataFrame(emergence))


def outlier_section(df: pd.DataFrame, long_df: pd.DataFrame) -> Section | None:
    """Return the part of a report about outliers: a row per model, of the metrics alone; None where there are none."""
    rows = [about | metrics for about, metrics, *_ in _stored(df, long_df)]
    if not rows:
        return None
    found = pd.DataFrame(rows)
    titles = {m.name: m.title for m in OUTLIERS.metrics}
    titles |= {f"spearman_{pair}": f"{weights} / {reads}" for pair, (weights, reads) in SPREAD_PAIRS.items()}
    there = [name for name in titles if name in found and found[name].notna().any()]
    frame = found[["model", "params", "eval", *there]].round(dict.fromkeys(there, 3)).rename(columns=titles)
    return Section(
        anchor="outliers",
        title="Outliers of 16-bit models",
        intro="python -m analysis outliers OUT has their intervals and figures; docs/outliers.md says what they are.",
        tables=[TablePart(title="Outlier features, and correlations of weights with activations", frame=frame)],
    )


def write_outliers(found: Outliers, directory: Path, study: str | None = None) -> list[Path]:
    """Write tables (CSV, Markdown, LaTeX) and figures (PNG, SVG); return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, table, markdown in (
        ("outlier_correlations", found.correlations, correlations_markdown),
        ("outlier_emergence", found.emergence, emergence_markdown),
    ):
        made += [write_table(table, directory / f"{name}.{kind}") for kind in ("csv", "tex")]
        made.append(directory / f"{name}.md")
        made[-1].write_text(markdown(table))
    return [*made, *(save(figure, directory / name) for name, figure in outlier_figures(found, study).items())]


def outlier_figures(found: Outliers, study: str | None = None) -> dict[str, Figure]:
    """Return the figures that the data allow, by their names; of several text sets each has its own."""
    figures: dict[str, Figure | None] = {}
    evals = found.emergence["eval"].unique().tolist()
    for of in evals:
        suffix = f"_{of}" if len(evals) > 1 else ""
        figures[f"outlier_correlations{suffix}"] = draw_correlations(_only(found.correlations, of), study=study)
        figures[f"outlier_emergence{suffix}"] = draw_emergence(_only(found.emergence, of), study=study)
    return {name: figure for name, figure in figures.items() if figure is not None}


def correlations_markdown(table: pd.DataFrame) -> str:
    """Return Table 2, one for each family and text set: layers down, models across."""
    parts = []
    for (of, family), own in table.groupby(["eval", "family"], sort=False):
        models = own["model"].unique().tolist()
        texts = {(r["layers"], r["model"]): _correlation_text(r) for r in _records(own)}
        pooled = {(r["layers"], r["model"]): f"{r['pooled']:.2f}" for r in _records(own)}
        rows = [
            [name + how, *(cells.get((name, m), "-") for m in models)]
            for cells, how in ((texts, ""), (pooled, ", pooled"))
            for name in layer_order(own)
        ]
        text = str(of).removesuffix(OUTLIERS.suffix)
        head = f"Rank correlation of the spread of weights with the magnitude of activations: {family}, on {text}\n\n"
        parts.append(head + pipe_table(["Layer / feature", *models], rows, numeric_from=1))
    chance = f"* p < {_SIGNIFICANT:g} (two-sided, over permutations of the dimensions)"
    how = f"Mean over blocks [{100 * LEVEL:g} % interval over blocks]; {chance}"
    return "\n".join([*parts, f"{how}; pooled: of the dimensions of all blocks at once.\n"])


def emergence_markdown(table: pd.DataFrame) -> str:
    """Return a row per model: how many outlier features it has, and what they affect."""
    columns = ["Model", "Parameters", "Loss", "Outlier features", "One-sided", "Layers", "Positions"]
    columns += ["Widest feature: layers", "positions", "Largest input"]
    rows = []
    for r in _records(table):
        layers, positions = (
            value_text(100 * r[n], 100 * r[f"{n}_stderr"], False, decimals=1) for n in ("layers", "positions")
        )
        numbers = [f"{r['features']:.0f}", f"{r['one_sided']:.0f}", f"{layers} %", f"{positions} %"]
        widest = [f"{100 * r[f'widest_{n}']:.1f} %" for n in ("layers", "positions")]
        params = "-" if math.isnan(r["params"]) else f"{r['params']:,.0f}"
        loss = value_text(r["loss"], math.nan, False, decimals=3)
        rows.append([str(r["model"]), params, loss, *numbers, *widest, f"{r['largest_input']:.1f}"])
    note = (
        f"An outlier feature has a magnitude of at least {OUTLIER_MAGNITUDE:g} in at least {100 * OUTLIER_LAYERS:g} % "
        f"of the layers and at {100 * OUTLIER_POSITIONS:g} % of the positions; ± one standard error over windows. "
        f"Text: {', '.join(of.removesuffix(OUTLIERS.suffix) for of in table['eval'].unique())}.\n"
    )
    return pipe_table(columns, rows, numeric_from=1) + "\n" + note


def _stored(
    df: pd.DataFrame, long_df: pd.DataFrame
) -> list[tuple[dict[str, Any], dict[str, float], dict[str, float], str]]:
    """Return (about the model, metrics, standard errors, measurement) of each measurement, by family and size."""
    if "eval_kind" not in long_df:
        return []
    stored = long_df[(long_df["eval_kind"] == KIND) & long_df["status"].isin(MEASURED)]
    if not len(stored):
        return []
    wide = baselines(measured(df)).drop_duplicates("key").set_index("key")
    metric = primary_loss(df)
    loss = wide[metric.column] if metric is not None else pd.Series(math.nan, index=wide.index)
    found = []
    for row in _records(stored[stored["key"].isin(wide.index)]):
        key = row["key"]
        about = {name: wide.at[key, name] for name in ("family", "model")}
        about |= {"params": _number(wide.at[key, "params"]), "loss": float(loss[key]), "eval": row["eval"]}
        found.append((about, dict(row["metrics"]), dict(row["stderr"]), str(row["measurement"])))
    return sorted(
        found, key=lambda of: (of[0]["eval"], str(of[0]["family"]), np.nan_to_num(of[0]["params"], nan=math.inf))
    )


def _correlation(pair: str, samples: Samples) -> dict[str, Any]:
    """Return what is known of one pair of layers, of a measurement's samples."""
    weights, reads = SPREAD_PAIRS[pair]
    of_blocks = samples[pair].astype(np.float64)
    there = ~np.isnan(of_blocks)
    mean, low, high = _interval(of_blocks[there])
    is_control = pair == CONTROL and bool((samples[f"{pair}_least"][samples[f"{pair}_units"] > 0] >= 0).all())
    chance = float(samples[f"{pair}_chance"][0])
    feature = f"{'ReLU (control)' if is_control else 'activation'}" if pair == CONTROL else reads
    largest = samples[f"{pair}_largest"][there]
    return {
        "layers": f"{weights} / {feature}",
        **{"weights": weights, "reads": reads, "is_control": is_control, "correlation": mean, "low": low, "high": high},
        "p": math.erfc(abs(mean) / chance / math.sqrt(2)) if chance > 0 else math.nan,
        "by_largest": float(largest.mean()) if len(largest) else math.nan,
        "pooled": float(samples[f"{pair}_pooled"][0]),
        **{"blocks": int(there.sum()), "units": int(samples[f"{pair}_units"].max()), "of_blocks": of_blocks.tolist()},
    }


def _emergence(metrics: Mapping[str, float], stderr: Mapping[str, float], samples: Samples) -> dict[str, Any]:
    names = {"features": "outlier_features", "layers": "outlier_layers", "positions": "outlier_positions"}
    values = {name: metrics[metric] for name, metric in names.items()}
    # Samples are float32, and list no more than the 64 dimensions that are large at most positions.
    shares = (("feature_layers", OUTLIER_LAYERS), ("feature_positions", OUTLIER_POSITIONS))
    chosen = np.logical_and.reduce([samples[name] >= np.float32(least) for name, least in shares])
    crosses = (samples["feature_low"] <= -OUTLIER_MAGNITUDE) & (samples["feature_high"] >= OUTLIER_MAGNITUDE)
    values["one_sided"] = float((chosen & ~crosses).sum())
    values |= {f"{name}_stderr": stderr.get(names[name], math.nan) for name in ("layers", "positions")}
    return values | {name: metrics[name] for name in ("widest_layers", "widest_positions", "largest_input")}


def _interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of correlations, and an interval by Student's t of Fisher's z; NaN where there are too few."""
    from scipy.stats import t

    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    z = np.arctanh(np.clip(values, -1 + _FINITE, 1 - _FINITE))
    half = t.ppf((1 + LEVEL) / 2, len(z) - 1) * z.std(ddof=1) / math.sqrt(len(z))
    return mean, math.tanh(z.mean() - half), math.tanh(z.mean() + half)


def _correlation_text(row: Mapping[str, Any]) -> str:
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['correlation']:.2f}{interval}{'*' if row['p'] < _SIGNIFICANT else ''}"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _only(table: pd.DataFrame, of: str) -> pd.DataFrame:
    return table[table["eval"] == of].reset_index(drop=True) if len(table) else table


def _number(value: object) -> float:
    return math.nan if value is None or value is pd.NA else float(value)  # type: ignore[arg-type]
