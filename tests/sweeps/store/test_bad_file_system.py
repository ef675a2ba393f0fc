"""A slow file system that shows old listings and fails now and then: nothing is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.launches.claimer import Claimer
from sweeps.launches.claims import Claims
from sweeps.plan.packs import Packing
from sweeps.store.parts import Store
from tests.conftest import ROOT
from tests.filesystem import compiled_layer, under_layer
from tests.sweeps.plan.test_packs import KEYS, MANIFEST
from tests.sweeps.store.test_parts import row

ROWS = 25


def work(out: Path, name: str) -> None:
    """Store rows and fold, as workers do; say what is stored."""
    store = Store(out=out)
    for n in range(ROWS):
        store.write(row(f"{name}-{n}", seconds=float(n)))
        print(f"{name}-{n}", flush=True)
        if n % 8 == 7:
            store.close()
            store.fold()


def follow(out: Path) -> None:
    """Read again and again: what was seen once stays, and is the same."""
    store, seen = Store(out=out), dict[str, str]()
    while len(seen) < 2 * ROWS:
        found = store.read(["measurement", "row_id"]).to_pylist()
        now = {r["measurement"]: r["row_id"] for r in found}
        assert len(now) == len(found)
        assert seen.items() <= now.items()
        seen = now


def launch_after_another(out: Path) -> None:
    """Plan and claim what another process has done meanwhile, whose files old listings don't show."""
    store = Store(out=out)

    def claimer(launch: str) -> Claimer:
        packing = Packing(workers=1)
        return Claimer(
            store=Store(out=out),
            manifest=MANIFEST,
            retry=frozenset(),
            packing=packing,
            device="cpu",
            executor="local",
            launch=launch,
        )

    store.write(row(KEYS[0]))
    assert len(store.read(["measurement"])) == 1
    other = os.fork()
    if not other:
        plan, claim = claimer("a").claim()
        assert claim is not None
        of_worker = Store(out=out)
        for key in plan.measurement_keys():
            of_worker.write(row(key))
        Claims(out=out).release(claim)
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    assert len(store.read(["measurement"])) == 1, "the listing is old, else nothing is shown here"
    plan, claim = claimer("b").claim()
    assert (plan.todo, claim) == (0, None)


def start(call: str, home: Path, **layer: object) -> subprocess.Popen[str]:
    """Call one of the above, under a layer over ``home``."""
    code = f"import sys, pathlib; from {__name__} import *; out = pathlib.Path(sys.argv[1]); {call}"
    command = [sys.executable, "-c", code, str(home / "results")]
    environment = under_layer(compiled_layer(home), home, **layer)
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_nothing_is_lost_or_doubled_where_listings_are_old_and_writes_fail(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    calls = ("work(out, 'a')", "work(out, 'b')", "follow(out)")
    processes = [
        start(call, tmp_path, delay_ms=1, stale_s=0.3, fail=0.02, seed=seed) for seed, call in enumerate(calls)
    ]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    stored = {f"{name}-{n}" for name in "ab" for n in range(ROWS)}
    assert {line for said, _ in told for line in said.split()} == stored
    history = Store(out=out).history(["measurement", "seconds"])
    assert {(r["measurement"], r["seconds"]) for r in history} == {(m, float(m[2:])) for m in stored}
    assert len(history) == len(stored)


def test_a_launch_sees_what_another_machine_stored_just_now(tmp_path: Path) -> None:
    process = start("launch_after_another(out)", tmp_path, stale_s=60)
    told = process.communicate(timeout=60)
    assert process.returncode == 0, told


@pytest.mark.slow
def test_a_study_on_such_a_file_system(tmp_path: Path) -> None:
    """Launched, killed, and launched again: everything is measured once, and takes less than ten times as long."""
    small = ("executor=local", "executor.workers=2", "sweep.sizes=[neox-xs]", "eval.tasks=[]", "eval.tokens=1024")
    quant = "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6], dtype: [int, float, quantile], blocksize: [32, 64, 128]}]"
    out = tmp_path / "bad" / "results"
    out.parent.mkdir()
    bad = under_layer(compiled_layer(tmp_path), out.parent, delay_ms=20, stale_s=3, fail=0.01)

    def run(*args: str, at: Path = out, env: dict[str, str] | None = None) -> str:
        command = [sys.executable, str(ROOT / "launch.py"), f"out={at}", *small, quant, *args]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    began = time.monotonic()
    run("report=false", at=tmp_path / "good")
    took = time.monotonic() - began
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "launch.py"), f"out={out}", *small, quant, "report=false"]
    with subprocess.Popen(command, env=bad, cwd=tmp_path, stdout=subprocess.DEVNULL) as first:
        while len(Store(out=out).history([])) < 5:
            assert first.poll() is None
            time.sleep(0.2)
        first.kill()
    run("report=false", env=bad)
    assert time.monotonic() - began < 10 * took
    assert "nothing to do" in run("report=false", env=bad)
    run("mode=audit")
    rows = Store(out=out).history(["measurement", "metrics"])
    good = Store(out=tmp_path / "good").history(["measurement", "metrics"])
    assert len(rows) == 37
    assert {json.dumps([r["measurement"], r["metrics"]]) for r in rows} == {
        json.dumps([r["measurement"], r["metrics"]]) for r in good
    }
