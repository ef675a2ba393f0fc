"""Two hosts on one directory, with equal names and pids, as containers have: neither takes the other's for its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sweeps.launches.claimer import Claimer
from sweeps.launches.claims import SILENT_SECONDS, Claim, Claims
from sweeps.launches.in_flight import read_flight
from sweeps.plan.packs import Packing
from sweeps.store.parts import Store
from tests import ROOT
from tests.hosts import Host, hosts
from tests.sweeps.plan.test_packs import KEYS, MANIFEST
from tests.sweeps.store.test_parts import row

FIRST = replace(MANIFEST, cells=MANIFEST.cells[:8])
"""A study that has some of the cells of the other."""


@dataclass(kw_only=True)
class Launched:
    """A launch on a host, in which nothing is computed."""

    store: Store
    claim: Claim | None = None
    left: list[str] = field(default_factory=list)

    def launch(self, study: str) -> dict[str, Any]:
        """Plan and claim; tell what is claimed, by which pid, and who has the rest."""
        claims = Claims(out=self.store.out)
        plan, self.claim = Claimer(
            store=self.store,
            manifest={"first": FIRST, "all": MANIFEST}[study],
            retry=frozenset({"lost"}),
            packing=Packing(workers=1),
            device="cpu",
            executor="local",
            launch=f"{study} {time.time()}",
        ).claim()
        others = [claims.holder(claim) for claim in read_flight(self.store.out).local if claim != self.claim]
        self.left = list(plan.measurement_keys()) if self.claim else []
        return {"todo": plan.todo, "pid": os.getpid(), "others": others}

    def measure(self, count: str) -> None:
        """Store so many, and fold what can be folded."""
        assert self.claim is not None
        for _ in range(int(count)):
            Claims(out=self.store.out).heartbeat(self.claim, self.left[:1])
            self.store.write(row(self.left.pop(0)))
        self.store.fold()

    def end(self) -> None:
        """Measure the rest and end as a launch does."""
        self.measure(str(len(self.left)))
        self.store.close()
        self.store.fold()
        assert self.claim is not None
        Claims(out=self.store.out).release(self.claim)


def serve(out: str) -> None:
    """Do what is said, line by line."""
    launched = Launched(store=Store(out=Path(out)))
    for line in sys.stdin:
        name, *arguments = line.split()
        print(json.dumps(getattr(launched, name)(*arguments)), flush=True)


def start(host: Host) -> subprocess.Popen[str]:
    code = f"import sys; from {__name__} import serve; serve(sys.argv[1])"
    return host.start("-c", code, str(host.out), stdin=subprocess.PIPE)


def say(process: subprocess.Popen[str], line: str) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    said = process.stdout.readline()
    try:
        return json.loads(said)
    except ValueError:
        raise AssertionError(said + process.communicate()[0]) from None


def let_time_pass(out: Path) -> None:
    """As if nothing had been written for as long as a dead host is waited for."""
    for path in (*out.glob("claims/*"), *out.glob("parts/*"), *out.glob("packs/*")):
        before = path.stat().st_mtime - SILENT_SECONDS
        os.utime(path, (before, before))


def test_hosts_of_one_name_and_equal_pids_share_a_study(tmp_path: Path) -> None:
    out = tmp_path / "shared"
    with hosts(tmp_path, "node", "node") as (one, two):
        first, second = start(one), start(two)
        launched = say(first, "launch first"), say(second, "launch all")
        assert launched[0]["pid"] == launched[1]["pid"]
        assert [told["todo"] for told in launched] == [16, len(KEYS) - 16]
        for process in (first, second, first, second):
            say(process, "measure 3")
        assert not list(out.glob("packs/*")), "neither takes the other's file from it"
        one.kill()
        assert first.wait(timeout=30)
        say(second, "end")
        assert len(list(out.glob("packs/*"))) == 1
        assert not list(out.glob("parts/*.taken"))
        again = say(second, "launch all")
        assert again["todo"] == 0, "nobody can know yet that the other host is dead"
        assert "on node, which can't be seen from here: last heard of" in again["others"][0]
        let_time_pass(out)
        assert say(second, "launch all")["todo"] == 16 - 6
        say(second, "end")
        assert say(second, "launch first")["todo"] == 0
        second.communicate()
    assert len(list(out.glob("parts/*.taken"))) == 1
    assert sorted(r["measurement"] for r in Store(out=out).history(["measurement"])) == sorted(KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("node", "node"), ("n1", "n2")], ids="-".join)
def test_studies_on_two_hosts(tmp_path: Path, names: tuple[str, str]) -> None:
    """Launches at once of one study and of overlapping ones; a host dies, and the other does what it left."""
    out = tmp_path / "shared"
    small = ("sweep.sizes=[neox-xs]", "eval.tasks=[]", "eval.tokens=1024", "executor.workers=1", "executor.device=cpu")
    quant = "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6], dtype: [int, float, quantile], blocksize: [32, 64, 128]}]"
    part = "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: [int, float], blocksize: [32, 64, 256]}]"
    with hosts(tmp_path, *names) as (one, two):

        def launch(host: Host, *args: str) -> subprocess.Popen[str]:
            return host.start(str(ROOT / "launch.py"), f"out={host.out}", *small, *args)

        def said(process: subprocess.Popen[str], code: int = 0) -> str:
            text = process.communicate(timeout=600)[0]
            assert process.returncode == code, text
            return text

        def stored() -> int:
            return len(Store(out=out).history([]))

        whole = [launch(host, f"sweep.name={name}", quant) for name, host in (("a", one), ("a", two), ("b", one))]
        whole.append(launch(two, "sweep.name=c", part))
        while stored() < 10:
            assert any(process.poll() is None for process in whole)
            time.sleep(0.1)
        texts = [said(process) for process in whole]
        assert sum("nothing to do" in text for text in texts) >= 2
        assert stored() == 37 + 4
        for host in (one, two):
            assert "done" in said(launch(host, "mode=status"))
            said(launch(host, "mode=audit"))

        more = (quant.replace("64", "96"), "sweep.name=d", "report=false")
        dying = launch(one, *more)
        while stored() < 37 + 4 + 3:
            assert dying.poll() is None
            time.sleep(0.05)
        one.kill()
        dying.communicate()
        before = stored()
        assert before < 37 + 4 + 12
        waiting = said(launch(two, *more))
        assert "nothing to do" in waiting
        assert "can't be seen from here" in waiting
        assert "is running: launch" in said(launch(two, "mode=status"))
        assert stored() == before
        let_time_pass(out)
        said(launch(two, *more))
        assert stored() == 37 + 4 + 12
        said(launch(two, "mode=audit"))
    rows = Store(out=out).history(["measurement"])
    assert len({r["measurement"] for r in rows}) == len(rows)
