"""A budget on a real SLURM: jobs that it pays for are submitted, they stop at their share, a larger budget goes on."""

from __future__ import annotations

import pytest

from sweeps import load_results
from sweeps.launches.spending import read_spending
from sweeps.store.parts import Store
from tests.slurm.studies import CELLS, Studies

NO_PREFLIGHT = "executor.preflight=false"
BUDGET = 100.0 / 3600
"""Three jobs of a study's four, each predicted to hold its GPU for half a minute before it loads its model."""


def test_jobs_are_submitted_as_far_as_the_budget_goes(studies: Studies) -> None:
    study = studies("budget")
    planned = study.run(NO_PREFLIGHT, f"budget={BUDGET}", "mode=plan")
    assert planned.returncode == 0, planned.stderr
    assert "12 measurements of 13 to do" in planned.stdout
    first = study.run(NO_PREFLIGHT, f"budget={BUDGET}")
    assert first.returncode == 0, first.stderr
    (launch,) = study.launches()
    assert sum(launch.settings.allowances.values()) == pytest.approx(3600 * BUDGET, rel=1e-12)
    assert "3 jobs submitted for 12 cells" in first.stdout
    assert "pays for no more" in first.stdout
    assert "1 measurement left. The same command with a larger budget= goes on." in " ".join(first.stdout.split())
    # What is not in flight stays so, however often it is asked for.
    again = study.run(NO_PREFLIGHT, f"budget={BUDGET}")
    assert again.returncode == 0
    assert len(study.launches()) == 1

    study.wait_idle()
    measured = read_spending(Store(out=study.out), "demo").spent
    assert 0 < measured < 3600 * BUDGET + 30
    done = study.run(NO_PREFLIGHT, "budget=1", "watch=true")
    assert done.returncode == 0, done.stdout + done.stderr
    study.assert_whole()


def test_a_job_that_has_spent_its_share_stops_and_its_cells_are_missing_not_lost(studies: Studies) -> None:
    study = studies("share")
    launch = study.submit(NO_PREFLIGHT, "executor.cells_per_job=100", "executor.extra={hold: true}", "budget=0.02")
    # A start as slow as this study's allowance.
    path = launch.directory / "launch.json"
    path.write_text(path.read_text().replace(str(next(iter(launch.settings.allowances.values()))), "0.5"))
    study.release()
    study.wait_idle()
    status = study.run("mode=status")
    assert status.returncode == 0
    states = set(load_results(study.out)["status"])
    assert states <= {"missing", "done"}
    assert "missing" in states
    assert "lost" not in status.stdout
    rest = study.run(NO_PREFLIGHT, "watch=true")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    study.assert_whole(cells=CELLS)
