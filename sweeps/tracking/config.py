"""Settings of the W&B mirror: the keys of conf/tracking."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from kbit.errors import SpecError

Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Settings of a study's mirror (conf/tracking).

    Attributes:
        mode: 'online'; 'offline' writes runs under ``dir``, for `wandb sync` or mode=sync; 'disabled'.
        project: W&B's project.
        entity: W&B's user or team; None is the key's default.
        base_url: the server; None is wandb's own default (WANDB_BASE_URL, its settings file, the public server).
        dir: for wandb's files and the mirror's log; None is ./wandb.

    Raises:
        SpecError: the mode doesn't exist, or the project has no name.
    """

    mode: str = "disabled"
    project: str = "kbit-sweep"
    entity: str | None = None
    base_url: str | None = None
    dir: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise SpecError("tracking.mode", self.mode, "one of " + ", ".join(get_args(Mode)))
        if not re.fullmatch(r"(?=.*\S)[^/\\#?%:]{1,128}", self.project or ""):
            allowed = "the name of a W&B project: 1 to 128 characters without / \\ # ? % and :"
            raise SpecError("tracking.project", self.project, allowed)
        if self.entity is not None and not self.entity.strip():
            raise SpecError("tracking.entity", self.entity, "a W&B user or team, or null")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise SpecError("tracking.base_url", self.base_url, "a URL with http:// or https://, or null")

    def message(self) -> dict[str, str | None]:
        """Return it in JSON's types, for the process that talks to W&B."""
        return {**asdict(self), "dir": str(Path(self.dir or "wandb").absolute())}

    def how_to_log_in(self) -> str:
        """Return what a user does about a missing or wrong key."""
        host = f" --host {self.base_url}" if self.base_url else ""
        return f"set WANDB_API_KEY or run `wandb login{host}`"
