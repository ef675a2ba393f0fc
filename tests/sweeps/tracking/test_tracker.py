"""Studies that are launched beside W&B's mirror, and ``mode=sync``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sweeps.results.table import load_results
from tests.conftest import Launch
from tests.sweeps.tracking.studies import digest_of
from tests.sweeps.tracking.wandb_server import WandbServer, free_port

STUDY = (
    "sweep.sizes=[neox-xs]",
    "eval.tasks=[]",
    "eval.tokens=512",
    "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: int}]",
)


def test_a_study_and_its_tables_are_mirrored_and_made_whole_by_sync(
    server: WandbServer, launch: Launch, here: Launch, tmp_path: Path
) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}")
    down = ("tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    first = launch("out=a", *STUDY, "sweep.name=tables", *online)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "W&B:" not in first.stdout
    made = tmp_path / "a" / "tables" / "tables.parquet"
    assert len(pd.read_parquet(made)) == 3
    assert server.artifacts("tables-results") == [("tables-results", "results")]
    files = [made.with_suffix(suffix) for suffix in (".parquet", ".csv", ".md")]
    assert server.digests("tables-results") == [digest_of("tables-results", *files)]
    assert server.run("tables-results")["state"] == "finished"
    whole = here("out=a", "mode=sync", *online)
    assert whole.returncode == 0, whole.stdout
    assert "W&B holds 3 of 3 measurements in 3 runs, 0 brought up to date now" in whole.stdout

    outage = launch("out=b", *STUDY, "sweep.name=outage", *down)
    assert outage.returncode == 0, outage.stdout + outage.stderr
    assert "mode=sync" in outage.stdout
    added = here("out=b", "mode=sync", *online)
    assert added.returncode == 0
    assert "W&B holds 3 of 3 measurements in 3 runs, 3 brought up to date now" in added.stdout
    assert server.artifacts("outage-results") == [("outage-results", "results")]


def test_a_sync_knows_what_no_table_of_a_study_shows_any_more(
    server: WandbServer, launch: Launch, here: Launch, tmp_path: Path
) -> None:
    online = ("tracking=online", f"tracking.base_url={server.url}", "tracking.project=superseded")
    for tokens in (512, 1024):
        done = launch("out=a", *STUDY, "sweep.name=again", f"eval.tokens={tokens}", "report=false")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B holds 6 of 6 measurements in 3 runs" in here("out=a", "mode=sync", *online).stdout
    said = server.summaries("again").values()
    assert [(of["cells"], of["done"], of["superseded"]) for of in said] == [(1, 1, 1)] * 3
    now = load_results(tmp_path / "a", long=True)
    assert sorted(of["jargon/loss"] for of in said) == pytest.approx(sorted(m["loss"] for m in now["metrics"]))
    assert list(load_results(tmp_path / "a", long=True)["limit"]) == [1024] * 3


def test_a_study_without_a_key_runs_untracked_and_asks_for_no_login(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    result = launch("out=a", *STUDY, "tracking=online", f"tracking.base_url=http://127.0.0.1:{free_port()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WANDB_API_KEY" in result.stdout
    assert "bit_scaling.png" in result.stdout or "tables/demo.csv" in result.stdout
