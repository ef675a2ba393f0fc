"""Studies larger than the cluster lets in: arrays are cut, what does not fit waits its turn, cancelling is exact."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sweeps import load_results
from sweeps.launches.claims import Claims
from tests.slurm.studies import Counted, Studies, Study

HELD = ("executor.extra={hold: true}", "executor.preflight=false")
THOUSAND = (
    "executor.cells_per_job=1",
    "executor.max_parallel=25",
    "sweep.quant=[{bits: [2, 3, 4, 5, 6, 7, 8], dtype: [int, dynamic, quantile], "
    "blocksize: [16, 32, 64, 128, 256, 512, 1024, 2048], absmax_dtype: [float16, float32, nested], "
    "outlier_fraction: [0, 0.02]}]",
)
JOBS = 7 * 3 * 8 * 3 * 2


@dataclass(frozen=True, kw_only=True)
class ToppedUp:
    """A study of four jobs under a QOS that lets three in: the words of two launches, and a third that watches."""

    study: Study
    held: str
    again: str
    watcher: subprocess.Popen[str]


@pytest.fixture(scope="module")
def topped_up(studies: Studies) -> Iterator[ToppedUp]:
    study = studies("tiny")
    tiny = ("executor.qos=tiny", "executor.preflight=false")
    first, second = study.run(*tiny, "executor.extra={hold: true}"), study.run(*tiny)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    claims = len(Claims(out=study.out).open())
    assert claims == len(study.launches()) == 1
    watcher = study.start(*tiny, "watch=true")
    try:
        yield ToppedUp(study=study, held=first.stdout, again=second.stdout, watcher=watcher)
    finally:
        watcher.kill()
        watcher.wait()


def test_what_does_not_fit_is_said_and_not_claimed(topped_up: ToppedUp) -> None:
    limit = "MaxSubmitJobsPerUser of QOS tiny is 3"
    assert "3 jobs submitted for " in topped_up.held
    assert f"1 more job did not fit ({limit}, 0 are queued): run the same command again later" in topped_up.held
    assert f"1 more job did not fit ({limit}, 3 are queued)" in topped_up.again
    (claim,) = Claims(out=topped_up.study.out).open()
    assert len(claim.packs) == 3
    assert len(topped_up.study.jobs()) == 3
    topped_up.study.release()


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """A study of 1,008 held jobs, and how long submitting took."""

    study: Study
    said: str
    seconds: float


@pytest.fixture(scope="module")
def crowd(studies: Studies) -> Crowd:
    study = studies("crowd")
    began = time.monotonic()
    done = study.run(*THOUSAND, *HELD)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"submitting {JOBS} jobs took {seconds:.1f} s")
    return Crowd(study=study, said=done.stdout, seconds=seconds)


def queue(study: Study, *options: str) -> list[str]:
    return study.cluster.command("squeue", "--noheader", "--all", *options).split()


def test_a_thousand_jobs_are_cut_into_arrays_that_the_cluster_takes(crowd: Crowd) -> None:
    (launch,) = crowd.study.launches()
    assert f"{JOBS:,} jobs submitted for {JOBS:,} cells" in crowd.said
    sizes = [len(c.packs) for c in launch.chunks]
    # MaxArraySize=101: indices 0 to 100.
    assert sizes == [101] * 9 + [JOBS - 9 * 101]
    elements = [e.split("|") for e in queue(crowd.study, "--array", "--format=%j|%K")]
    mine = [(name, int(index)) for name, index in elements if name.startswith(f"kbit-{launch.id}-")]
    assert sorted(mine) == sorted(place for place in launch.places.values())
    assert len(mine) == JOBS


def test_max_parallel_is_shared_out_to_the_arrays(crowd: Crowd) -> None:
    (launch,) = crowd.study.launches()
    arrays = [a.split("|") for a in queue(crowd.study, "--format=%j|%i")]
    throttles = [int(i.partition("%")[2].rstrip("]")) for n, i in arrays if n.startswith(f"kbit-{launch.id}-")]
    assert sorted(throttles) == [2] * 5 + [3] * 5
    assert sum(throttles) == 25


def test_status_asks_the_scheduler_twice_whatever_the_size(crowd: Crowd, counted: Counted) -> None:
    said = crowd.study.run("mode=status", "by=[bits]", env=counted.environment)
    assert said.returncode == 0, said.stderr
    assert f"{JOBS} pending" in said.stdout
    assert counted.calls() == Counter(squeue=1, sacct=1)


def test_cancel_ends_exactly_one_study(crowd: Crowd, studies: Studies) -> None:
    study, elsewhere = crowd.study, studies("elsewhere")
    own = study.cluster.command("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    # Another study: int and quantile cells are the crowd's, the others its own; and one in another directory.
    beside = study.run("sweep.name=other", *HELD)
    assert "2 jobs submitted for 5 cells, 5 measurements" in beside.stdout, beside.stderr
    assert "Of the rest: 8 in flight" in beside.stdout
    assert elsewhere.run(*HELD).returncode == 0
    ambiguous = study.run("mode=cancel")
    assert ambiguous.returncode == 2
    assert ambiguous.stderr == "error: mode=cancel: demo, other have jobs: name one, e.g. sweep=demo\n"
    assert len(study.jobs()) == JOBS + 2
    done = study.run("mode=cancel", "sweep=demo")
    assert done.returncode == 0, done.stderr
    assert f"Cancelling {JOBS:,} jobs of demo: 0 running, {JOBS:,} queued." in done.stdout
    assert len(study.jobs()) == 2
    assert len(elsewhere.jobs()) == 4
    assert own in queue(study, "--format=%i")
    study.cluster.command("scancel", own)
    again = study.run("mode=cancel", "sweep=demo")
    assert again.returncode == 0
    assert "Cancelling" not in again.stdout
    assert load_results(study.out)["status"].value_counts().to_dict() == {"cancelled": JOBS, "queued": 5}


def test_watching_submits_what_did_not_fit_until_all_is_done(topped_up: ToppedUp) -> None:
    said, _ = topped_up.watcher.communicate(timeout=180)
    assert topped_up.watcher.returncode == 0, said
    assert "1 more job submitted" in said
    assert "13 done" in said
    assert "quantile" in said
    topped_up.study.assert_whole()
    assert len(topped_up.study.launches()) == 2


def test_chosen_cells_are_submitted_and_cancelled_alone(study: Study) -> None:
    assert study.run(*HELD, "where={bits: [3,4]}", "executor.cells_per_job=1").returncode == 0
    assert len(study.jobs()) == 6
    mixed = study.run("mode=cancel", "where={bits: 3}")
    assert "Cancelling 3 jobs of demo: 0 running, 3 queued." in mixed.stdout, mixed.stderr
    assert len(study.jobs()) == 3
    states = load_results(study.out).groupby(["bits"])["status"].unique().map(list).to_dict()
    assert states == {3: ["cancelled"], 4: ["queued"], 5: ["missing"], 6: ["missing"], 16: ["missing"]}
    # A job with other cells goes on, and that is said.
    assert study.run(*HELD, "where={bits: [5,6]}", "executor.cells_per_job=6").returncode == 0
    partly = study.run("mode=cancel", "where={bits: 5}")
    assert "1 job left alone: they also measure cells that are not chosen." in partly.stdout, partly.stderr
    assert len(study.jobs()) == 4
