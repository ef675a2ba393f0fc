"""A study of any size with made-up results: planned by the real planner, written through the real store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from sweeps.config import CONFIG_DIR, register
from sweeps.options import Options
from sweeps.provenance import package_versions
from sweeps.status import State
from sweeps.store.parts import Store
from sweeps.store.rows import Origin, run_row
from sweeps.store.samples import Outcomes
from sweeps.store.schema import Row, Scalar
from sweeps.study.cell import Measurement
from sweeps.study.manifest import Manifest
from sweeps.study.resolve import build_study

DOCUMENTS: Final = 1000
"""Of each task."""
WINDOWS: Final = 24
PACK_CELLS: Final = 40
"""Cells of one model that a job of two hours measures, more or less."""
_EVALUATIONS: Final = 4
_CELLS_A_BLOCKSIZE: Final = 3 * 7 * 4 * 10
"""Models, bits, data types, outlier fractions."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A study of about so many measurements, on the models and evaluations inside the package.

    Attributes:
        out: the results directory.
        measurements: wanted; there are at least so many.
    """

    out: Path
    measurements: int

    @property
    def overrides(self) -> list[str]:
        """The command line's arguments that describe the study."""
        blocks = -(-self.measurements // (_EVALUATIONS * _CELLS_A_BLOCKSIZE))
        sizes = ",".join(str(16 * (n + 1)) for n in range(blocks))
        fractions = ",".join(f"{n / 100:g}" for n in range(10))
        axes = f"bits: [2,3,4,5,6,7,8], dtype: [int,dynamic,quantile,normal], blocksize: [{sizes}]"
        return [
            f"out={self.out}",
            "sweep.name=bench",
            f"sweep.quant=[{{bits: 16}},{{{axes}, outlier_fraction: [{fractions}]}}]",
            "eval.kinds={agreement: [jargon]}",
            "executor.device=cpu",
        ]

    def manifest(self) -> Manifest:
        """Plan it, as a launch does."""
        from hydra import compose, initialize_config_dir

        register()
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            options = Options.from_config(compose("config", self.overrides), self.overrides)
        return build_study(
            options.study, device="cpu", device_name=lambda: "cpu", strict=True, progress=lambda _: None
        ).manifest


def packs_of(manifest: Manifest) -> Iterator[tuple[str, list[Measurement]]]:
    """Yield (pack, measurements) as jobs would have measured them: a model's cells, some at a time."""
    by_model: dict[object, list[Measurement]] = {}
    for measurement in manifest.measurements():
        by_model.setdefault(measurement.cell.model, []).append(measurement)
    number = 0
    for of_model in by_model.values():
        rest = iter(of_model)
        while some := list(islice(rest, PACK_CELLS * _EVALUATIONS)):
            yield f"{number:012x}", some
            number += 1


def results(pack: str, measurements: Sequence[Measurement], seed: int = 0) -> Iterator[Row]:
    """Yield a made-up result of each measurement, of the size that a real one has."""
    random = np.random.default_rng(seed)
    provenance: dict[str, Scalar] = {
        "commit": "0" * 40,
        "dirty": False,
        "versions": package_versions(),
        "launch": "0123456789ab (bench-0123456789abcdef)",
        "job": f"slurm/1234_{pack}",
        "host": "node1",
        "device": "cpu (x86_64)",
        "gpus": 0,
        "kernel": "torch",
        "seed": 0,
        "batch_tokens": 4096,
    }
    origin = Origin(sweep="bench", pack=pack, provenance=provenance)
    started = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=seed)
    # One quantization is shared by all evaluations of a cell.
    quantizing = {key: float(random.gamma(2.0)) for key in dict.fromkeys(m.cell.key for m in measurements)}
    for number, measurement in enumerate(measurements):
        samples = _samples(measurement.eval.kind, random)
        loss = float(random.gamma(4.0))
        yield {
            **run_row(measurement, origin, started + timedelta(seconds=number)),
            "finished": started + timedelta(seconds=number + 1),
            "status": State.DONE.value,
            "metrics": {"loss": loss, "perplexity": float(np.exp(loss))} if "nats" in samples else {"acc": loss / 40},
            "stderr": {"loss": loss / 100} if "nats" in samples else {"acc": loss / 400},
            "samples": samples,
            "n_samples": len(next(iter(samples.values()))),
            "n_tokens": 12288,
            "dataset_hash": "1" * 64,
            "codebook_hash": "2" * 64,
            "held": "whole",
            "bits_per_param": measurement.cell.quant.bits_per_param_nominal,
            "bits_per_param_nominal": measurement.cell.quant.bits_per_param_nominal,
            "total_bits": float(measurement.cell.model.params or 0) * (measurement.cell.quant.bits_per_param_nominal),
            "total_bits_nominal": 1e9,
            "seconds": float(random.gamma(2.0)),
            "quantize_seconds": quantizing[measurement.cell.key],
            "load_seconds": 1.5,
            "predicted_seconds": 2.0,
            "peak_memory_bytes": 123456789,
        }


def fill(store: Store, manifest: Manifest) -> None:
    """Write results of a whole study, a measurement at a time, as workers do; they are not folded."""
    manifest.save(store.out)
    for number, (pack, measurements) in enumerate(packs_of(manifest)):
        for row in results(pack, measurements, seed=number):
            store.write(row)
    store.close()


def counted_flushes() -> Callable[[], int]:
    """Count this process's calls of fsync from now on; return what gives their number."""
    count, flush = 0, os.fsync

    def counted(file: int) -> None:
        nonlocal count
        count += 1
        flush(file)

    os.fsync = counted  # type: ignore[assignment]
    return lambda: count


def _samples(kind: str, random: np.random.Generator) -> dict[str, Outcomes]:
    if kind == "task":
        return {"acc": random.random(DOCUMENTS) < 0.5, "acc_norm": random.random(DOCUMENTS) < 0.6}
    tokens = np.full(WINDOWS, 511, dtype=np.int32)
    names = ("nats",) if kind == "perplexity" else ("kl", "agree", "p_change", "p_change_squares")
    return {**{name: random.random(WINDOWS).astype(np.float32) for name in names}, "tokens": tokens}
