"""What is said to SLURM's commands, said to a real SLURM."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import UserError
from sweeps.executors.slurm.query import JobSnapshot, JobState, Request, cancel, check_request, query_jobs, read_limits
from tests.slurm.cluster import Cluster


@pytest.fixture(autouse=True)
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in cluster.environment().items():
        monkeypatch.setenv(key, value)
    # Users export such: nothing may depend on it.
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SQUEUE_STATES", "SUSPENDED")
    monkeypatch.setenv("SACCT_FORMAT", "jobid")


@pytest.fixture
def name() -> str:
    return f"commands-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def cut_off(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """The same cluster as a client sees it whose way to some of its daemons is cut."""

    def cut(*ports: str) -> None:
        lines = [
            f"{line.partition('=')[0]}=1" if line.startswith(ports) else line
            for line in cluster.config.read_text().splitlines()
        ]
        (tmp_path / "slurm.conf").write_text("\n".join(lines))
        (tmp_path / "gres.conf").write_text(cluster.config.with_name("gres.conf").read_text())
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))

    return cut


def submit(name: str, *flags: str, script: str = "true") -> str:
    command = ["sbatch", "--parsable", f"--job-name={name}", "--output=/dev/null", "--time=5", "--mem=10M", *flags]
    return subprocess.run([*command, f"--wrap={script}"], capture_output=True, text=True, check=True).stdout.strip()


def request(**changes: Any) -> Request:
    shape = Request(
        partition="main",
        account=None,
        qos=None,
        gpus=0,
        gpu_type=None,
        cpus=1,
        mem_gb=0.1,
        minutes=5,
        constraint=None,
        extra={},
        exclude=None,
    )
    return Request(**{**vars(shape), **changes})


def look_until(name: str, wanted: Callable[[JobSnapshot], bool], seconds: float = 40.0) -> JobSnapshot:
    end = time.monotonic() + seconds
    while True:
        snapshot = query_jobs([name, "nobody-has-this-name"], time.time())
        assert snapshot.problems == ()
        if wanted(snapshot):
            return snapshot
        assert time.monotonic() < end, snapshot
        time.sleep(0.2)


def states(jobs: Any) -> dict[int, str]:
    return {index: job.state for (_, index), job in (jobs or {}).items()}


def test_held_elements_are_seen_one_by_one_and_cancelled_by_their_ids(name: str) -> None:
    array = submit(name, "--hold", "--array=0-98:2%3")
    snapshot = query_jobs([name], time.time())
    assert snapshot.queue is not None
    assert states(snapshot.queue) == dict.fromkeys(range(0, 100, 2), "PENDING")
    assert snapshot.queue[name, 4] == JobState(
        name=name, index=4, job=f"{array}_4", state="PENDING", reason="JobHeldUser", nodes="", restarts=0
    )
    cancel([f"{array}_{i}" for i in range(0, 50, 2)])
    left = look_until(name, lambda s: 0 not in states(s.queue))
    assert states(left.queue) == dict.fromkeys(range(50, 100, 2), "PENDING")
    cancel([f"{array}_{i}" for i in range(0, 100, 2)])
    look_until(name, lambda s: "PENDING" not in states(s.queue).values())


def test_jobs_that_ended_are_no_error_to_cancel(name: str) -> None:
    job = submit(name)
    look_until(name, lambda s: states(s.queue) == {0: "COMPLETED"})
    cancel([job, "99999", "99999_3"])
    assert states(query_jobs([name], time.time()).queue) == {0: "COMPLETED"}


def test_ends_are_told_by_queue_and_accounting(name: str) -> None:
    submit(name, "--array=0-2", script="exit $SLURM_ARRAY_TASK_ID")
    ends = {0: "COMPLETED", 1: "FAILED", 2: "FAILED"}
    snapshot = look_until(name, lambda s: states(s.accounting) == ends)
    assert states(snapshot.queue) == ends
    assert snapshot.queue is not None
    assert all(j.terminal and j.nodes in ("n1", "n2", "n3", "n4") for j in snapshot.queue.values())


def test_jobs_killed_before_they_could_ever_start_are_in_accounting(name: str) -> None:
    first = submit(name + "-first", script="exit 1")
    submit(name, f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", "--array=0-3")
    killed = look_until(name, lambda s: states(s.accounting) == dict.fromkeys(range(4), "CANCELLED"))
    assert killed.accounting is not None
    assert not any(job.nodes for job in killed.accounting.values())


def test_a_requeue_counts_as_a_restart(name: str) -> None:
    script = '[ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" != 1 ] || sleep 60'
    array = submit(name, "--array=0-1", "--requeue", script=script)
    running = look_until(name, lambda s: states(s.accounting) == {0: "COMPLETED", 1: "RUNNING"})
    assert running.queue is not None
    assert {j.restarts for j in running.queue.values()} == {0}
    subprocess.run(["scontrol", "requeue", f"{array}_1"], check=True)
    over = look_until(
        name, lambda s: states(s.accounting) == {0: "COMPLETED", 1: "COMPLETED"} and restarts(s, name) == [0, 1]
    )
    assert over.queue is not None
    assert [over.queue[name, i].restarts for i in (0, 1)] == [0, 1]


def restarts(snapshot: JobSnapshot, name: str) -> list[int]:
    assert snapshot.accounting is not None
    return [snapshot.accounting[name, i].restarts for i in (0, 1)]


def test_more_names_than_a_command_line_takes(name: str) -> None:
    job = submit(name, "--hold")
    names = [f"{uuid.uuid4().hex * 3}-{i}" for i in range(1500)]
    assert len(",".join(names)) > 128 * 1024
    snapshot = query_jobs([*names, name], time.time())
    assert snapshot.problems == ()
    assert snapshot.queue is not None
    assert [j.job for j in snapshot.queue.values()] == [job]
    cancel([job])


def test_limits_are_the_clusters(cluster: Cluster) -> None:
    configured = dict(
        line.replace(" ", "").split("=", 1)
        for line in cluster.command("scontrol", "show", "config").splitlines()[1:]
        if "=" in line
    )
    limits = read_limits(partition="main", account=None, qos=None)
    assert limits.max_array_size == int(configured["MaxArraySize"])
    assert limits.kill_wait == float(configured["KillWait"].removesuffix("sec"))
    assert limits.room is not None
    assert 0 < limits.room <= int(configured["MaxJobCount"])


def test_room_shrinks_with_queued_elements_and_a_full_qos_is_no_bad_request(name: str) -> None:
    submit(name, "--hold", "--qos=tiny", "--array=0-1")
    try:
        limits = read_limits(partition="main", account="research", qos="tiny")
        assert limits.room == 1
        assert limits.why == "MaxSubmitJobsPerUser of QOS tiny is 3, 2 are queued"
        submit(name, "--hold", "--qos=tiny")
        assert read_limits(partition=None, account=None, qos="tiny").room == 0
        check_request(request(qos="tiny"))
    finally:
        subprocess.run(["scancel", f"--name={name}"], check=True)


def test_limits_of_users_and_accounts_count_and_the_tightest_is_named(cluster: Cluster) -> None:
    user = cluster.command("id", "-un").strip()

    def limit(what: str) -> None:
        cluster.command("sacctmgr", "-i", "modify", *what.split())

    # Far above what other tests submit meanwhile.
    try:
        limit("account research set GrpSubmitJobs=5000")
        assert (
            "GrpSubmitJobs of account research is 5000, " in read_limits(partition="main", account=None, qos=None).why
        )
        limit(f"user {user} where account=research set MaxSubmitJobs=4000")
        limits = read_limits(partition="main", account="research", qos=None)
        assert f"MaxSubmitJobs of {user} in account research is 4000, " in limits.why
        assert limits.room is not None
        assert 3000 < limits.room <= 4000
    finally:
        limit("account research set GrpSubmitJobs=-1")
        limit(f"user {user} where account=research set MaxSubmitJobs=-1")


def test_without_accounting_the_queue_and_the_controllers_limits_are_told(
    name: str, cut_off: Callable[..., None]
) -> None:
    job = submit(name, "--hold", "--qos=tiny")
    cut_off("AccountingStoragePort=")
    snapshot = query_jobs([name], time.time())
    assert states(snapshot.queue) == {0: "PENDING"}
    assert snapshot.accounting is None
    assert [p.split()[0] for p in snapshot.problems] == ["sacct"]
    assert read_limits(partition="main", account=None, qos="tiny").why.startswith("MaxJobCount of the cluster")
    cancel([job])


@pytest.mark.parametrize(
    "changes",
    [{}, {"gpus": 2}, {"partition": None}, {"partition": "small,main"}, {"extra": {"nice": 10, "exclusive": True}}],
)
def test_requests_that_fit_pass(changes: dict[str, Any]) -> None:
    check_request(request(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partition": "mian"}, r"executor\.partition=mian: .* main, urgent, small\. Did you mean main\?"),
        ({"gpus": 3}, r"executor\.gpus=3: nodes of partition main have at most 2"),
        ({"gpus": 1, "gpu_type": "a100"}, r"executor\.gpu_type=a100: GPUs of partition main"),
        ({"cpus": 400}, r"executor\.cpus=400: nodes of partition main have at most \d+"),
        ({"mem_gb": 4000}, r"executor\.mem_gb=4000: nodes of partition main have at most"),
        ({"partition": "small", "minutes": 11}, r"executor\.time=11 minutes: partition small allows at most 10"),
        ({"account": "reserch"}, r"executor\.account=reserch: .* Did you mean research\?"),
        ({"qos": "tny"}, r"executor\.qos=tny: .* Did you mean tiny\?"),
        ({"constraint": "avx9"}, r"executor\.constraint=avx9: Invalid feature"),
        ({"exclude": "n99"}, r"executor\.exclude=n99: Invalid node name"),
        ({"extra": {"frobnicate": 3}}, r"executor\.extra=.*unrecognized option '--frobnicate=3'"),
        ({"exclude": "n[1-4]"}, r"sbatch refuses .*--exclude=n\[1-4\]: Requested node configuration is not available"),
    ],
)
def test_requests_that_can_never_run_are_one_clear_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        check_request(request(**changes))
    assert "\n" not in str(refused.value)


def test_a_partition_that_is_down_is_told(cluster: Cluster) -> None:
    cluster.command("scontrol", "update", "PartitionName=small", "State=INACTIVE")
    try:
        with pytest.raises(UserError, match=r"executor\.partition=small: the partition is inactive now; up are main"):
            check_request(request(partition="small"))
    finally:
        cluster.command("scontrol", "update", "PartitionName=small", "State=UP")


def test_a_scheduler_that_does_not_answer_is_a_problem_not_an_empty_queue(cut_off: Callable[..., None]) -> None:
    cut_off("SlurmctldPort=", "AccountingStoragePort=")
    snapshot = query_jobs(["a"], time.time())
    assert snapshot.queue is None
    assert snapshot.accounting is None
    assert [p.split()[0] for p in snapshot.problems] == ["squeue", "sacct"]
    with pytest.raises(UserError, match=r"the scheduler can't be asked .*Unable to contact slurm controller"):
        check_request(request())
