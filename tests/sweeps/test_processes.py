"""A process is told from all others, whatever its number and its machine's name; who can't be seen is not dead."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps import processes
from sweeps.processes import FIRST_NAMESPACE, is_running, seconds_since_restart, this_machine, this_process
from tests import ROOT


def test_a_process_runs_until_it_ends_and_its_number_alone_is_another_ones() -> None:
    mine = this_process()
    assert is_running(mine) is True
    assert is_running({**mine, "pid_started": "1"}) is False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        other = {**mine, "pid": child.pid, "pid_started": processes.process_start(child.pid)}
        assert is_running(other) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(other) is False, "though nobody has asked yet how it ended"


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere"},
        {"machine": "another-boot pid:[1]"},  # of the same name, as containers and machines of one image are
        {"machine": ""},
    ],
    ids=str,
)
def test_nobody_knows_of_a_process_of_another_machine(other: dict[str, str]) -> None:
    assert is_running({**this_process(), **other}) is None
    assert is_running({**this_process(), **other, "pid": 2**30}) is None


def test_what_an_earlier_version_wrote_is_known_by_the_name_of_its_machine() -> None:
    earlier = {name: value for name, value in this_process().items() if name != "machine"}
    assert is_running(earlier) is True
    assert is_running({**earlier, "pid_started": "1"}) is False
    assert is_running({**earlier, "host": "elsewhere"}) is None
    assert seconds_since_restart(earlier) is None


def test_a_machine_that_started_again_is_known_by_its_name_outside_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    def before(namespace: str = FIRST_NAMESPACE, **more: str) -> dict[str, str | int]:
        return {**this_process(), "machine": f"before {namespace}", **more}

    monkeypatch.setattr(processes, "this_machine", lambda: f"now {FIRST_NAMESPACE}")
    up = float(Path("/proc/uptime").read_text().split()[0])
    assert seconds_since_restart(before()) == pytest.approx(up, abs=5)
    assert seconds_since_restart(before(host="elsewhere")) is None
    assert seconds_since_restart(this_process()) is None
    assert seconds_since_restart(before("pid:[4026532180]")) is None
    monkeypatch.setattr(processes, "this_machine", lambda: "now pid:[4026532180]")
    assert seconds_since_restart(before()) is None
    assert seconds_since_restart(before("pid:[4026532180]")) is None


def run_apart(*command: str, unshare: tuple[str, ...]) -> str:
    """What a command says in namespaces of its own; skip where these are not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: apt install util-linux")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = ["unshare", *unshare, *command]
    ended = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if ended.returncode and "unshare:" in ended.stderr:
        pytest.skip(f"namespaces are not allowed here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_process_that_sees_others_pids_in_proc_is_known_to_nobody() -> None:
    """As in a container that got the /proc of its machine: pid 1 is another process there."""
    code = "from sweeps.processes import *; print(repr(this_machine()), is_running(this_process()))"
    said = run_apart(sys.executable, "-c", code, unshare=("--user", "--map-root-user", "--pid", "--fork"))
    assert said == "'' None"


def test_a_process_that_is_hidden_from_other_users_is_not_dead() -> None:
    if os.geteuid():
        pytest.skip("only root can be two users")
    code = (
        "import os, sys; from sweeps.processes import *; "
        "os.setgroups([]); os.setgid(54321); os.setuid(54321); "
        "owner = {**this_process(), 'pid': int(sys.argv[1]), 'pid_started': sys.argv[2]}; "
        "print(process_start(owner['pid']) == '', is_running(owner), is_running({**owner, 'pid': 2**30}))"
    )
    mine = [str(os.getpid()), processes.process_start(os.getpid())]
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    said = run_apart("sh", "-ec", hide, "sh", sys.executable, "-c", code, *mine, unshare=("--mount",))
    assert said == "True None False"


def test_this_machine_is_the_same_for_all_its_processes_and_stays_so() -> None:
    code = "from sweeps.processes import this_machine; print(this_machine())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == this_machine() != ""
