"""The demo's embedded text: what it promises, and that its builder gives it from a dictionary."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from kbit.evaluation import EvalSpec, prepare
from kbit.sources import LocalFile, TaskSource
from sweeps.demo.build_text import Entry, build, choice, clean, entries, jsonl, lastword, read_package, sentences
from tests import ROOT

DEMO = ROOT / "sweeps" / "demo"
FILES = ("jargon", "jargon_lastword", "jargon_choice")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_no_entry_serves_two_files_and_all_is_small() -> None:
    headwords = [{row["headword"] for row in rows(name)} for name in FILES]
    assert [len(words) for words in headwords] == [564, 100, 50]
    assert len(set.union(*headwords)) == 714
    assert sum((DEMO / "text" / f"{name}.jsonl").stat().st_size for name in FILES) < 400_000


def test_prose_is_plain_and_gives_the_demo_its_tokens() -> None:
    texts = [row["text"] for row in rows("jargon")]
    assert all(text.isascii() and text == text.strip() and "{" not in text and "http" not in text for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    assert len(tokenizer("\n\n".join(texts), verbose=False)["input_ids"]) > 60_000


def test_last_words_occur_before_and_end_their_passage() -> None:
    for row in rows("jargon_lastword"):
        earlier, word = row["text"].rsplit(" ", 1)
        assert word.isalpha()
        assert word in earlier


def test_choices_have_four_endings_of_like_length_and_balanced_labels() -> None:
    choices = rows("jargon_choice")
    for row in choices:
        right = row["endings"][row["label"]]
        assert len(set(row["endings"])) == 4
        assert all(0.8 <= len(ending) / len(right) <= 1.25 for ending in row["endings"])
    assert all(5 <= sum(row["label"] == label for row in choices) <= 25 for label in range(4))


def dictionary(texts: list[str]) -> tuple[bytes, str]:
    """A dictionary and its index as dictd keeps them, one headword an entry."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data, lines = b"", []
    for text in texts:
        numbers = []
        for number in (len(data), len(text.encode())):
            encoded = ""
            while number:
                number, digit = divmod(number, 64)
                encoded = digits[digit] + encoded
            numbers.append(encoded or "A")
        lines.append("\t".join([text.partition("\n")[0], *numbers]))
        data += text.encode()
    return data, "\n".join([*reversed(lines), lines[0].replace("\t", " again\t", 1)]) + "\n"


def test_entries_are_read_once_in_order_and_without_what_is_not_prose() -> None:
    prose = "A small thing that a hacker may hold, see {frobnicate},\n    and may “turn” about too."
    frob = f"frob\n /frob/\n\n    1. n. {prose}\n\n"
    listing = "code\n\n        10 PRINT\n        20 GOTO 10\n\n"
    found = list(entries(*dictionary([frob, listing])))
    assert [entry.headword for entry in found] == ["frob"]
    assert found[0].text == 'A small thing that a hacker may hold, see frobnicate, and may "turn" about too.'


def test_package_is_read_from_a_directory(tmp_path: Path) -> None:
    data, index = dictionary(["a\n\n    A long enough paragraph of prose to be kept, which tells of nothing at all.\n"])
    (tmp_path / "jargon.dict.dz").write_bytes(gzip.compress(data))
    (tmp_path / "jargon.index").write_text(index, encoding="utf-8")
    assert read_package(tmp_path) == (data, index)


def test_cleaning_leaves_prose_only() -> None:
    assert clean("    See {foo}.") == ""
    assert clean("    Text that goes on at some length with https://example.org/ in it, which is no prose.") == ""
    cleaned = clean("    [MIT] The kind of thing that {hackers} are known to say all day, e.g. this. See also {bar}.")
    assert cleaned == "The kind of thing that hackers are known to say all day, e.g. this."


def test_sentences_do_not_end_after_abbreviations() -> None:
    assert sentences("It is used, e.g. By hackers. So there!") == ["It is used, e.g. By hackers.", "So there!"]


def test_building_is_deterministic_and_independent_of_the_order_of_entries() -> None:
    made = [
        Entry(
            headword=f"word {i}",
            paragraphs=(
                f"The machine number {i} was a great big machine that stood in the cellar of the old laboratory. "
                f"Nobody in the building could tell who had built the machine in the winter of that year. "
                f"Once in a while somebody number {i} went down to the cellar and looked for a while at the machine.",
            ),
        )
        for i in range(300)
    ]
    first, second = build(made), build(made[::-1])
    assert {name: jsonl(part) for name, part in first.items()} == {name: jsonl(part) for name, part in second.items()}
    assert [len(first[name]) for name in ("jargon_lastword", "jargon_choice")] == [100, 50]
    passage = lastword(made[0])
    assert passage is not None
    assert passage["text"].endswith(" machine")


def test_wrong_endings_come_from_other_entries() -> None:
    entry = Entry(headword="own", paragraphs=("x",))
    pool = [("own", "ends here as well."), *((f"other {i}", f"ends elsewhere {i:03d}") for i in range(5))]
    row = choice(entry, "It", "ends right here now.", pool)
    assert row is not None
    endings = list(row["endings"])
    assert endings.pop(row["label"]) == "ends right here now."
    assert all(ending.startswith("ends elsewhere") for ending in endings)
    assert choice(entry, "It", "a", pool) is None


@pytest.mark.parametrize("name", ["jargon_lastword", "jargon_choice"])
def test_tasks_are_ordinary_lm_eval_tasks(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(DEMO)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    manager = TaskManager(include_path=str(DEMO / "tasks"), include_defaults=False)
    task = manager.load([name])["tasks"][name]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=5)
    documents = LocalFile(path=str(DEMO / "text" / f"{name}.jsonl"))
    source = TaskSource(task_file=str(DEMO / "tasks" / f"{name}.yaml"), documents=documents)
    spec = EvalSpec(kind="task", name=name, dataset="x", compute_dtype="float32", limit=5, source=source)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    ours = prepare(spec, tokenizer, context=512, vocab_size=2048).task
    assert [i.args for i in task.instances] == [i.args for i in ours.instances]
    assert str(task.VERSION) == "1.0"


def test_embedded_models_know_the_text_better_with_size() -> None:
    spec = EvalSpec(
        kind="perplexity",
        name="jargon",
        dataset="x",
        compute_dtype="float32",
        limit=2048,
        source=LocalFile(path=str(DEMO / "text" / "jargon.jsonl")),
    )
    losses = []
    for name in ("neox-xs", "neox-s", "neox-m"):
        directory = DEMO / "models" / name
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        prepared = prepare(spec, AutoTokenizer.from_pretrained(directory), context=512, vocab_size=2048)
        losses.append(prepared.run(model, batch_tokens=2048).metrics["loss"])
    assert math.log(2048) > losses[0] > losses[1] > losses[2]
