"""The test cluster: a real SLURM of four nodes on this host, apart from any other SLURM that the host may have.

    python -m tests.slurm.cluster up|down|status|env [--dir DIR]

munge, MariaDB, slurmdbd, slurmctld and four slurmd run as the caller, with their keys, sockets, state and free ports
under DIR, and listen on 127.0.0.1. Each node has two fake GPUs: SLURM counts and assigns them, nothing can compute on
them. `up` starts what isn't running; `down` ends every process that it started, jobs included, and removes DIR.
Partitions: `main` (default, preempted by requeue), `urgent` (preempts main), `small` (one node, 10 minutes).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.configuration import NODES, user_name, write_files
from tests.slurm.processes import ClusterError, Process, processes_of_jobs, spawn, wait_until

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", *NODES)
PACKAGES = ("munge", "slurm-wlm", "slurmdbd", "mariadb-server")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sacctmgr", "sbatch", "mariadbd", "mariadb-install-db")
INSTALL = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
# A user who isn't root may not have the directories of the daemons in PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
CLIENT_PREFIXES = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")


class PackagesMissing(ClusterError):  # noqa: N818 - says what is the matter
    """SLURM, munge or MariaDB isn't installed and could not be."""


def default_directory() -> Path:
    """This user's directory for the cluster."""
    return Path(tempfile.gettempdir()) / f"kbit-slurm-{os.geteuid()}"


def install_packages() -> None:
    """Install SLURM, munge and MariaDB by apt, without starting the system's own daemons. Raises PackagesMissing."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for step in (["apt-get", "update"], INSTALL):
            print(f"  {shlex.join(step)}", file=sys.stderr, flush=True)
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PackagesMissing(f"{shlex.join(step)} failed: {done.stderr.strip()}")
    finally:
        if ours:
            policy.unlink()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The test cluster that lives in `directory`. Its methods may be called from any process of its user."""

    directory: Path

    @property
    def config(self) -> Path:
        """slurm.conf, which SLURM_CONF names."""
        return self.directory / "etc" / "slurm.conf"

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (default os.environ) for this cluster's clients and jobs: our SLURM_CONF, no other SLURM_ variable."""
        source = os.environ if base is None else base
        return {k: v for k, v in source.items() if not k.startswith(CLIENT_PREFIXES)} | {"SLURM_CONF": str(self.config)}

    def missing_packages(self) -> str | None:
        """What is not installed, and the command that installs it; None when all is there."""
        missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
        return f"{', '.join(missing)} not found: sudo {shlex.join(INSTALL)}" if missing else None

    def command(self, *argv: str) -> str:
        """What a SLURM client command prints, e.g. `command("sinfo", "-h")`. ClusterError when it fails."""
        run = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, check=False)
        if run.returncode:
            raise ClusterError(f"{shlex.join(argv)}: {run.stderr.strip() or run.stdout.strip()}")
        return run.stdout

    def up(self) -> None:
        """Start what isn't running; returns when jobs run and are accounted for.

        As root, installs what is missing; raises PackagesMissing where that can't be, ClusterError when a part of the
        cluster does not start.
        """
        missing = self.missing_packages()
        if missing and (os.geteuid() != 0 or shutil.which("apt-get") is None):
            raise PackagesMissing(missing)
        if missing:
            install_packages()
        with self._locked():
            fresh = not any(map(self._process, DAEMONS))
            if fresh:
                self._clear()
                write_files(self.directory)
            elif self.is_up():
                return
            self._start_munge_and_database()
            self.start_accounting()
            if fresh:
                self._register()
            for name in NODES:
                self._start(name, "slurmd", "-D", "-N", name)
            self.start_controller()
            wait_until(f"{len(NODES)} nodes in service", lambda: all(map(self._in_service, NODES)), 60)
            if fresh:
                self._run_a_job()

    def down(self) -> None:
        """End every process of the cluster, jobs included, and remove its directory."""
        if self.directory.exists():
            with self._locked():
                self._clear()
                self.directory.rmdir()

    def is_up(self) -> bool:
        """Whether every daemon runs, the controller answers and all nodes are in service."""
        return (
            all(map(self._process, DAEMONS)) and self._answers("scontrol", "ping") and all(map(self._in_service, NODES))
        )

    def stop_controller(self) -> None:
        """End slurmctld, which saves its state; jobs run on."""
        self._end("slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld and return when it answers."""
        self._start("slurmctld", "slurmctld", "-D")
        wait_until("slurmctld", lambda: self._answers("scontrol", "ping"))

    def stop_accounting(self) -> None:
        """End slurmdbd: sacct fails; the controller keeps its records until slurmdbd is back."""
        self._end("slurmdbd")

    def start_accounting(self) -> None:
        """Start slurmdbd and return when it answers."""
        # StorageHost=localhost means a socket, which MariaDB's client library takes from this variable.
        self._start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(self.directory / "db" / "socket"))
        wait_until("slurmdbd", lambda: self._answers("sacctmgr", "-n", "show", "account"))

    def purge_accounting(self, name: str) -> None:
        """Remove what accounting knows of jobs of a name, as a site's purge does with old ones."""
        delete = f"DELETE FROM kbit_job_table WHERE job_name = '{name}'"
        self.command(
            "mariadb", "--no-defaults", "--user=root", f"--socket={self.directory}/db/socket", "slurm", "-e", delete
        )

    def stop_node(self, name: str, *, with_jobs: bool = False) -> None:
        """SIGKILL the node's slurmd; `with_jobs`: its job steps and their processes too, as when the power fails.

        Without `with_jobs` the jobs' processes live on while SLURM, after SlurmdTimeout, takes the node to be lost.
        """
        self._end(name, signal.SIGKILL)
        if with_jobs:
            self._kill_jobs(name)

    def start_node(self, name: str) -> None:
        """Start the node's slurmd and return when the node is in service."""
        self._start(name, "slurmd", "-D", "-N", name)
        wait_until(f"node {name}", lambda: self._in_service(name), 60)

    def _in_service(self, node: str) -> bool:
        """Whether the controller holds the node to be idle or at work; a `*` after the state: it does not answer."""
        state = self._output("sinfo", "-h", "-N", "-n", node, "-o", "%T").split()
        return bool(state) and state[0] in ("idle", "mixed", "allocated", "completing")

    def _answers(self, *argv: str) -> bool:
        output = self._output(*argv)
        return bool(output) and "DOWN" not in output

    def _output(self, *argv: str) -> str:
        """What a command prints; nothing when it fails."""
        try:
            return self.command(*argv)
        except ClusterError:
            return ""

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` at a time. What is locked is the directory, so that `down` leaves no lock file behind."""
        while True:
            self._make_directory()
            handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # Another process's `down` may have removed the directory while this one waited for the lock.
                if self.directory.exists() and os.path.samestat(os.fstat(handle), self.directory.stat()):
                    yield
                    return
            finally:
                os.close(handle)

    def _make_directory(self) -> None:
        if len(str(self.directory)) > 80:
            raise ClusterError(f"{self.directory} is too long for the paths of sockets: name a shorter one with --dir")
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.directory.is_symlink() or self.directory.stat().st_uid != os.geteuid():
            raise ClusterError(f"{self.directory} belongs to another user: name another one with --dir")
        if any(self.directory.iterdir()) and not (self.directory / "pids").is_dir():
            raise ClusterError(
                f"{self.directory} holds something else than a test cluster: name another one with --dir"
            )
        (self.directory / "pids").mkdir(exist_ok=True)

    def _clear(self) -> None:
        """End every process and empty the directory."""
        for name in NODES:
            self.stop_node(name, with_jobs=True)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name)
        for entry in self.directory.iterdir():
            shutil.rmtree(entry)

    def _start_munge_and_database(self) -> None:
        munge, database = self.directory / "munge", self.directory / "db"
        # --force: munged would not run as root.
        paths = [f"--{what}-file={munge / what}" for what in ("key", "log", "pid", "seed")]
        options = ["--force", "--foreground", "--num-threads=10", f"--socket={munge / 'socket'}"]
        self._start("munged", "munged", *options, *paths)
        common = ["--no-defaults", f"--datadir={database / 'data'}", f"--user={user_name()}"]
        if not (database / "data").exists():
            self.command("mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db")
        # A socket that only its owner can reach, no port; nothing is flushed to disk: the data live for a test run.
        listen = ["--skip-networking", f"--socket={database / 'socket'}", f"--pid-file={database / 'pid'}"]
        quick = ["--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync", "--innodb-lock-wait-timeout=900"]
        self._start("mariadbd", "mariadbd", *common, *listen, *quick)
        wait_until("munged and mariadbd", lambda: all((part / "socket").exists() for part in (munge, database)))

    def _register(self) -> None:
        """The account `research`, and the QOS `tiny`, under which a user may have three jobs."""
        for change in (
            "add cluster kbit",
            "add account research cluster=kbit",
            "add qos tiny set MaxSubmitJobsPerUser=3",
            f"add user {user_name()} account=research qos=normal,tiny defaultqos=normal",
            f"modify user {user_name()} set defaultaccount=research",
        ):
            self.command("sacctmgr", "-i", *change.split())

    def _run_a_job(self) -> None:
        """Ready means that a job runs to its end and that sacct knows it."""
        job = self.command("sbatch", "--parsable", "--output=/dev/null", "--job-name=ready", "--wrap=srun true").strip()
        query = ["sacct", "-n", "-X", "-P", "-j", job, "-o", "State"]
        wait_until(f"job {job}", lambda: self._output(*query).strip() == "COMPLETED", 60)

    def _start(self, name: str, program: str, *argv: str, **variables: str) -> None:
        """Start a daemon, unless it runs, and note its process."""
        if self._process(name) is None:
            path = shutil.which(program, path=SEARCH_PATH) or program
            environment = {**self.environment(), "PATH": SEARCH_PATH, **variables}
            process = spawn(path, [program, *argv], environment, self.directory / "log" / f"{name}.out")
            self._note(name).write_text(f"{process.pid} {process.started}\n")

    def _end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        process = self._process(name)
        if process:
            process.end(number)
        self._note(name).unlink(missing_ok=True)

    def _process(self, name: str) -> Process | None:
        """The daemon of this name where it runs."""
        try:
            pid, started = map(int, self._note(name).read_text().split())
        except FileNotFoundError:
            return None
        process = Process(pid=pid, started=started)
        return process if process.alive() else None

    def _note(self, name: str) -> Path:
        return self.directory / "pids" / f"{name}.pid"

    def _kill_jobs(self, node: str) -> None:
        """SIGKILL a node's job steps, and first slurmstepd, which would tell the controller how its tasks ended."""
        log = self.directory / "log" / f"{node}.log"
        while found := processes_of_jobs(self.config, node, log):
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            for process in found:
                process.end(signal.SIGKILL)


def main() -> int:
    """The command line. Returns 1 when `status` finds the cluster not up, 2 when something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description="The test SLURM cluster.")
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--dir", type=Path, default=default_directory(), help="where it lives (%(default)s)")
    options = parser.parse_args()
    cluster = Cluster(directory=options.dir.absolute())
    begin = time.monotonic()
    try:
        if options.action == "up":
            cluster.up()
            print(f"up after {time.monotonic() - begin:.1f} s; to use it: export SLURM_CONF={cluster.config}")
        elif options.action == "down":
            cluster.down()
            print(f"down after {time.monotonic() - begin:.1f} s")
        elif options.action == "env":
            foreign = [name for name in os.environ if name.startswith(CLIENT_PREFIXES) and name != "SLURM_CONF"]
            print(
                "".join(f"unset {name}\n" for name in foreign) + f"export SLURM_CONF={shlex.quote(str(cluster.config))}"
            )
        elif cluster.is_up():
            print(cluster.command("sinfo", "-N", "-o", "%N %P %T %G"), end="")
        else:
            print(f"not up: {cluster.directory}")
            return 1
    except ClusterError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
