"""The options of a launch, typed and frozen: made once from Hydra's configuration, which ends here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeps.errors import UserError
from sweeps.plan.budget import parse_budget
from sweeps.plan.order import parse_order
from sweeps.plan.packs import parse_retry
from sweeps.study.choice import Choice
from sweeps.study.evals import as_list
from sweeps.study.resolve import StudyConfig
from sweeps.tracking.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of conf/config.yaml, checked where that needs no more than the key.

    Attributes:
        choice: of cells, by cell=, where= and status=; all where they say nothing.
        asked_sweep: the study that the command line names; None where it names none (the default is the demo).
        retry: states of measurements to run again.
        order: in which cells run (sweeps.plan.order).
        budget: device-seconds that the study may spend; None is without end.
        format: in which mode=export writes a cell (kbit.exporting.base).
        script: whether mode=plan shows the scripts of jobs.
        report: whether a study ends in its report.
        yes, undo: mode=drop doesn't ask; it takes the last drop back.
        executor: keys of the chosen executor, which checks them (sweeps.executors.base).
    """

    mode: str
    out: Path
    retry: frozenset[str]
    order: str
    budget: float | None
    by: tuple[str, ...]
    choice: Choice
    to: Path | None
    format: str | None
    long: bool
    watch: bool
    script: bool
    report: bool
    yes: bool
    undo: bool
    trust_remote_code: bool
    asked_sweep: str | None
    study: StudyConfig
    executor: Mapping[str, Any]
    tracking: TrackingConfig

    @classmethod
    def from_config(cls, cfg: DictConfig, overrides: Sequence[str]) -> Options:
        """Convert a composed configuration.

        Args:
            cfg: as Hydra composed it.
            overrides: the arguments of the command line, without those about Hydra itself.

        Raises:
            UserError, SpecError: a value is not valid.
        """
        given = plain(cfg)
        out = _out(given["out"])
        return cls(
            mode=str(given["mode"]),
            out=out,
            retry=parse_retry(given["retry"]),
            order=parse_order(given["order"]),
            budget=parse_budget(given["budget"]),
            by=tuple(str(b) for b in as_list(given["by"], "by")),
            choice=Choice.parse(_cell_prefixes(overrides), given["where"], given["status"]),
            to=Path(given["to"]).expanduser() if given["to"] else None,
            format=given["format"],
            long=given["long"],
            watch=given["watch"],
            script=given["script"],
            report=given["report"],
            yes=given["yes"],
            undo=given["undo"],
            trust_remote_code=given["trust_remote_code"],
            asked_sweep=_asked_sweep(given["sweep"], overrides),
            study=StudyConfig(**{name: given[name] for name in ("sweep", "models", "path", "eval", "calibration")}),
            executor=given["executor"],
            tracking=_tracking(given["tracking"], out),
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration's plain values; axes that a block of the grid doesn't name (MISSING) are left out.

    Raises:
        UserError: an interpolation can't be resolved.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration can't be resolved: {error}") from error
    return {str(key): value for key, value in _without_missing(values).items()}


def _without_missing(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_missing(v) for k, v in value.items() if v != "???"}
    if isinstance(value, list):
        return [_without_missing(v) for v in value]
    return value


def _out(value: str) -> Path:
    if not value.strip():
        raise UserError("out='' is not valid: name a directory for the results, e.g. out=results")
    path = Path(value).expanduser().absolute()
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"out={value!r} is a link to {path.readlink()}, which does not exist: is its file system mounted? "
            "Make that directory, or change the link"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"out={value!r} is a file: name a directory for the results, e.g. out=results")
    return path


def _tracking(given: Mapping[str, Any], out: Path) -> TrackingConfig:
    """W&B's files go into the results directory unless ``tracking.dir`` says otherwise."""
    directory = Path(given["dir"]).expanduser().absolute() if given["dir"] else out / "wandb"
    return TrackingConfig(**{**given, "dir": directory})


def _cell_prefixes(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what ``cell=`` says, as it was written: Hydra takes a key such as 0123 or 1e5 for a number."""
    written = [o.partition("=")[2] for o in overrides if o.startswith("cell=")]
    names = [name.strip(" '\"") for text in written for name in text.strip("[] ").split(",")]
    return tuple(name for name in names if name not in ("", "null"))


def _asked_sweep(sweep: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    named = any(o.startswith(("sweep=", "sweep.name=")) for o in overrides)
    return str(sweep["name"]) if named else None
