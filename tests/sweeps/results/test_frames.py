"""Wide tables: what a cell lacks is unknown in it, whatever the others have."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.metrics import metric_columns
from sweeps import load_results
from tests.sweeps.studies import TASK, store_study, stored_row, study


@pytest.mark.parametrize("higher", [False, True])
def test_a_direction_is_that_of_the_task_where_some_cells_are_not_measured(tmp_path: Path, higher: bool) -> None:
    manifest = study()
    store = store_study(tmp_path, manifest, wanted=lambda _: False)
    for m in manifest.measurements():
        if m.eval == TASK and m.cell.quant.bits != 3:
            store.write({**stored_row(m), "higher_is_better": {"acc": higher}})
    wide = load_results(tmp_path)
    column = wide.set_index("bits")[f"{TASK.name}_acc_higher_is_better"]
    assert [column[16], column[4]] == [higher] * 2
    assert column[[3]].isna().all()
    (metric,) = [m for m in metric_columns(wide) if m.column == f"{TASK.name}_acc"]
    assert metric.higher_is_better is higher
