"""What a worker keeps warm for one model is another's only where everything that it was made from is equal."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kbit.evaluation.spec import EvalSpec
from kbit.models.loading import load_model
from kbit.sources import LocalFile, NamedFiles, TaskSource
from kbit.spec import QuantSpec
from sweeps.study.evals import _data_files_hash
from sweeps.study.task_index import find_task
from sweeps.worker.model_cache import Warm
from tests.sweeps.worker.test_worker import NEOX_XS, Bench, evaluation, pack_of

BASELINE = QuantSpec(bits=16)
TASK = "task: own\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
TASK += "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n"


def variant(tmp_path: Path, name: str, **settings: Any) -> Path:
    """A copy of a demo model with the same tokenizer.json and other settings of the tokenizer."""
    directory = Path(shutil.copytree(NEOX_XS, tmp_path / name))
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


def rolling(tmp_path: Path) -> EvalSpec:
    """A task that scores texts after nothing but the token that begins one."""
    (tmp_path / "own.yaml").write_text(TASK)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"valve {n} turns"}) + "\n" for n in range(6)))
    source = TaskSource(task_file=str(tmp_path / "own.yaml"), documents=LocalFile(path=str(tmp_path / "own.jsonl")))
    return evaluation("own", kind="task", window=None, limit=None, source=source)


def outcome(out: Path, models: list[Path], spec: EvalSpec) -> dict[str, tuple[str, dict[str, float]]]:
    """Status and metrics of each model, all measured by one worker in this order."""
    bench = Bench(out)
    for number, model in enumerate(models):
        bench.worker.run_pack(pack_of(BASELINE, evals=(spec,), model=model, name=f"pack{number}"))
    return {row["model"]: (row["status"], dict(row["metrics"] or [])) for row in bench.rows()}


def test_models_that_share_rules_but_not_special_tokens_are_measured_as_if_alone(tmp_path: Path) -> None:
    vocabulary = json.loads((NEOX_XS / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [w for w in vocabulary if w.isalpha()][:2]
    base = variant(tmp_path, "base", bos_token=plain[0], eos_token=plain[0])
    chat = variant(tmp_path, "chat", bos_token=plain[1], eos_token=plain[1])
    spec = rolling(tmp_path)
    together = outcome(tmp_path / "together", [base, chat], spec)
    assert together["base"] != together["chat"]
    for model in (base, chat):
        alone = outcome(tmp_path / f"alone-{model.name}", [model], spec)
        assert alone[model.name] == together[model.name]
        assert alone[model.name][0] == "done"
    keys = {load_model(str(m), device="cpu", compute_dtype="float32").tokenizer_hash for m in (base, chat)}
    assert len(keys) == 2


def test_a_tokenizer_without_special_tokens_fails_alone_as_in_company(tmp_path: Path) -> None:
    bare = variant(tmp_path, "bare", bos_token=None, eos_token=None, unk_token=None, pad_token=None)
    spec = rolling(tmp_path)
    alone = outcome(tmp_path / "alone", [bare], spec)
    together = outcome(tmp_path / "together", [NEOX_XS, bare], spec)
    assert alone["bare"][0] == together["bare"][0] == "failed"
    assert together["neox-xs"][0] == "done"


def test_what_changes_no_token_is_shared(tmp_path: Path) -> None:
    """Sizes of a family bring the same tokenizer under other names; preparing it again for each would take minutes."""
    other = variant(tmp_path, "other", name_or_path="someone/else", chat_template="{{ messages }}")
    warm = Warm(device="cpu", gpus=1, trust_remote_code=False)
    first, second = (load_model(str(m), device="cpu", compute_dtype="float32") for m in (NEOX_XS, other))
    spec = dataclasses.replace(evaluation(), limit=1024)
    assert warm.prepare(spec, first) is warm.prepare(spec, second)


@pytest.mark.parametrize("setting", ["add_prefix_space", "clean_up_tokenization_spaces", "padding_side"])
def test_any_setting_of_the_tokenizer_tells_it_apart(tmp_path: Path, setting: str) -> None:
    values: dict[str, Any] = {"padding_side": "left"}
    other = variant(tmp_path, "other", **{setting: values.get(setting, True)})
    hashes = {load_model(str(m), device="cpu", compute_dtype="float32").tokenizer_hash for m in (NEOX_XS, other)}
    assert len(hashes) == 2


def test_equal_evaluations_with_data_in_two_places_are_prepared_from_each(tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, text in enumerate(texts):
        text.write_text(f"valve {number} turns the gear. " * 400)
    specs = [evaluation(source=LocalFile(path=str(t))) for t in texts]
    assert specs[0] == specs[1]
    warm = Warm(device="cpu", gpus=1, trust_remote_code=False)
    loaded = load_model(str(NEOX_XS), device="cpu", compute_dtype="float32")
    first, second = (warm.prepare(spec, loaded) for spec in specs)
    assert first.dataset_hash != second.dataset_hash  # type: ignore[attr-defined]


def test_a_tasks_own_file_replaced_with_its_times_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` keeps files by path and time of modification, which copying tools preserve."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, found = tmp_path / "own.jsonl", []
    for gold in (0, 1):
        data.write_text(json.dumps({"text": "the valve", "gold": gold}) + "\n")
        os.utime(data, (1_000_000, 1_000_000))
        kwargs = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / "own.yaml").write_text(TASK + f"dataset_path: json\n{kwargs}")
        entry = find_task("own", [tmp_path])
        source = TaskSource(task_file=str(entry.file), documents=NamedFiles(sha256=_data_files_hash(entry)))
        loaded = load_model(str(NEOX_XS), device="cpu", compute_dtype="float32")
        spec = evaluation("own", kind="task", window=None, limit=None, source=source)
        prepared: Any = Warm(device="cpu", gpus=1, trust_remote_code=False).prepare(spec, loaded)
        found.append([document["gold"] for document in prepared.task.test_docs()])
    assert found == [[0], [1]]
