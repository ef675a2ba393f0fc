"""Encoding by parts and in the library's own batches: the token ids of a tokenizer's call, whatever the texts."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kbit.evaluation.encoding import AFTER_A_WORD, BYTE_LEVEL, encode_texts, find_joint
from kbit.evaluation.requests import RequestEncoder
from kbit.garbage import uncollected
from tests import ROOT

FILE = str(ROOT / "sweeps" / "demo" / "models" / "neox-xs" / "tokenizer.json")
RULES = list(AFTER_A_WORD)
PIECES = [*" \n\t\xa0\u3000\x1c\x85\u200b'a\u0301\u212a\r", "  ", "'s", "'S", "It", "über", "e\u0301", "漢字", "the"]
PIECES += [*"7.,()|。_-<🙂", "1234", "...", "!?", "<|endoftext|>", "|>"]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def made(rule: str = BYTE_LEVEL, *, nfc: bool = False, **changes: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the demo's merges that cuts words by a rule, and begins texts with a token."""
    backend = Tokenizer.from_file(FILE)
    if rule != BYTE_LEVEL:
        split = pre_tokenizers.Split(Regex(rule), "isolated")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, words])
    if nfc:
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([AddedToken("  ", normalized=True), AddedToken("K the", normalized=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    for name, value in changes.items():
        setattr(backend, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def words(tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


TOKENIZERS = {f"{rule}{' NFC' * nfc}": made(rule, nfc=nfc) for rule in RULES for nfc in (False, True)}
PLAIN = made()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=[str(i) for i in range(len(TOKENIZERS))])
def test_parts_that_come_apart_have_the_tokens_of_the_whole(tokenizer: Any) -> None:
    joint = find_joint(tokenizer)
    assert joint is not None
    for end, begin in product(PIECES, PIECES):
        for first, second in ((end, f" {begin}"), (f"A{end}", f"{begin}the"), (f" {end}", f" {begin}\n")):
            if joint.lies_between(first, second):
                whole = tokenizer(first + second)["input_ids"]
                parts = tokenizer(first)["input_ids"] + tokenizer(second, add_special_tokens=False)["input_ids"]
                assert whole == parts, (first, second)
                # With other merges too.
                assert words(tokenizer, first + second) == words(tokenizer, first) + words(tokenizer, second)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=[str(i) for i in range(len(TOKENIZERS))])
def test_a_question_and_its_answer_come_apart(tokenizer: Any) -> None:
    joint = find_joint(tokenizer)
    assert joint is not None
    assert joint.lies_between("Question: why?\nAnswer:", " because")
    assert not joint.lies_between("Question", "s")
    assert not joint.lies_between("Question: why? ", " because")
    assert not joint.lies_between("Question: <|endoftext|>", " because")
    assert not joint.lies_between("", " because")


@given(pairs=st.lists(st.tuples(texts, texts), max_size=5))
@settings(deadline=None, max_examples=50)
def test_requests_have_the_tokens_of_texts_encoded_one_by_one(pairs: list[tuple[str, str]]) -> None:
    for tokenizer in TOKENIZERS.values():
        encoder, slow = (RequestEncoder(t, context=64) for t in (tokenizer, tokenizer))
        slow._joint = None
        assert encoder._encode_pairs(pairs) == slow._encode_pairs(pairs)


@pytest.mark.parametrize("special", [None, True, False])
def test_texts_have_the_tokens_of_the_tokenizers_call(special: bool | None) -> None:
    tokenizer = made()
    # What an earlier call, or tokenizer.json, left behind must not cut or fill texts.
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    given_texts = ["", "a", "The quick brown fox jumps", "Tränen 漢字 <|endoftext|> x", "  two", "e\u0301"] * 2
    options = {} if special is None else {"add_special_tokens": special}
    found = encode_texts(tokenizer, given_texts, special=special)
    assert found == [made()(text, **options)["input_ids"] for text in given_texts]


class OwnCall(PreTrainedTokenizerFast):
    """A tokenizer whose call does more than the library's."""

    def _encode_plus(self, *args: Any, **options: Any) -> Any:
        encoding = super()._encode_plus(*args, **options)
        return {"input_ids": [[7, *ids] for ids in encoding["input_ids"]]}


def test_a_tokenizer_with_a_call_of_its_own_is_called() -> None:
    own = OwnCall(tokenizer_object=copy.deepcopy(PLAIN.backend_tokenizer))
    assert encode_texts(own, ["a"], special=None) == [[7, *PLAIN("a")["input_ids"]]]
    assert find_joint(own) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"pre_tokenizer": None},
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {"model": models.BPE({"a": 0}, [], dropout=0.5)},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
        {
            "post_processor": processors.TemplateProcessing(
                single="$A <|endoftext|>", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
            )
        },
    ],
    ids=str,
)
def test_what_is_not_known_to_come_apart_is_encoded_whole(changes: dict[str, Any]) -> None:
    assert find_joint(made(**changes)) is None


def test_garbage_is_left_and_looked_for_again() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with suppress(KeyError), uncollected():
            raise KeyError
        assert not gc.isenabled()
    assert gc.isenabled()
