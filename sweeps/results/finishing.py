"""The report of a study whose jobs end on their own: whoever stores the last missing measurement claims and writes it.

``python -m sweeps.results.finishing OUT MANIFEST`` writes it, in a process of its own that ends in time.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from sweeps.files import create_exclusively, make_directory
from sweeps.provenance import ROOT
from sweeps.store.parts import Store
from sweeps.study.manifest import Manifest, load_manifest, manifest_path

REPORT_SECONDS: Final = 120.0
"""A job's GPU waits no longer for a report."""


def finish_study(store: Store, manifest: str, *, code: str, seconds: float = REPORT_SECONDS) -> str | None:
    """Write the report of a study if nothing of it is missing and nobody else does; return what came of it.

    Whatever goes wrong, the measurements are stored: it is said, and ``mode=report`` writes the report later.

    Args:
        store: the results.
        manifest: name of what the launch planned.
        code: the installation whose ``analysis`` writes it: a snapshot of the code has none.
        seconds: that there are for it; never more than ``REPORT_SECONDS``.

    Returns:
        a sentence for the log; None where measurements are missing, or another job has claimed the report.
    """
    try:
        path = manifest_path(store.out, manifest)
        if not _claim(store, load_manifest(path)):
            return None
        # Without -P the directory that a job was submitted from would come first.
        command = [sys.executable, "-P", "-m", "sweeps.results.finishing", str(store.out), str(path)]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=min(seconds, REPORT_SECONDS), env=_env(code), check=False
        )
    except subprocess.TimeoutExpired as error:
        return f"warning: no report within {error.timeout:.0f} s; mode=report writes it"
    except Exception as error:
        return f"warning: no report ({type(error).__name__}: {error}); mode=report writes it"
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return f"warning: no report ({why}); mode=report writes it"
    return ended.stdout.strip()


def _claim(store: Store, manifest: Manifest) -> bool:
    """Claim the report of exactly what is stored, if that is all of the study: of all who try, one is told True."""
    wanted = {m.key for m in manifest.measurements()}
    rows = store.read(["measurement", "row_id"], measurements=wanted).to_pylist()
    if {row["measurement"] for row in rows} != wanted:
        return False
    what = hashlib.sha256("\n".join(sorted(row["row_id"] for row in rows)).encode()).hexdigest()[:16]
    claims = store.out / "reports" / "claims"
    make_directory(claims)
    who = f"{socket.gethostname()} {os.getpid()} {os.environ.get('SLURM_JOB_ID', '')}".strip()
    return create_exclusively(claims / f"{manifest.name}-{what}", who.encode())


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
