"""``eval.bos=each`` needs a token that begins a text: refused when planning where the worker's tokenizer has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kbit.evaluation import EvalSpec
from sweeps.config import DEMO_DIR
from sweeps.errors import UserError
from sweeps.study.begins import check_begins, lacks_bos
from sweeps.study.cell import ModelRef
from tests.conftest import Launch

MODEL = DEMO_DIR / "models" / "neox-xs"


def copy_of(directory: Path, **changes: Any) -> Path:
    """The demo's tokenizer with other settings; None removes one, 'null' is a null."""
    target = directory / "model"
    shutil.copytree(MODEL, target)
    path = target / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: None if v == "null" else v for k, v in settings.items() if v is not None}))
    return target


def ref(directory: Path) -> ModelRef:
    return ModelRef(family="neox", name="mine", path=str(directory), weights_hash="0" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bos_token": None},
        {"bos_token": "null"},
        {"bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"},
        {"bos_token": "null", "tokenizer_class": "GPT2Tokenizer"},
        {"bos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"},
    ],
    ids=str,
)
def test_what_the_files_say_is_what_the_worker_finds(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = copy_of(tmp_path, **changes)
    assert lacks_bos(ref(directory)) == (AutoTokenizer.from_pretrained(directory).bos_token_id is None)


def test_a_class_that_may_have_one_of_its_own_is_left_to_the_worker(tmp_path: Path) -> None:
    assert not lacks_bos(ref(copy_of(tmp_path, bos_token=None, tokenizer_class="GPT2Tokenizer")))


def test_only_each_window_needs_it(tmp_path: Path) -> None:
    models = [ref(copy_of(tmp_path, bos_token=None))]

    def spec(bos: str | None) -> EvalSpec:
        return EvalSpec(kind="perplexity", name="text", dataset="x", compute_dtype="float32", bos=bos)

    check_begins(models, [spec(None), spec("none")])
    with pytest.raises(UserError, match=r"eval\.bos=each is not valid with mine: no token .* \(text\)"):
        check_begins(models, [spec("none"), spec("each")])


def test_a_plan_refuses_it_and_writes_nothing(tmp_path: Path, here: Launch) -> None:
    directory = copy_of(tmp_path, bos_token=None)
    for mode in ("plan", "run"):
        ended = here(f"path={directory}", "eval.bos=each", f"mode={mode}", "sweep.sizes=[]")
        assert ended.returncode == 2
        assert "eval.bos=each is not valid with model:" in ended.stderr
    assert not (tmp_path / "results").exists()
