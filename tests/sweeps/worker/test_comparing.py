"""A worker takes the 16-bit model's side of a comparison once per loaded model, and runs the model once for what comes
together.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.evaluation.agreement import AgreementEval
from kbit.evaluation.spec import EvalSpec
from kbit.models.loading import load_model
from kbit.sources import LocalFile
from sweeps import load_samples
from sweeps.events import Measuring
from sweeps.store.parts import Store
from sweeps.worker.model_cache import Warm
from tests.conftest import ROOT
from tests.sweeps.worker.test_worker import (
    BASELINE,
    INT3,
    INT4,
    NEOX_XS,
    SHORT_OF_MEMORY,
    Bench,
    evaluation,
    pack_of,
)

NEOX_S = NEOX_XS.parent / "neox-s"


def agreement(**changes: Any) -> EvalSpec:
    return evaluation("jargon_agreement", kind="agreement", **changes)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what went through a model: 'refer' and 'run' of agreement, as they are called."""
    called: list[str] = []
    for name in ("refer", "run"):
        original = getattr(AgreementEval, name)

        def counted(self: AgreementEval, *args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            called.append(name)
            return original(self, *args, **kw)

        monkeypatch.setattr(AgreementEval, name, counted)
    return called


def test_the_16_bit_side_is_taken_once_and_perplexity_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Bench(tmp_path / "alone")
    alone.worker.run_pack(pack_of(BASELINE, INT4, INT3))
    called = count_runs(monkeypatch)
    bench = Bench(tmp_path / "both")
    bench.worker.run_pack(pack_of(BASELINE, INT4, INT3, evals=(evaluation(), agreement())))
    assert called == ["refer", "run", "run", "run"]
    rows = {(row["bits"], row["eval"]): row for row in bench.rows()}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len(rows) == 6
    own = {row["bits"]: row for row in alone.rows()}
    for bits in (16, 4, 3):
        along = rows[bits, "jargon"]
        for same in ("metrics", "stderr", "n_samples", "n_tokens", "dataset_hash", "measurement"):
            assert along[same] == own[bits][same], same
        # Half of the time of one run each, so that a study's times add up.
        assert along["seconds"] == rows[bits, "jargon_agreement"]["seconds"] > 0
    kl = {bits: dict(rows[bits, "jargon_agreement"]["metrics"])["kl"] for bits in (16, 4, 3)}
    assert kl[16] == 0 < kl[4] < kl[3]
    measurement = own[4]["measurement"]
    samples = [load_samples(tmp_path / out, [measurement])[measurement] for out in ("alone", "both")]
    assert [{name: array.tolist() for name, array in of.items()} for of in samples] == [
        {name: array.tolist() for name, array in samples[0].items()}
    ] * 2


def test_what_comes_for_another_text_or_nobody_is_dropped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    other = evaluation("other", window=256)
    bench.worker.run_pack(pack_of(INT4, evals=(other, agreement())))
    rows = {row["eval"]: row for row in bench.rows()}
    assert rows["other"]["n_samples"] == 4
    assert rows["jargon_agreement"]["n_samples"] == 2
    assert rows["other"]["seconds"] != rows["jargon_agreement"]["seconds"]


def test_without_its_16_bit_side_only_what_needs_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = agreement(source=LocalFile(path=str(tmp_path / "nowhere.jsonl")))
    changed = evaluation("changed", kind="agreement", source=LocalFile(path=str(ROOT / "README.md"), sha256="0" * 64))
    bench = Bench(tmp_path / "r")
    bench.worker.run_pack(pack_of(BASELINE, INT4, evals=(evaluation(), lacking, changed)))
    assert {(r["bits"], r["eval"]): r["status"] for r in bench.rows()} == {
        (16, "jargon"): "done",
        (4, "jargon"): "done",
        (16, "jargon_agreement"): "failed",
        (4, "jargon_agreement"): "failed",
    }
    assert bench.names().count("withheld") == 2
    # Where it would kill the process, it is the suspect.
    suspects = [e.measurement for e in bench.events if isinstance(e, Measuring)]
    assert suspects[0] == next(r["measurement"] for r in bench.rows() if r["status"] == "failed" and r["bits"] == 16)
    # A cell with nothing left is not quantized.
    only = Bench(tmp_path / "only")
    monkeypatch.setattr("kbit.models.quantize.quantize_model", None)
    only.worker.run_pack(pack_of(INT4, evals=(lacking,)))
    assert [r["error_type"] for r in only.rows()] == ["ValueError"]


def test_what_is_kept_goes_with_the_model_that_it_is_of(tmp_path: Path) -> None:
    warm = Warm(device="cpu", gpus=1, trust_remote_code=False)
    packs = [pack_of(BASELINE, INT4, model=model, evals=(agreement(),)) for model in (NEOX_XS, NEOX_S)]
    spec = agreement()
    loaded = warm.load(packs[0].model, "float32")
    assert warm.lacks_reference(spec, loaded, batch_tokens=1024)
    warm.refer(spec, loaded, batch_tokens=1024)
    assert warm.total_seconds > warm.load_seconds  # no cell's own time
    first: Any = warm.prepare(spec, loaded)
    kept = weakref.ref(first.reference)
    assert not warm.lacks_reference(spec, loaded, batch_tokens=1024)
    assert warm.lacks_reference(spec, loaded, batch_tokens=512)
    assert not warm.lacks_reference(evaluation(), loaded, batch_tokens=512)
    warm.refer(spec, loaded, batch_tokens=1024)
    assert warm.prepare(spec, loaded) is first
    del first
    other = warm.load(packs[1].model, "float32")
    gc.collect()
    assert kept() is None
    assert warm.lacks_reference(spec, other, batch_tokens=1024)
    # Prepared once all the same: they share a tokenizer.
    assert warm.prepare(spec, other) is warm.prepare(
        spec, load_model(str(NEOX_XS), device="cpu", compute_dtype="float32")
    )
    bench = Bench(tmp_path)
    for pack in packs:
        bench.worker.run_pack(pack)
    found = {(r["model"], r["bits"]): dict(r["metrics"])["kl"] for r in bench.rows()}
    assert found["neox-xs", 16] == found["neox-s", 16] == 0
    assert found["neox-xs", 4] > 0
    assert found["neox-s", 4] > 0


def test_after_a_cell_without_it_the_16_bit_side_is_still_the_16_bit_models(tmp_path: Path) -> None:
    fresh = Bench(tmp_path / "fresh")
    fresh.worker.run_pack(pack_of(INT3, evals=(agreement(),)))
    pack = pack_of(INT4, INT3)
    (int4, _), (int3, _) = pack.items
    bench = Bench(tmp_path / "after")
    bench.worker.run_pack(dataclasses.replace(pack, items=((int4, (evaluation(),)), (int3, (agreement(),)))))
    (expected,) = fresh.rows()
    (found,) = [row for row in bench.rows() if row["eval"] == "jargon_agreement"]
    assert found["metrics"] == expected["metrics"]


def test_in_smaller_batches_the_16_bit_side_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, run = count_runs(monkeypatch), AgreementEval.run
    failing = [True]

    def run_short_of_memory(self: AgreementEval, model: Any, *, batch_tokens: int) -> Any:
        # Stands for a GPU that is full: only the comparison finds no room, not the pass before it.
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, model, batch_tokens=batch_tokens)

    monkeypatch.setattr(AgreementEval, "run", run_short_of_memory)
    bench = Bench(tmp_path)
    bench.worker.run_pack(pack_of(BASELINE, INT4, evals=(agreement(),)))
    assert called == ["refer", "refer", "run", "run"]
    assert [e.batch_tokens for e in bench.events if e.name == "smaller_batch"] == [1024]  # type: ignore[union-attr]
    rows = {row["bits"]: row for row in bench.rows()}
    assert {row["batch_tokens"] for row in rows.values()} == {1024}
    assert dict(rows[16]["metrics"])["kl"] == 0 < dict(rows[4]["metrics"])["kl"]


def test_where_memory_runs_out_its_batches_are_halved(tmp_path: Path) -> None:
    long = agreement(limit=16384)
    packs = [
        # Imports take their memory before any is measured.
        (pack_of(BASELINE, name="first", evals=(agreement(),)), {}),
        (pack_of(BASELINE, INT4, name="halved", evals=(long,)), {"begin": 60}),
    ]
    lines = [json.dumps({**pack.to_dict(), "limits": limits}) for pack, limits in packs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    told = [e["batch_tokens"] for e in events if e["event"] == "smaller_batch"]
    assert told
    assert told == [16384 >> i for i in range(1, len(told) + 1)]
    rows = [r for r in Store(out=tmp_path).read().to_pylist() if r["pack"] == "halved"]
    assert {r["status"] for r in rows} == {"done"}
    kl = {r["bits"]: dict(r["metrics"])["kl"] for r in rows}
    assert kl[16] == 0 < kl[4]
