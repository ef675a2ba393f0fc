"""Limits of control groups, and kills when memory ran out, are found wherever the groups are mounted."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.worker import devices
from sweeps.worker.cgroup import memory_limit, oom_kills
from sweeps.worker.devices import Workers, plan_workers
from tests import ROOT

V1 = (
    "35 31 0:32 {root} {at} rw,relatime shared:12 - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /x rw - cgroup cgroup rw,cpu\n"
)
V2 = "31 23 0:28 {root} {at} rw,relatime - cgroup2 cgroup2 rw\n"


def process(directory: Path, groups: str, mounts: str) -> Path:
    directory.mkdir()
    (directory / "cgroup").write_text(groups)
    (directory / "mountinfo").write_text("23 1 0:5 / / rw - ext4 /dev/sda rw\n" + mounts)
    return directory


def group(mount: Path, path: str, file: str, text: str) -> None:
    (mount / path).mkdir(parents=True)
    (mount / path / file).write_text(text)


def test_version_2_counts_in_memory_events(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    group(mount, "slurm/job_1", "memory.events", "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert oom_kills(process(tmp_path / "1", "0::/slurm/job_1\n", V2.format(root="/", at=mount))) == 3


def test_version_1_counts_in_oom_control_also_beside_version_2(tmp_path: Path) -> None:
    mount, unified = tmp_path / "memory", tmp_path / "unified"
    group(mount, "a", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    group(unified, "b", "cgroup.procs", "")
    mounts = V2.format(root="/", at=unified) + V1.format(root="/", at=mount)
    assert oom_kills(process(tmp_path / "1", "8:pids:/\n4:cpu,memory:/a\n0::/b\n", mounts)) == 2


def test_a_container_sees_its_part_of_the_tree(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    group(mount, "inner", "memory.events", "oom_kill 1\n")
    assert oom_kills(process(tmp_path / "1", "0::/docker/ab/inner\n", V2.format(root="/docker/ab", at=mount))) == 1


def test_the_least_limit_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    group(mount, "job/step", "memory.max", "max\n")
    at = process(tmp_path / "2", "0::/job/step\n", V2.format(root="/", at=mount))
    assert memory_limit(at) is None
    (mount / "job" / "memory.max").write_text("3000000\n")
    assert memory_limit(at) == 3_000_000
    (mount / "job" / "step" / "memory.max").write_text("2000000\n")
    assert memory_limit(at) == 2_000_000
    mount = tmp_path / "memory"
    group(mount, "a", "memory.limit_in_bytes", "9223372036854771712\n")
    at = process(tmp_path / "1", "4:cpu,memory:/a\n", V1.format(root="/", at=mount))
    assert memory_limit(at) is None
    (mount / "a" / "memory.limit_in_bytes").write_text("1000000\n")
    assert memory_limit(at) == 1_000_000
    assert memory_limit(tmp_path / "no such process") is None


PLAN = "from sweeps.worker.devices import plan_workers as p; w = p('cpu', 'auto', 'auto', 0); print(w.count, w.threads)"


def test_workers_are_counted_by_the_quota_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    mounted = ["unshare", "-m", "sh", "-c", f'mount --bind {tmp_path} /sys/fs/cgroup && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*mounted, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare (util-linux) makes a container's view of control groups")
    if allowed.returncode:
        pytest.skip(f"a container's view of control groups can't be made here: {allowed.stderr.strip()}")
    asked = [*mounted, sys.executable, "-c", PLAN]
    assert subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "1 1\n"


def test_workers_fit_into_the_memory_of_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory_limit", lambda: int(1.6e9))
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)
    assert plan_workers("cpu", "auto", "auto", 0) == Workers(device="cpu", count=1, threads=8)
    assert plan_workers("cpu", "auto", "auto", 10**9).count == 1
    monkeypatch.setattr(devices, "memory_limit", lambda: int(4.6e9))
    assert plan_workers("cpu", "auto", "auto", 0) == Workers(device="cpu", count=3, threads=2)
    assert plan_workers("cpu", "auto", 4, 0) == Workers(device="cpu", count=2, threads=4)
    assert plan_workers("cpu", 1, 1, 0) == Workers(device="cpu", count=1, threads=1)


def test_without_a_memory_controller_there_is_no_count(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    mount.mkdir()
    assert oom_kills(tmp_path / "no such process") is None
    assert oom_kills(process(tmp_path / "1", "0::/\n", V2.format(root="/", at=mount))) is None
    group(mount, "old", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
    assert oom_kills(process(tmp_path / "2", "4:memory:/old\n", V1.format(root="/", at=mount))) is None


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_this_machine_is_asked_without_error() -> None:
    count = oom_kills()
    assert count is None or count >= 0


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MB on this machine."""
    for mount, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        directory = mount / f"kbit-test-{uuid.uuid4().hex[:8]}"
        if not (mount / "cgroup.procs").exists():
            continue
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            (directory / limit).write_text(str(64 << 20))
            for swap, most in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", 64 << 20)):
                with contextlib.suppress(OSError):  # it would only put the end off
                    (directory / swap).write_text(str(most))
        except OSError:
            directory.rmdir()
            continue
        yield directory
        directory.rmdir()
        return
    pytest.skip("this user may not make control groups with a memory limit")


JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"


def test_a_real_kill_is_counted(small_group: Path) -> None:
    """A process like the pool stays in the group; another joins and takes more memory than there is."""
    procs = str(small_group / "cgroup.procs")
    pool = subprocess.Popen(
        [sys.executable, "-c", JOIN + "print(flush=True); input()", procs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert pool.stdout is not None
        pool.stdout.readline()
        seen = Path(f"/proc/{pool.pid}")
        assert oom_kills(seen) == 0
        # The kernel kills the largest process.
        greedy = subprocess.run([sys.executable, "-c", JOIN + "b'x' * (256 << 20)", procs], check=False)
        assert greedy.returncode == -9
        assert oom_kills(seen) == 1
    finally:
        pool.communicate("\n")
