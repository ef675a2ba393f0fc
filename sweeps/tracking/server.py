"""Read W&B runs back: what a server already holds of a run."""

from __future__ import annotations

import json
import netrc
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from sweeps.errors import RefusedError
from sweeps.store.schema import Scalar
from sweeps.tracking.runs import STATUSES

if TYPE_CHECKING:
    import requests
    import wandb

HTTP_TIMEOUT: Final = 10.0
MOST_WAIT_SECONDS: Final = 60.0
"""A server that is asked too often is waited for so long; then what was asked for fails, and mode=sync adds it."""
_TOO_OFTEN: Final = (429, 503)
_BACK_OFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 29.0)
_FIELDS: Final = "name state summaryMetrics"
_AT_ONCE: Final = 50
"""Runs that are asked for in one request."""


@dataclass(frozen=True, kw_only=True)
class RemoteRun:
    """The contents of a run that W&B has, or of one that was written offline; empty if there is none.

    Attributes:
        state: 'finished' when all that was sent has come.
        mirrored: a token a measurement (sweeps.tracking.runs).
        counts: by status.
        steps: of its history.
    """

    state: str = "missing"
    mirrored: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0

    def to_summary(self) -> dict[str, Scalar]:
        """Return what its summary says of it."""
        return {**self.counts, "mirrored": " ".join(self.mirrored), "steps": self.steps}

    @classmethod
    def from_summary(cls, state: str, summary: Mapping[str, Any]) -> RemoteRun:
        """Read back what ``to_summary`` gave."""
        return cls(
            state=state,
            mirrored=tuple(summary.get("mirrored", "").split()),
            counts={status: int(summary.get(status, 0)) for status in STATUSES},
            steps=int(summary.get("steps", 0)),
        )


class Server:
    """Reads runs back by the query with which wandb itself resumes them.

    wandb.Api isn't used: it asks for more than every server has, and takes a server that is down for a wrong key.

    Raises:
        RefusedError: no API key is found.
    """

    def __init__(self, settings: wandb.Settings, config: Mapping[str, Any]) -> None:
        import requests

        self._config = config
        key = os.environ.get("WANDB_API_KEY") or _key_from_netrc(settings.base_url) or settings.api_key
        if not key:
            raise RefusedError(f"no API key for {settings.base_url}")
        self._session = requests.Session()
        self._session.auth = ("api", key)
        self._url = settings.base_url.rstrip("/") + "/graphql"

    def read(self, names: Sequence[str]) -> dict[str, RemoteRun]:
        """Return the state of each run.

        Raises:
            RefusedError: the server refuses the key.
            OSError: it can't be reached, or doesn't answer as W&B does.
        """
        found: dict[str, RemoteRun] = {}
        for start in range(0, len(names), _AT_ONCE):
            found |= self._read(names[start : start + _AT_ONCE])
        return found

    def _read(self, names: Sequence[str]) -> dict[str, RemoteRun]:
        numbered = {f"r{number}": name for number, name in enumerate(names)}
        wanted = " ".join(f"{r}: bucket(name: ${r}, missingOk: true) {{ {_FIELDS} }}" for r in numbered)
        declared = "".join(f", ${r}: String!" for r in numbered)
        query = (
            f"query KbitMirror($project: String!, $entity: String{declared}) "
            f"{{ viewer {{ entity }} model(name: $project, entityName: $entity) {{ {wanted} }} }}"
        )
        of_project = {"project": self._config["project"], "entity": self._config["entity"]}
        response = self._post({"query": query, "variables": {**of_project, **numbered}})
        if response.status_code in (401, 403):
            raise RefusedError(f"{self._url} refuses the API key (HTTP {response.status_code})")
        response.raise_for_status()
        data = response.json().get("data")
        if data is None:
            raise OSError(f"{self._url} answers with errors: {response.text[:200]}")
        if data["viewer"] is None:
            raise RefusedError(f"{self._url} doesn't know the API key")
        runs = data.get("model") or {}
        return {
            name: RemoteRun.from_summary(run["state"], json.loads(run["summaryMetrics"] or "{}"))
            if run
            else RemoteRun()
            for r, name in numbered.items()
            for run in [runs.get(r)]
        }

    def _post(self, query: Mapping[str, Any]) -> requests.Response:
        """Ask, and where the server is asked too often wait as long as it says, or longer and longer, and ask again."""
        waited = 0.0
        for wait in chain(_BACK_OFF, repeat(_BACK_OFF[-1])):
            response = self._session.post(self._url, json=query, timeout=HTTP_TIMEOUT)
            if response.status_code not in _TOO_OFTEN:
                break
            # The second is W&B's own.
            told = response.headers.get("Retry-After") or response.headers.get("RateLimit-Reset") or ""
            seconds = float(told) if re.fullmatch(r"\d+(\.\d+)?", told) else wait
            if waited + seconds > MOST_WAIT_SECONDS:
                break
            time.sleep(seconds)
            waited += seconds
        return response


def _key_from_netrc(url: str) -> str | None:
    """Return the key that `wandb login` stored. requests reads netrc too, but without the port that wandb writes."""
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        try:
            entry = netrc.netrc(path).authenticators(urlsplit(url).netloc)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry:
            return entry[2]
    return None
