"""Results of an earlier version are read, counted and gone on with as if they were of today: nothing is computed again.

tests/data/earlier_results holds five studies as commit c368867 left them: one finished here; one interrupted, then
killed, with a cell dropped; one with a failed measurement; one finished on SLURM; one on SLURM with a job that died and
a later launch that was cancelled. What that commit read there is in tests/data/earlier_results.csv, one row a
measurement. @ROOT@ and @OUT@ stand for the repository and the results directory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sweeps import load_results, load_samples
from tests.conftest import ROOT, Launch

DATA: Final = Path(__file__).parent.parent / "data"
SETTINGS: Final = ("eval.tokens=1024", "eval.limit=10", "executor.device=cpu")
HERE: Final = ("executor.workers=1",)
ON_SLURM: Final = ("executor=slurm", "executor.gpus=1", "executor.cpus=1", "executor.mem_gb=1.5", "executor.time=10")
LOCAL_DONE: Final = (
    "sweep.name=local_done",
    "sweep.sizes=[neox-xs,neox-s]",
    "sweep.quant=[{bits: 16}, {bits: 4, dtype: [int, float], exponent_bits: heuristic}, "
    "{bits: [3, 4], dtype: float, exponent_bits: 3, outlier_fraction: 0.02}, {bits: 2, dtype: int, blocksize: null}]",
    "sweep.exclude=[{when: {model: neox-s, bits: 16}, reason: its baseline is of another study}, "
    "{when: {model: neox-s, outlier_fraction: 0.02}, reason: too slow}, "
    "{when: {model: neox-s, bits: 2}, reason: too slow}]",
)
LOCAL_PART: Final = (
    "sweep.name=local_part",
    "sweep.sizes=[neox-xs]",
    "sweep.quant=[{bits: 16}, {bits: [3, 5], dtype: [quantile, dynamic], blocksize: 128}, "
    "{bits: 4, dtype: normal, scheme: group, absmax_dtype: nested, center: true}]",
    "sweep.exclude=[{when: {bits: 5, dtype: quantile}, reason: as good as 16 bits}]",
)
LOCAL_WRONG: Final = (
    "sweep.name=local_wrong",
    "sweep.sizes=[neox-xs]",
    "sweep.quant=[{bits: 5, dtype: normal, blocksize: 32, absmax_dtype: float32}]",
    "eval.tasks=[jargon_choice]",
)
SLURM_DONE: Final = (
    "sweep.name=slurm_done",
    "sweep.sizes=[neox-xs]",
    "eval.tasks=[jargon_choice]",
    "sweep.quant=[{bits: 16}, {bits: [4, 6], dtype: [int, float], blocksize: [256, null], subnormals: bnb}]",
    "sweep.exclude=[{when: {blocksize: null, bits: 6}, reason: of no interest}, "
    "{when: {dtype: float, bits: 6}, reason: too much}]",
)
SLURM_PART: Final = (
    "sweep.name=slurm_part",
    "sweep.sizes=[neox-s]",
    "eval.tasks=[jargon_choice]",
    "sweep.quant=[{bits: 16}, {bits: [3, 4, 5], dtype: [int, dynamic], dynamic_interval: paper}]",
    "sweep.exclude=[{when: {bits: 5, dtype: dynamic}, reason: as good as 16 bits}]",
)
CELLS: Final = {
    "local_done": {"done": 6, "diverged": 1},
    "local_part": {"lost": 2, "missing": 2},
    "local_wrong": {"failed": 1},
    "slurm_done": {"done": 5},
    "slurm_part": {"done": 3, "cancelled": 2},
}
"""Cells by study and state; a cell that two studies have counts for the first."""
CELLS_OF_STUDIES: Final = {
    **CELLS,
    "local_part": {"done": 1, "lost": 2, "missing": 2},
    "slurm_done": {"done": 6},
    "slurm_part": {"done": 4, "cancelled": 2},
}
"""What mode=status counts: a cell that two studies have, for both."""


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The earlier results in a place of the test's own, a day old, on a machine without SLURM."""
    out = Path(shutil.copytree(DATA / "earlier_results", tmp_path / "results"))
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.suffix == ".parquet":
            put_into_parquet(path, out)
        else:
            path.write_text(put_into(path.read_text(), out))
    for launched in out.glob("launches/*/launch.json"):
        find_lines(launched, launched.with_name("packs.jsonl"))
    # Whether a launch of another machine is alive is told by when it last wrote.
    yesterday = time.time() - 86400
    for path in out.rglob("*"):
        os.utime(path, (yesterday, yesterday))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return out


def put_into(text: str, out: Path) -> str:
    """JSON, or other text, with the directories in place of what stands for them."""
    for name, directory in (("@ROOT@", ROOT), ("@OUT@", out)):
        text = text.replace(name, json.dumps(str(directory))[1:-1])
    return text


def put_into_parquet(path: Path, out: Path) -> None:
    """The same for every column of text."""
    table = pq.read_table(path)
    for index, field in enumerate(table.schema):
        if field.type == pa.string():
            column = table.column(index)
            for name, directory in (("@ROOT@", ROOT), ("@OUT@", out)):
                column = pc.replace_substring(column, name, str(directory))
            table = table.set_column(index, field, column)
    pq.write_table(table, path, compression="zstd")


def find_lines(launched: Path, packs: Path) -> None:
    """Write down again where each pack's line begins, in bytes."""
    offsets, at = {}, 0
    for line in packs.read_bytes().splitlines(keepends=True):
        offsets[json.loads(line)["id"]] = at
        at += len(line)
    launched.write_text(json.dumps({**json.loads(launched.read_text()), "offsets": offsets}))


def planned() -> pd.DataFrame:
    """What the earlier version read, one row a measurement."""
    return pd.read_csv(DATA / "earlier_results.csv", dtype=str, keep_default_na=False)


def not_done(sweep: str) -> list[str]:
    """Measurements that a study still has to make."""
    rows = planned()
    chosen = rows[(rows["sweep"] == sweep) & ~rows["status"].isin(["done", "diverged"])]
    return sorted(chosen["measurement"])


def rows_on_disk(out: Path) -> dict[str, str]:
    """Measurement by row id, of every row that was ever stored."""
    found: dict[str, str] = {}
    for path in out.glob("pa*/**/*.parquet"):
        table = pq.read_table(path, columns=["row_id", "measurement"])
        found |= zip(table.column("row_id").to_pylist(), table.column("measurement").to_pylist(), strict=True)
    return found


def added(out: Path, before: dict[str, str]) -> list[str]:
    """Measurements of the rows that were stored since, each as often as it was; those of before are still there."""
    after = rows_on_disk(out)
    assert before.items() <= after.items()
    return sorted(after[row] for row in after.keys() - before.keys())


def counts(text: str) -> dict[str, dict[str, int]]:
    """The table of mode=status in a pipe: cells by study and state."""
    _, head, *rows = (line.split() for line in text.splitlines())
    table = [row for row in rows if len(row) == len(head) and row[-1].isdigit()]
    return {row[0]: {s: int(n) for s, n in zip(head[1:], row[1:], strict=True) if n != "0"} for row in table}


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, on one line; it must have ended with 0."""
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_every_measurement_is_read_with_its_state_value_and_keys(earlier: Path) -> None:
    rows = load_results(earlier, long=True)
    main = {"perplexity": "loss", "task": "acc"}
    pairs = zip(rows["metrics"], rows["eval_kind"], strict=True)
    rows["value"] = [repr(float(values[main[kind]])) if values else "" for values, kind in pairs]
    expected = planned()
    read = rows[list(expected.columns)].astype(str).sort_values(list(expected.columns), ignore_index=True)
    pd.testing.assert_frame_equal(read, expected, check_dtype=False)


def test_every_cell_is_read_with_its_state(earlier: Path) -> None:
    cells = load_results(earlier)
    assert len(cells) == sum(sum(states.values()) for states in CELLS.values())
    by_sweep = {sweep: dict(Counter(group["status"])) for sweep, group in cells.groupby("sweep")}
    assert by_sweep == CELLS
    assert set(cells["key"]) == set(planned()["key"])
    # Studies share cells: a baseline with local_part and slurm_done, a cell with slurm_part.
    planned_cells = {sweep: len(load_results(earlier, sweep=sweep)) for sweep in CELLS}
    assert planned_cells == {"local_done": 7, "local_part": 5, "local_wrong": 1, "slurm_done": 6, "slurm_part": 6}


def test_the_outcome_of_every_sample_is_read(earlier: Path) -> None:
    rows = load_results(earlier, long=True)
    stored = rows[rows["status"].isin(["done", "diverged"])]
    samples = load_samples(earlier, stored["measurement"])
    for row in stored.to_dict("records"):
        outcomes = samples[row["measurement"]]
        assert outcomes, row
        assert {len(values) for values in outcomes.values()} == {row["n_samples"]}


def test_status_counts_cells_without_asking_a_scheduler(earlier: Path, here: Launch) -> None:
    done = here("mode=status")
    said = succeeded(done)
    assert counts(done.stdout) == {
        sweep: {**states, "all": sum(states.values())} for sweep, states in CELLS_OF_STUDIES.items()
    }
    assert "is running" not in said
    assert "SLURM jobs" not in said
    assert "1 failed with DataChangedError" in said


def test_logs_show_a_failure_and_jobs_that_never_began(earlier: Path, here: Launch) -> None:
    said = succeeded(here("mode=logs"))
    assert "jargon.jsonl changed since the study was launched" in said
    assert "that never began: 1 cancelled" in said


def test_a_plan_of_what_is_finished_has_nothing_to_do(earlier: Path, here: Launch) -> None:
    said = succeeded(here(*SETTINGS, *HERE, *LOCAL_DONE, "mode=plan"))
    assert " to do 0 done 20 diverged 1 excluded 5 " in said
    said = succeeded(here(*SETTINGS, *ON_SLURM, *SLURM_DONE, "mode=plan"))
    assert " to do 0 done 12 excluded 3 " in said
    assert " jobs 0 of 10 min" in said


def test_a_finished_study_has_nothing_to_do(earlier: Path, here: Launch) -> None:
    before = rows_on_disk(earlier)
    said = succeeded(here(*SETTINGS, *HERE, *LOCAL_DONE))
    assert "local_done: nothing to do. 20 done, 1 diverged." in said
    assert added(earlier, before) == []


def test_a_study_that_slurm_finished_has_nothing_to_do(earlier: Path, here: Launch) -> None:
    before = rows_on_disk(earlier)
    said = succeeded(here(*SETTINGS, *HERE, *SLURM_DONE, "report=false"))
    assert "slurm_done: nothing to do. 12 done." in said
    assert added(earlier, before) == []


def test_a_study_that_was_killed_goes_on_with_what_was_lost_or_dropped(earlier: Path, here: Launch) -> None:
    before = rows_on_disk(earlier)
    said = succeeded(here(*SETTINGS, *HERE, *LOCAL_PART, "report=false"))
    assert "local_part: 4 cells, 10 measurements in " in said
    assert added(earlier, before) == not_done("local_part")
    assert set(load_results(earlier, sweep="local_part")["status"]) == {"done"}


def test_a_study_that_was_cancelled_on_slurm_is_finished_here(earlier: Path, here: Launch) -> None:
    before = rows_on_disk(earlier)
    said = succeeded(here(*SETTINGS, *HERE, *SLURM_PART, "report=false"))
    assert "slurm_part: 2 cells, 3 measurements in 1 packs" in said
    assert added(earlier, before) == not_done("slurm_part")
    assert set(load_results(earlier, sweep="slurm_part")["status"]) == {"done"}


def test_a_failed_measurement_runs_again_when_that_is_asked_for(earlier: Path, here: Launch) -> None:
    before = rows_on_disk(earlier)
    again = here(*SETTINGS, *HERE, *LOCAL_WRONG, "report=false")
    assert again.returncode == 1, again.stdout + again.stderr
    assert "local_wrong: nothing to do." in again.stdout
    assert added(earlier, before) == []
    succeeded(here(*SETTINGS, *HERE, *LOCAL_WRONG, "retry=[failed]", "report=false"))
    assert added(earlier, before) == not_done("local_wrong")
    assert set(load_results(earlier, sweep="local_wrong")["status"]) == {"done"}
