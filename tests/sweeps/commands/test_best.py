"""mode=best: what fits is chosen with its sum, what can't be known is named, bad values are refused."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kbit.evaluation.spec import EvalSpec
from kbit.spec import QuantSpec
from sweeps import load_results
from sweeps.commands.best import best, size
from sweeps.config import DEMO_DIR
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.store.rows import Origin, run_row
from sweeps.study.cell import Cell, Measurement, ModelRef
from tests import ROOT
from tests.sweeps.studies import composed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of an earlier version, whose models' config.json is not where they were."""
    shutil.copytree(ROOT / "tests" / "data" / "earlier_results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(home: Path) -> Path:
    """The same, with the models where the manifests say."""
    for manifest in (home / "results" / "manifests").glob("*.json"):
        manifest.write_text(manifest.read_text().replace("@ROOT@", str(ROOT)))
    return home


def ask(*overrides: str) -> tuple[int, str]:
    given = ["mode=best", *overrides]
    options = Options.from_config(composed(*given), given)
    console = Console(width=200, record=True, file=StringIO())
    return best(options, console), console.export_text()


def test_the_best_that_fits_is_shown_with_its_sum_and_what_comes_behind(here: Path) -> None:
    results = load_results("results")
    loss = "jargon_loss"
    done = results[(results["status"] == "done") & results[loss].notna()].sort_values(loss)
    code, text = ask("memory=1.1GB", f"metrics=[{loss}]")
    assert code == 0
    first = done.iloc[0]
    assert f"Best for 1.10 GB: {first['model']} {first['label']}, loss on jargon {first[loss]:.4f}" in text
    weights = size(first["total_bits"] / 8)
    layers = json.loads((DEMO_DIR / "models" / first["model"] / "config.json").read_text())
    cache = 2 * layers["num_hidden_layers"] * layers["hidden_size"] * 2 * 512
    # The models' context is 512 tokens, less than 2,048.
    assert f"= {weights} weights + {size(cache)} cache (512 tokens x 1) + 1.00 GB kept free" in text
    assert "paired on the same samples: significant" in text
    assert "cache (512 tokens x 4)" in ask("memory=1.1GB", f"metrics=[{loss}]", "batch=4")[1]
    three = ask("memory=1.1GB", f"metrics=[{loss}]", "where={bits: 3}")[1]
    assert "3 b64" in three.splitlines()[0]


def test_what_is_too_large_and_better_is_named_with_what_it_needs(here: Path) -> None:
    results = load_results("results").dropna(subset=["jargon_loss", "total_bits"])
    small = results.sort_values("total_bits").iloc[0]
    model = f"where={{model: {small['model']}}}"
    # Enough for the smallest cell of the smallest model and its cache, and for nothing that is better.
    _, text = ask("memory=1.1GB", "metrics=[jargon_loss]", model)
    assert "too large" not in text
    code, text = ask("memory=1024.5MB", "metrics=[jargon_loss]", model)
    assert code == 1
    assert "Nothing that was measured fits into 1.00 GB, of which 1.00 GB are kept free." in text
    assert "What needs least" in text


def test_models_whose_cache_is_unknown_are_named_and_nothing_is_guessed(home: Path) -> None:
    code, text = ask("memory=48GB", "metrics=[jargon_loss]")
    assert code == 1
    assert "Not considered: neox-xs, neox-s: the size of its cache is unknown" in text
    assert "mode=fetch" in text


def test_a_context_beyond_a_models_own_leaves_the_model_out_by_name(here: Path) -> None:
    code, text = ask("memory=48GB", "metrics=[jargon_loss]", "context=4096")
    assert code == 1
    assert "its context of 512 tokens is shorter than context=4096" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "mode=best needs memory=: a size with its unit"),
        (["memory=48"], "memory=48 is not valid: a size with its unit, MB, GB or TB"),
        (["memory=lots"], "memory=lots is not valid"),
        (["memory=0GB"], "memory=0GB is not valid"),
        (["memory=1GB"], "memory=1GB is not valid: 1.00 GB of it are kept free"),
        (["memory=48GB", "context=0"], "context=0 is not valid: a whole number from 1, e.g. context=2048"),
        (["memory=48GB", "batch=1.5"], "batch=1.5 is not valid: a whole number from 1, e.g. batch=1"),
        (
            ["memory=48GB", "metrics=[jargon_los]"],
            "metrics=jargon_los is not valid: one of .* Did you mean jargon_loss",
        ),
        (["memory=48GB", "metrics=[jargon_loss,jargon_perplexity]"], "not valid with mode=best: one of them"),
        (["memory=48GB", "where={bits: 7}"], "where={bits: 7} matches no cell"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused_by_name(home: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ask(*arguments)


@pytest.mark.parametrize(
    ("count", "words"),
    [(2**30, "1.00 GB"), (48 * 2**30, "48.0 GB"), (5 * 2**20, "5.0 MB"), (1.5 * 2**40, "1,536.0 GB")],
)
def test_a_gigabyte_has_2_to_the_30_bytes(count: float, words: str) -> None:
    assert size(count) == words


def test_rows_have_the_size_of_a_models_cache_as_it_runs() -> None:
    model = ModelRef(family="neox", name="neox-xs", path=str(DEMO_DIR / "models" / "neox-xs"), weights_hash="sha256:1")
    spec = EvalSpec(name="jargon", kind="perplexity", version="1", dataset="sha256:2", compute_dtype="float32")
    measurement = Measurement(cell=Cell(model=model, quant=QuantSpec(bits=16)), eval=spec)
    row = run_row(measurement, Origin(sweep="s", pack="p"), datetime.now(UTC))
    assert (row["kv_values"], row["context"]) == (576, 512)
