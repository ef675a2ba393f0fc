"""The W&B mirror against a real W&B-compatible server (openwandb), and servers that are down or refuse the key."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from kbit.errors import SpecError
from sweeps.leases import lease
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.tracking import mirror as mirror_module
from sweeps.tracking import server as server_module
from sweeps.tracking.artifact import upload_tables
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Job
from sweeps.tracking.mirror import Ending, Mirror
from sweeps.tracking.server import RemoteRun, Server
from sweeps.tracking.tracker import SyncReport, Tracker, sync
from tests.conftest import Launch
from tests.sweeps.tracking.wandb_server import KEY, WandbServer, busy, free_port


def digest_of(name: str, *files: Path) -> str:
    """The digest by which W&B knows an artifact of these files: of their names and contents."""
    import wandb

    artifact = wandb.Artifact(name, type="results")
    for file in files:
        artifact.add_file(str(file))
    return str(artifact.digest)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.1)


def processes_naming(text: object) -> list[str]:
    """Processes (on Linux) that were started with this in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if str(text).encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


def write(out: Path, sweep: str, *numbers: int, **more: Any) -> None:
    """Store measurements of cells of one model, some of which were there: W&B gets a run of them."""
    store = Store(out=out)
    for i in numbers:
        row = {
            "measurement": f"{sweep}-{i}",
            "key": f"{sweep}-cell-{i:02}",
            "pack": "p",
            "sweep": sweep,
            "family": "neox",
            "model": "neox-s",
            "params": 1_000_000,
            "method": "blockwise",
            "bits": 4,
            "dtype": "int",
            "blocksize": 64,
            "label": "int4 b64",
            "eval": "pile_cc",
            "status": "done",
            "metrics": {"loss": 3.0 + i / 8, "perplexity": float("inf")},
            "stderr": {"loss": 0.01},
            "seconds": 1.5,
            "finished": datetime.now(UTC),
        }
        store.write({**row, **more})
    store.close()


def places(*numbers: int) -> list[tuple[int, float]]:
    """(step, loss) of cells that are steps in this order."""
    return [(step, 3.0 + i / 8) for step, i in enumerate(numbers)]


def report(runs: int, measurements: int, added: int) -> SyncReport:
    return SyncReport(runs=runs, measurements=measurements, whole=measurements, added=added)


def test_a_study_is_mirrored_while_it_runs(server: WandbServer, tmp_path: Path) -> None:
    warnings: list[str] = []
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path / "wandb")
    write(tmp_path, "stream", 0, 1)
    write(tmp_path, "another", 0)
    tracker = Tracker(config, out=tmp_path, sweep="stream", warn=warnings.append, every=0.2)
    wait_for(lambda: len(server.losses("stream")) == 2)
    write(tmp_path, "stream", 2)
    write(tmp_path, "stream", 3, bits=3, label="int3 b64")
    assert tracker.close(30) is None
    assert warnings == []

    assert server.losses("another") == []
    runs = {run["config"]["bits"]: run for run in map(server.run, server.runs("stream"))}
    assert sorted(server.losses("stream")) == sorted([*places(0, 1, 2), *[(0, 3.375)]])
    run = runs[4]
    assert (run["name"], run["state"]) == ("neox-s int4 b64", "finished")
    about = {"sweep": "stream", "model": "neox-s", "method": "blockwise", "bits": 4, "dtype": "int", "blocksize": 64}
    assert about.items() <= run["config"].items()
    assert runs[3]["config"]["bits"] == 3
    assert "total_bits" in {metric.get("1") for metric in run["config"]["_wandb"]["m"]}  # what charts are drawn over
    counts = {"cells": 3, "measurements": 3, "done": 3, "failed": 0}
    assert {**counts, "pile_cc/loss": 3.125}.items() <= run["summary"].items()
    assert list((tmp_path / "wandb").glob("run-*")), "wandb's files belong under dir"


def test_a_study_mirrored_again_adds_only_what_is_new_whoever_does_it(server: WandbServer, tmp_path: Path) -> None:
    """Machines take turns: what another one added since is seen on the server."""
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    write(tmp_path, "turns", 0)
    trackers = [Tracker(config, out=tmp_path, sweep="turns", every=0.2) for _ in range(2)]
    wait_for(lambda: len(server.losses("turns")) == 1)
    write(tmp_path, "turns", 1)
    wait_for(lambda: len(server.losses("turns")) == 2)
    write(tmp_path, "turns", 2)
    wait_for(lambda: len(server.losses("turns")) == 3)
    write(tmp_path, "turns", 3)
    assert [tracker.close(30) for tracker in trackers] == [None, None]
    assert server.losses("turns") == places(0, 1, 2, 3)
    assert server.only("turns")["summary"]["measurements"] == 4


def test_offline_runs_reach_the_server_by_wandbs_own_sync(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="offline", base_url=server.url, dir=tmp_path / "wandb")
    for numbers in ((0, 1), (2,), ()):  # the second launch adds a cell, the third has nothing to do
        write(tmp_path, "offline", *numbers)
        tracker = Tracker(config, out=tmp_path, sweep="offline")
        assert tracker.close(30) is None
        [run] = (tmp_path / "wandb").glob("offline-run-*")  # it has all of it: W&B would replace one by the other
        assert server.runs("offline") == []
    env = {**os.environ, "WANDB_BASE_URL": server.url}
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert server.losses("offline") == places(0, 1, 2)
    before = server.everything()
    assert sync(tmp_path, config) == report(1, 3, 0)
    assert server.everything() == before
    write(tmp_path, "offline", 3)
    assert sync(tmp_path, config) == report(1, 4, 1)
    assert server.losses("offline") == places(0, 1, 2, 3)


def test_sync_after_an_outage_makes_runs_whole_and_twice_changes_nothing(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    write(tmp_path, "away", 0, 1)
    tracker = Tracker(config, out=tmp_path, sweep="away", every=0.2)
    # The summary too: openwandb commits it after the history, and killed in between it would know half of a request.
    wait_for(lambda: server.only("away")["summary"].get("measurements") == 2)
    wait_for(lambda: server.only("away")["state"] == "finished")
    server.stop()
    write(tmp_path, "away", 2, 3)
    write(tmp_path, "away", 1, metrics={"loss": 9.0})  # measured again with another outcome
    assert "mode=sync" in str(tracker.close(1))
    wait_for(lambda: not processes_naming(tmp_path), 10)  # wandb's own process would go on trying for hours
    server.start()

    write(tmp_path, "away", 4, status="failed", metrics={}, stderr={}, error_type="OSError")
    write(tmp_path, "never-seen", 0, 1)
    seen: list[tuple[int, int]] = []
    assert sync(tmp_path, config, progress=lambda done, total: seen.append((done, total))) == report(2, 7, 6)
    assert seen == [(1, 2), (2, 2)]
    assert server.losses("away") == [*places(0, 1), (2, 9.0), (3, 3.25), (4, 3.375)]
    assert server.losses("never-seen") == places(0, 1)
    assert {"measurements": 5, "done": 4, "failed": 1, "pile_cc/loss": 3.3125}.items() <= server.only("away")[
        "summary"
    ].items()

    before = server.everything()
    assert sync(tmp_path, config) == report(2, 7, 0)
    assert server.everything() == before


def test_where_w_and_b_is_asked_too_often_nothing_is_lost_or_doubled(server: WandbServer, tmp_path: Path) -> None:
    write(tmp_path, "often", 0, 1)
    write(tmp_path, "often", 2, bits=3)
    with busy(server, graphql=3, file_stream=3) as (url, refused):
        config = TrackingConfig(mode="online", base_url=url, dir=tmp_path)
        assert sync(tmp_path, config) == report(2, 3, 3)
        assert refused == {"graphql": 3, "file_stream": 3}
    assert sorted(server.losses("often")) == [*places(0), (0, 3.25), (1, 3.125)]
    before = server.everything()
    assert sync(tmp_path, replace(config, base_url=server.url)) == report(2, 3, 0)
    assert server.everything() == before


def test_one_process_mirrors_a_directory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "LEASE_SECONDS", 0.1)
    write(tmp_path, "taken", 0)
    job = Job(tracking=TrackingConfig(mode="offline", dir=tmp_path / "wandb").message(), out=str(tmp_path))
    mirror = Mirror(job, lambda said: pytest.fail(str(said)), Ending(iter([])))
    with lease(tmp_path / "tracking"):
        mirror.look(last=False)
        with pytest.raises(OSError, match=f"process {os.getpid()} on {socket.gethostname()} mirrors {tmp_path} now"):
            mirror.look(last=True)


class Refuses(BaseHTTPRequestHandler):
    """What W&B answers to a key it doesn't know; openwandb lets every key in."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def refusing_url() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


def unmirrored(config: TrackingConfig, out: Path, *, close_after: float, warned: bool) -> tuple[str, list[str]]:
    """A study that nothing may slow: what close said, and the warnings before (waits for one, if it is to come)."""
    warnings: list[str] = []
    write(out, "p", 0, 1)
    start = time.monotonic()
    tracker = Tracker(config, out=out, sweep="p", warn=warnings.append)
    assert time.monotonic() - start < 1
    if warned:
        wait_for(lambda: bool(warnings))
    start = time.monotonic()
    message = tracker.close(close_after)
    assert time.monotonic() - start < close_after + 1
    assert message is not None
    assert "not all of p is known to be mirrored" in message
    assert "mode=sync" in message
    return message, warnings


def test_a_server_that_is_down_neither_stops_nor_slows_a_study(tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=f"http://127.0.0.1:{free_port()}", dir=tmp_path)
    _, warnings = unmirrored(config, tmp_path, close_after=10, warned=True)
    assert len(warnings) == 1
    said = sync(tmp_path, config)
    assert (said.whole, said.added) == (0, 0)
    assert "run mode=sync again" in str(said.error)


def test_a_server_that_never_answers_is_given_up_at_close(silent_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=silent_url, dir=tmp_path)
    message, _ = unmirrored(config, tmp_path, close_after=2, warned=False)
    assert "W&B didn't take them within 2 s" in message


def test_a_wrong_key_neither_stops_nor_slows_a_study(refusing_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=refusing_url, dir=tmp_path)
    _, [warning] = unmirrored(config, tmp_path, close_after=10, warned=True)
    assert "refuses the API key" in warning
    assert "refuses the API key" in str(sync(tmp_path, config).error)


def test_a_server_that_is_asked_too_often_is_asked_again_when_it_says(server: WandbServer) -> None:
    def ask(url: str) -> RemoteRun:
        settings: Any = SimpleNamespace(base_url=url, api_key=KEY)
        return Server(settings, {"project": "p", "entity": None}).read(["none"])["none"]

    with busy(server, graphql=2) as (url, refused):
        began = time.monotonic()
        assert ask(url).state == "missing"
        assert 2 <= time.monotonic() - began < 5
        assert refused == {"graphql": 2}
    with busy(server, graphql=10**6) as (url, refused), pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "MOST_WAIT_SECONDS", 1.5)
        with pytest.raises(OSError, match="429"):
            ask(url)
        assert refused == {"graphql": 2}


def test_without_a_key_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    config = TrackingConfig(mode="online", base_url="http://127.0.0.1:9", dir=tmp_path)
    _, [warning] = unmirrored(config, tmp_path, close_after=10, warned=True)
    assert "no API key" in warning
    assert "set WANDB_API_KEY or run `wandb login --host http://127.0.0.1:9`" in warning
    assert "\n" not in warning


def test_disabled_starts_no_process_and_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled", dir=tmp_path / "wandb"), out=tmp_path, sweep="none")
    assert tracker.close() is None
    assert not list(tmp_path.iterdir())


def test_the_study_itself_never_imports_wandb() -> None:
    code = "import sys, sweeps.tracking.tracker; print([m for m in ('wandb', 'torch', 'requests') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SpecError, match=r"tracking\.mode='on' is not valid: one of online, offline, disabled"):
        TrackingConfig(mode="on")
    with pytest.raises(SpecError, match=r"tracking\.by='bit' is not valid: one of family, model, .*bits"):
        TrackingConfig(by=["method", "bit"])


STUDY = (
    "sweep.sizes=[neox-xs]",
    "eval.tasks=[]",
    "eval.tokens=512",
    "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: int}]",
)


def test_a_studys_tables_are_an_artifact_of_the_study(server: WandbServer, launch: Launch, tmp_path: Path) -> None:
    online = ("sweep.name=tables", "tracking=online", f"tracking.base_url={server.url}")
    done = launch("out=a", *STUDY, *online)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("W&B") == 1
    made = tmp_path / "a" / "tables" / "tables.parquet"
    assert len(pd.read_parquet(made)) == 3
    assert server.artifacts("tables-results") == [("tables-results", "results")]
    files = [made.with_suffix(suffix) for suffix in (".parquet", ".csv", ".md")]
    assert server.digests("tables-results") == [digest_of("tables-results", *files)]
    assert server.run("tables-results")["state"] == "finished"


def test_tables_that_did_not_arrive_are_said_and_sync_brings_them(
    server: WandbServer, refusing_url: str, tmp_path: Path
) -> None:
    table = tmp_path / "t.parquet"
    pd.DataFrame({"late": [1, 2]}).to_parquet(table)
    for url, why in ((f"http://127.0.0.1:{free_port()}", "refused"), (refusing_url, "refuses the API key")):
        config = TrackingConfig(mode="online", base_url=url, dir=tmp_path / "wandb")
        began = time.monotonic()
        said = upload_tables(config, tmp_path, "late", [table])
        assert time.monotonic() - began < 30
        assert said is not None
        assert "the tables of late are not known to be uploaded" in said
        assert why in said
        assert "run the same command with mode=sync" in said
    assert server.artifacts("late-results") == []
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path / "wandb")
    assert upload_tables(config, tmp_path, "late", [table]) is None
    assert server.digests("late-results") == [digest_of("late-results", table)]
    assert upload_tables(TrackingConfig(mode="disabled"), tmp_path, "late", [table]) is None


def test_a_study_is_mirrored_while_it_runs_and_made_whole_by_sync(server: WandbServer, launch: Launch) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}")
    down = ("tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    first = launch("out=a", *STUDY, *online)
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line for line in first.stdout.splitlines() if "W&B" in line] == [
        "W&B: demo is 3 runs by method, bits, dtype, blocksize"
    ]
    assert {server.run(run)["config"]["bits"] for run in server.runs("demo")} == {3, 4, 16}
    other = launch("out=a", *STUDY, *online, "tracking.by=[model]")
    assert other.returncode == 2
    assert "take another tracking.project" in other.stderr
    whole = launch("out=a", "mode=sync", *online)
    assert whole.returncode == 0, whole.stdout
    assert "W&B holds 3 of 3 measurements in 3 runs, 0 added now" in whole.stdout

    outage = launch("out=b", *STUDY, "sweep.name=outage", *down)
    assert outage.returncode == 0, outage.stdout + outage.stderr
    assert "mode=sync" in outage.stdout
    added = launch("out=b", "mode=sync", *online)
    assert added.returncode == 0
    assert "W&B holds 3 of 3 measurements in 3 runs, 3 added now" in added.stdout
    assert server.artifacts("outage-results") == [("outage-results", "results")]


def test_a_sync_knows_what_no_table_of_a_study_shows_any_more(
    server: WandbServer, launch: Launch, tmp_path: Path
) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}", "tracking.project=superseded")
    for tokens in (512, 1024):
        done = launch("out=a", *STUDY, "sweep.name=again", f"eval.tokens={tokens}", "report=false")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B holds 6 of 6 measurements in 3 runs" in launch("out=a", "mode=sync", *online).stdout
    runs = [server.run(run)["summary"] for run in server.runs("again")]
    assert [(of["cells"], of["done"], of["superseded"]) for of in runs] == [(1, 1, 1)] * 3
    now = load_results(tmp_path / "a", long=True)
    # History can't be taken back; what a run says of itself is of what counts.
    assert sorted(of["jargon/loss"] for of in runs) == pytest.approx(sorted(m["loss"] for m in now["metrics"]))
    assert list(now["limit"]) == [1024] * 3


def test_a_study_without_a_key_runs_untracked_and_asks_for_no_login(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    result = launch("out=a", *STUDY, "tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WANDB_API_KEY" in result.stdout
    assert "bit_scaling.png" in result.stdout or "tables/demo.csv" in result.stdout
