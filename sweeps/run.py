"""``mode=run``: plan what is left, claim it, run it, and end in a table and figures."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from sweeps.claims import Claim, Claims, ClaimTakenError
from sweeps.cost import CostModel
from sweeps.devices import Workers, plan_workers, resolve_device
from sweeps.dispatch import ExecutorError, LocalExecutor
from sweeps.errors import UserError
from sweeps.manifest import Manifest
from sweeps.plan import Pack, Plan, make_plan, parse_retry
from sweeps.provenance import code_provenance
from sweeps.report import show_results
from sweeps.store import Store
from sweeps.study import build_study
from sweeps.tracking import Tracker, TrackingConfig
from sweeps.view import RunView

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch: on a CPU what keeps activations in its caches, on a GPU what fills it."""


def run(cfg: DictConfig, console: Console) -> int:
    """Run what is left of a study; returns the exit code.

    Raises:
        UserError, SpecError: the request is wrong; nothing was run.
    """
    retry = parse_retry(_plain(cfg.retry))
    device = resolve_device(cfg.executor.device)
    batch_tokens = _batch_tokens(cfg.executor.batch_tokens, device)
    tracking = tracking_config(cfg)
    store = Store(out=out_dir(cfg))
    store.check_writable()
    with console.status("resolving models and data") as status:
        study = build_study(cfg, device=device, strict=True, progress=status.update)
    manifest = study.manifest
    workers = plan_workers(device, cfg.executor.workers, max(c.model.params or 0 for c in manifest.cells))
    name = manifest.save(store.out)
    launch = uuid.uuid4().hex[:12]
    plan, claim = _claim(store, manifest, retry, workers, launch)
    if claim is None:
        console.print(f"[bold]{manifest.sweep}[/]: nothing to do. {_counts(plan)}")
        for other in Claims(out=store.out).live() if plan.counts["in flight"] else ():
            console.print(f"{other.sweep} is being run by launch {other.launch}, process {other.pid} on {other.host}.")
        return _ending(store, manifest, console, figures=False)
    console.print(
        f"[bold]{manifest.sweep}[/]: {sum(len(p.items) for p in plan.packs)} cells, {plan.todo} measurements "
        f"in {len(plan.packs)} packs on {workers.count} {device} worker(s) with {workers.threads} thread(s). "
        f"{_counts(plan)}\nResults stream to {store.out}; Ctrl-C is safe: the same command goes on where it stopped."
    )
    logs = store.out / "logs" / launch
    settings = {
        "batch_tokens": batch_tokens,
        "trust_remote_code": bool(cfg.trust_remote_code),
        "provenance": {**code_provenance(), "launch": f"{launch} ({name})"},
    }
    try:
        _execute(plan, store, claim, workers, settings, logs, tracking, console)
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/]: finished measurements are stored; the same command runs the rest.")
        return EXIT_INTERRUPTED
    except ExecutorError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return EXIT_FAILED
    except OSError as error:
        console.print(f"[red]{escape(f'results can not be written any more: {error}')}[/]\nWhat is stored is safe.")
        return EXIT_FAILED
    finally:
        _close(store, claim, plan, console)
    return _ending(store, manifest, console, figures=True)


def out_dir(cfg: DictConfig) -> Path:
    if not str(cfg.out).strip():
        raise UserError("out='' is not valid: name a directory for the results, e.g. out=results")
    return Path(cfg.out).expanduser().absolute()


def tracking_config(cfg: DictConfig) -> TrackingConfig:
    t = cfg.tracking
    return TrackingConfig(
        mode=t.mode,
        project=t.project,
        entity=t.entity,
        base_url=t.base_url,
        dir=Path(t.dir).expanduser().absolute() if t.dir else out_dir(cfg) / "wandb",
    )


def run_config(pack: Pack | Mapping[str, Any]) -> dict[str, Any]:
    """What a pack's W&B run says of itself, from a pack or from one of its rows."""
    if isinstance(pack, Pack):
        model = pack.model
        return {"family": model.family, "model": model.label, "params": model.params}
    return {name: pack[name] for name in ("family", "model", "params")}


def run_name(pack_id: str, config: Mapping[str, Any]) -> str:
    """What people see in W&B: the model and the first characters of the pack's id."""
    return f"{config['model']} {pack_id[:4]}"


def _claim(
    store: Store, manifest: Manifest, retry: frozenset[str], workers: Workers, launch: str
) -> tuple[Plan, Claim | None]:
    """Plan against what is stored and claimed, and claim the plan; again if another launch was faster."""
    claims = Claims(out=store.out)
    while True:
        number = claims.last_number() + 1
        plan = plan_study(store, manifest, retry, workers)
        if plan.todo == 0:
            return plan, None
        try:
            keys = plan.measurement_keys()
            return plan, claims.create(number, launch=launch, sweep=manifest.sweep, measurements=keys)
        except ClaimTakenError:
            continue


def plan_study(store: Store, manifest: Manifest, retry: frozenset[str], workers: Workers) -> Plan:
    """What is left of a study, given the store and the claims on it."""
    claims = Claims(out=store.out)
    # Claims first: a launch that ends in between has then already stored what it did.
    in_flight = {m for claim in claims.live() for m in claim.measurements}
    lost = claims.lost()
    columns = ["measurement", "status", "model", "eval", "limit", "seconds", "quantize_seconds", "device"]
    rows = store.read(columns).to_pylist()
    return make_plan(
        manifest,
        statuses={r["measurement"]: r["status"] for r in rows},
        in_flight=in_flight,
        lost=lost,
        retry=retry,
        cost=CostModel.from_rows(rows, workers.device),
        workers=workers.count,
    )


def _execute(
    plan: Plan,
    store: Store,
    claim: Claim,
    workers: Workers,
    settings: Mapping[str, Any],
    logs: Path,
    tracking: TrackingConfig,
    console: Console,
) -> None:
    tracker = Tracker(tracking, warn=lambda text: console.print(f"[yellow]{escape(text)}[/]"))
    waiting = {pack.id: pack for pack in plan.packs}
    cells = Counter(m.cell.key for p in plan.packs for m in p.measurements())
    view = RunView(console=console, cells=cells)

    def on_event(event: Mapping[str, Any]) -> None:
        view.on_event(event)
        # A run is opened when its pack begins: a large study has more packs than W&B likes to have open.
        pack = waiting.pop(event["pack"], None) if event["event"] == "started" else None
        if pack is not None:
            config = run_config(pack)
            tracker.start_pack(pack.id, sweep=pack.sweep, name=run_name(pack.id, config), config=config)
        if event["event"] == "measured":
            tracker.log(event["row"])
        elif event["event"] == "pack_done":
            tracker.finish_pack(event["pack"])

    executor = LocalExecutor(
        store=store,
        claims=Claims(out=store.out),
        claim=claim,
        workers=workers,
        settings=settings,
        logs=logs,
        on_event=on_event,
    )
    try:
        with view:
            executor.run(plan.packs)
    finally:
        warning = tracker.close()
        if warning:
            console.print(f"[yellow]{escape(warning)}[/]")


def _close(store: Store, claim: Claim, plan: Plan, console: Console) -> None:
    """Compact what interrupted packs left as parts, and give back what was claimed."""
    try:
        for pack in plan.packs:
            store.compact(pack.id)
        Claims(out=store.out).release(claim)
    except OSError as error:
        console.print(f"[yellow]{escape(f'{store.out} can not be tidied up: {error}')}[/]")


def _ending(store: Store, manifest: Manifest, console: Console, *, figures: bool) -> int:
    """Table, figures, findings, where everything lies; which cells failed."""
    failed = show_results(store, manifest, console, figures=figures)
    return EXIT_FAILED if failed else 0


def _batch_tokens(value: object, device: str) -> int:
    if value == "auto":
        return BATCH_TOKENS[device]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"executor.batch_tokens={value!r} is not valid: auto, or a whole number of at least 1")
    return value


def _counts(plan: Plan) -> str:
    known = [f"{n} {state}" for state, n in plan.counts.items() if n and state != "to do"]
    return ("Of the rest: " if plan.todo else "") + ", ".join(known) + "." if known else ""


def _plain(value: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
