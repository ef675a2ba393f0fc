"""mode=status by study: shared cells count in each, what was superseded says by what, and to do is what a plan says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from sweeps import load_results
from sweeps.config import DEMO_DIR
from tests.conftest import Launch, unreported

QUANT = "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: int}]"
WIDER = "sweep.quant=[{bits: 16}, {bits: [3, 4, 5], dtype: int}]"
BASE = ("eval.tasks=[]", "eval.tokens=512", "out=r")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of the user's own."""
    return Path(shutil.copytree(DEMO_DIR / "models" / "neox-xs", tmp_path / "mine"))


@pytest.fixture
def launch(here: Launch) -> Launch:
    """The command, without reports, which nobody reads here."""
    return lambda *args: here(*unreported(args))


def change_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if n.endswith("dense_4h_to_h.weight"))
    save_file({**tensors, name: tensors[name] * 1.01}, model / "model.safetensors", metadata={"format": "pt"})


def counts(shown: str, study: str) -> dict[str, int]:
    """The row of a study in the table of mode=status, by state."""
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    head = next(words for words in lines if words[0] == "sweep")
    row = next(words for words in lines if words[0] == study and len(words) == len(head))
    return {name: int(n) for name, n in zip(head[1:], row[1:], strict=True) if int(n)}


def left(launch: Launch, study: str, *args: str) -> int:
    """What is to do, which status and plan must say alike."""
    named = f"sweep.name={study}"
    said = launch("mode=status", *BASE, named, *args)
    assert said.returncode == 0, said.stderr
    (what,) = re.findall(rf"^{study}: (?:([\d,]+) measurements? to do|nothing to do)", said.stdout, re.MULTILINE)
    plan = launch("mode=plan", *BASE, named, *args)
    (planned,) = re.findall(r"^ +to do +([\d,]+)", plan.stdout, re.MULTILINE)
    assert int(what or 0) == int(planned), said.stdout + plan.stdout
    return int(planned)


def test_a_cell_that_studies_share_counts_in_each_and_to_do_is_what_a_plan_says(launch: Launch, model: Path) -> None:
    mine = f"path={model}"
    assert launch(*BASE, mine, QUANT, "sweep.name=first").returncode == 0
    assert launch(*BASE, mine, WIDER, "sweep.name=second", "where={bits: 16}").returncode == 0
    shown = launch("mode=status", "out=r").stdout
    assert counts(shown, "first") == {"done": 3, "all": 3}
    assert counts(shown, "second") == {"done": 3, "missing": 1, "all": 4}
    assert "first: nothing to do" in shown
    assert "second: 1 measurement to do" in shown
    # By other axes a cell is one cell, and results have it once.
    assert counts(launch("mode=status", "out=r", "by=[method]").stdout.replace("method", "sweep"), "blockwise") == {
        "done": 2,
        "missing": 1,
        "all": 3,
    }
    by_label = launch("mode=status", "out=r", "by=[label,calibration]").stdout
    assert re.search(r"int4 b64 +- +1 +0 +1$", by_label, re.M), by_label
    assert len(load_results(model.parent / "r")) == 4
    assert left(launch, "first", mine, QUANT) == 0
    assert left(launch, "second", mine, WIDER) == 1
    assert left(launch, "second", mine, WIDER, "where={bits: [3, 4]}") == 0


def test_changed_weights_supersede_cells_and_status_says_by_what_also_after_a_drop(launch: Launch, model: Path) -> None:
    mine = f"path={model}"
    # One of three cells is measured before the weights change.
    assert launch(*BASE, mine, QUANT, "sweep.name=study", "where={bits: 16}").returncode == 0
    assert left(launch, "study", mine, QUANT) == 2
    change_weights(model)
    assert launch(*BASE, mine, QUANT, "sweep.name=study", "where={bits: 3}").returncode == 0
    shown = launch("mode=status", "out=r").stdout
    assert counts(shown, "study") == {"done": 2, "missing": 2, "superseded": 2, "all": 6}
    assert re.search(
        r"3 cells of study superseded: mine had weights \w{12}, now \w{12}, by its newest launch", shown
    ), shown
    assert left(launch, "study", mine, QUANT) == 2
    assert launch(*BASE, mine, QUANT, "sweep.name=study").returncode == 0
    assert launch("mode=drop", "out=r", "where={bits: 16}", "yes=true").returncode == 0
    shown = launch("mode=status", "out=r").stdout
    assert counts(shown, "study") == {"done": 2, "missing": 1, "superseded": 3, "all": 6}
    assert left(launch, "study", mine, QUANT) == 1
    assert launch(*BASE, mine, QUANT, "sweep.name=study").returncode == 0
    assert counts(launch("mode=status", "out=r").stdout, "study") == {"done": 3, "superseded": 3, "all": 6}
    assert left(launch, "study", mine, QUANT) == 0


def test_other_settings_and_cells_that_are_not_planned_any_more_are_superseded(launch: Launch, model: Path) -> None:
    mine = f"path={model}"
    assert launch(*BASE, mine, WIDER, "sweep.name=study", "where={bits: [16, 5]}").returncode == 0
    assert launch(*BASE, mine, QUANT, "sweep.name=study", "eval.tokens=1024", "where={bits: 16}").returncode == 0
    shown = launch("mode=status", "out=r", "sweep.name=study").stdout
    assert "does not plan them" not in shown  # nothing is left of what the earlier launch alone planned
    assert "3 measurements of study superseded: jargon, which had limit 512, now 1024" in shown
    assert left(launch, "study", mine, QUANT, "eval.tokens=1024") == 2
    # What has a result stays a result.
    assert counts(shown, "study") == {"done": 2, "missing": 2, "all": 4}
    assert launch("mode=drop", "out=r", "where={bits: 5}", "yes=true").returncode == 0
    shown = launch("mode=status", "out=r", "sweep.name=study").stdout
    assert "1 cell of study superseded: its newest launch does not plan them" in shown
