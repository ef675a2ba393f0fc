"""What SLURM's commands say, read: every text here was printed by SLURM 22.05, with `|` for the unit separator."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query import (
    LIVE,
    TERMINAL,
    JobState,
    Request,
    cancel,
    check_request,
    command,
    query_jobs,
    read_limits,
)
from sweeps.executors.slurm.query.accounting import parse_minutes
from sweeps.executors.slurm.query.command import one_line
from sweeps.executors.slurm.query.feasibility import parse_gpus
from sweeps.executors.slurm.query.jobs import array_elements, read_accounting, read_queue, without_parents


def printed(text: str) -> str:
    return text.replace("|", "\x1f")


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "partition": None,
        "account": None,
        "qos": None,
        "gpus": 0,
        "gpu_type": None,
        "cpus": 1,
        "mem_gb": 1.0,
        "minutes": 10,
        "constraint": None,
        "extra": {},
        "exclude": None,
    }
    return Request(**{**values, **changes})


@pytest.mark.parametrize(
    ("job", "indices"),
    [
        ("11", [0]),
        ("8_3", [3]),
        ("8_[2-9%2]", [2, 3, 4, 5, 6, 7, 8, 9]),
        ("9_[1,3,5-7]", [1, 3, 5, 6, 7]),
        ("43_[1-2,4-7%1]", [1, 2, 4, 5, 6, 7]),
        ("22_[0-8:2]", [0, 2, 4, 6, 8]),
        ("22_[0-8:4%1]", [0, 4, 8]),
        ("12+1", [0]),
    ],
)
def test_job_ids_stand_for_these_elements(job: str, indices: list[int]) -> None:
    elements = list(array_elements(job))
    assert [index for index, _ in elements] == indices
    parent, bar, _ = job.partition("_")
    assert [element for _, element in elements] == [f"{parent}_{i}" if bar else job for i in indices]


def test_squeue_tells_arrays_single_jobs_reasons_and_nodes() -> None:
    text = printed(
        "8_2|PENDING|0||JobArrayTaskLimit|arr|\n"
        "8_3|PENDING|0||(Nodes required for job are DOWN, DRAINED or reserved)|arr|\n"
        "11|PENDING|0||BeginTime|begin|\n"
        "8_0|RUNNING|2|n1|None|arr|\n"
        "14|COMPLETED|0|n2|None|somebody|else's|\n"
        "15|RUNNING|0|n2|None|unasked|\n"
    )
    jobs = read_queue(text, {"arr", "begin", "nothere"})
    assert set(jobs) == {("arr", 2), ("arr", 3), ("begin", 0), ("arr", 0)}
    assert jobs["arr", 0] == JobState(
        name="arr", index=0, job="8_0", state="RUNNING", reason="", nodes="n1", restarts=2
    )
    assert jobs["arr", 3].reason == "(Nodes required for job are DOWN, DRAINED or reserved)"
    assert jobs["begin", 0].job == "11"


def test_of_two_jobs_of_one_name_the_queue_shows_the_live_or_the_later_one() -> None:
    live = read_queue(printed("9|PENDING|0||Priority|a|\n10|CANCELLED|0||None|a|\n"), {"a"})
    assert live["a", 0].job == "9"
    later = read_queue(printed("9|CANCELLED|0||None|a|\n10|FAILED|0|n1|NonZeroExitCode|a|\n"), {"a"})
    assert later["a", 0].job == "10"


def test_the_latest_record_counts_after_a_requeue_and_earlier_ones_are_restarts() -> None:
    text = printed(
        "40_0|COMPLETED|n1|1795337695|52|req\n"
        "40_1|COMPLETED|n1|1795337698|56|req\n"
        "40_1|REQUEUED|n1|1795337695|53|req\n"
        "14_0|PREEMPTED|n4|1795337700|60|pre\n"
        "14_0|PENDING|None assigned|1795337710|61|pre\n"
    )
    jobs = read_accounting(text, {"req", "pre"})
    assert {key: (j.state, j.restarts, j.nodes) for key, j in jobs.items()} == {
        ("req", 0): ("COMPLETED", 0, "n1"),
        ("req", 1): ("COMPLETED", 1, "n1"),
        ("pre", 0): ("PENDING", 1, ""),
    }


def test_a_cancelled_range_is_every_element_and_names_who_cancelled_no_more() -> None:
    text = printed("9_[1,3,5-7]|CANCELLED by 1000|None assigned|1795337470|20|held\n")
    jobs = read_accounting(text, {"held"})
    assert sorted(jobs) == [("held", i) for i in (1, 3, 5, 6, 7)]
    assert {j.state for j in jobs.values()} == {"CANCELLED"}
    assert all(j.terminal and not j.live for j in jobs.values())
    assert jobs["held", 5].job == "9_5"


def test_an_elements_own_record_counts_more_than_the_waiting_ranges() -> None:
    text = printed("8_1|RUNNING|n1|100|5|a\n8_[1-3]|PENDING|None assigned|100|6|a\n")
    jobs = read_accounting(text, {"a"})
    assert [jobs["a", i].state for i in (1, 2, 3)] == ["RUNNING", "PENDING", "PENDING"]


def test_a_cancelled_arrays_parent_is_not_taken_for_its_first_element() -> None:
    queue = read_queue(printed("27_0|COMPLETED|0|n1|None|a|\n27|CANCELLED|0||JobHeldUser|a|\n"), {"a"})
    assert queue["a", 0].state == "COMPLETED"
    accounting = read_accounting(printed("27_0|COMPLETED|n1|100|5|a\n27|CANCELLED|None assigned|100|6|a\n"), {"a"})
    assert accounting["a", 0].state == "COMPLETED"
    parent = read_queue(printed("27|CANCELLED|0||JobHeldUser|a|\n"), {"a"})
    assert without_parents(parent, list(accounting.values())) == {}
    assert without_parents(parent, list(parent.values())) == parent


def test_a_state_that_nobody_knows_is_neither_live_nor_terminal() -> None:
    jobs = read_queue(printed("8|HIBERNATING|0||None|a|\n"), {"a"})
    assert not jobs["a", 0].live
    assert not jobs["a", 0].terminal
    assert "UNKNOWN" not in LIVE | TERMINAL
    assert not LIVE & TERMINAL


def test_headings_of_other_shapes_are_no_jobs() -> None:
    assert read_queue("CLUSTER: kbit\n" + printed("8|RUNNING|0|n1|None|a|\n"), {"a"}).keys() == {("a", 0)}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("10:00", 10), ("1:30:00", 90), ("1-00:00:00", 1440), ("2-12:00:00", 3600), ("0:30", 0.5), ("infinite", math.inf)],
)
def test_slurms_times_are_read(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:2", {"": 2}),
        ("gpu:fake:2", {"fake": 2}),
        ("gpu:a100:4(S:0,2),nvme:1", {"a100": 4}),
        ("gpu:a100:4(S:0-1),gpu:v100:2", {"a100": 4, "v100": 2}),
        ("gpu", {"": 1}),
        ("(null)", {}),
    ],
)
def test_gpus_of_a_node_are_counted_by_type(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


def test_what_commands_say_becomes_one_line() -> None:
    said = "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n"
    assert one_line(said) == "invalid partition specified: x; Invalid partition name specified"
    assert one_line("sbatch: unrecognized option '--x'\nTry \"sbatch --help\"\n") == "unrecognized option '--x'"
    assert one_line("") == "no reason given"


def test_a_request_asks_only_for_what_it_names() -> None:
    assert request().parameters() == {"cpus_per_task": 1, "mem": "1024M", "time": 10}
    typed = request(gpus=2, gpu_type="a100", mem_gb=0.3, extra={"nice": 10, "exclusive": True})
    assert typed.parameters() == {
        "cpus_per_task": 1,
        "mem": "308M",
        "time": 10,
        "gres": "gpu:a100:2",
        "additional_parameters": {"nice": 10, "exclusive": True},
    }
    assert request(gpus=2).parameters()["gpus_per_node"] == 2
    assert {"--gres=gpu:a100:2", "--nice=10", "--exclusive", "--nodes=1"} <= set(typed.flags())


def test_no_names_ask_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    snapshot = query_jobs([], time.time())
    assert (snapshot.queue, snapshot.accounting, snapshot.problems) == ({}, {}, ())


def test_without_slurm_each_call_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    snapshot = query_jobs(["a"], time.time())
    assert snapshot.queue is None
    assert snapshot.accounting is None
    assert snapshot.problems == ("squeue is not on this machine", "sacct is not on this machine")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        check_request(request())
    with pytest.raises(SchedulerError, match="scontrol is not on this machine"):
        read_limits(partition=None, account=None, qos=None)
    with pytest.raises(SchedulerError, match="scancel is not on this machine"):
        cancel(["1_2"])


def test_a_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "COMMAND_SECONDS", 0.1)
    with pytest.raises(SchedulerError, match="sleep did not answer"):
        command.call(["sleep", "30"])


def test_the_users_own_formats_do_not_reach_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SACCT_FORMAT", "jobid")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    seen = command.ask(["env"]).splitlines()
    assert not [line for line in seen if line.startswith(("SQUEUE_", "SACCT_"))]
    assert {"SLURM_TIME_FORMAT=%s", "LC_ALL=C", "SLURM_BITSTR_LEN=0"} <= set(seen)
