"""Servers that are down, silent or refuse: no study is stopped or slowed by them, and each is told of."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from kbit.errors import SpecError
from sweeps.errors import AwayError, PoolError
from sweeps.store.parts import Store
from sweeps.tracking import server as server_module
from sweeps.tracking import tracker as tracker_module
from sweeps.tracking.artifact import upload_tables
from sweeps.tracking.config import TrackingConfig
from sweeps.tracking.messages import Mirrored
from sweeps.tracking.runs import Run
from sweeps.tracking.server import Server
from sweeps.tracking.tracker import Tracker, sync
from sweeps.worker import execution as execution_module
from sweeps.worker.devices import Workers
from sweeps.worker.execution import Execution
from sweeps.worker.pool import WorkerPool
from sweeps.worker.settings import WorkerSettings
from tests.sweeps.tracking.studies import digest_of, mirrored, processes_naming, study, wait_for
from tests.sweeps.tracking.wandb_server import KEY, WandbServer, busy, free_port


class Refuses(BaseHTTPRequestHandler):
    """What W&B answers to a key it doesn't know, or else has to refuse; openwandb lets everything in."""

    status = 401
    said = "user is not logged in"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"errors": [{"message": self.said}], "data": {"viewer": None}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def refusing_url() -> Iterator[str]:
    with refusing(Refuses.status, Refuses.said) as url:
        yield url


@contextlib.contextmanager
def refusing(status: int, said: str) -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("RefusesHere", (Refuses,), {"status": status, "said": said}))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(
    ("status", "said", "advice"),
    [
        (200, "no", "fails (HTTP 200: no)"),
        (400, "field 'x'", "fails (HTTP 400: field 'x')"),
        (403, "permission denied", "tracking.entity=e, tracking.project=p (HTTP 403: permission denied): correct them"),
        (404, "project not found", "tracking.entity=e, tracking.project=p (HTTP 404: project not found): correct them"),
        (409, "run x was previously created and deleted", "undelete it, or take another tracking.project"),
        (409, "busy", "fails (HTTP 409: busy)"),
        (500, "", "fails (HTTP 500"),
    ],
)
def test_what_the_server_says_is_told_with_what_to_do(status: int, said: str, advice: str) -> None:
    """And only a key that is refused is called so."""
    with refusing(status, said) as url:
        settings: Any = SimpleNamespace(base_url=url, api_key=KEY)
        asked = Server(settings, {"project": "p", "entity": "e"})
        run = Run(id="x", sweep="s", name="n", config={})
        for ask in (lambda: asked.read(["x"]), lambda: asked.write(run, "cells", {"store_digest": "d"})):
            with pytest.raises(OSError, match="HTTP") as raised:
                ask()
            assert said in str(raised.value)
            assert advice in str(raised.value)
            assert "API key" not in str(raised.value)
            assert isinstance(raised.value, AwayError) == (status in (403, 404))  # then each other run would fail alike


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


def unmirrored(config: TrackingConfig, tmp_path: Path, *, close_after: float, warned: bool) -> tuple[str, list[str]]:
    """What is said where nothing is mirrored: at close, and the warnings before (waits for one, if it is to come)."""
    warnings: list[str] = []
    start = time.monotonic()
    tracker = Tracker(config, out=tmp_path / "out", sweep="demo", warn=warnings.append)
    assert time.monotonic() - start < 1
    if warned:
        wait_for(lambda: bool(warnings))
    start = time.monotonic()
    message = tracker.close(close_after)
    assert time.monotonic() - start < close_after + 1
    assert message is not None
    assert "not known to be mirrored" in message
    assert "mode=sync" in message
    return message, warnings


def test_a_server_that_is_down_neither_stops_nor_slows_a_study(tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=f"http://127.0.0.1:{free_port()}", dir=str(tmp_path))
    study(tmp_path / "out")
    message, warnings = unmirrored(config, tmp_path, close_after=20, warned=True)
    assert len(warnings) == 1
    assert f"W&B: 3 of 3 measurements are not known to be mirrored ({config.base_url} can't be reached" in message
    report = sync(tmp_path / "out", config)
    assert (report.runs, report.measurements, report.whole, report.updated) == (3, 3, 0, 0)
    assert str(report).startswith("W&B is known to hold 0 of 3 measurements")
    assert "run mode=sync again" in str(report.error)


def test_a_server_that_never_answers_is_given_up_at_close(silent_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=silent_url, dir=str(tmp_path))
    message, _ = unmirrored(config, tmp_path, close_after=2, warned=False)
    assert "W&B didn't take them within 2 s" in message


@pytest.mark.parametrize(
    ("ends", "seconds"),
    [("finished", "1.5"), ("walltime", "1"), (KeyboardInterrupt(), "1"), (PoolError("x"), "1")],
)
def test_who_interrupts_a_study_waits_less_for_the_mirror_and_is_told_of_it(
    silent_url: str, tmp_path: Path, ends: str | BaseException, seconds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> str:
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setattr(WorkerPool, "run", run)
    monkeypatch.setattr(execution_module, "CLOSE_SECONDS", 1.5)
    monkeypatch.setattr(execution_module, "HURRIED_SECONDS", 1.0)
    monkeypatch.setattr(tracker_module, "QUIET_SECONDS", 0.25)
    said: list[str] = []
    study(tmp_path / "out")
    packs: Any = [SimpleNamespace(sweep="demo")]
    execution = Execution(
        packs=packs,
        store=Store(out=tmp_path / "out"),
        workers=Workers(device="cpu", count=1, threads=1),
        settings=WorkerSettings(batch_tokens=1, trust_remote_code=False, provenance={}),
        tracking=TrackingConfig(mode="online", base_url=silent_url, dir=str(tmp_path)),
        on_event=lambda *_: None,
        warn=said.append,
        log=lambda _: tmp_path / "log",
        beat=lambda _: None,
    )
    with contextlib.suppress(KeyboardInterrupt, PoolError):
        assert execution.run() == ends
    waits, missing = said
    assert waits == f"W&B is being brought up to date, for up to {float(seconds) - 0.25:g} s more"
    assert f"W&B didn't take them within {seconds} s" in missing


def test_where_nothing_can_be_written_a_study_goes_on_unmirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No log beside the results, and no temporary directory."""
    study(tmp_path / "out")
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    config = TrackingConfig(mode="online", base_url="http://127.0.0.1:9", dir=str(tmp_path / "file" / "wandb"))
    _, [warning] = unmirrored(config, tmp_path, close_after=1, warned=True)
    assert "the mirror's process can't start" in warning
    assert "the mirror's process can't start" in str(sync(tmp_path / "out", config))


def test_where_no_thread_may_be_started_a_study_goes_on_unmirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    config = TrackingConfig(mode="online", base_url="http://127.0.0.1:9", dir=str(tmp_path / "wandb"))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    _, [warning] = unmirrored(config, tmp_path, close_after=1, warned=True)
    assert "the mirror's process can't start: can't start new thread" in warning
    assert not processes_naming(tmp_path)  # none is left without a reader


def test_a_wrong_key_neither_stops_nor_slows_a_study(refusing_url: str, tmp_path: Path) -> None:
    config = TrackingConfig(mode="online", base_url=refusing_url, dir=str(tmp_path))
    _, [warning] = unmirrored(config, tmp_path, close_after=10, warned=True)
    assert "refuses the API key" in warning
    assert "refuses the API key" in str(sync(tmp_path / "out", config).error)


def test_a_server_that_is_asked_too_often_is_asked_again_when_it_says(
    server: WandbServer, online: TrackingConfig, tmp_path: Path, name: str
) -> None:
    """By 'Retry-After', and by the header that W&B has for it; of each kind of request."""
    study(tmp_path / "out", sweep=name)
    with busy(server, graphql=9, file_stream=1) as (url, refused):
        asked = TrackingConfig(mode="online", base_url=url, dir=online.dir, project=online.project)
        began = time.monotonic()
        assert mirrored(asked, tmp_path / "out", name) == Mirrored(runs=3, measurements=3, whole=3, updated=3)
        assert 2 <= time.monotonic() - began < 10
        assert refused == {"graphql": 9, "file_stream": 1}  # as long as there is time
    assert server.losses(name) == [3.0, 3.125, 3.25]
    with busy(server, graphql=10**6) as (url, refused), pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "MOST_WAIT_SECONDS", 1.5)
        settings: Any = SimpleNamespace(base_url=url, api_key=KEY)
        began = time.monotonic()
        with pytest.raises(OSError, match=r"too often \(HTTP 429"):
            Server(settings, {"project": "p", "entity": None}).read(["none"])
        assert 1.4 <= time.monotonic() - began < 3
        assert refused == {"graphql": 8}


def test_without_a_key_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    config = TrackingConfig(mode="online", base_url="http://127.0.0.1:9", dir=str(tmp_path))
    _, [warning] = unmirrored(config, tmp_path, close_after=10, warned=True)
    assert "no API key" in warning
    assert "set WANDB_API_KEY or run `wandb login --host http://127.0.0.1:9`" in warning
    assert "\n" not in warning


def test_disabled_starts_no_process_and_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(mode="disabled", dir=str(tmp_path / "wandb")), out=tmp_path, sweep="none")
    assert tracker.close() is None
    assert not list(tmp_path.iterdir())


def test_the_study_itself_never_imports_wandb() -> None:
    code = "import sys, sweeps.tracking.tracker; print([m for m in ('wandb', 'torch', 'requests') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SpecError, match=r"tracking\.mode='on' is not valid: one of online, offline, disabled"):
        TrackingConfig(mode="on")


def test_tables_that_did_not_arrive_are_said_and_sync_brings_them(
    server: WandbServer, refusing_url: str, tmp_path: Path
) -> None:
    table = tmp_path / "t.parquet"
    pd.DataFrame({"late": [1, 2]}).to_parquet(table)
    for url, why in ((f"http://127.0.0.1:{free_port()}", "refused"), (refusing_url, "refuses the API key")):
        config = TrackingConfig(mode="online", base_url=url, dir=str(tmp_path / "wandb"))
        began = time.monotonic()
        said = upload_tables(config, "late", [table])
        assert time.monotonic() - began < 30
        assert said is not None
        assert "the tables of late are not known to be uploaded" in said
        assert why in said
        assert "run the same command with mode=sync" in said
    assert server.artifacts("late-results") == []
    config = TrackingConfig(mode="online", base_url=server.url, dir=str(tmp_path / "wandb"))
    assert upload_tables(config, "late", [table]) is None
    assert server.digests("late-results") == [digest_of("late-results", table)]
    assert upload_tables(TrackingConfig(mode="disabled"), "late", [table]) is None
