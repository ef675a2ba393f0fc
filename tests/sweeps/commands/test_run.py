"""Studies end to end, as a user runs them: the demo's findings, resuming, and everything that can kill a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis.tables import other_cells, others_text
from sweeps import load_results, load_samples
from sweeps.config import DEMO_DIR
from sweeps.results.report import MOST_OTHERS_SHOWN
from sweeps.store.parts import Store
from sweeps.text import counted
from tests.conftest import ROOT, Launch, unreported

SMALL = [
    "sweep.sizes=[neox-xs]",
    "eval.tasks=[]",
    "eval.tokens=1024",
    "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6], dtype: [int, float, quantile]}]",
]
"""13 cells of a tenth of a second each."""


@pytest.fixture
def launch(launch: Launch) -> Launch:
    """The command; a study's report takes longer than its cells, and is written only where it is asked for."""
    return lambda *args, **more: launch(*unreported(args), **more)


def start(out: Path, *args: str) -> subprocess.Popen[str]:
    """The command, as a terminal would start it: in a process group of its own."""
    command = [sys.executable, str(ROOT / "launch.py"), f"out={out}", *unreported(args)]
    return subprocess.Popen(
        command, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while Store(out=out).read(["measurement"]).num_rows < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if b"sweeps.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]


def all_row_ids(out: Path) -> pd.Series[str]:
    """Every row on disk, not only the one that counts for its measurement: what was ever computed."""
    rows = Store(out=out).history(["row_id", "measurement"])
    return pd.DataFrame(rows).set_index("row_id")["measurement"]


def assert_whole(out: Path, cells: int) -> None:
    """Every cell is done, every measurement was computed exactly once."""
    results = load_results(out)
    assert len(results) == cells
    assert set(results["status"]) == {"done"}
    assert all_row_ids(out).is_unique


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The demo on a reduced grid: one model, block 64 at 3 to 8 bits, data types and block sizes at 4."""
    out = tmp_path_factory.mktemp("demo") / "results"
    quant = (
        "sweep.quant=[{bits: 16}, {bits: [3, 4, 5, 6, 7, 8], dtype: int}, "
        "{bits: 4, dtype: [float, dynamic, quantile], exponent_bits: 2}, "
        "{bits: 4, dtype: int, blocksize: [16, 256, 1024]}]"
    )
    process = start(out, "sweep.sizes=[neox-s]", quant, "eval.limit=20", "report=true")
    text, _ = process.communicate(timeout=300)
    return out, subprocess.CompletedProcess(process.args, process.returncode, text)


def loss(results: pd.DataFrame, **axes: object) -> float:
    chosen = results
    for name, value in axes.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return float(chosen["jargon_loss"].iloc[0])


def test_the_demo_shows_the_papers_orderings(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = demo
    assert process.returncode == 0, process.stdout
    results = load_results(out)
    baseline = loss(results, bits=16)
    b64 = {bits: loss(results, bits=bits, dtype="int", blocksize=64) for bits in range(3, 9)}
    assert b64[3] > b64[4] > b64[5]
    for bits in (6, 7, 8):
        assert abs(b64[bits] / baseline - 1) < 0.01
    at4 = {d: loss(results, bits=4, dtype=d, blocksize=64) for d in ("int", "float", "quantile")}
    assert at4["quantile"] < at4["int"]
    assert at4["float"] < at4["int"]
    blocks = [loss(results, bits=4, dtype="int", blocksize=b) for b in (16, 64, 256, 1024)]
    assert blocks == sorted(blocks)
    assert len(set(blocks)) == len(blocks)


def test_the_demo_ends_in_a_table_figures_and_places(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = demo
    for expected in ("16", "int", "quantile", "±", "bit_scaling.png", "tables/demo.csv"):
        assert expected in process.stdout
    others = other_cells(load_results(out), metric="jargon_loss")
    assert 0 < len(others) <= MOST_OTHERS_SHOWN
    assert f"{others_text(others)} They are:" in process.stdout
    by_label = (out / "tables" / "demo.md").read_text()
    assert others_text(others) in by_label
    assert all(label in process.stdout and label in by_label for label in others["label"])
    figures = {p.name: p.read_bytes() for p in out.glob("figures/demo/*.png")}
    drawn = ("bit_scaling", "data_types_4bit", "block_sizes_4bit", "perplexity_and_accuracy")
    assert set(figures) == {f"{name}.png" for name in drawn}
    assert all(data.startswith(b"\x89PNG") for data in figures.values())
    table = pd.read_csv(out / "tables" / "demo.csv")
    assert len(table) == 13


def test_results_have_what_analysis_needs(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo
    wide = load_results(out)
    assert len(wide) == 13
    for column in (
        *("key", "status", "family", "model", "params", "method", "dtype", "bits", "blocksize", "exponent_bits"),
        *("outlier_fraction", "center", "bits_per_param", "bits_per_param_nominal", "total_bits", "total_bits_nominal"),
        *("jargon_loss", "jargon_loss_stderr", "jargon_perplexity", "jargon_bits_per_byte", "jargon_choice_acc"),
        *("jargon_lastword_acc", "jargon_lastword_acc_stderr", "commit", "device", "seconds", "peak_memory_bytes"),
    ):
        assert column in wide, column
    int4 = wide[(wide["bits"] == 4) & (wide["dtype"] == "int") & (wide["blocksize"] == 64)].iloc[0]
    assert int4["bits_per_param_nominal"] == 4.25
    assert int4["bits_per_param"] == pytest.approx(4.25, abs=0.01)
    assert int4["total_bits"] < wide[wide["bits"] == 16].iloc[0]["total_bits"] == 16 * 1_892_800
    assert wide["jargon_perplexity"].tolist() == pytest.approx(wide["jargon_loss"].map(lambda x: 2.718281828**x))


def test_per_sample_outcomes_give_the_metrics_back(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo
    long = load_results(out, long=True)
    samples = load_samples(out, long["measurement"])
    assert len(samples) == len(long) == 39
    for row in long.itertuples():
        outcome = samples[row.measurement]
        if row.eval == "jargon":
            assert outcome["nats"].sum() / outcome["tokens"].sum() == pytest.approx(row.metrics["loss"], rel=1e-5)
        else:
            assert len(outcome["acc"]) == 20
            assert outcome["acc"].mean() == pytest.approx(row.metrics["acc"])


def test_running_again_does_nothing_and_says_so(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = demo
    before = sorted((p, p.stat().st_mtime_ns) for p in out.glob("pa*/**/*.parquet"))
    again = subprocess.run(process.args, cwd=out.parent, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert before == sorted((p, p.stat().st_mtime_ns) for p in out.glob("pa*/**/*.parquet"))


def test_a_study_stops_when_its_budget_is_spent_and_a_larger_one_goes_on(tmp_path: Path, launch: Launch) -> None:
    study = [f"out={tmp_path / 'r'}", *SMALL]
    some = launch(*study, "budget=0.0001", "report=true")
    assert some.returncode == 0, some.stdout + some.stderr
    done = load_results(tmp_path / "r").query("status == 'done'")
    assert 1 <= len(done) < 13
    assert done["bits"].min() <= done["bits"].max() == 16  # the baseline came first
    assert "budget=0.0001 is spent" in some.stdout
    assert f"{13 - len(done)} measurement" in some.stdout
    again = launch(*study, "budget=0.0001")
    assert again.returncode == 0
    assert "budget=0.0001 is spent" in again.stdout
    assert len(all_row_ids(tmp_path / "r")) == len(done)
    plan = launch(*study, "budget=0.5", "mode=plan").stdout
    assert "budget  0.5 worker-hours: " in plan
    assert f"fits  {counted(13 - len(done), 'measurement')} of {13 - len(done)} to do" in plan
    rest = launch(*study, "budget=0.5")
    assert rest.returncode == 0
    assert "is spent" not in rest.stdout
    assert_whole(tmp_path / "r", 13)


def test_launches_that_differ_in_settings_each_show_their_own_numbers(small: Path, launch: Launch) -> None:
    few = [*SMALL[:2], f"out={small}", "sweep.quant=[{bits: 16}, {bits: 4, dtype: [int, quantile]}]"]
    shown = [launch(*few, f"eval.tokens={n}") for n in (1024, 1536, 1024)]
    assert [r.returncode for r in shown] == [0, 0, 0], shown[1].stdout + shown[1].stderr
    first, second, third = (next(line for line in r.stdout.splitlines() if line.startswith("  neox-xs")) for r in shown)
    assert first == third != second
    assert ["nothing to do" in r.stdout for r in shown] == [True, False, True]


def test_ctrl_c_at_any_moment_is_one_line_and_130(tmp_path: Path) -> None:
    for delay in (0.2, 0.6, 1.2):
        process = start(tmp_path / "r", *SMALL)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        assert "Traceback" not in text
        assert process.returncode == 130, text


def test_ctrl_c_that_a_library_takes_for_its_own_error_is_one_line_and_130() -> None:
    code = (
        "import os, signal, launch, sweeps.commands as commands\n"
        "def swallow(cfg, arguments):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.read(os.pipe()[0], 1)\n"
        "    except KeyboardInterrupt:\n"
        "        raise TypeError('unexpected argument')\n"
        "commands.run_mode = swallow\n"
        "launch.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("\ninterrupted: ")


def test_an_added_evaluation_runs_alone(small: Path, launch: Launch) -> None:
    first = set(all_row_ids(small).index)
    arguments = [a for a in SMALL if not a.startswith("eval.tasks")]
    result = launch(f"out={small}", *arguments, "eval.tasks=[jargon_choice]", "eval.limit=5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert first < set(all_row_ids(small).index)
    assert_whole(small, 13)
    assert len(load_results(small, long=True)) == 26


def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    out = tmp_path / "r"
    process = start(out, *SMALL)
    wait_for_parts(out, 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "SIGKILL" in text
    assert_whole(out, 13)


def test_a_study_that_is_killed_again_and_again_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, stored = tmp_path / "r", set[str]()
    many = [*SMALL, SMALL[-1].replace("quantile]", "quantile], blocksize: [32, 64, 128]")]
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = start(out, *many)
        wait_for_parts(out, len(stored) + 3, process)
        workers = workers_of(process)
        os.kill(process.pid, how)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), text
        deadline = time.monotonic() + 30
        while any(is_python(worker) for worker in workers):
            assert time.monotonic() < deadline, f"a worker outlived its launcher, killed by {how.name}"
            time.sleep(0.1)
        before, stored = stored, set(all_row_ids(out).index)
        assert before < stored
        assert len(before) + 3 <= len(stored) < 37
    process = start(out, *many)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert stored < set(all_row_ids(out).index)
    assert_whole(out, 37)


def is_python(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and "(python" in stat.read_text()


def test_two_launches_at_once_never_measure_twice(tmp_path: Path) -> None:
    out = tmp_path / "r"
    both = [start(out, *SMALL) for _ in range(2)]
    texts = [p.communicate(timeout=200)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert_whole(out, 13)


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(tmp_path: Path, launch: Launch) -> None:
    broken = tmp_path / "neox-broken"
    shutil.copytree(DEMO_DIR / "models" / "neox-xs", broken)
    _put_nan_into(broken / "model.safetensors")
    arguments = [a for a in SMALL if not a.startswith("sweep.sizes")]
    arguments += [f"path=[{broken},{DEMO_DIR / 'models' / 'neox-xs'}]", f"out={tmp_path / 'r'}"]
    result = launch(*arguments, "report=true")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "12 cell(s) failed" in result.stdout
    assert "mode=logs" in result.stdout
    statuses = load_results(tmp_path / "r").groupby("model")["status"].value_counts().to_dict()
    # The 16-bit baseline of a broken model quantizes nothing: it measures, and diverges.
    assert statuses == {("neox-broken", "failed"): 12, ("neox-broken", "diverged"): 1, ("neox-xs", "done"): 13}
    logs = launch("mode=logs", f"out={tmp_path / 'r'}")
    # A codebook that is fitted to the tensor meets it elsewhere than one that is not.
    assert logs.stdout.count("Traceback (most recent call last)") == 2
    for count in (8, 4):
        assert f"{count} measurements of {count} cells failed alike" in logs.stdout
    assert "neox-broken" in logs.stdout
    one = launch("mode=logs", f"out={tmp_path / 'r'}", "where={model: neox-broken, bits: 3, dtype: int}")
    assert one.stdout.count("Traceback (most recent call last)") == 1
    assert "failed alike" not in one.stdout
    assert "nothing to do" in launch(*arguments).stdout
    shown = launch(*arguments, "mode=plan", "retry=[failed]").stdout
    assert "12" in next(line for line in shown.splitlines() if "to do" in line)


def _put_nan_into(path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("dense_4h_to_h.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_dropped_cells_run_again_and_their_rows_stay(small: Path, launch: Launch) -> None:
    before = set(all_row_ids(small).index)
    dropped = launch(f"out={small}", "mode=drop", "where={bits: 3, dtype: int}", "yes=true")
    assert "Retired 1 measurement" in dropped.stdout, dropped.stderr
    assert load_results(small)["status"].value_counts().to_dict() == {"done": 12, "missing": 1}
    assert launch(f"out={small}", *SMALL).returncode == 0
    after = set(all_row_ids(small).index)
    assert before < after
    assert len(after) == 14
    assert Store(out=small).read(["measurement"]).num_rows == 13


def test_multirun_shares_the_store_and_leaves_no_files_of_hydra(tmp_path: Path, launch: Launch) -> None:
    quant = "sweep.quant=[{bits: 16}, {bits: 4, dtype: int}]"
    arguments = [a for a in SMALL if not a.startswith(("sweep.quant", "eval.tokens"))]
    result = launch("-m", "out=r", "eval.tokens=512,1024", quant, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(all_row_ids(tmp_path / "r")) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_tables_are_written_as_asked(small: Path, tmp_path: Path, launch: Launch) -> None:
    for name in ("t.csv", "t.parquet", "t.md"):
        assert launch(f"out={small}", "mode=table", f"to={name}").returncode == 0
    csv, parquet = pd.read_csv(tmp_path / "t.csv"), pd.read_parquet(tmp_path / "t.parquet")
    assert csv["jargon_loss"].tolist() == parquet["jargon_loss"].tolist()
    assert (tmp_path / "t.md").read_text().count("\n|") >= 3
    status = launch(f"out={small}", "mode=status", "by=[bits]").stdout
    assert "done" in status
