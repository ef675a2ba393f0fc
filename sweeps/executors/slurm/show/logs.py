"""Endings of jobs on SLURM, the ends of their logs, and what keeps jobs from ever running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from sweeps.files import list_files
from sweeps.launches.claims import Claim, Claims
from sweeps.launches.in_flight import load_launch
from sweeps.launches.job_log import BUDGET, JobLog, JobRecord
from sweeps.launches.launch import Attempt, Chunk, Launch

LINES_SHOWN: Final = 30
MOST_LOGS_SHOWN: Final = 10
_SLURMS_WORDS: Final = ("srun: ", "slurmstepd: ")


def why_never_run(out: Path, measurements: Collection[str]) -> dict[str, set[str]]:
    """Return which measurements can't run, by why: the job that theirs wait for failed, or their data changed."""
    found: dict[str, set[str]] = {}
    wanted = set(measurements)
    for claim, launch, job_log in _launches(out):
        mine = {pack: wanted.intersection(keys) for pack, keys in claim.packs.items() if not wanted.isdisjoint(keys)}
        for pack, tried in launch.attempts(mine).items():
            if (tried[-1].end or {}).get("reason") == "data":
                found.setdefault(str((tried[-1].end or {})["error"]), set()).update(mine[pack])
        for chunk in launch.chunks:
            block = _block(launch, job_log, chunk)
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
    """Print how the jobs that held some measurements ended, and the ends of their logs; return how many."""
    shown = 0
    wanted = set(measurements)
    for claim, launch, job_log in _launches(out):
        packs = [p for p, keys in claim.packs.items() if wanted & set(keys)]
        wanted -= claim.measurements
        attempts = launch.attempts(packs) if packs else {}
        unstarted = {p for p in packs if p not in attempts and not _logs(launch, job_log, p)}
        for chunk in launch.chunks:
            shown += _show_unstarted(launch, job_log, chunk, unstarted, console)
        for pack in packs:
            entry = job_log.entries.get(pack)
            if pack in unstarted or entry is None or entry.ended in (None, BUDGET):
                continue
            shown += 1
            if shown <= MOST_LOGS_SHOWN:
                _show_job(entry, attempts.get(pack, []), _logs(launch, job_log, pack), console)
    if shown > MOST_LOGS_SHOWN:
        console.print(f"… and {shown - MOST_LOGS_SHOWN} more jobs: cell= or where= chooses")
    return shown


def _launches(out: Path) -> Iterator[tuple[Claim, Launch, JobLog]]:
    """Yield every launch on SLURM whose claim stands, the latest first."""
    for claim in reversed(Claims(out=out).open()):
        if claim.executor == "slurm":
            launch = load_launch(out, claim)
            if launch is not None:
                yield claim, launch, JobLog.load(launch)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The reason why an array can't run: what the job that it waits for said, and that job's logs."""

    text: str
    logs: Sequence[Path]


def _block(launch: Launch, job_log: JobLog, chunk: Chunk) -> _Block | None:
    """Return what keeps an array from running for ever; None when nothing is known to."""
    problems = launch.preflight_problems(chunk.shape)
    logs = list_files(launch.logs(chunk.number).parent / f"preflight-{chunk.shape}", "*_log.out")
    if problems:
        return _Block(text="preflight: " + "; ".join(problems), logs=logs)
    ended = all((entry := job_log.entries.get(p)) and entry.ended == "cancelled" for p in chunk.packs)
    if problems is None and logs and ended and not launch.cancelled_packs().issuperset(chunk.packs):
        return _Block(text=f"the preflight died before it could say why; {_last(logs[-1])}", logs=logs)
    if chunk.after is None:
        return None
    for gate in launch.chunks[chunk.after].packs:
        attempts = launch.attempts([gate]).get(gate, [])
        end = attempts[-1].end if attempts else None
        if end is not None and end["reason"] in ("gate", "walltime", "error", BUDGET) and not end.get("requeued"):
            why = end.get("error") or f"its baseline did not finish ({end['reason']})"
            text = f"{launch.pack(gate).model.label} is held back: {why}"
            return _Block(text=text, logs=_logs(launch, job_log, gate))
    return None


def _show_unstarted(launch: Launch, job_log: JobLog, chunk: Chunk, unstarted: Collection[str], console: Console) -> int:
    """Say once for an array why jobs of it never began; return how many jobs it spoke of."""
    packs = [p for p in chunk.packs if p in unstarted]
    if not packs:
        return 0
    block = _block(launch, job_log, chunk)
    ends = Counter(entry.ended for p in packs if (entry := job_log.entries.get(p)) and entry.ended)
    if block is None and not ends:
        return 0
    words = ", ".join(f"{n} {end}" for end, n in ends.items()) or f"{len(packs)} queued"
    console.rule(f"jobs of launch {launch.id} that never began: {words}")
    if block is not None:
        _print(block.text, console)
        for log in block.logs:
            _show_log(log, console)
    return len(packs)


def _show_job(entry: JobRecord, attempts: Sequence[Attempt], logs: Sequence[Path], console: Console) -> None:
    assert entry.ended is not None
    console.rule(f"job {entry.job}: " + ", ".join(dict.fromkeys([entry.state.lower(), entry.ended])))
    last = attempts[-1] if attempts else None
    if last is not None and last.end is not None:
        error = f": {last.end['error']}" if last.end.get("error") else ""
        _print(f"its own last word: {last.end['reason']}{error}", console)
    for log in logs:
        _show_log(log, console)


def _logs(launch: Launch, job_log: JobLog, pack: str) -> list[Path]:
    """Return the logs of a pack's job: its own and its worker's."""
    entry = job_log.entries.get(pack)
    if entry is None or not entry.job:
        return []
    return list_files(launch.logs(launch.chunk_of(pack).number), f"{entry.job}_*log*")


def _show_log(log: Path, console: Console) -> None:
    _print(f"{log}:", console)
    _print("\n".join(log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]), console)


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # What SLURM says of the end ('srun: error: … Exited with exit code 1') hides the line that says why.
    lines = [line for line in lines if not line.startswith(_SLURMS_WORDS)] or lines
    return f"{log} ends with: {lines[-1].strip()}" if lines else f"{log} is empty: is executor.setup right?"


def _print(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
