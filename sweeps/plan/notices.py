"""Say what a user should know of a study before it runs, though nothing is wrong: shown by plan and run alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from kbit.errors import CheckpointError
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.checkpoint import read_config
from kbit.specs.base import Spec
from sweeps.errors import HubError
from sweeps.status import FINAL
from sweeps.store.parts import Store
from sweeps.store.schema import Row
from sweeps.study.cell import UNRESOLVED, Measurement, ModelRef
from sweeps.study.hub import ModelConfig, first_content_hash
from sweeps.study.manifest import Manifest, load_manifests
from sweeps.study.reading import superseded
from sweeps.text import counted

NEEDS_BOS: Final = ("gemma",)
"""How the model types begin whose models were trained with the beginning-of-sequence token before every text, and lose
whole nats without it. The families' own documentation says so.
"""
_SHOWN: Final = 4
_COLUMNS: Final = (
    *("key", "measurement", "sweep", "model", "model_id", "weights_hash", "revision"),
    *("label", "eval", "dataset", "eval_definition"),
)


def notices(store: Store, manifest: Manifest) -> list[str]:
    """Return what is to be said of a study that is about to run, a sentence or two each.

    Args:
        store: with the results of earlier launches.
        manifest: the study.
    """
    of_study = [*_calibrate_on_tests(manifest), *_need_bos(manifest)]
    results = store.read(["measurement", "status"])
    final = dict(zip(results.column("measurement").to_pylist(), results.column("status").to_pylist(), strict=True))
    left = [m for m in manifest.wanted() if final.get(m.key) not in FINAL]
    if not final or not left:
        return of_study
    rows = store.read(_COLUMNS).to_pylist()
    return [
        *_changed_models(rows, left),
        *_earlier_readings(store, rows, left),
        *_changed_evals(rows, left, manifest.sweep),
        *of_study,
    ]


def _changed_models(rows: Sequence[Row], left: Sequence[Measurement]) -> Iterator[str]:
    """Say which models are other ones under a known path, or hub id, than those that results are of."""
    by_place: dict[object, list[Row]] = {}
    for row in rows:
        # Revisions of one hub id are models of their own, by other names; a path has one model at a time.
        by_place.setdefault(row["model_id"] if row["weights_hash"] else (row["model_id"], row["model"]), []).append(row)
    measured = {row["key"] for row in rows}
    unmeasured: dict[ModelRef, set[str]] = {}
    for m in left:
        if m.cell.key not in measured:
            unmeasured.setdefault(m.cell.model, set()).add(m.cell.quant_label)
    for model, labels in unmeasured.items():
        content = str(model.weights_hash or model.commit)
        of_place = by_place.get(model.path or (model.hub_id, model.label), [])
        old = [row for row in of_place if (row["weights_hash"] or row["revision"]) != content]
        if content.startswith(UNRESOLVED) or labels.isdisjoint(row["label"] for row in old):
            continue
        stay = counted(len({row["key"] for row in old}), "cell")
        if model.path and {row["weights_hash"] for row in old} == {_first_hash(model.path)}:
            yield (
                f"files of {model.label} that were not part of its key now are, such as generation_config.json: {stay} "
                "under the old key stay, and it is measured again"
            )
        else:
            what = (
                f"weights of {model.label} differ from those" if model.path else f"commit of {model.label} is not that"
            )
            yield f"{what} of the earlier launch: {stay} of the old ones stay, and it is measured again"


def _first_hash(path: str) -> str | None:
    try:
        return first_content_hash(Path(path))
    except (HubError, OSError):
        return None


def _earlier_readings(store: Store, rows: Sequence[Row], left: Sequence[Measurement]) -> Iterator[str]:
    """Say which models were measured under an earlier reading, and why that doesn't count."""
    models = [model for model in dict.fromkeys(m.cell.model for m in left) if model.reading > 1]
    if not models:
        return
    measured = {row["key"] for row in rows}
    cells = {c.key: c.model for m in load_manifests(store.out) for c in m.cells if c.key in measured}
    earlier = superseded([*cells.values(), *models])
    for model in models:
        old = [own for own in cells.values() if own in earlier and own.origin == model.origin]
        if old:
            count = counted(len(old), "earlier cell")
            yield f"{count} of {model.label} stay and don't count, and it is measured again: {earlier[old[0]]}"


def _changed_evals(rows: Sequence[Row], left: Sequence[Measurement], sweep: str) -> Iterator[str]:
    """Say which evaluations of a study read other data than its results did, or are tasks defined otherwise."""
    cells: dict[EvalSpec, set[str]] = {}
    for m in left:
        cells.setdefault(m.eval, set()).add(m.cell.key)
    for spec, keys in cells.items():
        of_eval = [row for row in rows if (row["sweep"], row["eval"]) == (sweep, spec.name) and row["key"] in keys]
        old = {row["measurement"] for row in of_eval if row["dataset"] != spec.dataset}
        if old and UNRESOLVED not in spec.dataset:
            yield (
                f"data of {spec.name} differ from those of the earlier launch: {counted(len(old), 'measurement')} on "
                "the old ones stay, and it is measured again"
            )
        old = {row["measurement"] for row in of_eval if row["eval_definition"] != spec.definition}
        if old:
            known = any(row["eval_definition"] for row in of_eval)
            yield (
                f"the definition of {spec.name} {'differs from that' if known else 'was no part of its key'} of the "
                f"earlier launch: {counted(len(old), 'measurement')} of the old one stay, and it is measured again"
            )


def _calibrate_on_tests(manifest: Manifest) -> Iterator[str]:
    """Say which text sets are both calibrated on and measured on."""
    cells = [c for c in manifest.wanted_cells() if c.calibration is not None]
    for dataset, name in {c.calibration.dataset: c.calibration.name for c in cells if c.calibration}.items():
        same = [e.name for e in manifest.evals if e.dataset == dataset]
        if same:
            methods = _some(list(dict.fromkeys(_calibrating(c.quant) for c in cells)))
            yield (
                f"calibration.set={name} is also measured on ({_some(same)}): cells of {methods} have seen what they "
                "are tested on, and their losses are too low there. Calibrate on another text, such as a training split"
            )


def _calibrating(spec: Spec) -> str:
    """Return the method that calibrates, or the option with which one does: 'gptq', 'weighting=activation'."""
    name, value = spec.calibrating
    return value if name == "method" else f"{name}={value}"


def _need_bos(manifest: Manifest) -> Iterator[str]:
    specs = [e for e in manifest.evals if "bos" in EVALUATORS[e.kind].settings and e.bos != "each"]
    models = [m.label for m in dict.fromkeys(c.model for c in manifest.wanted_cells()) if _needs_bos(m)]
    if not specs or not models:
        return
    names = _some([e.name for e in specs])
    has = "in no window" if all(e.bos == "none" for e in specs) else "in the first window at most"
    yield (
        f"{_some(models)}: trained with the beginning-of-sequence token before every text, which with "
        f"eval.bos={specs[0].bos or 'first'} stands {has} of {names}: their losses will be far too high. eval.bos=each "
        "puts it into every window"
    )


def _needs_bos(model: ModelRef) -> bool:
    if model.path is None:
        return any(name in f"{model.hub_id}".lower().rpartition("/")[2] for name in NEEDS_BOS)
    try:
        config: ModelConfig = read_config(Path(model.path))
    except (CheckpointError, OSError):
        return False
    return str(config["model_type"]).startswith(NEEDS_BOS)


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
