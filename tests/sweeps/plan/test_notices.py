"""Plan and run say what changed under a known name, and what a model needs, before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sweeps.config import DEMO_DIR
from tests.conftest import Launch, unreported

QUANT = "sweep.quant=[{bits: 16}, {bits: [3, 4], dtype: int}]"


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """A study of three cells on a copy of a demo model and text."""
    shutil.copytree(DEMO_DIR / "models" / "neox-xs", tmp_path / "neox-xs")
    shutil.copy(DEMO_DIR / "text" / "jargon.jsonl", tmp_path / "words.jsonl")
    keys = ["sweep.name=own", "out=out", f"path={tmp_path / 'neox-xs'}", QUANT, "eval.tasks=[]", "eval.tokens=1024"]
    return [*keys, f"eval.perplexity=[{tmp_path / 'words.jsonl'}]", "executor.device=cpu", "executor.workers=1"]


def said(here: Launch, *args: str) -> str:
    done = here(*unreported(args))
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_changed_weights_and_data_are_said_when_planned_and_run_and_no_more(
    here: Launch, study: list[str], tmp_path: Path
) -> None:
    assert "earlier launch" not in said(here, *study)
    assert "earlier launch" not in said(here, *study, "mode=plan")
    file = tmp_path / "neox-xs" / "model.safetensors"
    values = {name: value * np.float16(1.01) if value.ndim > 1 else value for name, value in load_file(file).items()}
    save_file(values, file, metadata={"format": "pt"})
    weights = "weights of neox-xs differ from those of the earlier launch: 3 cells of the old ones stay"
    assert weights in said(here, *study, "mode=plan")
    assert weights in said(here, *study)
    # All is measured on what is there now.
    assert "earlier launch" not in said(here, *study, "mode=plan")
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps({"text": "one more document"}) + "\n" + words.read_text())
    data = "data of words differ from those of the earlier launch: 3 measurements on the old ones stay"
    text = said(here, *study, "mode=plan")
    assert data in text
    assert "weights of" not in text


TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_an_edited_task_of_the_user_s_own_is_said_and_measured_again(
    here: Launch, study: list[str], tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "next_word.yaml"
    file.write_text(TASK % (DEMO_DIR / "text" / "jargon_lastword.jsonl"))
    own = [*study, "eval.perplexity=[]", "eval.tasks=[next_word]", f"eval.task_dirs=[{file.parent}]", "eval.limit=4"]
    assert "earlier launch" not in said(here, *own)
    assert "to do 0" in said(here, *own, "mode=plan")
    file.write_text(file.read_text().replace("{{text.", "So: {{text."))
    definition = (
        "the definition of next_word differs from that of the earlier launch: 3 measurements of the old one stay"
    )
    assert definition in said(here, *own, "mode=plan")
    assert definition in said(here, *own)
    assert "earlier launch" not in said(here, *own, "mode=plan")
    status = said(here, "mode=status", "out=out")
    assert "3 measurements of own superseded: next_word, which had definition" in status


def test_a_task_that_was_known_by_its_version_alone_is_not_said_to_have_changed(
    here: Launch, study: list[str], tmp_path: Path
) -> None:
    shutil.copytree(DEMO_DIR / "tasks", tmp_path / "tasks")
    (tmp_path / "tasks" / "jargon_choice.yaml").unlink()
    own = [*study, "eval.perplexity=[]", "eval.tasks=[jargon_lastword]", "eval.limit=4"]
    # The demo's own file is known by its version, as a user's was before definitions were part of keys.
    said(here, *own, f"eval.task_data={{jargon_lastword: {DEMO_DIR / 'text' / 'jargon_lastword.jsonl'}}}")
    moved = [*own, f"eval.task_dirs=[{tmp_path / 'tasks'}]"]
    text = said(here, *moved, f"eval.task_data={{jargon_lastword: {DEMO_DIR / 'text' / 'jargon_lastword.jsonl'}}}")
    assert "the definition of jargon_lastword was no part of its key of the earlier launch" in text


def test_a_model_whose_key_covers_more_files_now_is_not_said_to_have_changed(
    here: Launch, study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kbit.models import obeyed
    from sweeps.plan.notices import notices
    from sweeps.store.parts import Store
    from sweeps.study import hub
    from sweeps.study.manifest import load_manifests

    said(here, *study)
    model = tmp_path / "neox-xs"
    first = hub.local_model(model).content_hash
    (model / "generation_config.json").write_text("{}")
    assert hub.first_content_hash(model) == first != hub.local_model(model).content_hash
    text = said(here, *study, "mode=plan")
    assert "files of neox-xs that were not part of its key now are" in text
    assert "weights of" not in text
    assert set(obeyed.FIRST_OBEYED) - set(obeyed.OBEYED) == {"vocab.json", "tokenizer.model"}
    (manifest,) = load_manifests(tmp_path / "out")
    assert notices(Store(out=tmp_path / "out"), manifest) == []


@pytest.mark.parametrize(("bos", "warned"), [("first", True), ("none", True), ("each", False)])
def test_models_that_need_bos_in_every_window_are_named(
    here: Launch, study: list[str], tmp_path: Path, bos: str, warned: bool
) -> None:
    file = tmp_path / "neox-xs" / "config.json"
    assert "eval.bos" not in said(here, *study, "mode=plan", f"eval.bos={bos}")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gemma2"}))
    text = said(here, *study, "mode=plan", f"eval.bos={bos}")
    assert ("neox-xs: trained with the beginning-of-sequence token before every text" in text) == warned
    assert (f"eval.bos={bos} stands" in text) == warned


def test_a_text_that_is_calibrated_and_measured_on_is_said(here: Launch, study: list[str], tmp_path: Path) -> None:
    quant = "sweep.quant=[{bits: 4, dtype: int}, {method: gptq, bits: 4, dtype: int, blocksize: row}]"
    study = [*(key for key in study if not key.startswith("sweep.quant")), quant, "calibration.samples=4", "mode=plan"]
    study += ["calibration.length=64", "where={blocksize: row}"]
    seen = said(here, *study, f"calibration.set={tmp_path / 'words.jsonl'}")
    assert "is also measured on (words): cells of gptq have seen what they are tested on" in seen
    options = "sweep.quant=[{bits: 4, dtype: lloyd, weighting: activation}, "
    options += "{bits: 4, dtype: int, outlier_fraction: 0.02, outlier_criterion: activation}]"
    without = [key for key in study if not key.startswith(("sweep.quant", "where"))]
    seen = said(here, *without, options, f"calibration.set={tmp_path / 'words.jsonl'}")
    assert "cells of weighting=activation, outlier_criterion=activation have seen what" in seen
    (tmp_path / "other.jsonl").write_text("".join((tmp_path / "words.jsonl").open().readlines()[:200]))
    assert "also measured on" not in said(here, *study, f"calibration.set={tmp_path / 'other.jsonl'}")
