"""Compare 16-bit models and methods with published scores: agreeing, off or unknown, within a stated tolerance.

The scores lie in ``references.json``: each table cites its paper, address and place, says under which protocol the
scores were measured, and each of its rows how far another measurement of the same may lie off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from analysis.cells import MEASURED
from kbit.spec import spec_of
from kbit.specs.base import Spec

FILE: Final = Path(__file__).with_name("references.json")
STEADY: Final = 100.0
"""A perplexity above it is a broken model's: another run of it agrees within a factor of two."""
COLUMNS: Final = (
    *("model", "label", "eval", "metric", "value", "reference", "difference", "tolerance", "verdict", "reason"),
    *("published_as", "paper", "table", "address", "key"),
)
_SAME_SIZE: Final = 0.01
_REASON_UNKNOWN: Final = "no published score of this model and method is known here"


class Agreement(StrEnum):
    """How a score lies to a published one."""

    AGREES = "agrees"
    OFF = "off"
    UNKNOWN = "unknown"


@cache
def references() -> pd.DataFrame:
    """Return the published scores, one row each.

    Returns:
        Columns: model (hub id), params, published_as, cell (dict of axes; None where no method of ours does it), eval,
        metric, reference (float64), tolerance (in the metric's unit), protocol (dict), paper, table, address, read
        (where the value was read), id (of the table).
    """
    data = json.loads(FILE.read_text(encoding="utf-8"))
    rows = [
        {
            **{"model": model, "params": data["models"].get(model), "published_as": row["label"], "cell": row["cell"]},
            **{name: table[name] for name in ("eval", "metric", "protocol", "paper", "table", "address", "read", "id")},
            **{"reference": float(value), "tolerance": _tolerance(row["tolerance"], float(value), table["metric"])},
        }
        for table in data["tables"]
        for row in table["rows"]
        for model, value in row["values"].items()
    ]
    return pd.DataFrame(rows)


def check_references(long_df: pd.DataFrame, *, known_only: bool = False) -> pd.DataFrame:
    """Mark each 16-bit model and method as agreeing with a published score, off, or unknown, and say why.

    A score is compared with what was published of the same model (its hub id, or a directory of that name whose model
    has as many parameters) under the same quantization, if the protocol is the same, too: data, window, limit, few-shot
    examples, size of the calibration. Several sources of one score give a row each.

    Args:
        long_df: the long result table.
        known_only: leave out what no score is known of.

    Returns:
        Columns ``COLUMNS``, a row per measured score and source: value and reference; difference (value - reference);
        tolerance; verdict (``Agreement``); reason in words; the citation. What no source has is one row for each
        measurement, unknown. Without rows where nothing was measured.
    """
    measured = long_df[long_df["status"].isin(MEASURED)] if len(long_df) else long_df
    wanted = _of_known_models(measured)
    found = pd.DataFrame(list(_checked(measured[wanted])), columns=list(COLUMNS))
    if known_only or measured.empty:
        return found
    has = pd.MultiIndex.from_frame(found[["key", "eval"]])
    rest = measured[~pd.MultiIndex.from_frame(measured[["key", "eval"]]).isin(has)]
    unknown = rest.assign(verdict=Agreement.UNKNOWN, reason=_REASON_UNKNOWN)
    about = unknown[["model", "label", "eval", "key", "verdict", "reason"]].reindex(columns=list(COLUMNS))
    return about if found.empty else pd.concat([found, about], ignore_index=True)


def references_text(checked: pd.DataFrame) -> list[str]:
    """Return a sentence for each score of ``check_references`` that agrees or is off, and how many are unknown."""
    lines = [
        f"{row['model']} {row['label']}: {row['eval']} {row['metric']} {row['value']:.4g} {row['verdict']}: "
        f"published {row['reference']:.4g} ± {row['tolerance']:.2g} ({row['paper']}, {row['table']})"
        for row in checked[checked["verdict"] != Agreement.UNKNOWN].to_dict("records")
    ]
    unknown = checked[checked["verdict"] == Agreement.UNKNOWN]
    lines += [f"{n} unknown: {reason}" for reason, n in unknown["reason"].value_counts().items()]
    return lines


def _tolerance(given: Mapping[str, float], value: float, metric: str) -> float:
    if metric == "perplexity" and value > STEADY and "relative" in given:
        return value / 2
    return float(given["absolute"]) if "absolute" in given else float(given["relative"]) * value


def _of_known_models(measured: pd.DataFrame) -> pd.Series[bool]:
    """Tell which measurements are of an evaluation and a model that scores were published of."""
    if measured.empty:
        return pd.Series(False, index=measured.index)
    known = references()[["model", "params"]].drop_duplicates().to_dict("records")
    models = measured[["model_id", "params"]].drop_duplicates()
    same = [any(_is_model(_named(row), _named(k)) for k in known) for row in models.to_dict("records")]
    ids = set(models.loc[same, "model_id"])
    return measured["eval"].isin(set(references()["eval"])) & measured["model_id"].isin(ids)


def _checked(measured: pd.DataFrame) -> Iterator[dict[str, Any]]:
    published = {str(name): rows for name, rows in references().groupby("eval")}
    for row in map(_named, measured.to_dict("records")):
        about = {"model": row["model"], "label": row["label"], "eval": row["eval"], "key": row["key"]}
        for reference in _alike(row, published[row["eval"]]):
            yield {**about, **_judged(row, reference)}


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def _alike(row: Mapping[str, Any], published: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the published scores of a measurement's model, quantization and metrics."""
    rows = [_named(r) for r in published.to_dict("records")]
    of_model = [r for r in rows if r["cell"] is not None and _is_model(row, r)]
    return [r for r in of_model if r["metric"] in (row["metrics"] or {}) and _is_cell(row, r["cell"])]


def _is_model(row: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """The same hub id; or a local directory of its name, as large."""
    found = str(row["model_id"]).rstrip("/")
    if found.lower() == str(reference["model"]).lower():
        return True
    if found.rpartition("/")[2].lower() != str(reference["model"]).rpartition("/")[2].lower():
        return False
    sizes = [size for size in (row["params"], reference["params"]) if not pd.isna(size)]
    return len(sizes) == 2 and abs(float(sizes[0]) / float(sizes[1]) - 1) < _SAME_SIZE


def _is_cell(row: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    if row["method"] != cell["method"] or int(row["bits"]) != cell["bits"]:
        return False
    spec = _spec(json.dumps(cell, sort_keys=True))
    return all(_equal(row.get(name), value) for name, value in spec.axis_values().items() if name != "codebook")


@cache
def _spec(cell: str) -> Spec:
    return spec_of(json.loads(cell))


def _equal(found: object, wanted: object) -> bool:
    missing = found is None or (isinstance(found, float) and np.isnan(found)) or found is pd.NA
    return wanted in (None, False) if missing else bool(found == wanted)


def _judged(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    value = float(row["metrics"][reference["metric"]])
    cited = {c: reference[c] for c in ("metric", "reference", "tolerance", "published_as", "paper", "table", "address")}
    difference = value - reference["reference"]
    found = {**cited, "value": value, "difference": difference}
    differs = _protocol_differs(row, reference["protocol"])
    if differs:
        return {**found, "verdict": Agreement.UNKNOWN, "reason": f"measured otherwise: {'; '.join(differs)}"}
    within = bool(np.isfinite(value)) and abs(difference) <= reference["tolerance"]
    said = "within" if within else "beyond"
    return {
        **found,
        "verdict": Agreement.AGREES if within else Agreement.OFF,
        "reason": f"{difference:+.4g}, {said} the tolerance of {reference['tolerance']:.2g}",
    }


def _protocol_differs(row: Mapping[str, Any], protocol: Mapping[str, Any]) -> Sequence[str]:
    """Return what of a measurement's protocol differs from a published one, in words."""
    differs = []
    for name in ("window", "limit", "num_fewshot"):
        if name not in protocol:
            continue
        found = None if pd.isna(row.get(name)) else int(row[name])
        if found != protocol[name]:
            differs.append(f"{name} {_word(found)} rather than {_word(protocol[name])}")
    data = protocol.get("data")
    if data and str(row.get("dataset")).startswith("hub:") and not str(row["dataset"]).startswith(data):
        differs.append(f"data {row['dataset']} rather than {data}")
    if not pd.isna(row.get("eval_bos")):
        differs.append(f"beginning-of-sequence token {row['eval_bos']}")
    wanted = protocol.get("calibration")
    calibration = row.get("calibration")
    if wanted and isinstance(calibration, str):
        used = json.loads(calibration)
        differs += [
            f"calibrated on {name} {used.get(name)} rather than {wanted[name]}"
            for name in ("samples", "length")
            if used.get(name) != wanted[name]
        ]
    return differs


def _word(value: object) -> str:
    return "none" if value is None else str(value)
