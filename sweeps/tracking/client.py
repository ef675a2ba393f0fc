"""wandb's own client, where it is needed: its settings, runs that are written offline, and artifacts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sweeps.store.schema import Scalar
from sweeps.tracking.runs import Run
from sweeps.tracking.server import RemoteRun

if TYPE_CHECKING:
    import wandb


_NOTE: Final = "mirrored.json"
"""In a directory that was written offline, once all of it is there: the entity that it is for, and the summary."""


class Client:
    """One process's use of wandb.

    Args:
        config: what ``TrackingConfig.message`` returns.
    """

    def __init__(self, config: Mapping[str, str | None]) -> None:
        import wandb

        self._wandb: Any = wandb
        self._config = config
        root = Path(str(config["dir"]))
        # wandb adds a folder 'wandb' of its own.
        self._dir = root if root.name == "wandb" else root / "wandb"
        settings: dict[str, Any] = {"root_dir": str(self._dir.parent), "base_url": config["base_url"]}
        settings |= dict.fromkeys(("silent", "disable_code", "disable_git", "x_disable_stats", "x_disable_meta"), True)
        settings |= {"console": "off", "init_timeout": 30.0, "x_disable_machine_info": True}
        settings |= {"x_save_requirements": False}
        self._settings = wandb.Settings(**{k: v for k, v in settings.items() if v is not None})
        self.settings: wandb.Settings = wandb.setup(self._settings).settings

    def read(self, ids: Sequence[str]) -> dict[str, RemoteRun]:
        """Return what was written offline of each of some runs, and is still there."""
        return {name: self._read(self._directories(name)) for name in ids}

    def write(self, run: Run, job_type: str, summary: Mapping[str, Scalar]) -> RemoteRun:
        """Write a run for ``wandb sync``: one directory, which takes the place of what was there of it.

        A run's id tells the results directory and the project too, so these are nobody else's than its mirrors'. One
        that is not whole is left alone: another mirror may be at it. Of two that are, only the later removes the other.
        """
        about = {"id": run.id, "name": run.name, "group": run.sweep, "job_type": job_type}
        there = self._init(**about, config=dict(run.config))
        there.summary.update(dict(summary))
        there.finish()
        written = Path(there.dir).parent
        (written / _NOTE).write_text(json.dumps({"entity": self._config["entity"], "summary": dict(summary)}))
        whole = [directory for since, directory in self._directories(run.id) if since]
        for earlier in whole[: whole.index(written)] if written in whole else ():
            shutil.rmtree(earlier, ignore_errors=True)
        return RemoteRun(state="finished", summary=summary)

    def upload(self, sweep: str, name: str, files: Iterable[str]) -> None:
        """Add a version of an artifact of files, in a run of its name; return when W&B has it, or wandb gave up."""
        run = self._init(id=name, name=name, group=sweep, job_type="results", config={"sweep": sweep})
        artifact = self._wandb.Artifact(name, type="results", description=f"Tables of {sweep}")
        for file in files:
            artifact.add_file(file, policy="immutable")  # without a copy in the user's home
        run.log_artifact(artifact)
        run.finish()

    def _init(self, **about: object) -> wandb.Run:
        """Open a run, or take it up again."""
        return self._wandb.init(  # type: ignore[no-any-return]
            **about,
            project=self._config["project"],
            entity=self._config["entity"],
            mode=self._config["mode"],
            resume="allow" if self._config["mode"] == "online" else None,
            reinit="create_new",
            allow_val_change=True,
            settings=self._settings.model_copy(),  # wandb writes the run's id into it
        )

    def _directories(self, name: str) -> list[tuple[int, Path]]:
        """Return what wandb has of a run, and when that was whole (ns; 0 where it isn't), in that order.

        Not by their names, which hold the second in which each was begun: of one second they tell no order.
        """
        found = []
        for directory in self._dir.glob(f"offline-run-*-{name}*"):
            since = 0
            with contextlib.suppress(FileNotFoundError):
                since = (directory / _NOTE).stat().st_mtime_ns
            found.append((since, directory))
        return sorted(found)

    def _read(self, directories: Sequence[tuple[int, Path]]) -> RemoteRun:
        for since, directory in reversed(directories):
            with contextlib.suppress(FileNotFoundError, ValueError):  # another mirror removes it, or wrote it just now
                if since and any(directory.glob("*.wandb")):
                    note = json.loads((directory / _NOTE).read_text())
                    # `wandb sync` takes a run to the entity that it was written for.
                    is_here = note["entity"] == self._config["entity"]
                    return RemoteRun(state="finished" if is_here else "elsewhere", summary=note["summary"])
        return RemoteRun(state="crashed" if directories else "missing")
