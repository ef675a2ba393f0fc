"""Studies on SLURM as a user runs them, on the real test cluster: the same table, and what was planned is what runs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from sweeps import load_results
from sweeps.config import DEMO_DIR
from tests.conftest import ROOT
from tests.slurm.studies import SMALL, Studies, Study

LARGER = (
    "sweep.sizes=[neox-xs,neox-s]",
    "eval.tokens=512",
    "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6, 7, 8], dtype: [int, float, dynamic, quantile], "
    "exponent_bits: heuristic, blocksize: 64}, {bits: [3, 4], dtype: [int, quantile], blocksize: [16, 256]}]",
    "executor.cells_per_job=17",
    "executor.max_parallel=2",
    "report=true",
)
LARGER_CELLS = 66
ONE_CELL = ("sweep.quant=[{bits: 4, dtype: int}]", "executor.preflight=false")
HELD = "executor.extra={hold: true}"
PROVENANCE = {
    *("row_id", "job", "host", "launch", "pack", "started", "finished", "gpus", "batch_tokens"),
    *("seconds", "quantize_seconds", "load_seconds", "peak_memory_bytes"),
}
"""Columns that may differ between two runs of one study; all others are its result."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A study of 66 cells that ran to its end.

    Attributes:
        local: the same study on this machine's own workers.
        said, status: what the launch said, and mode=status while jobs ran.
        most_running: most jobs that ran at once.
    """

    study: Study
    local: Study
    said: str
    status: str
    most_running: int


@pytest.fixture(scope="module")
def finished(studies: Studies) -> Finished:
    study, local = studies("finished"), studies("local")
    launched = study.run(*LARGER)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    mine = [a for a in (*SMALL, *LARGER) if not a.startswith("executor")]
    command = [sys.executable, str(ROOT / "launch.py"), f"out={local.out}", *mine]
    beside = subprocess.Popen(command, cwd=local.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    study.wait(lambda: "RUNNING" in study.jobs().values())
    status = study.run("mode=status", "by=[model,bits]").stdout
    most = 0
    while jobs := list(study.jobs().values()):
        most = max(most, jobs.count("RUNNING") + jobs.count("COMPLETING"))
        time.sleep(0.3)
    said, _ = beside.communicate(timeout=300)
    assert beside.returncode == 0, said
    return Finished(study=study, local=local, said=launched.stdout, status=status, most_running=most)


def test_the_launch_says_what_was_submitted_and_returns(finished: Finished) -> None:
    (launch,) = finished.study.launches()
    assert "4 jobs submitted for 66 cells, 66 measurements" in finished.said
    assert "1 GPU, 1 core, 1.5 GB" in finished.said
    assert f"kbit-{launch.id}-*" in finished.said
    assert "predicted" in finished.said
    assert "preflight" in finished.said


def test_the_table_is_the_local_executors_to_the_digit(finished: Finished) -> None:
    for long in (False, True):
        here, there = (table_of(s, long=long) for s in (finished.local, finished.study))
        assert len(there) == LARGER_CELLS
        assert set(there["status"]) == {"done"}, finished.study.report()
        for column in here.columns:
            assert there[column].map(repr).tolist() == here[column].map(repr).tolist(), column


def test_the_job_that_stores_the_last_measurement_writes_the_report_and_no_other_does(finished: Finished) -> None:
    out = finished.study.out
    page = (out / "reports" / "demo.html").read_text()
    assert f"{LARGER_CELLS} of {LARGER_CELLS} cells measured" in page
    assert {p.name for p in (out / "figures" / "demo").glob("*.png")} >= {"bit_scaling.png", "data_types_4bit.png"}
    assert len(list((out / "reports" / "claims").iterdir())) == 1
    (launch,) = finished.study.launches()
    said = [p for p in (out / "logs" / launch.id / "000").glob("*.out") if "report: " in p.read_text()]
    assert len(said) == 1, finished.study.report()


def table_of(study: Study, *, long: bool) -> pd.DataFrame:
    """A study's results, in an order and with columns that don't depend on who ran them."""
    results = load_results(study.out, long=long)
    kept = [c for c in results.columns if c not in PROVENANCE]
    return results[kept].sort_values("key", ignore_index=True)


def test_rows_say_where_they_come_from(finished: Finished) -> None:
    long = load_results(finished.study.out, long=True)
    (launch,) = finished.study.launches()
    assert long["row_id"].notna().all()
    assert finished.study.computed_twice() == 0
    assert long["job"].str.fullmatch(r"slurm/\d+_\d+").all()
    assert long["job"].nunique() == 4
    assert set(long["host"]) <= {"n1", "n2", "n3", "n4"}
    assert set(long["launch"].str.split().str[0]) == {launch.id}
    assert set(long["oom_rung"]) == {0}
    # SLURM's GPUs are fake: the models were on the CPU.
    assert set(long["gpus"]) == {0}
    assert long["versions"].str.contains("torch").all()


def test_a_job_leaves_two_logs_and_arrays_their_own_directory(finished: Finished) -> None:
    (launch,) = finished.study.launches()
    root = finished.study.out / "logs" / launch.id
    assert {p.name for p in root.iterdir()} == {"000", "preflight-0"}
    logs = [p for p in (root / "000").iterdir() if p.suffix not in (".pkl", ".sh")]
    jobs = {m.group(1) for p in logs if (m := re.match(r"(\d+_\d+)_", p.name))}
    assert len(jobs) == 4
    assert {re.sub(r"^\d+_\d+_", "", p.name) for p in logs} == {"0_log.out", "worker.log"}
    assert len(logs) == 8
    made = {p.name for p in finished.study.out.iterdir()}
    of_results = {"packs", "parts", "table.csv", "figures", "reports", "tables"}
    assert made <= {"claims", "code", "launches", "logs", "manifests", *of_results}
    assert {p.name for p in finished.study.home.iterdir()} == {"results"}


def test_max_parallel_is_kept(finished: Finished) -> None:
    assert 1 <= finished.most_running <= 2


def test_status_counts_cells_and_jobs_while_they_run(finished: Finished) -> None:
    said = finished.status
    rows = [line.split() for line in said.splitlines() if line.startswith("neox-")]
    assert {(r[0], r[1]) for r in rows} == {(m, str(b)) for m in ("neox-xs", "neox-s") for b in (3, 4, 5, 6, 7, 8, 16)}
    assert sum(int(r[-1]) for r in rows) == LARGER_CELLS
    assert "queued" in said
    assert re.search(r"SLURM jobs: .*\d running", said)


def test_a_finished_study_has_nothing_to_submit_and_a_table(finished: Finished) -> None:
    again = finished.study.run(*LARGER)
    assert again.returncode == 0
    assert "nothing to submit. 66 done" in again.stdout
    assert "quantile" in again.stdout
    assert len(finished.study.launches()) == 1
    written = finished.study.run("mode=table", f"to={finished.study.home / 'results' / 'table.csv'}")
    assert written.returncode == 0
    table = pd.read_csv(finished.study.out / "table.csv")
    assert len(table) == LARGER_CELLS
    assert table["jargon_loss"].notna().all()


def test_what_runs_is_what_was_planned(studies: Studies) -> None:
    """Everything that a job could read is broken while it waits; one that asked for the checkout refuses."""
    home = studies("planned").home
    checkout = copy_of_the_checkout(home / "checkout")
    task = own_task(home / "tasks")
    mine = (
        *ONE_CELL,
        HELD,
        f"eval.task_dirs=[{task.parent}]",
        "eval.tasks=[mine]",
        "eval.perplexity=[]",
        "eval.limit=8",
    )
    frozen, live = studies("frozen"), studies("live")
    for study, code in ((frozen, "snapshot"), (live, "checkout")):
        launched = study.run(*mine, f"executor.code={code}", program=checkout)
        assert launched.returncode == 0, launched.stdout + launched.stderr
    with (checkout / "sweeps" / "worker" / "worker.py").open("a") as worker:
        worker.write("\n\nWorker.run_pack = None\n")
    (checkout / "conf" / "config.yaml").write_text("edited: true\n")
    task.write_text("task: mine\ndataset_path: /not/there\n")
    frozen.release()
    live.release()
    frozen.wait_idle()
    live.wait_idle()
    (row,) = load_results(frozen.out).to_dict("records")
    assert row["status"] == "done", frozen.report()
    assert 0 <= row["mine_acc"] <= 1
    assert math.isfinite(row["mine_acc"])
    said = live.run("mode=logs").stdout
    assert re.search(r"the code in \S*checkout has changed since the study was launched", said), said
    assert load_results(live.out)["status"].tolist() == ["lost"]


def copy_of_the_checkout(target: Path) -> Path:
    """What a user has, without the demo's models, which are linked to."""
    for name in ("launch.py", "conf", "kbit", "sweeps", "analysis"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
        else:
            target.mkdir(parents=True)
            shutil.copy(source, target / name)
    (target / "conf" / "model" / "demo.yaml").write_text((ROOT / "conf" / "model" / "demo.yaml").read_text())
    (target / "conf" / "eval" / "demo.yaml").write_text((ROOT / "conf" / "eval" / "demo.yaml").read_text())
    (target / "conf" / "sweep" / "demo.yaml").write_text((ROOT / "conf" / "sweep" / "demo.yaml").read_text())
    (target / "sweeps" / "demo").symlink_to(DEMO_DIR)
    return target


def own_task(directory: Path) -> Path:
    """The demo's multiple-choice task as one of the user's own."""
    directory.mkdir()
    text = (DEMO_DIR / "tasks" / "jargon_choice.yaml").read_text().replace("task: jargon_choice", "task: mine")
    file = directory / "mine.yaml"
    file.write_text(text.replace("text/jargon_choice.jsonl", str(DEMO_DIR / "text" / "jargon_choice.jsonl")))
    return file


def test_a_plan_says_jobs_and_shapes_and_loads_no_torch(study: Study) -> None:
    code = (
        "import sys, launch\n"
        "try:\n    launch.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'submitit'} & set(sys.modules)\n"
    )
    arguments = [f"out={study.out}", *SMALL, *LARGER, "mode=plan", "models.demo.members.neox-s.gpus=2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "jobs 4 of 10 min, each with cells of one model" in rows
    assert "2 with 1 GPU, 1 core, 1.5 GB" in rows
    assert "2 with 2 GPUs, 1 core, 1.5 GB" in rows
    assert not study.out.exists()
