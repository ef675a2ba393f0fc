"""A W&B-compatible server of the tests (openwandb), and a proxy before it that may say that it is asked too often."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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

    def runs(self, sweep: str) -> list[str]:
        """Ids of a study's runs, its tables left out."""
        found = self._query("SELECT run_id, config_json FROM runs ORDER BY run_id")
        known = [(run, {k: v["value"] for k, v in json.loads(c).items() if k != "_wandb"}) for run, c in found]
        return [run for run, config in known if config.get("sweep") == sweep and run != f"{sweep}-results"]

    def summaries(self, sweep: str) -> dict[str, dict[str, Any]]:
        """What a study's runs say of results, by name."""
        return {run["name"]: run["summary"] for run in map(self.run, self.runs(sweep))}

    def losses(self, sweep: str) -> list[float]:
        """What a study's runs say of the loss on pile_cc."""
        said = (summary.get("pile_cc/loss") for summary in self.summaries(sweep).values())
        return sorted(loss for loss in said if loss is not None)

    def run(self, run: str) -> dict[str, Any]:
        sql = "SELECT display_name, state, config_json, summary_json FROM runs WHERE run_id = ?"
        [(name, state, config, summary)] = self._query(sql, run)
        configured = {k: v["value"] for k, v in json.loads(config).items() if k != "_wandb"}
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Busy(BaseHTTPRequestHandler):
    """Hands requests on, but says of some that it is asked too often, as W&B does."""

    upstream: str
    refuses: Counter[str]
    refused: Counter[str]
    fails: str
    hides: str
    drops: tuple[Callable[[str], bool]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what = self.path.rpartition("/")[2]
        if self.refuses[what] > 0:
            self.refuses[what] -= 1
            self.refused[what] += 1
            # The header that clients know, or W&B's own.
            headers = {"Retry-After" if self.refused[what] % 2 else "RateLimit-Reset": "0.2"}
            self._answer(429, headers, b'{"error": "rate limit exceeded"}')
            return
        if self.drops[0](body.decode()):
            return  # and the connection ends without an answer
        if self.fails and self.fails in body.decode():
            self._answer(500, {}, b"")
            return
        there = http.client.HTTPConnection(self.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if not self.hides or k.lower() != "accept-encoding"}
        there.request(self.command, self.path, body, headers)
        said = there.getresponse()
        kept = {k: v for k, v in said.getheaders() if k.lower() in ("content-type", "content-encoding", "location")}
        text = said.read()
        if self.hides and self.hides in body.decode():
            text = re.sub(rb'"summaryMetrics":\s*"(\\.|[^"\\])*"', b'"summaryMetrics": null', text)
            if b"upsertBucket" in text:
                text = b'{"data": {"upsertBucket": null}}'
        self._answer(said.status, kept, text)
        there.close()

    do_GET = do_PUT = do_POST  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


@contextmanager
def busy(
    server: WandbServer,
    *,
    fails: str = "",
    hides: str = "",
    drops: Callable[[str], bool] = lambda _: False,
    **refuses: int,
) -> Iterator[tuple[str, Counter[str]]]:
    """A proxy that refuses so many requests of each kind, fails at those with a text in them, answers those with
    another one without summaries, or what was written, and drops the connection of some; gives its URL, and counts what
    it refused.
    """
    refused: Counter[str] = Counter()
    about = {
        "upstream": server.url.removeprefix("http://"),
        "refuses": Counter(refuses),
        "refused": refused,
        "fails": fails,
        "hides": hides,
        "drops": (drops,),  # as a function of the class it would be a method
    }
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), type("BusyHere", (Busy,), about))
    thread = threading.Thread(target=http_server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}", refused
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()
