"""Two users at one study on the cluster, whatever their umask, and whether or not they see each other's jobs."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.faults import TINY_CELLS
from tests.slurm.users import Pair, hidden_jobs, pair_of_users

HELD = "executor.extra={hold: true}"


@pytest.fixture(params=[(0o077, 0o2770), (0o002, 0o2775), (0o002, 0o0775)], ids=["closed", "open", "by umask"])
def pair(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Pair]:
    umask, mode = request.param
    with pair_of_users(cluster, umask=umask, mode=mode) as pair:
        yield pair


@pytest.fixture
def private(cluster: Cluster) -> Iterator[Pair]:
    with pair_of_users(cluster, umask=0o077, mode=0o2770) as pair, hidden_jobs(cluster):
        yield pair


def test_jobs_that_another_user_cannot_see_are_neither_lost_nor_denied(private: Pair) -> None:
    first, second = private.users
    study, their = private.study, f"1 job of {first.pw_name} on kbit can't be seen from here"
    launched = private.launch(first, HELD)
    assert "1 job submitted" in launched.stdout, launched.stderr
    assert private.run(second, "squeue", "--all", "--noheader").stdout == ""
    again = private.launch(second)
    assert f"nothing to submit. {TINY_CELLS} in flight" in again.stdout, again.stderr
    assert "waiting to be sure" not in again.stdout
    assert their in private.launch(second, "mode=status").stdout
    cancelled = private.launch(second, "mode=cancel")
    assert cancelled.returncode == 2
    assert f"mode=cancel: {their} and may go on" in cancelled.stderr
    assert set(study.jobs().values()) == {"PENDING"}
    study.release()
    study.wait_idle()
    # Its own word is as good as the scheduler's.
    assert "can't be seen" not in private.launch(second, "mode=status").stdout
    study.assert_whole(cells=TINY_CELLS)


@pytest.mark.slow
def test_two_users_run_one_study_and_end_only_their_own_jobs(pair: Pair) -> None:
    first, second = pair.users
    study = pair.study
    launched = pair.launch(first, HELD, "where={bits: 3}")
    assert "1 job submitted for 3 cells" in launched.stdout, launched.stderr
    beside = pair.launch(second)
    assert "1 job submitted for 3 cells" in beside.stdout, beside.stderr
    assert "3 in flight" in beside.stdout
    study.wait(lambda: "RUNNING" not in study.jobs().values() and len(study.row_ids()) == TINY_CELLS - 3)
    cancelled = pair.launch(second, "mode=cancel")
    assert cancelled.returncode == 2
    assert f"they are {first.pw_name}'s, who can cancel them" in cancelled.stderr
    assert not list(study.out.glob("launches/*/cancelled*"))[1:], "of both launches one was the second user's"
    assert set(study.jobs().values()) == {"PENDING"}
    held = study.cluster.command("squeue", "--noheader", "--format=%A", f"--user={first.pw_name}").split()
    study.cluster.command("scontrol", "release", *held)
    study.wait_idle()
    assert pair.launch(second).returncode == 0
    study.assert_whole(cells=TINY_CELLS)
    assert {p.stat().st_uid for p in study.out.rglob("*.rows")} == {u.pw_uid for u in pair.users}
    assert [p for p in (study.out, *study.out.rglob("*")) if is_of_one(p)] == []


def is_of_one(path: Path) -> bool:
    """Whether a user's group may not do with a file of results what its user may; submitit's own files don't matter."""
    if path.is_symlink() or path.name.endswith((".pkl", ".sh")):
        return False
    mode = path.stat().st_mode
    return (mode & stat.S_IRWXU) >> 3 != mode & stat.S_IRWXG
