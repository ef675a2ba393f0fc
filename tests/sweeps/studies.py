"""Studies that are stored without being run: rows as a worker writes them, whose numbers follow from their samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from kbit import QuantSpec
from kbit.evaluation.perplexity import summarize
from kbit.evaluation.spec import EvalResult, EvalSpec
from sweeps.commands import run_mode
from sweeps.config import register
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, result_columns, run_row
from sweeps.store.schema import Row
from sweeps.study.cell import Cell, Measurement, ModelRef
from sweeps.study.manifest import Manifest
from tests.conftest import ROOT

TEXT = EvalSpec(name="jargon", kind="perplexity", dataset="sha256:aa", compute_dtype="storage", window=65)
TASK = EvalSpec(name="choice", kind="task", version="1.0", dataset="sha256:bb", compute_dtype="storage")
PROVENANCE: Row = {
    **{"commit": "c" * 40, "dirty": False, "versions": json.dumps({"torch": "2.13.0"}), "device": "cpu", "gpus": 0},
    **{"kernel": "torch", "seed": 0, "launch": "l1 (s-1)", "job": "here", "host": "h", "batch_tokens": 1024},
}
COUNTED: Row = {
    "bits_per_param": 4.25,
    "total_bits": 1e6,
    "total_bits_nominal": 1e6,
    "codebook_hash": "b",
    "held": "whole",
}


def study(sweep: str = "s", *, bits: Iterable[int] = (16, 4, 3), models: Sequence[str] = ("m-s",)) -> Manifest:
    refs = [
        ModelRef(family="m", name=name, params=1000, path=f"/models/{name}", weights_hash=f"sha256:{name}")
        for name in models
    ]
    specs = [QuantSpec(bits=b) if b == 16 else QuantSpec(bits=b, dtype="int", blocksize=64) for b in bits]
    cells = tuple(Cell(model=model, quant=spec) for model in refs for spec in specs)
    return Manifest(sweep=sweep, cells=cells, evals=(TEXT, TASK), excluded=(), config={})


def result(measurement: Measurement, *, seed: int = 0) -> EvalResult:
    """What a model might have given: the same for one measurement and seed."""
    rng = np.random.default_rng([seed, int(measurement.key[:8], 16)])
    if measurement.eval.kind == "task":
        right = rng.random(50) < 0.6
        acc = float(right.mean())
        metrics, samples = {"acc": acc}, {"acc": right}
        stderr = {"acc": float(right.std(ddof=1)) / np.sqrt(len(right))}
    else:
        nats = rng.normal(3.0, 0.1, 20) * 64
        metrics, stderr = summarize(nats, 64, np.full(20, 300))
        samples = {"nats": nats.astype(np.float32), "tokens": np.full(20, 64, dtype=np.int32)}
    return EvalResult(
        metrics=metrics,
        stderr=stderr,
        samples=samples,
        diverged=False,
        n_samples=len(next(iter(samples.values()))),
        n_tokens=1300,
        dataset_hash=hashlib.sha256(measurement.eval.name.encode()).hexdigest(),
    )


def stored_row(measurement: Measurement, *, seed: int = 0, sweep: str = "s", **other: object) -> Row:
    origin = Origin(sweep=sweep, pack="p1", provenance=PROVENANCE)
    about = {"compute_dtype": "float16", "seconds": 1.0, "quantize_seconds": 0.1, "load_seconds": 2.0}
    row = run_row(measurement, origin, datetime.now(UTC))
    return {
        **row,
        **result_columns(result(measurement, seed=seed)),
        **COUNTED,
        **about,
        "peak_memory_bytes": 1,
        **other,
    }


def store_study(
    out: Path, manifest: Manifest, *, seed: int = 0, wanted: Callable[[Measurement], bool] = lambda _: True
) -> Store:
    """A results directory that holds a study, of which the wanted measurements are stored."""
    store = Store(out=out)
    manifest.save(out)
    for measurement in manifest.measurements():
        if wanted(measurement):
            store.write(stored_row(measurement, seed=seed, sweep=manifest.sweep))
    store.close()
    return store


def composed(*arguments: str) -> DictConfig:
    """What Hydra composes of a command's arguments."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(arguments))


_defaults = cache(composed)


def configured(*arguments: str) -> DictConfig:
    """The same of values of keys, of no groups: in a fiftieth of the time."""
    config = deepcopy(_defaults())
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        OmegaConf.update(config, override.key_or_group, override.value())
    return config


def command(*arguments: str) -> int:
    """The command in this process, with keys but without groups: what it says is on standard output and error."""
    return run_mode(configured(*arguments), arguments)
