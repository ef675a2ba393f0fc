"""The options of a launch, typed and frozen: made once from Hydra's configuration, which ends here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweeps.errors import UserError, did_you_mean
from sweeps.files import JsonObject
from sweeps.plan.budget import parse_budget
from sweeps.plan.order import parse_order
from sweeps.plan.packs import parse_retry
from sweeps.study.cell import axis_names
from sweeps.study.choice import MORE, Choice, is_key_prefix
from sweeps.study.evals import as_list
from sweeps.study.grid import check_axes
from sweeps.study.resolve import StudyConfig
from sweeps.text import written
from sweeps.tracking.config import TrackingConfig

_MARGINS: Final = {"loss": "nats per token", "points": "percentage points"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of conf/config.yaml, checked where that needs no more than the key.

    Attributes:
        by: axes that cells are counted by, or rows of a table.
        columns, metrics, sort, top: of a table (analysis.tables.pivot); None where they say nothing.
        measured_with: the part of where= that a table alone knows, of how measurements were made.
        choice: of cells, by cell=, where= and status=; all where they say nothing.
        asked_sweep: the study that the command line names; None where it names none (the default is the demo).
        best: memory, context and batch of mode=best, which checks them.
        retry: states of measurements to run again.
        order: in which cells run (sweeps.plan.order).
        budget: device-seconds that the study may spend; None is without end.
        a, b: what mode=compare compares.
        margins: what is too small to matter: loss (nats per token), points (of accuracies).
        samples: names of the outcomes that mode=keep writes; None is all.
        format: in which mode=export writes a cell (kbit.exporting.base).
        script: whether mode=plan shows the scripts of jobs.
        report: whether a study ends in its report.
        yes, undo: mode=drop doesn't ask; it takes the last drop back.
        sources: results directories that mode=merge joins, as they are written: DIR or HOST:DIR.
        prefer: whose results count where they disagree with those here: mine or theirs; None is neither.
        executor: keys of the chosen executor, which checks them (sweeps.executors.base).
    """

    mode: str
    out: Path
    retry: frozenset[str]
    order: str
    budget: float | None
    by: tuple[str, ...]
    columns: tuple[str, ...] | None
    metrics: tuple[str, ...]
    sort: tuple[str, ...]
    top: int | None
    measured_with: Mapping[str, object]
    choice: Choice
    best: Mapping[str, object]
    to: Path | None
    a: Choice | None
    b: Choice | None
    margins: Mapping[str, float]
    format: str | None
    long: bool
    samples: tuple[str, ...] | None
    watch: bool
    script: bool
    report: bool
    yes: bool
    undo: bool
    sources: tuple[str, ...]
    prefer: str | None
    trust_remote_code: bool
    asked_sweep: str | None
    study: StudyConfig
    executor: JsonObject
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
        where, measured_with = _parts_of_where(given["where"], str(given["mode"]))
        return cls(
            mode=str(given["mode"]),
            out=out,
            retry=parse_retry(given["retry"]),
            order=parse_order(given["order"]),
            budget=parse_budget(given["budget"]),
            by=_names(given["by"], "by"),
            columns=None if given["columns"] is None else _names(given["columns"], "columns"),
            metrics=_names(given["metrics"], "metrics"),
            sort=_names(given["sort"], "sort"),
            top=given["top"],
            measured_with=measured_with,
            best={name: given[name] for name in ("memory", "context", "batch")},
            choice=Choice.parse(_prefixes("cell", overrides), where, given["status"]),
            to=Path(given["to"]).expanduser() if given["to"] else None,
            a=_side("a", given["a"], overrides),
            b=_side("b", given["b"], overrides),
            margins=_margins(given["margins"]),
            format=given["format"],
            long=given["long"],
            samples=None if given["samples"] is None else _names(given["samples"], "samples"),
            watch=given["watch"],
            script=given["script"],
            report=given["report"],
            yes=given["yes"],
            undo=given["undo"],
            sources=_names(given["from"], "from"),
            prefer=given["prefer"],
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
        where = re.sub(r"\[(\d+)\]", r".\1", f"{error.full_key}: ") if error.full_key else ""
        said = str(error).splitlines()[0]
        raise UserError(f"{where}the configuration can't be resolved: {said}") from error
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


def _names(value: object, key: str) -> tuple[str, ...]:
    return tuple(str(name) for name in as_list(value, key))


def _parts_of_where(where: object, mode: str) -> tuple[object, Mapping[str, object]]:
    """Return what chooses cells, in every mode, and what chooses measurements, in a table alone."""
    if mode != "table" or not isinstance(where, Mapping):
        return where, {}
    from analysis.mixtures import MIXED
    from analysis.tables.choosing import PROVENANCE

    check_axes(where, "where", (*MORE, *PROVENANCE, MIXED))
    axes = (*axis_names(), *MORE)
    return {k: v for k, v in where.items() if k in axes}, {k: v for k, v in where.items() if k not in axes}


def _tracking(given: JsonObject, out: Path) -> TrackingConfig:
    """W&B's files go into the results directory unless ``tracking.dir`` says otherwise."""
    directory = Path(given["dir"]).expanduser().absolute() if given["dir"] else out / "wandb"
    return TrackingConfig(**{**given, "dir": str(directory)})


def _prefixes(key: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what ``cell=`` says, as it was written: Hydra takes a key such as 0123 or 1e5 for a number."""
    written = [o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")]
    names = [name.strip(" '\"") for text in written for name in text.strip("[] ").split(",")]
    return tuple(name for name in names if name not in ("", "null"))


def _side(name: str, value: object, overrides: Sequence[str]) -> Choice | None:
    """Return what ``a=`` or ``b=`` says: axis values, or the first characters of a cell's key."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        check_axes(value, name, MORE)
        return Choice.parse((), value, None)
    prefixes = _prefixes(name, overrides)
    if len(prefixes) != 1 or not is_key_prefix(prefixes[0]):
        raise UserError(
            f"{name}={written(value)} is not valid: the first characters of one cell's key (0-9, a-f), e.g. "
            f"{name}=3fa9, or axis values, e.g. '{name}={{dtype: int, bits: 4}}'"
        )
    return Choice(cells=prefixes)


def _margins(value: object) -> Mapping[str, float]:
    given = {} if value is None else value
    if not isinstance(given, Mapping):
        raise UserError(f"margins={written(value)} is not valid: e.g. 'margins={{loss: 0.01, points: 0.5}}'")
    for name, margin in given.items():
        if name not in _MARGINS:
            raise UserError(f"margins: {name!r} is none of {', '.join(_MARGINS)}.{did_you_mean(name, _MARGINS)}")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < float("inf"):
            raise UserError(
                f"margins={{{name}: {written(margin)}}} is not valid: a number above 0, in {_MARGINS[name]}"
            )
    return {str(name): float(margin) for name, margin in given.items()}


def _asked_sweep(sweep: JsonObject, overrides: Sequence[str]) -> str | None:
    named = any(o.startswith(("sweep=", "sweep.name=")) for o in overrides)
    return str(sweep["name"]) if named else None
