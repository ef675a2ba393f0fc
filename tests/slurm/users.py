"""Two users of the test cluster beside its owner, who share a group: a command of theirs, and hiding jobs from them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.faults import TINY
from tests.slurm.studies import SMALL, Study


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two users and a directory that their group shares.

    Attributes:
        home: what both reach; below it a home for each, and ``shared``.
        python: an interpreter that they may run: root's own often lies in root's home.
        umask: of all their commands.
    """

    cluster: Cluster
    home: Path
    users: tuple[pwd.struct_passwd, pwd.struct_passwd]
    python: str
    umask: int

    @property
    def study(self) -> Study:
        """What they work on, as its cluster's owner sees it."""
        return Study(cluster=self.cluster, home=self.home / "shared")

    def run(self, user: pwd.struct_passwd, *command: object) -> subprocess.CompletedProcess[str]:
        """A command of a user's, as a login of theirs would run it."""
        home = self.home / user.pw_name
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "USER": user.pw_name, "COLUMNS": "200"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])
        return subprocess.run(
            list(map(str, command)),
            cwd=home,
            env=self.cluster.environment(environment),
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            umask=self.umask,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def launch(self, user: pwd.struct_passwd, *args: str) -> subprocess.CompletedProcess[str]:
        """``python launch.py`` by a user, on the study of six cells."""
        return self.run(user, self.python, ROOT / "launch.py", f"out={self.study.out}", *SMALL, *TINY, *args)


@contextmanager
def pair_of_users(cluster: Cluster, *, umask: int, mode: int) -> Iterator[Pair]:
    """Two users whom accounting knows, with ``shared`` of that mode. Skips where there can't be any."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    of_group: dict[int, list[pwd.struct_passwd]] = {}
    for user in pwd.getpwall():
        if user.pw_uid:
            of_group.setdefault(user.pw_gid, []).append(user)
    users = next((found for found in of_group.values() if len(found) > 1), None)
    if users is None:
        pytest.skip("no two users of this system share their group")
    first, second = users[:2]
    home = Path(tempfile.mkdtemp(prefix="users-"))
    try:
        home.chmod(0o755)
        for user in (first, second):
            (home / user.pw_name).mkdir()
            os.chown(home / user.pw_name, user.pw_uid, user.pw_gid)
            if not cluster.command("sacctmgr", "-n", "show", "user", user.pw_name).strip():
                cluster.command("sacctmgr", "-i", "add", "user", user.pw_name, "account=research")
        (home / "shared").mkdir()
        os.chown(home / "shared", first.pw_uid, first.pw_gid)
        (home / "shared").chmod(mode)
        pair = Pair(cluster=cluster, home=home, users=(first, second), python="", umask=umask)
        pair = replace(pair, python=interpreter(partial(pair.run, second)))
        try:
            yield pair
        finally:
            pair.study.cancel_all()
    finally:
        shutil.rmtree(home)


def interpreter(run: Callable[..., subprocess.CompletedProcess[str]]) -> str:
    """An interpreter that another user may run, as ``run`` does: root's own often lies in root's home. Or skips."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    why = ""
    for found in (sys.executable, shutil.which(name, path="/usr/local/bin:/usr/bin")):
        try:
            tried = run(found, "-c", f"import torch, yaml; open({str(ROOT / 'launch.py')!r})")
        except OSError as error:
            why = str(error)
            continue
        if not tried.returncode:
            return str(found)
        why = tried.stderr[-300:]
    pytest.skip(f"other users can't run Python with {ROOT}: {why}")


@contextmanager
def hidden_jobs(cluster: Cluster) -> Iterator[None]:
    """Have the controller hide other users' jobs meanwhile, as many sites do; its owner sees all."""
    before = cluster.config.read_text()
    try:
        cluster.config.write_text(f"{before}PrivateData=jobs,usage\n")
        cluster.command("scontrol", "reconfigure")
        yield
    finally:
        cluster.config.write_text(before)
        cluster.command("scontrol", "reconfigure")
