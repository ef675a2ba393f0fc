"""SLURM jobs as a user asks about them: how they do, what their logs end with, and how to end them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Final

from rich.console import Console
from rich.markup import escape

from sweeps.errors import SchedulerError, UserError
from sweeps.executors.slurm.query import cancel, look
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import Flight, job_counts, load_launch, read_flight, reconcile
from sweeps.launches.launch import Attempt, Chunk, Launch
from sweeps.launches.ledger import Entry, Ledger

LINES_SHOWN: Final = 30
MOST_LOGS_SHOWN: Final = 10
SUBMIT_SECONDS: Final = 20.0
"""How long mode=cancel waits for a launch to end its last sbatch."""
_ORDINARY: Final = ("", "None", "Priority", "Resources")
_IN_WORDS: Final = {
    "Dependency": "the preflight, or for their model's baseline",
    "JobArrayTaskLimit": "others of their array (executor.max_parallel)",
}
"""What SLURM's reasons for waiting mean here."""


def reconciled_flight(out: Path, console: Console) -> Flight:
    """Ask the scheduler once, say what it couldn't tell, and bring everything together."""
    with console.status("asking SLURM") as status:
        status.update("asking SLURM about jobs")
        sighting = reconcile(out)
    for problem in sighting.problems if sighting else ():
        console.print(f"[yellow]{escape(problem)}[/]", highlight=False)
    if sighting is not None and sighting.queue is None:
        console.print("[yellow]Jobs are shown as they were when SLURM last answered; none is given up for that.[/]")
    return read_flight(out)


def show_jobs(flight: Flight, console: Console) -> None:
    """Jobs of unsettled launches by state, and what keeps some from ever running."""
    counts = job_counts(flight)
    if counts:
        words = ", ".join(f"{n} {state.lower()}" for state, n in sorted(counts.items()))
        console.print(f"SLURM jobs: {words}", highlight=False)
    reasons = Counter(
        e.reason for _, ledger in flight.launches for e in ledger.entries.values() if e.state == "PENDING"
    )
    for reason, count in reasons.most_common():
        if reason not in _ORDINARY:
            console.print(f"  {count} pending for {_IN_WORDS.get(reason, reason)}", highlight=False)
    if any(e.state == "ABSENT" and not e.ended for _, ledger in flight.launches for e in ledger.entries.values()):
        console.print(
            "  absent: SLURM doesn't know them just now; when it still doesn't half a minute later, they are lost"
        )
    for (user, cluster), count in flight.unseen().items():
        where = f" on {cluster}" if cluster else ""
        console.print(
            f"  {count} jobs of {user}{where} can't be seen from here: none is given up for that",
            markup=False,
            highlight=False,
        )


def why_never_run(out: Path, measurements: Collection[str]) -> dict[str, set[str]]:
    """Which of some queued or cancelled measurements can't run, by what the job that theirs wait for failed of."""
    found: dict[str, set[str]] = {}
    wanted = set(measurements)
    for claim, launch, ledger in _launches(out):
        for chunk in launch.chunks:
            block = _block(launch, ledger, chunk)
            if block is None:
                continue
            attempts = launch.attempts(chunk.packs)
            keys = {k for p in chunk.packs if p not in attempts for k in claim.packs[p]} & wanted
            if keys:
                found.setdefault(block.text, set()).update(keys)
        # What a later launch holds is its own.
        wanted -= claim.measurements
    return found


def failed_logs(out: Path, measurements: Collection[str], console: Console) -> int:
    """Print how the jobs that held some measurements ended, and the ends of their logs; returns how many."""
    shown = 0
    wanted = set(measurements)
    for claim, launch, ledger in _launches(out):
        packs = [p for p, keys in claim.packs.items() if wanted & set(keys)]
        wanted -= claim.measurements
        attempts = launch.attempts(packs) if packs else {}
        unstarted = {p for p in packs if p not in attempts and not _logs(launch, ledger, p)}
        for chunk in launch.chunks:
            shown += _show_unstarted(launch, ledger, chunk, unstarted, console)
        for pack in packs:
            entry = ledger.entries.get(pack)
            if pack in unstarted or entry is None or entry.ended is None:
                continue
            shown += 1
            if shown <= MOST_LOGS_SHOWN:
                _show_job(entry, attempts.get(pack, []), _logs(launch, ledger, pack), console)
    if shown > MOST_LOGS_SHOWN:
        console.print(f"… and {shown - MOST_LOGS_SHOWN} more jobs: cell= or where= chooses")
    return shown


def _launches(out: Path) -> Iterator[tuple[Claim, Launch, Ledger]]:
    """Every launch on SLURM whose claim stands, the latest first."""
    for claim in reversed(Claims(out=out).open()):
        if claim.executor == "slurm":
            launch = load_launch(out, claim)
            if launch is not None:
                yield claim, launch, Ledger.load(launch)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Why an array can't run: what the job that it waits for said, and that job's logs."""

    text: str
    logs: Sequence[Path]


def _block(launch: Launch, ledger: Ledger, chunk: Chunk) -> _Block | None:
    """What keeps an array from running for ever; None when nothing is known to."""
    problems = launch.preflight_problems(chunk.shape)
    logs = sorted((launch.logs(chunk.number).parent / f"preflight-{chunk.shape}").glob("*_log.out"))
    if problems:
        return _Block(text="preflight: " + "; ".join(problems), logs=logs)
    ended = all((entry := ledger.entries.get(p)) and entry.ended == "cancelled" for p in chunk.packs)
    if problems is None and logs and ended and not ledger.cancelled:
        return _Block(text=f"the preflight died before it could say why; {_last(logs[-1])}", logs=logs)
    if chunk.after is None:
        return None
    for gate in launch.chunks[chunk.after].packs:
        attempts = launch.attempts([gate]).get(gate, [])
        end = attempts[-1].end if attempts else None
        if end is not None and end["reason"] in ("gate", "walltime", "error") and not end.get("requeued"):
            why = end.get("error") or f"its baseline did not finish ({end['reason']})"
            text = f"{launch.pack(gate).model.label} is held back: {why}"
            return _Block(text=text, logs=_logs(launch, ledger, gate))
    return None


def _show_unstarted(launch: Launch, ledger: Ledger, chunk: Chunk, unstarted: Collection[str], console: Console) -> int:
    """Say once for an array why jobs of it never began; returns how many jobs it spoke of."""
    packs = [p for p in chunk.packs if p in unstarted]
    if not packs:
        return 0
    block = _block(launch, ledger, chunk)
    ends = Counter(entry.ended for p in packs if (entry := ledger.entries.get(p)) and entry.ended)
    if block is None and not ends:
        return 0
    words = ", ".join(f"{n} {end}" for end, n in ends.items()) or f"{len(packs)} queued"
    console.rule(f"jobs of launch {launch.id} that never began: {words}")
    if block is not None:
        _print(block.text, console)
        for log in block.logs:
            _show_log(log, console)
    return len(packs)


def _show_job(entry: Entry, attempts: Sequence[Attempt], logs: Sequence[Path], console: Console) -> None:
    assert entry.ended is not None
    console.rule(f"job {entry.job}: " + ", ".join(dict.fromkeys([entry.state.lower(), entry.ended])))
    last = attempts[-1] if attempts else None
    if last is not None and last.end is not None:
        error = f": {last.end['error']}" if last.end.get("error") else ""
        _print(f"its own last word: {last.end['reason']}{error}", console)
    for log in logs:
        _show_log(log, console)


def _logs(launch: Launch, ledger: Ledger, pack: str) -> list[Path]:
    """The logs of a pack's job: its own and its worker's."""
    entry = ledger.entries.get(pack)
    if entry is None or not entry.job:
        return []
    return sorted(launch.logs(launch.chunk_of(pack).number).glob(f"{entry.job}_*log*"))


def _show_log(log: Path, console: Console) -> None:
    _print(f"{log}:", console)
    _print("\n".join(log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]), console)


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{log} ends with: {lines[-1].strip()}" if lines else f"{log} is empty: is executor.setup right?"


def _print(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def cancel_mode(out: Path, sweep: str | None, console: Console) -> int:
    """Cancel the SLURM jobs of a study, and no others.

    Raises:
        UserError: several studies have jobs and none was named, or SLURM can't be asked.
    """
    flight = read_flight(out)
    chosen = [la for la, _ in flight.launches if sweep in (None, la.sweep)]
    studies = sorted({la.sweep for la in chosen})
    if len(studies) > 1:
        raise UserError(f"mode=cancel: {', '.join(studies)} have jobs: name one, e.g. sweep={studies[0]}")
    if not chosen:
        named = f" of {sweep}" if sweep else ""
        console.print(f"No jobs{named} in {out} are known to be queued or running.", highlight=False)
        return 0
    stopped = _stop_submitting(out, chosen, console)
    names = [n for la in chosen for n in _job_names(la)]
    sighting = look(names, min(la.launched for la in chosen))
    if sighting.queue is None:
        rest = "No job was cancelled" if stopped else "Nothing was cancelled"
        raise UserError(f"mode=cancel: {'; '.join(sighting.problems)}. {rest}")
    live = [job for job in sighting.queue.values() if not job.terminal]
    if not live:
        reconcile(out)
        console.print(f"No jobs of {studies[0]} are queued or running any more.", highlight=False)
        return 0
    running = sum(1 for job in live if job.state in ("RUNNING", "COMPLETING"))
    console.print(
        f"Cancelling {len(live)} jobs of {studies[0]}: {running} running, {len(live) - running} queued.",
        highlight=False,
    )
    for launch in chosen:
        # A job that is gone from now on was cancelled, not lost.
        _write_cancelled(launch)
    try:
        cancel([job.job for job in live])
    except SchedulerError as error:
        raise UserError(f"mode=cancel: {error}. Some jobs may go on; run it again") from error
    # Reading results asks no scheduler: what waited is known to be cancelled from now on.
    reconcile(out)
    console.print("What they had finished is stored; the same study's command runs the rest.")
    return 0


def _stop_submitting(out: Path, launches: Sequence[Launch], console: Console) -> bool:
    """Tell launches that are still being submitted to stop, and wait for their last sbatch; whether there were any."""
    claims = Claims(out=out)
    alive = {c.launch for c in claims.open() if c.executor == "slurm" and claims.is_alive(c)}
    submitting = [la for la in launches if la.id in alive and la.submitted() is None]
    for launch in submitting:
        _write_cancelled(launch)
        console.print(
            f"Launch {launch.id}: it is still being submitted: what is not submitted yet won't be.", highlight=False
        )
    waited = 0.0
    while any(la.submitted() is None for la in submitting):
        if waited >= SUBMIT_SECONDS:
            console.print("[yellow]It has not stopped yet: mode=cancel once more makes sure.[/]", highlight=False)
            break
        sleep(0.5)
        waited += 0.5
    return bool(submitting)


def _write_cancelled(launch: Launch) -> None:
    try:
        launch.cancel()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"mode=cancel: {launch.directory} can't be written: {why}. No job was cancelled") from error


def _job_names(launch: Launch) -> list[str]:
    preflights = [launch.preflight_name(s) for s in range(len(launch.shapes))]
    return [launch.chunk_name(c.number) for c in launch.chunks] + preflights
