"""The keys of a launch, by the modes that obey them: declared once, here. A mode refuses the others by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from omegaconf import OmegaConf

from sweeps.commands.modes import MODES
from sweeps.config import Config, asked_keys
from sweeps.errors import UserError
from sweeps.text import written

if TYPE_CHECKING:
    from omegaconf import DictConfig

EVERY: Final = tuple(MODES)
CHOOSING: Final = tuple(mode for mode in MODES if mode not in ("fetch", "sync", "merge"))
"""Modes that work on cells, so that cells can be chosen for them."""

OBEYED: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("mode", "out"), EVERY),
    # A study and where it runs: the command of a study works with any other mode=.
    **dict.fromkeys(("sweep", "model", "models", "path", "eval", "calibration"), EVERY),
    **dict.fromkeys(("executor", "tracking", "trust_remote_code"), EVERY),
    **dict.fromkeys(("cell", "where", "status"), CHOOSING),
    "retry": ("run", "plan", "status"),
    "order": ("run", "plan"),
    "budget": ("run", "plan"),
    "watch": ("run", "status"),
    "report": ("run",),
    "script": ("plan",),
    "by": ("status", "table"),
    **dict.fromkeys(("columns", "sort", "top"), ("table",)),
    "metrics": ("table", "best"),
    **dict.fromkeys(("memory", "context", "batch"), ("best",)),
    "to": ("table", "report", "findings", "compare", "export", "keep"),
    "samples": ("keep",),
    **dict.fromkeys(("a", "b"), ("compare",)),
    "margins": ("findings", "compare"),
    "long": ("table",),
    "format": ("export",),
    **dict.fromkeys(("from", "prefer"), ("merge",)),
    **dict.fromkeys(("yes", "undo"), ("drop",)),
}
"""Top-level key, or group, to the modes that obey it."""


def check_keys(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse keys of the command line that the mode would ignore.

    Args:
        cfg: as Hydra composed it.
        overrides: the arguments of the command line, without those about Hydra itself.

    Raises:
        UserError: names the key, its value, and the modes that take it.
    """
    defaults, mode = Config(), str(cfg.mode)
    for key in asked_keys(overrides):
        if mode in OBEYED.get(key, EVERY):
            continue
        value = OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        if value == getattr(defaults, key, None):
            continue  # it asks for what happens anyway
        modes = ", ".join(OBEYED[key])
        raise UserError(f"{key}={written(value)} has no effect with mode={mode}, only with mode={modes}: leave it out")
