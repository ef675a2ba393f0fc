"""What the benchmark measures is a study like any other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from sweeps import load_results, load_samples
from sweeps.bench.__main__ import show
from sweeps.bench.growth import draw
from sweeps.bench.measuring import Took
from sweeps.bench.peers import peers
from sweeps.bench.synthetic import DOCUMENTS, Synthetic, packs_of, results
from sweeps.store.parts import Store


def test_made_up_results_are_read_as_results_of_the_planned_study(tmp_path: Path) -> None:
    study = Synthetic(out=tmp_path, measurements=1000)
    manifest = study.manifest()
    packs = list(packs_of(manifest))
    assert sum(len(measurements) for _, measurements in packs) >= 1000
    manifest.save(tmp_path)
    store = Store(out=tmp_path)
    pack, measurements = packs[0]
    for row in results(pack, measurements[:8]):
        store.write(row)
    table = load_results(tmp_path, long=True)
    done = table[table["status"] == "done"]
    assert list(done["measurement"]) == [m.key for m in measurements[:8]]
    assert set(table["status"]) == {"done", "missing"}
    outcomes = load_samples(tmp_path, done["measurement"])
    for row in done.itertuples():
        if row.eval_kind == "task":
            assert len(outcomes[row.measurement]["acc"]) == row.n_samples == DOCUMENTS


def test_growth_is_one_where_time_grows_as_measurements_do(capsys: pytest.CaptureFixture[str]) -> None:
    took = {n: {"load": Took(seconds=1.0, cpu=n / 100, peak=10**6, said="")} for n in (100, 1000)}
    show(took, Console(width=100))
    assert re.search(r"load[ │]+1\.0 / 1\.0 / 1[ │]+10\.0 / 1\.0 / 1[ │]+1\.00", capsys.readouterr().out)


def test_growth_is_drawn(tmp_path: Path) -> None:
    took = {n: {"load": Took(seconds=1.0, cpu=n / 100, peak=10**6, said="")} for n in (100, 1000)}
    draw(took, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    # Powers of ten would take fonts of mathematics, of which matplotlib warns where they are not installed.
    assert all(f"<!-- {words} -->" in drawn for words in ("load", "in proportion", "measurements", "100", "1,000"))


@pytest.mark.slow
def test_others_leave_files_for_each_cell_and_we_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(peers(Console(width=120), cells=100).values())
    hydra, submitit, ours = (kept.files for kept in found)
    assert hydra >= 400
    assert submitit > 100
    assert ours < 20
    assert "100 cells that compute nothing" in capsys.readouterr().out
