"""The W&B mirror against a real W&B-compatible server (openwandb), and servers that are down or refuse the key."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest

from kbit.errors import SpecError
from sweeps.results.table import load_results
from sweeps.store.parts import Store
from sweeps.tracking import server as server_module
from sweeps.tracking.artifact import upload_tables
from sweeps.tracking.server import Server
from sweeps.tracking.tracker import SyncReport, TrackedPack, Tracker, TrackingConfig, sync
from tests.conftest import Launch

KEY = "x" * 40
"""openwandb lets any key in, and spends a quarter of a second a request on its own."""


@dataclass
class WandbServer:
    """A running server and its database, which is where the tests look."""

    url: str
    data: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        command = [sys.executable, "-m", "openwandb", "serve", "--host", host, "--port", port]
        with open(self.data / "server.log", "a") as log:
            self.process = subprocess.Popen([*command, "--data-dir", str(self.data)], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/login", timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.data / "server.log").read_text()
                assert time.monotonic() < deadline, "openwandb doesn't answer"
                time.sleep(0.1)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.data / "openwandb.db", timeout=30)
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()

    def losses(self, run: str) -> list[tuple[int, float]]:
        """(step, value) of every 'pile_cc/loss' that the run's history holds, duplicates and all."""
        sql = "SELECT step, value FROM metrics WHERE run_id = ? AND key = 'pile_cc/loss' ORDER BY step, value"
        return self._query(sql, run)

    def run(self, run: str) -> dict[str, Any]:
        sql = "SELECT display_name, state, config_json, summary_json FROM runs WHERE run_id = ?"
        [(name, state, config, summary)] = self._query(sql, run)
        configured = {k: v["value"] for k, v in json.loads(config).items()}
        return {"name": name, "state": state, "config": configured, "summary": json.loads(summary)}

    def everything(self) -> tuple[int, list[tuple[Any, ...]]]:
        [(points,)] = self._query("SELECT count(*) FROM metrics")
        return points, self._query("SELECT run_id, state, config_json, summary_json FROM runs ORDER BY run_id")

    def artifacts(self, name: str) -> list[tuple[str, str]]:
        """(name, type) of the artifacts of a run."""
        return self._query("SELECT name, artifact_type FROM artifacts WHERE run_id = ?", name)  # type: ignore[return-value]

    def digests(self, name: str) -> list[str]:
        """Digests of an artifact's versions, by the server's log: openwandb takes note of artifacts, and no files."""
        log = (self.data / "server.log").read_text()
        return re.findall(rf"createArtifact: run={name}, type=results, collection={name}, digest=(\w+)", log)


def digest_of(name: str, *files: Path) -> str:
    """The digest by which W&B knows an artifact of these files: of their names and contents."""
    import wandb

    artifact = wandb.Artifact(name, type="results")
    for file in files:
        artifact.add_file(str(file))
    return str(artifact.digest)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    if importlib.util.find_spec("openwandb") is None:
        pytest.skip("openwandb, the W&B server of these tests, isn't installed (pip install openwandb)")
    server = WandbServer(f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("openwandb"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user with a key and nothing else of W&B's, and no home in which tests could leave things."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


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


def rows(pack: str, count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "measurement": f"{pack}-{i}",
            "key": f"cell-{i}",
            "pack": pack,
            "sweep": "demo",
            "family": "neox",
            "model": "neox-s",
            "params": 1_000_000,
            "bits": 4,
            "dtype": "int",
            "blocksize": 64,
            "exponent_bits": None,
            "eval": "pile_cc",
            "status": "done",
            "metrics": {"loss": 3.0 + i / 8, "perplexity": float("inf")},
            "stderr": {"loss": 0.01},
            "seconds": 1.5,
        }
        for i in range(first, first + count)
    ]


def track(tracker: Tracker, pack: str, these: list[dict[str, Any]], *, finish: bool = True) -> None:
    tracker.start_pack(pack, sweep="demo", name="neox-s #1", config={"model": "neox-s", "versions": {"torch": "2"}})
    for row in these:
        tracker.log(row)
    if finish:
        tracker.finish_pack(pack)


def stored(pack: str, these: list[dict[str, Any]]) -> TrackedPack:
    config = {"model": "neox-s", "versions": {"torch": "2"}}
    return TrackedPack(id=pack, sweep="demo", name="neox-s #1", config=config, rows=these)


def test_online_runs_stream_side_by_side_while_the_packs_run(server: WandbServer, tmp_path: Path) -> None:
    warnings: list[str] = []
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path / "wandb")
    tracker = Tracker(config, warn=warnings.append)
    track(tracker, "stream-a", rows("stream-a", 2), finish=False)
    track(tracker, "stream-b", rows("stream-b", 1), finish=False)
    wait_for(lambda: len(server.losses("stream-a")) == 2 and len(server.losses("stream-b")) == 1)
    assert server.run("stream-a")["state"] == "running"
    tracker.log(rows("stream-a", 1, first=2)[0])
    tracker.finish_pack("stream-a")
    assert tracker.close(30) is None
    assert warnings == []

    assert server.losses("stream-a") == [(0, 3.0), (1, 3.125), (2, 3.25)]
    assert server.losses("stream-b") == [(0, 3.0)]
    run = server.run("stream-a")
    assert (run["name"], run["state"]) == ("neox-s #1", "finished")
    assert run["config"]["sweep"] == "demo"
    assert run["config"]["versions"] == {"torch": "2"}
    assert (run["summary"]["measurements"], run["summary"]["done"], run["summary"]["failed"]) == (3, 3, 0)
    assert server.run("stream-b")["state"] == "finished"
    assert list((tmp_path / "wandb").glob("run-*")), "wandb's files belong under dir"


def test_a_pack_tracked_again_adds_only_what_is_new(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    for count in (2, 3):  # a requeued job starts over with what its run already holds
        tracker = Tracker(config)
        track(tracker, "again", rows("again", count))
        assert tracker.close(30) is None
    assert server.losses("again") == [(0, 3.0), (1, 3.125), (2, 3.25)]
    assert server.run("again")["summary"]["measurements"] == 3
    tables = list((server.data / "files").glob("**/again/media/table/*.table.json"))
    data = [json.loads(t.read_text()) for t in tables]
    column = data[0]["columns"].index("pile_cc/loss")
    assert [3.0, 3.125, 3.25] in [[row[column] for row in d["data"]] for d in data]


def test_offline_runs_reach_the_server_by_sync_from_the_store(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="offline", base_url=server.url, dir=tmp_path / "wandb")
    tracker = Tracker(config)
    track(tracker, "off-1", rows("off-1", 2))
    track(tracker, "off-2", rows("off-2", 1), finish=False)
    assert tracker.close(30) is None
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert server.losses("off-1") == []

    packs = [stored("off-1", rows("off-1", 2)), stored("off-2", rows("off-2", 1))]
    seen: list[tuple[int, int]] = []
    report = sync(packs, config, progress=lambda done, total: seen.append((done, total)))
    assert report == SyncReport(packs=2, measurements=3, whole=3, added=3)
    assert seen == [(1, 2), (2, 2)]
    assert server.losses("off-1") == [(0, 3.0), (1, 3.125)]
    assert server.losses("off-2") == [(0, 3.0)]


def test_offline_runs_reach_the_server_by_wandbs_own_sync(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="offline", base_url=server.url, dir=tmp_path / "wandb")
    tracker = Tracker(config)
    track(tracker, "own-sync", rows("own-sync", 2))
    assert tracker.close(30) is None
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    env = {**os.environ, "WANDB_BASE_URL": server.url}
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert server.losses("own-sync") == [(0, 3.0), (1, 3.125)]
    before = server.everything()
    assert sync([stored("own-sync", rows("own-sync", 2))], config).added == 0
    assert server.everything() == before


def test_sync_after_an_outage_makes_runs_whole_and_twice_changes_nothing(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    tracker = Tracker(config)
    track(tracker, "outage", rows("outage", 2), finish=False)
    # The summary too: openwandb commits it after the history, and killed in between it would know half of a request.
    wait_for(lambda: len(server.losses("outage")) == 2 and server.run("outage")["summary"].get("measurements") == 2)
    server.stop()
    for row in rows("outage", 2, first=2):
        tracker.log(row)
    tracker.finish_pack("outage")
    assert "mode=sync" in str(tracker.close(1))
    wait_for(lambda: not processes_naming(tmp_path), 10)  # wandb's own process would go on trying for hours
    server.start()

    failed = {**rows("outage", 1, first=4)[0], "status": "failed", "metrics": {}, "stderr": {}, "error_type": "OSError"}
    packs = [stored("outage", [*rows("outage", 4), failed]), stored("never-seen", rows("never-seen", 2))]
    assert sync(packs, config) == SyncReport(packs=2, measurements=7, whole=7, added=5)
    assert server.losses("outage") == [(0, 3.0), (1, 3.125), (2, 3.25), (3, 3.375)]
    assert server.losses("never-seen") == [(0, 3.0), (1, 3.125)]
    summary = server.run("outage")["summary"]
    assert (summary["measurements"], summary["done"], summary["failed"]) == (5, 4, 1)

    before = server.everything()
    assert sync(packs, config) == SyncReport(packs=2, measurements=7, whole=7, added=0)
    assert server.everything() == before


def test_a_measurement_redone_with_other_numbers_is_added_and_counted_once(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    sync([stored("redone", rows("redone", 2))], config)
    redone = [rows("redone", 1)[0], {**rows("redone", 1, first=1)[0], "metrics": {"loss": 9.0}}]
    assert sync([stored("redone", redone)], config).added == 1
    assert server.losses("redone") == [(0, 3.0), (1, 3.125), (2, 9.0)]
    assert server.run("redone")["summary"]["measurements"] == 2


def test_what_was_superseded_since_is_marked_and_in_no_count_or_table(server: WandbServer, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path)
    these = rows("late", 3)
    assert sync([stored("late", these)], config).added == 3
    these[1] = {**these[1], "status": "superseded"}
    assert sync([stored("late", these)], config) == SyncReport(packs=1, measurements=3, whole=3, added=1)
    summary = server.run("late")["summary"]
    assert (summary["done"], summary["superseded"], summary["measurements"]) == (2, 1, 3)
    # History can't be taken back: a step without numbers says that the one before it doesn't count.
    assert server.losses("late") == [(0, 3.0), (1, 3.125), (2, 3.25)]
    tables = [json.loads(t.read_text()) for t in (server.data / "files").glob("**/late/media/table/*.table.json")]
    column = tables[0]["columns"].index("measurement")
    assert ["late-0", "late-2"] in [[row[column] for row in table["data"]] for table in tables]
    before = server.everything()
    assert sync([stored("late", these)], config).added == 0
    assert server.everything() == before


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


def study_of_100(config: TrackingConfig, *, close_after: float, warned: bool) -> tuple[str, list[str]]:
    """A study that nothing may slow: what close said, and the warnings before (waits for one, if it is to come)."""
    warnings: list[str] = []
    start = time.monotonic()
    tracker = Tracker(config, warn=warnings.append)
    track(tracker, "p", rows("p", 100))
    assert time.monotonic() - start < 1
    if warned:
        wait_for(lambda: bool(warnings))
    start = time.monotonic()
    message = tracker.close(close_after)
    assert time.monotonic() - start < close_after + 1
    assert message is not None
    assert "100 of 100 measurements not known to be mirrored" in message
    assert "mode=sync" in message
    return message, warnings


def test_a_server_that_is_down_neither_stops_nor_slows_a_study(tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=f"http://127.0.0.1:{free_port()}", dir=tmp_path)
    _, warnings = study_of_100(config, close_after=10, warned=True)
    assert len(warnings) == 1
    report = sync([stored("p", rows("p", 2))], config)
    assert (report.whole, report.added) == (0, 0)
    assert "run mode=sync again" in str(report.error)


def test_a_server_that_never_answers_is_given_up_at_close(silent_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=silent_url, dir=tmp_path)
    message, _ = study_of_100(config, close_after=2, warned=False)
    assert "W&B didn't take them within 2 s" in message


def test_a_wrong_key_neither_stops_nor_slows_a_study(refusing_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=refusing_url, dir=tmp_path)
    _, [warning] = study_of_100(config, close_after=10, warned=True)
    assert "refuses the API key" in warning
    assert "refuses the API key" in str(sync([stored("p", rows("p", 1))], config).error)


class Busy(BaseHTTPRequestHandler):
    """Says that it is asked too often, as W&B's limits do, so many times; then that it has no such run."""

    left = 3
    asked: ClassVar[list[float]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        Busy.asked.append(time.monotonic())
        Busy.left -= 1
        body = b"{}" if Busy.left >= 0 else b'{"data": {"viewer": {"entity": "e"}, "model": null}}'
        self.send_response(429 if Busy.left >= 0 else 200)
        self.send_header("Retry-After", "0.2")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


def test_a_server_that_is_asked_too_often_is_asked_again_when_it_says() -> None:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    settings: Any = SimpleNamespace(base_url=f"http://127.0.0.1:{http.server_port}", api_key=KEY)
    asking = Server(settings, {"project": "p", "entity": None})
    assert asking.read("run").state == "missing"
    waits = [later - earlier for earlier, later in pairwise(Busy.asked)]
    assert len(waits) == 3
    assert all(0.2 <= wait < 1 for wait in waits)
    Busy.left, Busy.asked = 9, []
    assert asking.read("run").state == "missing"
    assert len(Busy.asked) == 10  # as long as there is time
    Busy.left = 10**6
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "MOST_WAIT_SECONDS", 0.5)
        with pytest.raises(OSError, match="429"):
            asking.read("run")
    assert time.monotonic() - began < 2
    http.shutdown()
    http.server_close()


def test_without_a_key_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    config = TrackingConfig(mode="online", base_url="http://127.0.0.1:9", dir=tmp_path)
    _, [warning] = study_of_100(config, close_after=10, warned=True)
    assert "no API key" in warning
    assert "set WANDB_API_KEY or run `wandb login --host http://127.0.0.1:9`" in warning
    assert "\n" not in warning


def test_disabled_starts_no_process_and_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled", dir=tmp_path / "wandb"))
    track(tracker, "none", rows("none", 1))
    assert tracker.close() is None
    assert not (tmp_path / "wandb").exists()


def test_the_study_itself_never_imports_wandb() -> None:
    code = "import sys, sweeps.tracking.tracker; print([m for m in ('wandb', 'torch', 'requests') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SpecError, match=r"tracking\.mode='on' is not valid: one of online, offline, disabled"):
        TrackingConfig(mode="on")


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
    assert "W&B" not in done.stdout
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
        said = upload_tables(config, "late", [table])
        assert time.monotonic() - began < 30
        assert said is not None
        assert "the tables of late are not known to be uploaded" in said
        assert why in said
        assert "run the same command with mode=sync" in said
    assert server.artifacts("late-results") == []
    config = TrackingConfig(mode="online", base_url=server.url, dir=tmp_path / "wandb")
    assert upload_tables(config, "late", [table]) is None
    assert server.digests("late-results") == [digest_of("late-results", table)]
    assert upload_tables(TrackingConfig(mode="disabled"), "late", [table]) is None


def test_a_study_is_mirrored_while_it_runs_and_made_whole_by_sync(server: WandbServer, launch: Launch) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}")
    down = ("tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    first = launch("out=a", *STUDY, *online)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "W&B" not in first.stdout
    whole = launch("out=a", "mode=sync", *online)
    assert whole.returncode == 0, whole.stdout
    assert "W&B holds 3 of 3 measurements in 1 packs, 0 added now" in whole.stdout

    outage = launch("out=b", *STUDY, "sweep.name=outage", *down)
    assert outage.returncode == 0, outage.stdout + outage.stderr
    assert "mode=sync" in outage.stdout
    added = launch("out=b", "mode=sync", *online)
    assert added.returncode == 0
    assert "W&B holds 3 of 3 measurements in 1 packs, 3 added now" in added.stdout
    assert server.artifacts("outage-results") == [("outage-results", "results")]


def test_a_sync_knows_what_no_table_of_a_study_shows_any_more(
    server: WandbServer, launch: Launch, tmp_path: Path
) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}", "tracking.project=superseded")
    for tokens in (512, 1024):
        done = launch("out=a", *STUDY, "sweep.name=again", f"eval.tokens={tokens}", "report=false")
        assert done.returncode == 0, done.stdout + done.stderr
        made = {row["pack"]: row["limit"] for row in Store(out=tmp_path / "a").read().to_pylist()}
    assert "W&B holds 6 of 6 measurements in 2 packs" in launch("out=a", "mode=sync", *online).stdout
    counts = {limit: server.run(pack)["summary"] for pack, limit in made.items()}
    assert {limit: (of["done"], of["superseded"]) for limit, of in counts.items()} == {512: (0, 3), 1024: (3, 0)}
    assert list(load_results(tmp_path / "a", long=True)["limit"]) == [1024] * 3


def test_a_study_without_a_key_runs_untracked_and_asks_for_no_login(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    result = launch("out=a", *STUDY, "tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WANDB_API_KEY" in result.stdout
    assert "bit_scaling.png" in result.stdout or "tables/demo.csv" in result.stdout
