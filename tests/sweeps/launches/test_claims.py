"""Two launches never hold one measurement, and a dead launch holds none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps import processes
from sweeps.errors import ClaimTakenError, StoreError
from sweeps.launches import claims as claims_module
from sweeps.launches.claims import Claims
from sweeps.launches.in_flight import read_flight
from sweeps.processes import FIRST_NAMESPACE, this_process
from tests import ROOT


def test_a_number_is_given_once(tmp_path: Path) -> None:
    claims = Claims(out=tmp_path)
    first = claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    with pytest.raises(ClaimTakenError):
        claims.create(1, launch="b", sweep="s", packs={"p": ["m2"]})
    assert claims.open() == [first]
    assert claims.last_number() == 1


def test_a_number_is_not_given_again_where_its_claim_was_moved_away(tmp_path: Path) -> None:
    claims = Claims(out=tmp_path)
    claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    (path,) = claims.directory.glob("*.json")
    path.rename(path.with_name(path.name + ".damaged"))
    assert claims.open() == []
    assert claims.last_number() == 1


def test_a_damaged_claim_of_one_machine_says_what_moving_it_does(tmp_path: Path) -> None:
    claims = Claims(out=tmp_path)
    claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    (path,) = claims.directory.glob("*.json")
    path.write_text("{")
    with pytest.raises(StoreError, match=rf"{path} is damaged.*end it, or it is computed twice; then rename the file"):
        read_flight(tmp_path)


def test_a_released_claim_holds_nothing_and_lost_nothing(tmp_path: Path) -> None:
    claims = Claims(out=tmp_path)
    claim = claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    claims.heartbeat(claim, ["m1"])
    assert claims.running(claim) == {"m1"}
    claims.release(claim)
    assert claims.open() == []


def test_the_claim_of_a_killed_process_is_void_and_its_work_is_lost(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sweeps.launches.claims import Claims; "
        "Claims(out=Path(sys.argv[1])).create(1, launch='a', sweep='s', packs={'p': ['m1']}); "
        "print('claimed', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None
    owner.stdout.readline()
    claims = Claims(out=tmp_path)
    assert [c.measurements for c in claims.open()] == [frozenset({"m1"})]
    assert read_flight(tmp_path).held == {"m1"}
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    flight = read_flight(tmp_path)
    assert flight.held == set()
    assert flight.ended == {"m1": "lost"}


def test_a_claim_of_another_machine_lives_while_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(out=tmp_path)
    claim = claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    path = tmp_path / "claims" / "00000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere", "pid": 1}))
    assert claims.is_alive(claims.open()[0])
    monkeypatch.setattr(claims_module, "SILENT_SECONDS", 0.2)
    time.sleep(0.3)
    assert not claims.is_alive(claims.open()[0])
    claims.heartbeat(claim, [])
    assert claims.is_alive(claims.open()[0])


@pytest.mark.parametrize(
    ("up", "silent", "alive"), [(600, 595, True), (600, 601, False), (9, 55, True), (9, 61, False)]
)
def test_a_claim_from_before_this_machine_started_again_is_void_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: float, silent: float, alive: bool
) -> None:
    """One that beat since is of another machine of this name; several beats must have failed to come."""
    claims = Claims(out=tmp_path)
    claims.create(1, launch="a", sweep="s", packs={"p": ["m1"]})
    claim = replace(claims.open()[0], owner={**this_process(), "machine": f"before {FIRST_NAMESPACE}"})
    monkeypatch.setattr(processes, "this_machine", lambda: f"now {FIRST_NAMESPACE}")
    monkeypatch.setattr(processes.time, "clock_gettime", lambda _: up)
    path = tmp_path / "claims" / "00000001.json"
    os.utime(path, (path.stat().st_mtime - silent,) * 2)
    assert claims.is_alive(claim) is alive
    assert "can't be seen from here" in claims.holder(claim)


def test_a_later_claim_of_lost_work_holds_it(tmp_path: Path) -> None:
    claims = Claims(out=tmp_path)
    claims.create(1, launch="a", sweep="s", packs={"p": ["m1", "m2"]})
    path = tmp_path / "claims" / "00000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid_started": "another process"}))
    claims.create(2, launch="b", sweep="s", packs={"p": ["m2"]})
    flight = read_flight(tmp_path)
    assert flight.queued == {"m2"}
    assert flight.ended == {"m1": "lost"}
