"""The report of a study whose jobs end on their own: whoever stores the last missing measurement claims and writes it.

``python -m sweeps.results.finishing OUT MANIFEST`` writes it, in a process of its own that ends in time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from sweeps.files import create_exclusively, make_directory
from sweeps.provenance import ROOT
from sweeps.store.parts import Store
from sweeps.store.rows import rows_digest
from sweeps.study.manifest import Manifest, load_manifest, manifest_path

REPORT_SECONDS: Final = 120.0
"""A job's GPU waits no longer for a report."""
LEAST_SECONDS: Final = 30.0
"""A report is not begun with less time."""


def finish_study(store: Store, manifest: str, *, code: str, until: float) -> str | None:
    """Write the report of a study if nothing of it is missing and nobody else does; return what came of it.

    Whatever goes wrong, the measurements are stored: it is said, and ``mode=report`` writes the report later.

    Args:
        store: the results.
        manifest: name of what the launch planned.
        code: the installation whose ``analysis`` writes it: a snapshot of the code has none.
        until: epoch seconds at which it must be done; it never takes longer than ``REPORT_SECONDS``.

    Returns:
        a sentence for the log; None where measurements are missing, or another job has claimed the report.
    """
    try:
        path = manifest_path(store.out, manifest)
        planned = load_manifest(path)
        rows = _rows_if_whole(store, planned)
        if rows is None:
            return None
        left = until - time.time()
        if left < LEAST_SECONDS:
            return f"warning: {left:.0f} s of the walltime are left: too few for a report; mode=report writes it"
        if not _claim(store, planned, rows):
            return None
        store.fold()
        # Without -P the directory that a job was submitted from would come first.
        command = [sys.executable, "-P", "-m", "sweeps.results.finishing", str(store.out), str(path)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=min(left, REPORT_SECONDS), env=_env(code), check=False
        )
    except subprocess.TimeoutExpired as error:
        return f"warning: no report within {error.timeout:.0f} s; mode=report writes it"
    except Exception as error:
        return f"warning: no report ({type(error).__name__}: {error}); mode=report writes it"
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return f"warning: no report ({why}); mode=report writes it"
    return ended.stdout.strip()


def _rows_if_whole(store: Store, manifest: Manifest) -> str | None:
    """Return ``rows_digest`` of what is stored of a study; None where something is missing."""
    wanted = {m.key for m in manifest.measurements()}
    rows = store.read(["measurement", "row_id"], measurements=wanted).to_pylist()
    if {row["measurement"] for row in rows} != wanted:
        return None
    return rows_digest(row["row_id"] for row in rows)


def _claim(store: Store, manifest: Manifest, rows: str) -> bool:
    """Claim the report of exactly these rows: of all who try, one is told True."""
    claims = store.out / "reports" / "claims"
    make_directory(claims)
    who = f"{socket.gethostname()} {os.getpid()} {os.environ.get('SLURM_JOB_ID', '')}".strip()
    return create_exclusively(claims / f"{manifest.name}-{rows}", who.encode())


def _env(code: str) -> dict[str, str]:
    """This process's environment, in which its own code is found first, and what that lacks in ``code``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), code, os.environ.get("PYTHONPATH"))))}


def main(out: str, manifest: str) -> None:
    """Write the report of a study."""
    from analysis.report.places import Places
    from sweeps.results.inputs import read_inputs
    from sweeps.results.report import make_report

    planned = load_manifest(Path(manifest))
    places = Places.of_study(Path(out), planned.sweep)
    _, _, problems = make_report(read_inputs([Path(out)], manifest=planned), places)
    print("\n".join([*(f"warning: {problem}" for problem in problems), f"report: {places.page}"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
