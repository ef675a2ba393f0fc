"""A worker records everything that it finished, stops when it is told or time is short, and makes do with the memory
there is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import EvalSpec
from kbit.models.loading import load_model
from kbit.sources import LocalFile, TaskSource
from kbit.spec import QuantSpec, Spec
from sweeps.config import DEMO_DIR
from sweeps.errors import EXIT_IO, EXIT_LOAD
from sweeps.events import Event, Stopped, Withheld
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.definitions import definition_of
from sweeps.study.hub import local_model
from sweeps.worker.settings import WorkerArguments, WorkerSettings
from sweeps.worker.time_budget import LEAST_SCALE, Pace
from sweeps.worker.worker import Worker
from tests.conftest import ROOT
from tests.kbit.tiny_models import bits_of, identical

NEOX_XS = DEMO_DIR / "models" / "neox-xs"
BASELINE, INT4, INT3 = QuantSpec(bits=16), QuantSpec(bits=4, dtype="int"), QuantSpec(bits=3, dtype="int")


def evaluation(name: str = "jargon", **changes: Any) -> EvalSpec:
    values: dict[str, Any] = {
        "kind": "perplexity",
        "name": name,
        "dataset": "sha256:" + "0" * 64,
        "compute_dtype": "float32",
        "window": 512,
        "limit": 1024,
        "source": LocalFile(path=str(DEMO_DIR / "text" / "jargon.jsonl")),
    }
    return EvalSpec(**values | changes)


def pack_of(
    *quants: Spec,
    evals: tuple[EvalSpec, ...] | None = None,
    model: Path = NEOX_XS,
    name: str = "pack",
    item_seconds: tuple[float, ...] = (),
    rung: int = 0,
) -> Pack:
    ref = ModelRef(
        family="neox", name=model.name, params=500_000, path=str(model), weights_hash=local_model(model).content_hash
    )
    items = tuple((Cell(model=ref, quant=q), evals or (evaluation(),)) for q in quants)
    return Pack(id=name, sweep="s", model=ref, items=items, seconds=1.0, item_seconds=item_seconds, rung=rung)


def pack_of_unloadable(model: Path) -> Pack:
    """A pack of two cells whose model was there when it was planned."""
    shutil.copytree(NEOX_XS, model)
    pack = pack_of(BASELINE, INT4, name="unloadable", model=model)
    shutil.rmtree(model)
    return pack


class Bench:
    """A worker in this process, and what it said."""

    def __init__(self, out: Path, **settings: Any) -> None:
        self.events: list[Event] = []
        self.stop_at: str | None = None
        self.store = Store(out=out)
        options = {"device": "cpu", "batch_tokens": 2048, "provenance": {}} | settings
        self.worker = Worker(store=self.store, emit=self._emit, **options)

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if event.name == self.stop_at:
            self.worker.stop.ask()

    def names(self) -> list[str]:
        return [e.name for e in self.events]

    def rows(self) -> list[dict[str, Any]]:
        return self.store.read().to_pylist()


def test_rows_say_where_and_with_what_they_were_computed(tmp_path: Path) -> None:
    launched_with = {"commit": "c0ffee", "launch": "l", "job": "77_3"}
    bench = Bench(tmp_path, provenance=launched_with, gpus=2)
    bench.worker.run_pack(pack_of(BASELINE, INT4, rung=2))
    assert bench.names()[-1] == "pack_done"
    for row in bench.rows():
        assert row["status"] == "done"
        assert {name: row[name] for name in launched_with} == launched_with
        assert (row["gpus"], row["oom_rung"], row["batch_tokens"]) == (0, 2, 2048)
        assert row["peak_memory_bytes"] > 10**6


def test_asked_to_stop_it_finishes_the_measurement_in_flight_and_loses_none(tmp_path: Path) -> None:
    evals = (evaluation("first"), evaluation("second"))
    pack = pack_of(BASELINE, INT4, evals=evals)
    bench = Bench(tmp_path)
    bench.stop_at = "measuring"
    bench.worker.run_pack(pack)
    assert bench.events[-1] == Stopped(pack=pack.id, reason="asked")
    (done,) = bench.rows()
    assert (done["eval"], done["bits"]) == ("first", 16)
    assert len(list(tmp_path.glob("parts/*.rows"))) == 1
    rest = dataclasses.replace(pack, item_seconds=(1.0, 1.0)).without({done["measurement"]})
    assert rest is not None
    other = Bench(tmp_path)
    other.worker.run_pack(rest)
    assert other.names().count("measured") == 3
    assert {r["measurement"]: r["status"] for r in bench.rows()} == {m.key: "done" for m in pack.measurements()}
    assert done in bench.rows()


def test_asked_to_stop_during_the_last_measurement_the_pack_is_done(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.stop_at = "measuring"
    bench.worker.run_pack(pack_of(BASELINE))
    assert bench.names()[-1] == "pack_done"
    bench.worker.run_pack(pack_of(INT4, name="next"))
    assert bench.names()[-1] == "stopped"
    assert len(bench.rows()) == 1


def test_a_cell_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pack = pack_of(BASELINE, INT4, INT3, item_seconds=(1.0, 1.0, 1e6))
    bench.worker.run_pack(pack, until=time.time() + 1000)
    assert bench.events[-1] == Stopped(pack=pack.id, reason="walltime")
    assert {r["bits"] for r in bench.rows()} == {16, 4}
    assert bench.names().count("started") == 2


def test_a_first_cell_that_is_predicted_to_take_too_long_is_tried_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pack = pack_of(BASELINE, INT4, item_seconds=(1e6, 1e6))
    bench.worker.run_pack(pack, until=time.time() + 1000)
    assert {r["bits"] for r in bench.rows()} == {16}
    assert bench.events[-1] == Stopped(pack=pack.id, reason="walltime")


def test_without_time_left_no_model_is_loaded(tmp_path: Path) -> None:
    for name, item_seconds in (("unknown", ()), ("known", (0.0,))):
        bench = Bench(tmp_path)
        bench.worker.run_pack(pack_of(BASELINE, name=name, item_seconds=item_seconds), until=time.time() - 1)
        assert bench.names() == ["stopped"]


def test_a_result_that_memory_was_too_short_to_write_is_written_once_some_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, write, refused = Bench(tmp_path), Store.write, []

    def write_when_free(store: Store, row: Mapping[str, Any]) -> None:
        # Stands for an allocation that fails: where exactly it does can't be steered.
        if not refused:
            refused.append(row["measurement"])
            raise MemoryError("malloc of size 512 failed")
        write(store, row)

    monkeypatch.setattr(Store, "write", write_when_free)
    bench.worker.run_pack(pack_of(BASELINE))
    assert [r["measurement"] for r in bench.rows()] == refused
    assert bench.rows()[0]["status"] == "done"


def test_on_a_slow_machine_predictions_grow_by_what_cells_took() -> None:
    pace = Pace(until=100.0, predicted=(10.0, 10.0, 20.0))
    assert pace.fits(0, now=90.0)
    assert not pace.fits(0, now=90.0, load_seconds=1.0)
    pace.took(0, 25.0)
    pace.took(1, 35.0)
    assert pace.seconds(2) == 60.0
    assert pace.fits(2, now=40.0)
    assert not pace.fits(2, now=40.1)


def test_cells_that_fail_at_once_do_not_make_the_next_seem_free() -> None:
    pace = Pace(until=100.0, predicted=(10.0, 10.0))
    pace.took(0, 0.01)
    assert pace.seconds(1) == LEAST_SCALE * 10.0


def test_without_predictions_cells_are_expected_to_take_the_mean_of_those_before() -> None:
    pace = Pace(until=100.0)
    assert pace.seconds(0) == 0.0
    pace.took(0, 2.0)
    pace.took(1, 4.0)
    assert pace.seconds(2) == 3.0
    assert Pace(until=None, predicted=(1e9,)).fits(0, now=time.time())


def test_unreadable_data_fail_the_measurement_and_not_the_run(tmp_path: Path) -> None:
    bad = evaluation("bad", source=LocalFile(path=str(tmp_path / "nowhere.jsonl")))
    bench = Bench(tmp_path / "r")
    bench.worker.run_pack(pack_of(BASELINE, evals=(bad, evaluation())))
    assert {r["eval"]: r["status"] for r in bench.rows()} == {"bad": "failed", "jargon": "done"}
    (failed,) = [r for r in bench.rows() if r["status"] == "failed"]
    assert "nowhere.jsonl" in failed["error"]
    assert (failed["gpus"], failed["oom_rung"]) == (0, 0)


def test_data_that_changed_since_the_launch_leave_no_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000)
    changed = evaluation(source=LocalFile(path=str(text), sha256="0" * 64))
    bench = Bench(tmp_path / "r")
    bench.worker.run_pack(pack_of(BASELINE, evals=(changed, evaluation("other"))))
    assert {r["eval"]: r["status"] for r in bench.rows()} == {"other": "done"}
    (withheld,) = [e for e in bench.events if isinstance(e, Withheld)]
    assert "text.txt changed since the study was launched" in withheld.why


def test_a_task_of_the_user_s_own_that_changed_since_the_launch_leaves_no_record(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    shutil.copy(DEMO_DIR / "tasks" / "jargon_choice.yaml", file)
    source = TaskSource(task_file=str(file), documents=LocalFile(path=str(DEMO_DIR / "text" / "jargon_choice.jsonl")))
    about = {"kind": "task", "window": None, "limit": 2, "source": source, "definition": definition_of(file).hash}
    own = evaluation("jargon_choice", **about)
    bench = Bench(tmp_path / "r")
    file.write_text(file.read_text() + "description: edited\n")
    bench.worker.run_pack(pack_of(BASELINE, evals=(own, evaluation("other"))))
    assert {r["eval"]: r["status"] for r in bench.rows()} == {"other": "done"}
    (withheld,) = [e for e in bench.events if isinstance(e, Withheld)]
    assert "eval jargon_choice: its definition" in withheld.why
    shutil.copy(DEMO_DIR / "tasks" / "jargon_choice.yaml", file)
    bench.worker.run_pack(pack_of(BASELINE, evals=(own,)))
    assert {r["eval"]: r["status"] for r in bench.rows()} == {"other": "done", "jargon_choice": "done"}
    (row,) = [r for r in bench.rows() if r["eval"] == "jargon_choice"]
    assert row["eval_definition"] == definition_of(file).hash


def test_cells_of_a_model_that_can_not_be_loaded_have_one_traceback(tmp_path: Path) -> None:
    """They are shown as one (mode=logs); an exception that is raised again has more frames each time."""
    model = tmp_path / "model"
    shutil.copytree(NEOX_XS, model)
    weights = load_file(model / "model.safetensors")
    weights.pop("gpt_neox.final_layer_norm.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(tmp_path / "r")
    bench.worker.run_pack(pack_of(BASELINE, INT4, INT3, model=model))
    errors = [row["error"] for row in bench.rows()]
    assert len(errors) == 3
    assert len(set(errors)) == 1
    assert "in _read" in errors[0]
    assert "final_layer_norm" in errors[0]


OF_A_RUN = {
    *("row_id", "pack", "started", "finished"),
    *("seconds", "quantize_seconds", "load_seconds", "peak_memory_bytes"),
}
"""Columns that say how and when a row was computed."""


def test_cells_of_a_pack_have_the_rows_of_each_cell_with_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVALUATORS._entries, "packed", dataclasses.replace(EVALUATORS["perplexity"], packed=True))
    evals = (evaluation(), evaluation("of-packed", kind="packed"))
    quants = [
        INT4,
        QuantSpec(bits=3, dtype="quantile"),
        QuantSpec(bits=3, dtype="quantile", blocksize=256),
        BASELINE,
        QuantSpec(bits=4, dtype="float", outlier_fraction=0.02),
        QuantSpec(bits=3, dtype="lloyd", outlier_fraction=0.02),
    ]
    together = Bench(tmp_path / "together")
    together.worker.run_pack(pack_of(*quants, evals=evals))
    for number, quant in enumerate(quants):
        alone = Bench(tmp_path / "alone")
        alone.worker.run_pack(pack_of(quant, evals=evals, name=f"pack{number}"))
    expected = {row["measurement"]: row for row in alone.rows()}
    assert len(expected) == len(together.rows()) == 2 * len(quants)
    for row in together.rows():
        assert row["status"] == "done"
        other = expected[row["measurement"]]
        assert {k: v for k, v in row.items() if k not in OF_A_RUN} == {
            k: v for k, v in other.items() if k not in OF_A_RUN
        }


def test_the_model_is_in_its_16_bit_form_when_it_is_asked_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.worker.run_pack(pack_of(BASELINE, INT4))
    warm = bench.worker._warm
    model = warm.load(*warm.holds).model if warm.holds else None
    assert model is not None
    true = load_model(str(NEOX_XS), device="cpu", compute_dtype="float32").model
    assert not identical(bits_of(model), bits_of(true))
    warm.as_loaded()
    assert identical(bits_of(model), bits_of(true))


class Process:
    """The worker's process, as a pool starts it."""

    def __init__(self, out: Path, **settings: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)  # as the launch has it
        read, write = os.pipe()
        values = {"batch_tokens": 2048, "provenance": {}, "trust_remote_code": False, **settings}
        arguments = WorkerArguments(out=str(out), device="cpu", threads=1, settings=WorkerSettings(**values))
        command = [
            sys.executable,
            "-m",
            "sweeps.worker",
            "--events",
            str(write),
            "--settings",
            arguments.to_json(),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[write],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(write)
        self._events = os.fdopen(read)

    def feed(self, pack: Pack, until: float | None = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**pack.to_dict(), "until": until}) + "\n")
        self.process.stdin.flush()

    def until(self, name: str) -> dict[str, Any]:
        """Read events up to one of this name."""
        for line in self._events:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"no {name}; the process said: {self.process.communicate()[1]}")

    def end(self) -> tuple[int, str]:
        text = self.process.communicate(timeout=30)[1]
        return self.process.returncode, text


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for each in processes:
        each.process.kill()
        each.process.communicate()
        each._events.close()


def test_signals_of_the_scheduler_are_ignored_and_the_pools_stops_it(tmp_path: Path, started: list[Process]) -> None:
    worker = Process(tmp_path, ignore_sigterm=True)
    started.append(worker)
    for number in (signal.SIGUSR2, signal.SIGTERM):  # while it starts up, too
        worker.process.send_signal(number)
    pack = pack_of(*(QuantSpec(bits=b, dtype=d) for b in (3, 4, 5, 6) for d in ("int", "quantile")))
    worker.feed(pack, until=time.time() + 3600)
    worker.until("measured")
    for number in (signal.SIGUSR2, signal.SIGTERM):
        worker.process.send_signal(number)
    worker.until("measured")
    worker.process.send_signal(signal.SIGUSR1)
    assert worker.until("stopped")["reason"] == "asked"
    measured = Store(out=tmp_path).read().num_rows
    assert 2 <= measured < 8
    # It goes on reading, and ends with its input.
    assert worker.process.poll() is None
    assert worker.end() == (0, "")


def test_results_that_cannot_be_written_end_the_process_with_its_own_code(
    tmp_path: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its files would not be written either
    worker = Process(tmp_path)
    started.append(worker)
    worker.feed(pack_of(BASELINE))
    worker.until("pack_done")
    # As under a quota: files may grow to 100 bytes.
    resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (100, 100))
    worker.feed(pack_of(INT4, INT3, name="more"))
    worker.until("measuring")
    code, text = worker.end()
    assert code == EXIT_IO == 74
    assert len(text.splitlines()) == 1
    assert "results can't be written" in text
    assert str(tmp_path) in text
    assert Store(out=tmp_path).read().num_rows == 1
    assert not list(tmp_path.glob("*/*/.*"))


def test_a_first_model_that_cannot_be_loaded_may_be_left_to_another_node(
    tmp_path: Path, started: list[Process]
) -> None:
    unloadable = pack_of_unloadable(tmp_path / "gone")
    worker = Process(tmp_path / "r", load_again=True)
    started.append(worker)
    worker.feed(unloadable)
    assert worker.until("started")["measurement"] == unloadable.measurements()[0].key
    code, text = worker.end()
    assert code == EXIT_LOAD == 75
    assert text.splitlines()[-1].startswith(f"{unloadable.model.label} can't be loaded on this node: ")
    assert Store(out=tmp_path / "r").read().num_rows == 0
    # Where a model could be loaded before, it is this one's fault (with the same weights: the baseline has its result).
    bench = Bench(tmp_path / "r", load_again=True)
    bench.worker.run_pack(pack_of(BASELINE))
    bench.worker.run_pack(unloadable)
    assert {r["bits"]: r["status"] for r in bench.rows()} == {16: "done", 4: "failed"}


SHORT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
import torch, pyarrow.parquet
from sweeps.events import event_to_dict
from sweeps.plan.pack import Pack
from sweeps.store.parts import Store
from sweeps.worker.worker import Worker

torch.set_num_threads(1)
limits = {}

def room(megabytes):
    "What the process may take beyond what it has; None is everything."
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft = resource.RLIM_INFINITY if megabytes is None else now + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

def emit(event):
    print(json.dumps(event_to_dict(event), default=str), flush=True)
    if event.name in limits:
        room(limits[event.name])

worker = Worker(store=Store(out=Path(sys.argv[1])), device="cpu", batch_tokens=16384, provenance={}, emit=emit)
for line in sys.stdin:
    data = json.loads(line)
    limits = data.pop("limits")
    room(limits.get("begin"))
    worker.run_pack(Pack.from_dict(data))
    room(None)
"""


def test_where_memory_runs_out_batches_are_halved_and_what_never_fits_fails_as_such(tmp_path: Path) -> None:
    big = tmp_path / "big-vocabulary"
    _write_model_with_large_head(big)
    long = evaluation("long", limit=16384)
    packs = [
        # Imports take their memory before any is measured.
        (pack_of(BASELINE, name="first"), {}),
        (pack_of(BASELINE, INT4, name="halved", evals=(long,)), {"begin": 60}),
        (pack_of(BASELINE, INT4, name="unloadable", model=big), {"begin": 30}),
        (pack_of(BASELINE, name="hopeless", model=big, evals=(evaluation(compute_dtype="storage"),)), {"loaded": 60}),
    ]
    lines = [json.dumps({**pack.to_dict(), "limits": limits}) for pack, limits in packs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "r")],
        cwd=ROOT,
        env=environment,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    events = [json.loads(line) for line in run.stdout.splitlines()]
    told = {
        p.id: [e["batch_tokens"] for e in events if e["event"] == "smaller_batch" and e["pack"] == p.id]
        for p, _ in packs
    }
    assert told["halved"] == [16384 >> i for i in range(1, len(told["halved"]) + 1)]
    assert told["halved"]
    assert told["hopeless"] == [8192, 4096, 2048, 1024, 512, 256]
    assert not told["first"] + told["unloadable"]
    rows = Store(out=tmp_path / "r").read().to_pylist()
    by_pack = {p.id: [r for r in rows if r["pack"] == p.id] for p, _ in packs}
    assert [r["status"] for r in by_pack["first"] + by_pack["halved"]] == ["done"] * 3
    assert {r["batch_tokens"] for r in by_pack["halved"]} == {told["halved"][-1]}
    assert [r["error_type"] for r in by_pack["unloadable"] + by_pack["hopeless"]] == ["OutOfMemoryError"] * 3
    assert by_pack["hopeless"][0]["batch_tokens"] == 256
    assert "alloc" in by_pack["hopeless"][0]["error"]


def _write_model_with_large_head(directory: Path) -> None:
    """A 77 MB checkpoint; its logits are computed 66 MB at a time, however small the batch."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(NEOX_XS)
    config.update({"vocab_size": 300_000, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2})
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).half().save_pretrained(directory)
    AutoTokenizer.from_pretrained(NEOX_XS).save_pretrained(directory)
