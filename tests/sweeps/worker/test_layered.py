"""A pack whose model fits nowhere runs layer by layer: the same rows, and on from where it was cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.calibration import Calibration
from kbit.evaluation import zeroshot
from kbit.evaluation.spec import EvalSpec
from kbit.layered import run
from kbit.layered.run import LayeredPass
from kbit.models.places import Room
from kbit.sources import LocalFile, source_from_dict
from kbit.spec import QuantSpec, spec_of
from sweeps import load_samples
from sweeps.config import DEMO_DIR
from sweeps.events import BlockDone, Stopped
from sweeps.plan.pack import Pack
from sweeps.study.cell import Cell
from sweeps.worker import layered, ways, worker
from tests import ROOT
from tests.kbit.evaluation.test_zeroshot import write_task
from tests.sweeps.worker.test_worker import BASELINE, INT4, NEOX_XS, Bench, evaluation, pack_of

NEOX_M = NEOX_XS.parent / "neox-m"
MEMORY = 96_000_000
"""Bytes that hold no neox-m whole with a batch in float32, but hold it layer by layer."""
FITS_BUT_NO_GPTQ = 130_000_000
"""Bytes that hold neox-m whole with its originals and a batch, but not what gptq needs beside them."""
OUTLIERS = QuantSpec(bits=3, dtype="quantile", blocksize=64, outlier_fraction=0.02)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "device_memory", lambda _: MEMORY)


def choice(**changes: Any) -> EvalSpec:
    files = {"task_file": DEMO_DIR / "tasks" / "jargon_choice.yaml", "path": DEMO_DIR / "text" / "jargon_choice.jsonl"}
    source = {name: str(path) for name, path in files.items()}
    return evaluation("jargon_choice", kind="task", window=None, limit=24, source=source_from_dict(source), **changes)


def results(bench: Bench, *columns: str) -> dict[tuple[int, str], dict[str, Any]]:
    rows = bench.rows()
    samples = load_samples(bench.store.out, [row["measurement"] for row in rows])
    return {
        (row["bits"], row["eval"]): {
            **{column: row[column] for column in columns},
            "samples": {name: values.tolist() for name, values in samples[row["measurement"]].items()},
        }
        for row in rows
    }


SAME = (
    *("status", "metrics", "stderr", "n_samples", "n_tokens", "dataset_hash", "compute_dtype"),
    *("bits_per_param", "total_bits", "total_bits_nominal", "codebook_hash", "measurement", "batch_tokens"),
)


def test_a_model_that_fits_nowhere_has_the_rows_of_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = (evaluation(), evaluation("jargon_agreement", kind="agreement"), choice())
    pack = pack_of(BASELINE, INT4, OUTLIERS, evals=evals, model=NEOX_M)
    whole = Bench(tmp_path / "whole")
    with monkeypatch.context() as apart:
        # Layer by layer, requests don't share their beginnings: these are equal up to float noise only.
        apart.setattr(zeroshot, "sharing", lambda *_, **__: "not shared: layer by layer")
        whole.worker.run_pack(pack)
    monkeypatch.setattr(ways, "device_memory", lambda _: MEMORY)
    bench = Bench(tmp_path / "layered")
    bench.worker.run_pack(pack)
    assert results(bench, *SAME) == results(whole, *SAME)
    rows = bench.rows()
    assert {row["status"] for row in rows} == {"done"}
    assert ({row["held"] for row in rows}, {row["held"] for row in whole.rows()}) == ({"layer by layer"}, {"whole"})
    assert {row["prefixes"] for row in rows} == {None, "not shared: layer by layer"}
    assert all(row["seconds"] > 0 and row["load_seconds"] > 0 and row["peak_memory_bytes"] > 10**6 for row in rows)
    said = [event for event in bench.events if isinstance(event, BlockDone)]
    assert [(event.done, event.count) for event in said] == [(n, 6) for n in range(1, 7)]
    assert said[0].label == "neox-m, 3 cells layer by layer"
    assert bench.names()[-1] == "pack_done"
    assert not (tmp_path / "layered" / "passes").exists()


@pytest.mark.usefixtures("small_machine")
def test_without_the_baseline_in_the_pack_others_are_still_compared_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = (evaluation("jargon_agreement", kind="agreement"),)
    all_in_one, apart = Bench(tmp_path / "all"), Bench(tmp_path / "apart")
    all_in_one.worker.run_pack(pack_of(BASELINE, INT4, evals=evals, model=NEOX_M))
    apart.worker.run_pack(pack_of(INT4, evals=evals, model=NEOX_M))
    both = results(all_in_one, *SAME)
    assert both[16, "jargon_agreement"]["metrics"][0] == ("kl", 0.0)
    assert results(apart, *SAME) == {key: row for key, row in both.items() if key[0] == 4}


@pytest.mark.usefixtures("small_machine")
def test_what_can_not_be_had_layer_by_layer_fails_by_name_and_the_rest_is_measured(tmp_path: Path) -> None:
    task_file, data = write_task(
        tmp_path,
        [{"q": "The computer is", "a": "on"}] * 3,
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    source = source_from_dict({"task_file": str(task_file), "path": str(data)})
    generating = evaluation("own", kind="task", window=None, limit=None, source=source)
    watching = evaluation("jargon_outliers", kind="outliers")
    bench = Bench(tmp_path / "out")
    bench.worker.run_pack(pack_of(BASELINE, INT4, evals=(evaluation(), generating, watching), model=NEOX_M))
    rows = {(row["bits"], row["eval"]): row for row in bench.rows()}
    assert {key: row["status"] for key, row in rows.items() if key[1] != "jargon_outliers"} == {
        **{(16, "jargon"): "done", (4, "jargon"): "done", (16, "own"): "failed", (4, "own"): "failed"}
    }
    said = "jargon_outliers watches what enters the layers of a model in memory: neox-m doesn't fit this device so"
    assert said in rows[16, "jargon_outliers"]["error"]
    assert "own can't be measured layer by layer: it generates text, token by token" in rows[4, "own"]["error"]


@pytest.mark.usefixtures("small_machine")
def test_what_fits_packed_joins_a_pass_that_is_made_anyway_but_not_what_it_can_not_give() -> None:
    layered = [(16, "perplexity"), (16, "latency"), (4, "perplexity")]
    assert ways_of(BASELINE, INT4, kinds=["perplexity", "latency"]) == ([(4, "latency")], layered)


def ways_of(*specs: QuantSpec, kinds: list[str]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Bits and kinds of what runs in memory, and layer by layer."""
    pack = pack_of(
        *specs,
        evals=tuple(evaluation(k, kind=k, device="cpu" if k == "latency" else None) for k in kinds),
        model=NEOX_M,
    )
    parts = ways.by_way(pack, device="cpu", gpus=0, batch_tokens=2048)
    in_memory, layered = (
        [(m.cell.quant.bits, m.eval.kind) for m in part.measurements()] if part else [] for part in parts
    )
    return in_memory, layered


def test_beside_a_cell_that_runs_layer_by_layer_others_are_measured_in_memory_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "device_memory", lambda _: FITS_BUT_NO_GPTQ)
    short = evaluation(limit=512)
    evals = (short, evaluation("jargon_outliers", kind="outliers", limit=512))
    text = LocalFile(path=str(DEMO_DIR / "text" / "jargon.jsonl"))
    data = Calibration(dataset="sha256:" + "0" * 64, samples=2, length=64, compute_dtype="float32", source=text)
    gptq = spec_of({"method": "gptq", "bits": 3, "dtype": "int"})
    plain = pack_of(BASELINE, evals=evals, model=NEOX_M)
    of_gptq, of_int4 = Cell(model=plain.model, quant=gptq, calibration=data), Cell(model=plain.model, quant=INT4)
    pack = replace(plain, items=(*plain.items, (of_gptq, (short,)), (of_int4, (short,))))
    cut, bench = Bench(tmp_path), Bench(tmp_path)
    cut.stop_at = "measured"
    cut.worker.run_pack(pack)
    assert cut.events[-1] == Stopped(pack=pack.id, reason="asked")
    assert "block_done" not in cut.names()
    (first,) = cut.rows()
    rest = pack.without({first["measurement"]})
    assert rest is not None
    bench.worker.run_pack(rest)
    assert bench.names().count("pack_done") == 1
    assert {(row["method"], row["eval"]): (row["status"], row["held"]) for row in bench.rows()} == {
        ("baseline", "jargon"): ("done", "whole"),
        ("baseline", "jargon_outliers"): ("done", "whole"),
        ("gptq", "jargon"): ("done", "layer by layer"),
        ("blockwise", "jargon"): ("done", "whole"),
    }


@pytest.mark.usefixtures("small_machine")
def test_asked_to_stop_or_out_of_time_it_goes_on_at_the_layer_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_of(BASELINE, INT4, OUTLIERS, model=NEOX_M)
    uncut = Bench(tmp_path / "uncut")
    uncut.worker.run_pack(pack)
    bench = Bench(tmp_path / "cut")
    bench.stop_at = "block_done"
    bench.worker.run_pack(pack)
    assert bench.events[-1] == Stopped(pack=pack.id, reason="asked")
    assert (bench.rows(), [e.done for e in bench.events if isinstance(e, BlockDone)]) == ([], [1])
    late = Bench(tmp_path / "cut")

    class Clock:
        monotonic, perf_counter = time.monotonic, time.perf_counter

        @staticmethod
        def time() -> float:
            return time.time() + (1e6 if "block_done" in late.names() else 0)

    with monkeypatch.context() as later:
        later.setattr(layered, "time", Clock)
        late.worker.run_pack(pack, until=time.time() + 1e5)
    assert late.events[-1] == Stopped(pack=pack.id, reason="walltime")
    done = [e.done for e in late.events if isinstance(e, BlockDone)]
    assert done == [2]
    again = Bench(tmp_path / "cut")
    again.worker.run_pack(pack)
    assert [e.done for e in again.events if isinstance(e, BlockDone)] == [3, 4, 5, 6]
    assert results(again, *SAME) == results(uncut, *SAME)
    assert not (tmp_path / "cut" / "passes").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from kbit.layered import run
from sweeps.worker import layered, ways
from tests.sweeps.worker.test_layered import MEMORY, NEOX_M, OUTLIERS
from tests.sweeps.worker.test_worker import BASELINE, INT4, Bench, pack_of

ways.device_memory = lambda _: MEMORY
run.SNAPSHOT_SHARE = float("inf")  # however long they take
begun = layered.LayeredRun.__init__
layered.LayeredRun.__init__ = lambda self, **given: begun(self, snapshot_seconds=0.0, **given)
bench = Bench(Path(sys.argv[1]))
told = bench.worker.emit

def emit(event):
    told(event)
    # A snapshot of block 3 is there; block 4 is done, and not kept.
    if event.name == "block_done" and event.done == 4:
        os.kill(os.getpid(), signal.SIGKILL)

bench.worker.emit = emit
bench.worker.run_pack(pack_of(BASELINE, INT4, OUTLIERS, model=NEOX_M))
"""


@pytest.mark.usefixtures("small_machine")
def test_killed_during_a_pass_it_goes_on_at_its_last_snapshot(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    pack = pack_of(BASELINE, INT4, OUTLIERS, model=NEOX_M)
    again, uncut = Bench(tmp_path / "killed"), Bench(tmp_path / "uncut")
    assert again.rows() == []
    again.worker.run_pack(pack)
    assert [e.done for e in again.events if isinstance(e, BlockDone)] == [4, 5, 6]
    uncut.worker.run_pack(pack)
    assert results(again, *SAME) == results(uncut, *SAME)
    assert not (tmp_path / "killed" / "passes").exists()


@pytest.mark.usefixtures("small_machine")
def test_where_activations_have_no_room_the_error_says_where_how_much_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Room(needed=0, free=0, total=1)
    monkeypatch.setattr(layered, "_host", lambda: nothing)
    monkeypatch.setattr(run, "disk_room", lambda _: nothing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench = Bench(tmp_path / "out")
    bench.worker.run_pack(pack_of(BASELINE, INT4, model=NEOX_M))
    # Of two cells, 1,024 tokens of 256 dimensions in float32.
    needed = f"{2 * 1024 * 256 * 4:,}"
    for row in bench.rows():
        assert (row["status"], row["error_type"]) == ("failed", "NoRoomError")
        assert f"need {needed} bytes outside of the GPU" in row["error"]
        assert f"{tmp_path} 0. Make room there, or set TMPDIR" in row["error"]


@pytest.mark.usefixtures("small_machine")
def test_where_memory_runs_out_batches_are_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, failures = LayeredPass.run, iter([True])

    def short(self: LayeredPass, between: Any) -> bool:
        if next(failures, False):
            raise torch.OutOfMemoryError("no memory")
        return own(self, between)

    monkeypatch.setattr(LayeredPass, "run", short)
    bench = Bench(tmp_path)
    bench.worker.run_pack(pack_of(BASELINE, INT4, model=NEOX_M))
    assert {(row["status"], row["batch_tokens"]) for row in bench.rows()} == {("done", 1024)}


def test_cells_that_calibrate_have_the_rows_of_the_whole_model_or_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LocalFile(path=str(DEMO_DIR / "text" / "jargon.jsonl"))
    about = Calibration(dataset="sha256:" + "0" * 64, samples=8, length=64, compute_dtype="float32", source=text)
    gptq = spec_of({"method": "gptq", "bits": 3, "dtype": "int", "blocksize": 32})
    changed = replace(about, source=replace(text, sha256="1" * 64))
    plain = pack_of(BASELINE, name="calibrated")
    cells = [
        Cell(model=plain.model, quant=gptq, calibration=calibration)
        for calibration in (about, replace(about, compute_dtype="storage", seed=1), replace(changed, seed=2))
    ]
    awq = spec_of({"method": "awq", "bits": 3, "dtype": "int", "blocksize": 32, "clip": False})
    cells.insert(0, Cell(model=plain.model, quant=awq, calibration=replace(about, seed=3)))
    pack = replace(plain, items=(*plain.items, *((cell, (evaluation(),)) for cell in cells)))
    whole, bench = Bench(tmp_path / "whole"), Bench(tmp_path / "layered")
    whole.worker.run_pack(replace(pack, items=pack.items[:3]))
    monkeypatch.setattr(worker, "by_way", lambda pack, **_: (None, pack))
    bench.worker.run_pack(pack)
    assert results(whole, *SAME, "codes_hash")[3, "jargon"]["codes_hash"] is not None
    rows = {row["calibration_seed"]: row for row in bench.rows()}
    assert {seed: row["status"] for seed, row in rows.items()} == {None: "done", 0: "done", 1: "failed", 3: "done"}
    assert "calibration.compute_dtype='storage' is float16, and a model that runs layer by layer" in rows[1]["error"]
    same = {row["calibration_seed"]: row for row in whole.rows()}
    for seed in (None, 0, 3):
        assert {c: rows[seed][c] for c in (*SAME, "codes_hash")} == {c: same[seed][c] for c in (*SAME, "codes_hash")}


def test_batches_made_smaller_for_the_last_packs_model_choose_no_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def whole(pack: Pack, **settings: Any) -> tuple[Pack, None]:
        seen.append(settings["batch_tokens"])
        return pack, None

    monkeypatch.setattr(worker, "by_way", whole)
    bench = Bench(tmp_path)
    bench.worker.run_pack(pack_of(BASELINE))
    held = bench.worker._warm.holds
    assert held is not None
    bench.worker._batches._smaller[held] = 256
    bench.worker.run_pack(pack_of(INT4))
    # As each cell's own way is chosen.
    assert seen == [bench.worker.batch_tokens] * 2
