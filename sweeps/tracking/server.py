"""A W&B server: what it holds of a run, and how a run becomes what it is to be."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from sweeps.errors import AwayError, RefusedError
from sweeps.store.schema import Scalar
from sweeps.tracking.runs import DIGEST, Run

if TYPE_CHECKING:
    import requests
    import wandb

HTTP_TIMEOUT: Final = 10.0
MOST_WAIT_SECONDS: Final = 60.0
"""A server that is asked too often is waited for so long; then what was asked for fails, and mode=sync adds it."""
RETRY_PAUSES: Final = (0.25, 1.0)
"""Seconds before a request whose connection dropped is sent again: of hundreds in a look, one may well do."""
_TOO_OFTEN: Final = (429, 503)
_BACK_OFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 29.0)
_DELETED: Final = "previously created and deleted"
_AT_ONCE: Final = 50
"""Runs that are asked for in one request."""
_FIELDS: Final = "name state summaryMetrics"
_WRITE: Final = f"""
mutation KbitMirror($name: String!, $project: String!, $entity: String, $displayName: String, $groupName: String,
  $jobType: String, $config: JSONString, $summaryMetrics: JSONString) {{
  upsertBucket(input: {{name: $name, modelName: $project, entityName: $entity, displayName: $displayName,
    groupName: $groupName, jobType: $jobType, config: $config, summaryMetrics: $summaryMetrics}}) {{
    bucket {{ {_FIELDS} project {{ name entity {{ name }} }} }}
  }}
}}"""


@dataclass(frozen=True, kw_only=True)
class RemoteRun:
    """The contents of a run on the server; empty if it has none."""

    state: str = "missing"
    summary: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def digest(self) -> Scalar:
        """Of the rows that it was made of; None where it has none."""
        return self.summary.get(DIGEST)


class Server:
    """Reads runs, and writes them whole: name, configuration and summary in one request, which takes the place of all.

    The requests are those of wandb's own client. It isn't used itself: its processes and threads exist to stream a
    history, of which we have none. Nor is wandb.Api: it asks for more than every server has, and takes a server that is
    down for a wrong key.

    Raises:
        RefusedError: no API key is found.
    """

    def __init__(self, settings: wandb.Settings, config: Mapping[str, str | None]) -> None:
        import requests

        key = os.environ.get("WANDB_API_KEY") or _key_from_netrc(settings.base_url) or settings.api_key
        if not key:
            raise RefusedError(f"no API key for {settings.base_url}")
        self._session = requests.Session()
        self._session.auth = ("api", key)
        self._url = settings.base_url.rstrip("/")
        self._place = {"project": config["project"], "entity": config["entity"]}
        self._own: str | None = None

    def read(self, ids: Sequence[str]) -> dict[str, RemoteRun]:
        """Return what the server has of each of some runs.

        Raises:
            RefusedError: the server refuses the key.
            AwayError: it can't be reached, has no time, or nothing there for this key.
            OSError: it fails, or doesn't answer as W&B does.
        """
        found: dict[str, RemoteRun] = {}
        for first in range(0, len(ids), _AT_ONCE):
            names = ids[first : first + _AT_ONCE]
            asked = " ".join(
                f"r{n}: bucket(name: {json.dumps(name)}, missingOk: true) {{ {_FIELDS} }}"
                for n, name in enumerate(names)
            )
            query = f"""query KbitMirror($project: String!, $entity: String) {{
              viewer {{ entity }} model(name: $project, entityName: $entity) {{ {asked} }} }}"""
            data = self._ask(query, self._place)
            if data["viewer"] is None:
                raise RefusedError(f"{self._url} doesn't know the API key")
            self._own = data["viewer"]["entity"]
            runs = data.get("model") or {}
            found |= {name: _remote(runs.get(f"r{n}")) for n, name in enumerate(names)}
        return found

    def write(self, run: Run, job_type: str, summary: Mapping[str, Scalar]) -> RemoteRun:
        """Make a run what it is to be; return what the server says that it is now, in whole or not.

        Raises:
            As ``read``.
        """
        about = {"name": run.id, "displayName": run.name, "groupName": run.sweep, "jobType": job_type}
        config = json.dumps({name: {"value": value} for name, value in run.config.items()}, allow_nan=False)
        told = {**about, "config": config, "summaryMetrics": json.dumps(summary, allow_nan=False)}
        bucket = (self._ask(_WRITE, {**self._place, **told}).get("upsertBucket") or {}).get("bucket") or {}
        remote = _remote(bucket)
        if remote.state != "finished":
            project = bucket.get("project") or {}
            entity = (project.get("entity") or {}).get("name") or self._place["entity"] or self._own or ""
            parts = (entity, project.get("name") or self._place["project"], bucket.get("name") or run.id)
            path = "/".join(quote(str(part), safe="") for part in parts)
            ended = self._post(f"/files/{path}/file_stream", {"complete": True, "exitcode": 0})
            if not ended.ok:
                raise OSError(f"{self._url} doesn't end a run ({_failure(ended)})")
        return replace(remote, state="finished")

    def _ask(self, query: str, variables: Mapping[str, object]) -> Mapping[str, Any]:
        response = self._post("/graphql", {"query": query, "variables": variables})
        why = _failure(response)
        if response.status_code == 401:
            raise RefusedError(f"{self._url} refuses the API key ({why})")
        if response.status_code in (403, 404):
            entity = self._place["entity"] or "null (the key's own)"
            place = f"tracking.entity={entity}, tracking.project={self._place['project']}"
            raise AwayError(
                f"{self._url} has no place for this key at {place} ({why}): correct them, or ask for access"
            )
        if response.status_code == 409 and _DELETED in why:
            raise OSError(
                f"{self._url} had a run that somebody deleted ({why}): undelete it, or take another tracking.project"
            )
        answer = _json(response) if response.ok else {}
        found: Mapping[str, Any] = answer.get("data") or {}
        if not found or (answer.get("errors") and None in found.values()):
            raise OSError(f"{self._url} fails ({why})")
        return found

    def _post(self, path: str, what: Mapping[str, Any]) -> requests.Response:
        """Ask, and where the server is asked too often wait as long as it says, or longer and longer, and ask again."""
        waited = 0.0
        for wait in chain(_BACK_OFF, repeat(_BACK_OFF[-1])):
            response = self._send(path, what)
            if response.status_code not in _TOO_OFTEN:
                return response
            # What HTTP has for it, and W&B's own.
            told = [response.headers.get(name, "") for name in ("Retry-After", "RateLimit-Reset")]
            seconds = next((float(text) for text in told if re.fullmatch(r"\d+(\.\d+)?", text)), wait)
            if waited + seconds > MOST_WAIT_SECONDS:
                break
            time.sleep(seconds)
            waited += seconds
        raise AwayError(f"{self._url} is asked too often ({_failure(response)})")

    def _send(self, path: str, what: Mapping[str, Any]) -> requests.Response:
        """Ask; where the connection drops, again: what is read or written whole may be so twice."""
        import requests

        drops = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
        post = partial(self._session.post, self._url + path, json=dict(what), timeout=HTTP_TIMEOUT)
        for pause in RETRY_PAUSES:
            with contextlib.suppress(*drops):
                return post()
            time.sleep(pause)
        try:
            return post()
        except drops as error:
            raise AwayError(f"{self._url} can't be reached ({_cause(error)})") from error


def _remote(bucket: Mapping[str, Any] | None) -> RemoteRun:
    if not bucket:
        return RemoteRun()
    return RemoteRun(state=bucket.get("state") or "", summary=json.loads(bucket.get("summaryMetrics") or "{}"))


def _cause(error: BaseException) -> str:
    """Return what the system says of a connection, without what libraries put around that."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__


def _json(response: requests.Response) -> Mapping[str, Any]:
    """Return the answer's object; empty, where it is none."""
    try:
        said = response.json()
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _failure(response: requests.Response) -> str:
    """Return the status of an answer, with what the server says of it: W&B's first error, or how the text begins."""
    errors = _json(response).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    said = str(first.get("message")) if isinstance(first, dict) else " ".join(response.text.split())
    return f"HTTP {response.status_code}: {said[:200]}" if said else f"HTTP {response.status_code}"


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
