"""Read W&B runs back: what a server already holds of a run."""

from __future__ import annotations

import json
import netrc
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from sweeps.errors import RefusedError
from sweeps.status import RECORDED, State

if TYPE_CHECKING:
    import requests
    import wandb

STATUSES: Final = (*(s.value for s in RECORDED), State.SUPERSEDED.value)
"""What a run counts: what is stored, and of this apart what no table shows any more."""
HTTP_TIMEOUT: Final = 10.0
MOST_WAIT_SECONDS: Final = 60.0
"""A server that is asked too often is waited for so long; then what was asked for fails, and mode=sync adds it."""
_TOO_OFTEN: Final = (429, 503)
_BACK_OFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 29.0)
_STATE_QUERY: Final = """
query KbitMirror($project: String!, $entity: String, $run: String!) {
  viewer { entity }
  model(name: $project, entityName: $entity) { bucket(name: $run, missingOk: true) { name state summaryMetrics } }
}"""


@dataclass(frozen=True, kw_only=True)
class RemoteRun:
    """The contents of a run on the server; empty if it has none."""

    state: str = "missing"
    mirrored: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


class Server:
    """Reads runs back by the query with which wandb itself resumes them.

    wandb.Api isn't used: it asks for more than every server has, and takes a server that is down for a wrong key.

    Raises:
        RefusedError: no API key is found.
    """

    def __init__(self, settings: wandb.Settings, config: Mapping[str, str | None]) -> None:
        import requests

        self._config = config
        key = os.environ.get("WANDB_API_KEY") or _key_from_netrc(settings.base_url) or settings.api_key
        if not key:
            raise RefusedError(f"no API key for {settings.base_url}")
        self._session = requests.Session()
        self._session.auth = ("api", key)
        self._url = settings.base_url.rstrip("/") + "/graphql"

    def read(self, run_id: str) -> RemoteRun:
        """Return the run's state.

        Raises:
            RefusedError: the server refuses the key.
            OSError: it can't be reached, or doesn't answer as W&B does.
        """
        variables = {"project": self._config["project"], "entity": self._config["entity"], "run": run_id}
        query: Any = {"query": _STATE_QUERY, "variables": variables}
        response = self._post(query)
        if response.status_code in (401, 403):
            raise RefusedError(f"{self._url} refuses the API key (HTTP {response.status_code})")
        response.raise_for_status()
        data = response.json().get("data")
        if data is None:
            raise OSError(f"{self._url} answers with errors: {response.text[:200]}")
        if data["viewer"] is None:
            raise RefusedError(f"{self._url} doesn't know the API key")
        run = (data.get("model") or {}).get("bucket")
        if run is None:
            return RemoteRun()
        summary = json.loads(run["summaryMetrics"] or "{}")
        counts = {status: int(summary.get(status, 0)) for status in STATUSES}
        return RemoteRun(state=run["state"], mirrored=tuple(summary.get("mirrored", "").split()), counts=counts)

    def _post(self, query: Mapping[str, Any]) -> requests.Response:
        """Ask, and where the server is asked too often wait as long as it says, or longer and longer, and ask again."""
        waited = 0.0
        for wait in chain(_BACK_OFF, repeat(_BACK_OFF[-1])):
            response = self._session.post(self._url, json=query, timeout=HTTP_TIMEOUT)
            if response.status_code not in _TOO_OFTEN:
                break
            told = response.headers.get("Retry-After", "")
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
