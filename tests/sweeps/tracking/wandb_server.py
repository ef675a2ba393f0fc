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
from collections.abc import Iterator
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

    def losses(self, sweep: str) -> list[tuple[int, float]]:
        """(step, value) of every 'pile_cc/loss' that the histories of a study's runs hold, duplicates and all."""
        sql = "SELECT step, value FROM metrics WHERE run_id = ? AND key = 'pile_cc/loss' ORDER BY step, value"
        return [point for run in self.runs(sweep) for point in self._query(sql, run)]

    def run(self, run: str) -> dict[str, Any]:
        sql = "SELECT display_name, state, config_json, summary_json FROM runs WHERE run_id = ?"
        [(name, state, config, summary)] = self._query(sql, run)
        configured = {k: v["value"] for k, v in json.loads(config).items()}
        return {"name": name, "state": state, "config": configured, "summary": json.loads(summary)}

    def only(self, sweep: str) -> dict[str, Any]:
        """The only run of a study; nothing before there is one."""
        return self.run(one[0]) if len(one := self.runs(sweep)) == 1 else {"state": "missing", "summary": {}}

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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what = self.path.rpartition("/")[2]
        if self.refuses[what] > 0:
            self.refuses[what] -= 1
            self.refused[what] += 1
            # The header that clients know, or W&B's own.
            headers = {"Retry-After" if self.refused[what] % 2 else "RateLimit-Reset": "1"}
            self._answer(429, headers, b'{"error": "rate limit exceeded"}')
            return
        there = http.client.HTTPConnection(self.upstream, timeout=30)
        there.request(self.command, self.path, body, dict(self.headers))
        said = there.getresponse()
        kept = {k: v for k, v in said.getheaders() if k.lower() in ("content-type", "content-encoding", "location")}
        self._answer(said.status, kept, said.read())
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
def busy(server: WandbServer, **refuses: int) -> Iterator[tuple[str, Counter[str]]]:
    """A proxy that refuses so many requests of each kind; gives its URL, and counts what it refused."""
    refused: Counter[str] = Counter()
    about = {"upstream": server.url.removeprefix("http://"), "refuses": Counter(refuses), "refused": refused}
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), type("BusyHere", (Busy,), about))
    thread = threading.Thread(target=http_server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}", refused
    finally:
        http_server.shutdown()
        thread.join()
        http_server.server_close()
