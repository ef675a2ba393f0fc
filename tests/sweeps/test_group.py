"""A results directory that a group shares: several users at one study, each with a umask that keeps others out."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sweeps.files import create_exclusively, make_directory, open_log, write_atomically
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.study.snapshot import snapshot_code
from tests import ROOT
from tests.forks import Forks, forking
from tests.slurm.users import interpreter
from tests.sweeps.commands.test_run import SMALL

GROUP, USERS = 54320, (54321, 54322)
PRIVATE = 0o077


def alike(path: Path) -> bool:
    """Whether the group has its owner's rights."""
    mode = path.stat().st_mode
    return (mode & stat.S_IRWXU) >> 3 == mode & stat.S_IRWXG


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that a group shares, while this process keeps others out."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o2770)
    return directory


@pytest.fixture(autouse=True)
def private() -> Iterator[None]:
    before = os.umask(PRIVATE)
    yield
    os.umask(before)


def write_all_kinds(directory: Path) -> list[Path]:
    make_directory(directory / "a" / "b" / "c")
    write_atomically(directory / "parts" / "p" / "x.parquet", b"x")
    create_exclusively(directory / "claims" / "1.json", b"x")
    open_log(directory / "logs" / "l" / "worker0.log").close()
    snapshot_code(directory)
    return sorted(directory.rglob("*"))


def test_whatever_is_written_in_a_shared_directory_is_the_groups_too(shared: Path) -> None:
    made = write_all_kinds(shared)
    assert len(made) > 10
    assert [p for p in made if not alike(p)] == []
    assert [p for p in made if p.is_dir() and not p.stat().st_mode & stat.S_ISGID] == []
    assert [p for p in made if p.stat().st_mode & stat.S_IRWXO] == []


@pytest.mark.parametrize("mode", [0o0770, 0o2750, 0o0755])
def test_elsewhere_the_umask_decides(shared: Path, mode: int) -> None:
    shared.chmod(mode)
    assert [p for p in write_all_kinds(shared) if p.stat().st_mode & stat.S_IRWXG] == []


def login(user: int, place: Path) -> dict[str, Any]:
    """The directory and the environment that a login of a user's has."""
    home = place / str(user)
    if not home.exists():
        home.mkdir()
        os.chown(home, user, user)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "USER": f"u{user}", "COLUMNS": "200"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    return {"cwd": home, "env": environment}


def identity(user: int) -> dict[str, Any]:
    """What makes a process a user's."""
    return {"user": user, "group": user, "extra_groups": [GROUP], "umask": PRIVATE}


def as_user(user: int, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program of one of the users, as a login of theirs would run it."""
    program = list(map(str, command))
    asked = {**login(user, cwd), **identity(user)}
    return subprocess.run(program, **asked, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def place() -> Iterator[Path]:
    with shared_place() as path:
        yield path


@contextmanager
def shared_place() -> Iterator[Path]:
    """A directory that both users reach, with shared/ of their group."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    path = Path(tempfile.mkdtemp(prefix="group-"))
    path.chmod(0o755)
    (path / "shared").mkdir()
    os.chown(path / "shared", USERS[0], GROUP)
    (path / "shared").chmod(0o2770)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def commands() -> Iterator[Mapping[int, Forks]]:
    """What runs each user's commands."""
    with shared_place() as place, ExitStack() as stack:
        python = interpreter(partial(as_user, USERS[1], cwd=place))
        yield {user: stack.enter_context(forking(python, **login(user, place), **identity(user))) for user in USERS}


def test_two_users_work_in_one_directory_whatever_their_umask(place: Path, commands: Mapping[int, Forks]) -> None:
    out = place / "shared" / "deeper" / "results"

    def command(user: int, *arguments: str) -> str:
        ran = commands[user].run(f"out={out}", *arguments, **login(user, place))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "Permission denied" not in ran.stdout + ran.stderr
        return ran.stdout

    first, second = USERS
    few = ["sweep.quant=[{bits: 16}, {bits: 4, dtype: int}]", "tracking=offline"]
    more = ["sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: int}]", "tracking=offline"]
    command(first, *SMALL[:3], *few)
    command(second, *SMALL[:3], *more)
    assert {p.stat().st_uid for p in out.rglob("*.parquet")} == {*USERS}
    command(second, "mode=drop", "where={bits: 4}", "yes=true")
    command(first, *SMALL[:3], more[0], "report=false")
    for user in (second, first):
        command(user, "mode=table", f"to={out / 'more' / 'table.csv'}")
    assert load_results(out)["status"].tolist() == ["done"] * 3
    assert [p for p in [out.parent, out, *out.rglob("*")] if not p.is_symlink() and not alike(p)] == []


def results_of(user: int, place: Path) -> Path:
    """A results directory of one user's that the group shares."""
    out = Path(shutil.copytree(ROOT / "tests" / "data" / "earlier_results", place / "shared" / "results"))
    Store(out=out).drop([], why="")
    for path in [out, *out.rglob("*")]:
        os.chown(path, user, GROUP)
        path.chmod(0o2770 if path.is_dir() else 0o660)
    return out


@pytest.mark.parametrize("part", ["packs", "manifests", "dropped"])
def test_whose_a_file_is_and_what_its_owner_can_do_is_said(
    part: str, place: Path, commands: Mapping[int, Forks]
) -> None:
    first, second = USERS
    out = results_of(first, place)
    for path in (out / part).iterdir():
        path.chmod(0o600)
    refused = commands[second].run(f"out={out}", "mode=status", **login(second, place))
    assert refused.returncode != 0
    said = " ".join(refused.stderr.split())
    assert f"{out / part}/" in said
    assert f"belongs to {first}" in said
    assert f"chmod -R g+rwX {out}" in said


@pytest.mark.parametrize("mode", ["status", "plan", "cancel", "run"])
@pytest.mark.parametrize("part", ["", "claims", "launches", "manifests", "packs", "parts", "dropped"])
def test_a_directory_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    part: str, mode: str, place: Path, commands: Mapping[int, Forks]
) -> None:
    if (mode, part) in {("cancel", p) for p in ("manifests", "packs", "parts", "dropped")} | {("plan", "manifests")}:
        pytest.skip(f"mode={mode} does not look into {part}")
    first, second = USERS
    out = results_of(first, place)
    (out / part).chmod(0o2700)
    before = sorted(out.glob("[clp]*/**/*"))
    asked = [f"out={out}", f"mode={mode}", *([] if mode in ("status", "cancel") else SMALL)]
    refused = commands[second].run(*asked, **login(second, place))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    (said,) = refused.stderr.splitlines()
    assert f"belongs to {first} (drwx--S---)" in said or "can't be written" in said
    assert str(out / part) in said
    assert sorted(out.glob("[clp]*/**/*")) == before, "something was claimed, launched or measured"
