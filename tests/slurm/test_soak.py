"""A study whose workers, jobs, batch scripts and launches are killed at random; tests.slurm.soak is the long one."""

from __future__ import annotations

import random

from tests.slurm.faults import TINY, side_by_side
from tests.slurm.soak import PLAIN, Soak, study_of
from tests.slurm.studies import Study


@side_by_side
def test_a_study_while_all_that_it_has_is_killed(study: Study) -> str:
    """The audit finds no fault: each of its measurements is there once, and none is missing or changed."""
    quant, cells = study_of(144)
    args = (*TINY, quant, *PLAIN, "executor.cells_per_job=48")
    soak = Soak(study=study, args=args, cells=cells, choose=random.Random(0), pause=(2.0, 4.0))
    # By kinds, not by seconds: where the machine is busy, the first job takes half a minute to begin.
    soak.strike_for(300, kinds=5)
    assert len(soak.struck) >= 3, soak.struck
    return soak.finish()
