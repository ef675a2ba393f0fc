"""Resolve a configuration to a frozen study: identify models and data, expand the grid.

Commits are resolved here, once, and never invented; a plan made without a network says which are unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from sweeps.errors import UnreachableError, UserError, did_you_mean
from sweeps.files import JsonObject
from sweeps.study import hub
from sweeps.study.begins import check_begins
from sweeps.study.cell import UNRESOLVED, ModelRef
from sweeps.study.evals import as_list, resolve_calibrations, resolve_evals
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.study.reading import check_baselines, check_context, check_packed, config_of, unfit, with_reading
from sweeps.study.windows import check_texts, check_windows


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The part of a configuration that describes its study, in plain values, without where it runs."""

    sweep: JsonObject
    models: JsonObject
    path: Any
    eval: JsonObject
    calibration: JsonObject


@dataclass(frozen=True, kw_only=True)
class Study:
    """A resolved study: the manifest, and how much was left out or merged."""

    manifest: Manifest
    duplicates: int
    unresolved: tuple[str, ...]
    """Hub names without a known commit; only a plan may have any."""


@dataclass
class Resolver:
    """Turns hub names into commits. ``strict`` refuses what can't be resolved, else it is noted."""

    strict: bool

    def __post_init__(self) -> None:
        self.unresolved: list[str] = []

    def commit(self, repo: str, revision: str, repo_type: str) -> str:
        try:
            return hub.resolve_commit(repo, revision, repo_type=repo_type)
        except UnreachableError:
            if self.strict:
                raise
            self.unresolved.append(repo)
            return f"{UNRESOLVED}{revision}"


def build_study(
    config: StudyConfig, *, device: str, device_name: Callable[[], str], strict: bool, progress: Callable[[str], None]
) -> Study:
    """Resolve and expand.

    Args:
        config: what the user asked for.
        device: 'cpu' or 'cuda': what compute_dtype=auto stands for.
        device_name: asked where the device belongs to the identity of an evaluation.
        strict: refuse models and data whose commit is unknown (a run); else note them (a plan).
        progress: called with what is being read, where that takes time.

    Raises:
        UserError, SpecError, HubError: something in the configuration is wrong; nothing has been run.
    """
    resolver = Resolver(strict=strict)
    sweep = config.sweep
    name = str(sweep["name"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"sweep.name={name!r} is not valid: letters, digits, '.', '_' and '-', not a '.' or '-' first")
    if not sweep["quant"]:
        raise UserError("sweep.quant=[] is not valid: a study needs at least one block, e.g. {bits: 16}")
    models = [with_reading(model) for model in _models(config, resolver, progress)]
    configs = {model: config_of(model) for model in models}
    found = partial(resolve_calibrations, config.calibration, config.eval, resolver)
    grid = expand(
        sweep["quant"], models, sweep["exclude"], cache(found), lambda model, spec: unfit(configs[model], spec)
    )
    evals = resolve_evals(config.eval, resolver, device, device_name)
    check_packed(evals, (cell.quant for cell in grid.cells), configs)
    check_context(evals, configs)
    check_baselines(evals, (cell.quant for cell in grid.cells), configs)
    if not grid.cells:
        reasons = "; ".join(f"{n} x {why}" for why, n in grid.excluded_counts().items()) or "no models"
        raise UserError(f"sweep={name}: nothing is left to run ({reasons})")
    check_windows(grid.cells, progress)
    check_texts((cell.model for cell in grid.cells), evals)
    check_begins((cell.model for cell in grid.cells), evals)
    calibrates = any(cell.calibration is not None for cell in grid.cells)
    settings = {key: value for key, value in vars(config).items() if key != "calibration" or calibrates}
    manifest = Manifest(sweep=name, cells=grid.cells, evals=tuple(evals), excluded=grid.excluded, config=settings)
    return Study(manifest=manifest, duplicates=grid.duplicates, unresolved=tuple(dict.fromkeys(resolver.unresolved)))


def _models(config: StudyConfig, resolver: Resolver, progress: Callable[[str], None]) -> list[ModelRef]:
    sizes = as_list(config.sweep.get("sizes"), "sweep.sizes")
    revisions: list[str | None] = [str(r) for r in as_list(config.sweep.get("revisions"), "sweep.revisions")]
    if config.path is not None:
        if revisions:
            raise UserError(f"sweep.revisions={revisions} is not valid with path=: directories have no revisions")
        paths = [Path(str(p)).expanduser() for p in as_list(config.path, "path")]
        if not paths:
            raise UserError("path=[] is not valid: name at least one model directory, or leave it null")
        names = {p: hub.directory_name(p) for p in paths}
        _check_sizes(sizes, list(names.values()))
        return [_local(p, None, None, progress) for p in paths if not sizes or names[p] in map(str, sizes)]
    members = {
        (str(family.get("family") or group), str(name)): {
            **member,
            "tokens_per_step": family.get("tokens_per_step"),
            "key": f"models.{group}.members.{name}",
        }
        for group, family in config.models.items()
        for name, member in family["members"].items()
    }
    _check_sizes(sizes, [name for _, name in members])
    chosen = {k: m for k, m in members.items() if not sizes or k[1] in map(str, sizes)}
    return [
        _member(family, name, {**member, "checkpoint": revision}, resolver, progress)
        for (family, name), member in chosen.items()
        for revision in revisions or [None]
    ]


def _check_sizes(sizes: list[object], known: list[str]) -> None:
    for size in sizes:
        if str(size) not in known:
            hint = did_you_mean(str(size), known)
            raise UserError(f"sweep.sizes={size!r} is not among the chosen models.{hint} Allowed: {', '.join(known)}")


def _member(
    family: str, name: str, member: JsonObject, resolver: Resolver, progress: Callable[[str], None]
) -> ModelRef:
    checkpoint = member["checkpoint"]
    if member["path"]:
        if checkpoint is not None:
            raise UserError(f"sweep.revisions={checkpoint!r} is not valid: {family} {name} is a local directory")
        return _local(Path(member["path"]), family, name, progress, f"{member['key']}.path")
    if not member["id"]:
        raise UserError(f"{member['key']}: needs `id` (a hub id) or `path` (a local directory)")
    progress(f"commit of {member['id']}")
    commit = resolver.commit(member["id"], checkpoint or member["revision"], "model")
    hub.check_model(member["id"], commit)
    return ModelRef(
        family=family,
        name=name,
        params=member["params"],
        hub_id=member["id"],
        commit=commit,
        checkpoint=checkpoint,
        tokens_seen=_tokens_seen(checkpoint, member["tokens_per_step"]),
    )


def _tokens_seen(checkpoint: str | None, tokens_per_step: int | None) -> int | None:
    """Return the tokens of a checkpoint whose name ends in its step, where the family says how many a step takes."""
    step = re.search(r"(\d+)$", checkpoint or "")
    return int(step.group(1)) * tokens_per_step if step and tokens_per_step else None


def _local(
    path: Path, family: str | None, name: str | None, progress: Callable[[str], None], key: str = "path"
) -> ModelRef:
    progress(f"hash of {path}")
    local = hub.local_model(path, key=key)
    return ModelRef(
        family=family or local.family,
        name=name or local.name,
        params=local.params,
        path=str(local.path),
        weights_hash=local.content_hash,
    )
