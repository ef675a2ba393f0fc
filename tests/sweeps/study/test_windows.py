"""Windows of a calibration set, counted when planning: as many as the worker finds, by each model's own tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kbit.calibration import Calibration
from kbit.errors import SpecError
from kbit.evaluation.spec import EvalSpec
from kbit.sources import HubData, LocalFile
from kbit.spec import QuantSpec
from sweeps.config import DEMO_DIR
from sweeps.errors import UserError
from sweeps.study.cell import Cell, ModelRef
from sweeps.study.windows import check_texts, check_windows, count_tokens
from tests import ROOT
from tests.conftest import Launch

MODEL = DEMO_DIR / "models" / "neox-xs"
REF = ModelRef(family="neox", name="neox-xs", path=str(MODEL), weights_hash="0" * 64)


def text_file(directory: Path, words: int) -> LocalFile:
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{n} and another"}) + "\n" for n in range(words)))
    return LocalFile(path=str(path))


def of(source: LocalFile | HubData, **settings: int) -> Calibration:
    return Calibration(dataset="x", name="mine", source=source, **settings)  # type: ignore[arg-type]


def cell(calibration: Calibration, model: ModelRef = REF) -> Cell:
    return Cell(model=model, quant=QuantSpec(bits=4, dtype="int"), calibration=calibration)


@pytest.mark.parametrize(("words", "length"), [(40, 16), (333, 16), (100, 64)])
def test_planning_counts_as_the_worker_does(tmp_path: Path, words: int, length: int) -> None:
    from transformers import AutoTokenizer

    from kbit.evaluation.calibration import calibration_windows

    asked = of(text_file(tmp_path, words), samples=10**6, length=length)
    tokens = count_tokens(asked, MODEL / "tokenizer.json", length)
    assert tokens is not None
    found = tokens // length
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with pytest.raises(SpecError, match=f"at most {found}: "):
        calibration_windows(asked, tokenizer, context=256, vocab_size=10**6)
    enough = replace(asked, samples=found)
    assert len(calibration_windows(enough, tokenizer, context=256, vocab_size=10**6)) == found
    check_windows([cell(enough)], lambda _: None)
    with pytest.raises(
        UserError, match=rf"calibration.samples={found + 1} is not valid with neox-xs: mine has {found} "
    ):
        check_windows([cell(replace(asked, samples=found + 1))], lambda _: None)


def test_a_window_is_no_longer_than_the_models_context(tmp_path: Path) -> None:
    context = json.loads((MODEL / "config.json").read_bytes())["max_position_embeddings"]
    with pytest.raises(UserError, match=f"windows of {context} tokens"):
        check_windows([cell(of(text_file(tmp_path, 40), samples=500, length=10**6))], lambda _: None)


def test_each_tokenizer_reads_a_text_once_whatever_the_cells_and_seeds(tmp_path: Path) -> None:
    source, said = text_file(tmp_path, 400), []
    calibrations = [of(source, samples=4, length=16, seed=seed) for seed in range(3)]
    check_windows([cell(c, replace(REF, name=n)) for n in ("a", "b") for c in calibrations], said.append)
    assert said == ["windows of mine for a"]


@pytest.mark.parametrize("lacks", ["tokenizer.json", "config.json", "context"])
def test_what_can_not_be_counted_here_is_left_to_the_worker(tmp_path: Path, lacks: str) -> None:
    for name in {"tokenizer.json", "config.json"} - {lacks}:
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    if lacks == "context":
        (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    check_windows([cell(of(text_file(tmp_path, 2)), replace(REF, path=str(tmp_path)))], lambda _: None)


def test_a_damaged_tokenizer_is_left_to_the_worker(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": "cut of')
    model = replace(REF, path=str(tmp_path))
    check_windows([cell(of(text_file(tmp_path, 2)), model)], lambda _: None)
    check_texts([model], [text_eval(text_file(tmp_path, 2), window=64)])


def test_data_and_models_of_the_hub_that_are_not_here_are_left_to_the_worker(tmp_path: Path) -> None:
    check_windows([cell(of(HubData(hub="nobody/nothing", revision="0" * 40)))], lambda _: None)
    remote = ModelRef(family="f", name="n", hub_id="nobody/nothing", commit="0" * 40)
    check_windows([cell(of(text_file(tmp_path, 2)), remote)], lambda _: None)


def test_a_damaged_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"calibration.set='mine' can't be read: .*text.jsonl, line 2"):
        check_windows([cell(of(LocalFile(path=str(path))))], lambda _: None)


def test_counting_loads_no_torch(tmp_path: Path) -> None:
    path = text_file(tmp_path, 400).path
    code = (
        "import sys\nfrom pathlib import Path\nfrom kbit.calibration import Calibration\n"
        "from kbit.sources import LocalFile\nfrom sweeps.study.windows import count_tokens\n"
        f"c = Calibration(dataset='x', source=LocalFile(path={path!r}), samples=2, length=16)\n"
        f"assert count_tokens(c, Path({str(MODEL / 'tokenizer.json')!r}), 16) == 32\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def text_eval(source: LocalFile | HubData, **settings: Any) -> EvalSpec:
    about = {"name": "mine", "dataset": "x", "compute_dtype": "float32", "window": 64, "source": source}
    return EvalSpec(**{"kind": "perplexity", **about, **settings})


@pytest.mark.parametrize("kind", ["perplexity", "agreement"])
@pytest.mark.parametrize("bos", [None, "each"])
def test_a_text_shorter_than_one_window_is_refused_as_the_worker_refuses_it(
    tmp_path: Path, kind: str, bos: str | None
) -> None:
    source = text_file(tmp_path, 200)
    least = 64 - (bos == "each")
    check_texts([REF], [text_eval(source, kind=kind, bos=bos, limit=least)])
    with pytest.raises(UserError, match=rf"eval\.tokens={least - 1} .*neox-xs: at least one window of {least} tokens"):
        check_texts([REF], [text_eval(source, kind=kind, bos=bos, limit=least - 1)])
    short = replace(text_file(tmp_path, 3), sha256="1")
    with pytest.raises(UserError, match=rf"text\.jsonl: .* 'mine' has \d+ tokens .*window of {least}: name"):
        check_texts([REF], [text_eval(short, kind=kind, bos=bos)])


def test_a_text_is_long_enough_where_the_model_s_context_is_short(tmp_path: Path) -> None:
    source = text_file(tmp_path, 400)
    check_texts([REF], [text_eval(source, window=2048, limit=512)])  # the model's context
    with pytest.raises(UserError, match="at least one window of 512 tokens"):
        check_texts([REF], [text_eval(source, window=2048, limit=511)])


def test_texts_of_the_hub_and_models_that_are_not_here_are_left_to_the_worker() -> None:
    hub = HubData(hub="o/n", revision="c" * 40)
    check_texts([REF, ModelRef(family="x", name="y", hub_id="o/m", commit="unresolved:main")], [text_eval(hub)])
    check_texts([REF], [EvalSpec(kind="task", name="piqa", dataset="x", compute_dtype="float32", limit=1)])


def test_a_plan_and_a_run_refuse_a_text_that_is_too_short(here: Launch) -> None:
    for mode in ("plan", "run"):
        ended = here(f"mode={mode}", "eval.tokens=100", "eval.tasks=[]")
        assert ended.returncode == 2
        assert "eval.tokens=100 is not valid with neox-xs: at least one window of 512 tokens" in ended.stderr
