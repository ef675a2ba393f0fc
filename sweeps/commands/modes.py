"""The modes beside ``run``: plan, status, table, logs, cancel, fetch, drop, sync. Each returns the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kbit.sources import HubData, documents_of
from sweeps.errors import UserError
from sweeps.executors.local import check_executor, run
from sweeps.executors.slurm.config import SlurmConfig, counted
from sweeps.executors.slurm.executor import hours, plan_rows, slurm_device
from sweeps.executors.slurm.show.manage import cancel_mode, failed_logs, reconciled_flight, show_jobs, why_never_run
from sweeps.launches.claimer import out_dir, plain, plan_study, tracking_config
from sweeps.launches.in_flight import has_scheduler, read_flight, reconcile
from sweeps.plan.packs import ROW_BYTES, Packing, parse_retry
from sweeps.results.table import load_results
from sweeps.status import FAILURES, State
from sweeps.store.parts import Store
from sweeps.study.cell import axis_names
from sweeps.study.evals import as_list
from sweeps.study.grid import check_axes, excluded_counts, matches
from sweeps.study.manifest import load_manifests
from sweeps.study.resolve import build_study
from sweeps.tracking.tracker import TrackedPack, sync
from sweeps.worker.devices import plan_workers, resolve_device
from sweeps.worker.execution import run_config, run_name

if TYPE_CHECKING:
    import pandas as pd

MOST_UNRESOLVED_SHOWN: Final = 5


def plan_mode(cfg: DictConfig, console: Console) -> int:
    """Say what a run would do, without doing it and without torch."""
    device = _device(cfg)
    store = Store(out=out_dir(cfg))
    with console.status("resolving models and data") as status:
        study = build_study(cfg, device=device, strict=False, progress=status.update)
    manifest = study.manifest
    retry = parse_retry(plain(cfg.retry))
    flight = read_flight(store.out)
    gpu = plan_study(store, manifest, retry, Packing(workers=1), "cuda", flight)
    if cfg.executor.name == "slurm":
        plan, where = plan_rows(cfg, store, manifest, retry, device, flight)
    else:
        largest = max(c.model.params or 0 for c in manifest.cells)
        workers = plan_workers(device, cfg.executor.workers, largest)
        plan = plan_study(store, manifest, retry, Packing(workers=workers.count), device, flight)
        wall = f"{hours(plan.seconds / workers.count)} predicted with {workers.count} {device} worker(s) here"
        where = [
            ("packs", f"{len(plan.packs):,}, longest {hours(plan.packs[0].seconds) if plan.packs else '0 s'}"),
            ("wall time", wall),
        ]
    models = {c.model for c in manifest.cells}
    hub_bytes = sum(2 * (m.params or 0) for m in models if m.hub_id)
    rows = [
        ("models", f"{len(models)}"),
        ("cells", f"{len(manifest.cells):,}"),
        (
            "measurements",
            f"{len(manifest.cells) * len(manifest.evals):,} ({', '.join(e.name for e in manifest.evals)})",
        ),
        *((state, f"{n:,}") for state, n in plan.counts.items()),
        ("excluded", f"{len(manifest.excluded):,}"),
        *((f"  {n:,}", reason) for reason, n in excluded_counts(manifest.excluded).items()),
        ("merged", f"{study.duplicates:,} named more than once"),
        *where,
        ("GPU-hours", f"{gpu.seconds / 3600:,.1f} predicted on an H100-class GPU, in {len(gpu.packs):,} packs"),
        ("disk", f"{_bytes(plan.todo * ROW_BYTES)} of results, {_bytes(hub_bytes)} of models from the hub"),
    ]
    table = Table(title=f"plan of {manifest.sweep}", show_header=False, box=None, title_justify="left")
    table.add_column(style="bold", justify="right")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)
    if study.unresolved:
        shown = ", ".join(study.unresolved[:MOST_UNRESOLVED_SHOWN])
        more = len(study.unresolved) - MOST_UNRESOLVED_SHOWN
        console.print(
            f"[yellow]The commit of {len(study.unresolved)} hub name(s) is unknown here[/] ({shown}"
            f"{f' and {more} more' if more > 0 else ''}): what is done of them can't be told. "
            "mode=fetch, where there is a network, resolves and downloads them.",
            highlight=False,
        )
    return 0


def status_mode(cfg: DictConfig, console: Console) -> int:
    """Count cells by state, and by the axes of ``by``; say how their jobs do."""
    by = [str(b) for b in as_list(plain(cfg.by), "by")]
    check_axes(by, "by")
    flight = reconciled_flight(out_dir(cfg), console)
    results = _results(cfg)
    states = [s for s in reversed(State) if (results["status"] == s).any()]
    console.print(f"Cells in {out_dir(cfg)}:", highlight=False, soft_wrap=True)
    table = Table()
    groups = by or ["sweep"]
    for name in groups:
        table.add_column(name)
    for state in [*states, "all"]:
        table.add_column(state, justify="right")
    for values, group in results.groupby(groups, dropna=False, sort=True):
        counts = group["status"].value_counts()
        numbers = [str(counts.get(s, 0) or "") for s in states]
        table.add_row(*("-" if _is_na(v) else str(v) for v in values), *numbers, str(len(group)))
    console.print(table)
    for claim in flight.local:
        console.print(f"{claim.sweep} is running: launch {claim.launch}, process {claim.pid} on {claim.host}")
    show_jobs(flight, console)
    cancelled = {m for m, how in flight.ended.items() if how == State.CANCELLED}
    blocked = why_never_run(out_dir(cfg), flight.queued | cancelled)
    if blocked:
        results = _say_blocked(blocked, results, _results(cfg, long=True), console)
    _explain_states(results, console)
    return 0


def _say_blocked(
    blocked: Mapping[str, set[str]], results: pd.DataFrame, long: pd.DataFrame, console: Console
) -> pd.DataFrame:
    """Say which cells wait for what failed; returns the other cells."""
    waiting = long[long["status"].isin([State.CANCELLED, State.QUEUED])]
    for why, measurements in blocked.items():
        keys = set(waiting.loc[waiting["measurement"].isin(measurements), "key"])
        if keys:
            console.print(
                f"[red]{counted(len(keys), 'cell')} can't run:[/] {escape(why)}", highlight=False, soft_wrap=True
            )
            console.print("  mode=logs says more. Mend it, and run the same command again.", highlight=False)
        results = results[~results["key"].isin(keys)]
    return results


def _explain_states(results: pd.DataFrame, console: Console) -> None:
    """For what did not finish: why, and what to do."""
    failed = results[results["status"] == State.FAILED]
    for error, count in failed["error_type"].value_counts().items():
        console.print(f"[red]{count} failed[/] with {error!s}: {State.FAILED.advice}", highlight=False)
    for state in FAILURES:
        count = int((results["status"] == state).sum())
        if count and state is not State.FAILED:
            console.print(f"[yellow]{count} {state}:[/] {escape(state.advice)}", highlight=False)


def table_mode(cfg: DictConfig, console: Console) -> int:
    """Write the results as CSV, parquet or Markdown."""
    from analysis.metrics import direction_warnings
    from analysis.mixtures import mixture_warnings
    from analysis.tables import write_table

    results = _results(cfg, long=bool(cfg.long))
    target = Path(cfg.to).expanduser() if cfg.to else out_dir(cfg) / "table.csv"
    try:
        path = write_table(results, target)
    except OSError as error:
        raise UserError(f"to={str(target)!r} can't be written: {error.strerror or error}") from error
    console.print(f"{len(results):,} rows, {len(results.columns)} columns: {path}", highlight=False, soft_wrap=True)
    unranked = [] if cfg.long else direction_warnings(results)
    for warning in [*mixture_warnings(load_results(out_dir(cfg), long=True)), *unranked]:
        console.print(f"[yellow]{escape(warning)}[/]")
    return 0


def logs_mode(cfg: DictConfig, console: Console) -> int:
    """Print why cells failed, and the ends of the logs of jobs that died."""
    reconciled_flight(out_dir(cfg), console)
    long = _results(cfg, long=True)
    failed = long[long["status"].isin([State.FAILED, State.OOM]) & long["error"].notna()]
    for row in failed.to_dict("records"):
        console.rule(f"{row['key'][:10]}  {row['model']} {row['label']}  {row['eval']}")
        console.print(row["error"], markup=False, highlight=False, soft_wrap=True)
        logs = out_dir(cfg) / "logs" / str(row["launch"]).split(" ")[0]
        of_job = sorted(logs.glob(f"*/{str(row['job']).partition('/')[2]}_*log*"))
        where = (
            f"host {row['host']}, job {row['job']}, {row['finished']}; logs: {', '.join(map(str, of_job or [logs]))}"
        )
        console.print(where, markup=False, highlight=False, soft_wrap=True)
    unrecorded = long[long["row_id"].isna() & (long["status"] != State.MISSING)]
    shown = failed_logs(out_dir(cfg), set(unrecorded["measurement"]), console)
    if not len(failed) and not shown:
        states = ", ".join(f"{n} {s}" for s, n in long["status"].value_counts().items())
        console.print(f"No failed measurement among those chosen ({states}).")
    return 0


def drop_mode(cfg: DictConfig, console: Console) -> int:
    """Retire the chosen rows, so that their measurements run again; the rows stay on disk."""
    if cfg.cell is None and not cfg.where:
        raise UserError("mode=drop needs cell=KEY_PREFIX or 'where={axis: value}': what to retire")
    long = _results(cfg, long=True)
    rows = long[long["row_id"].notna()]
    if not len(rows):
        raise UserError(f"mode=drop: nothing stored matches cell={cfg.cell} where={plain(cfg.where)}")
    store = Store(out=out_dir(cfg))
    # Older rows of the same measurements go too: else an earlier failure would come back in place of a new run.
    store.drop(store.row_ids(set(rows["measurement"])), why=f"cell={cfg.cell} where={plain(cfg.where)}")
    console.print(
        f"Retired {len(rows)} measurement(s) of {rows['key'].nunique()} cell(s). They stay on disk "
        f"(dropped/ names them) and run again with the next launch."
    )
    return 0


def sync_mode(cfg: DictConfig, console: Console) -> int:
    """Make W&B whole from the store."""
    config = tracking_config(cfg)
    store = Store(out=out_dir(cfg))
    if has_scheduler():
        # What ended since somebody last looked is not running any more.
        reconcile(store.out)
    # A pack that is running mirrors itself: adding its rows here too would show them twice.
    running = read_flight(store.out).held
    by_pack: dict[str, list[Mapping[str, Any]]] = {}
    rows = store.read().to_pylist()
    busy = {row["pack"] for row in rows if row["measurement"] in running}
    for row in rows:
        if row["pack"] in busy:
            continue
        by_pack.setdefault(row["pack"], []).append(
            {**row, "metrics": dict(row["metrics"] or ()), "stderr": dict(row["stderr"] or ())}
        )
    if not by_pack:
        raise UserError(f"out={str(store.out)!r} holds no finished pack to mirror")
    packs = []
    for pack_id, rows in by_pack.items():
        about = run_config(rows[0])
        name = run_name(pack_id, about)
        packs.append(TrackedPack(id=pack_id, sweep=rows[0]["sweep"], name=name, config=about, rows=rows))
    with console.status("mirroring") as status:
        report = sync(packs, config, progress=lambda done, of: status.update(f"mirroring pack {done} of {of}"))
    console.print(str(report), highlight=False)
    if busy:
        console.print(f"{len(busy)} packs are running and mirror themselves; sync again when they are done.")
    return 1 if report.error else 0


def fetch_mode(cfg: DictConfig, console: Console) -> int:
    """Download the study's models and data, so that runs need no network."""
    from sweeps.study import hub

    device = _device(cfg)
    with console.status("resolving models and data") as status:
        study = build_study(cfg, device=device, strict=True, progress=status.update)
        models = {(c.model.hub_id, c.model.commit) for c in study.manifest.cells if c.model.hub_id}
        read = [documents_of(e.source) for e in study.manifest.evals]
        datasets = [documents for documents in read if isinstance(documents, HubData)]
        status.update("downloading")
        hub.fetch(
            sorted((str(m), str(c)) for m, c in models),
            datasets,
            report=lambda line: console.print(line, markup=False, highlight=False),
        )
    console.print(f"{len(models)} model(s) and {len(datasets)} data set(s) of {study.manifest.sweep} are in the cache.")
    return 0


MODES: Final[Mapping[str, Callable[[DictConfig, Console], int]]] = {
    "run": run,
    "plan": plan_mode,
    "status": status_mode,
    "table": table_mode,
    "logs": logs_mode,
    "cancel": lambda cfg, console: cancel_mode(out_dir(cfg), _asked_sweep(cfg), console),
    "fetch": fetch_mode,
    "drop": drop_mode,
    "sync": sync_mode,
}


def _results(cfg: DictConfig, *, long: bool = False) -> pd.DataFrame:
    """The results that ``cell=`` and ``where=`` choose."""
    where = plain(cfg.where) or {}
    if not isinstance(where, Mapping):
        raise UserError(f"where={where!r} is not valid: axis values, e.g. 'where={{bits: 3, dtype: int}}'")
    check_axes(where, "where")
    prefixes = _cell_prefixes()
    results = load_results(out_dir(cfg), long=long, sweep=_asked_sweep(cfg))
    if prefixes:
        results = results[results["key"].str.startswith(prefixes)]
    if where:
        names = list(axis_names())
        axes = results[names].astype(object).where(results[names].notna(), None)
        results = results[[matches(dict(zip(names, row, strict=True)), where) for row in axes.itertuples(index=False)]]
    if not len(results):
        known = ", ".join(sorted({m.sweep for m in load_manifests(out_dir(cfg))}))
        raise UserError(f"no cell matches cell={list(prefixes)} where={where} (studies there: {known})")
    return results


def _cell_prefixes() -> tuple[str, ...]:
    """What ``cell=`` says, as it was written: Hydra takes a key such as 0123 or 1e5 for a number."""
    from hydra.core.hydra_config import HydraConfig

    written = [o.partition("=")[2] for o in HydraConfig.get().overrides.task if o.startswith("cell=")]
    names = [name.strip(" '\"") for text in written for name in text.strip("[] ").split(",")]
    return tuple(name for name in names if name not in ("", "null"))


def _asked_sweep(cfg: DictConfig) -> str | None:
    """The study that the command line names; None, all of them, where it names none (the default is the demo)."""
    from hydra.core.hydra_config import HydraConfig

    named = any(o.startswith(("sweep=", "sweep.name=")) for o in HydraConfig.get().overrides.task)
    return str(cfg.sweep.name) if named else None


def _device(cfg: DictConfig) -> str:
    check_executor(plain(cfg.executor))
    if cfg.executor.name == "slurm":
        return slurm_device(cfg.executor.device, SlurmConfig.from_config(plain(cfg.executor)))
    return resolve_device(cfg.executor.device)


def _is_na(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
