"""Texts to token ids, in batches and quickly, exactly as a tokenizer's own call gives them.

The steps of a fast tokenizer are normalizing, cutting the text into words, and merging within each word. So a text that
is cut between two words anyway can be encoded by parts: the context of a question once for all its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unicodedata import is_normalized

ENCODE_BATCH: Final = 1000
"""Texts that are encoded at once: some hundred bytes a token while they are."""

BYTE_LEVEL: Final = "ByteLevel"
"""GPT-2's words, as the library has them built in."""
_STOPS: Final = ".,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c"
_BLOOM: Final = rf" ?[^(\s|[{_STOPS}])]+"
_LLAMA_3, _QWEN_2 = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
AFTER_A_WORD: Final[Mapping[str, str]] = {
    **dict.fromkeys((BYTE_LEVEL, _LLAMA_3, _QWEN_2), " "),
    _BLOOM: rf" [^\s(|){_STOPS}]",
}
"""Rules that cut a text into words, and what a second part begins with where they cut before it whatever the first part
is, if that ends in no blank.

None of the patterns has a word with a space after what is no blank, and only of blanks do they look at what follows: so
the first part has the words that it has alone, and the second begins with a word of its own. BLOOM's takes what lies
between words for words too, so a word has to begin there.
"""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Where a tokenizer cuts any text, so that the parts' tokens are those of the whole.

    Attributes:
        second: what the second part begins with.
        added: tokens that are looked for before words are; None without any.
        form: the Unicode normal form that texts are brought into; None without one.
    """

    second: re.Pattern[str]
    added: re.Pattern[str] | None
    form: Any

    def lies_between(self, first: str, second: str) -> bool:
        """Tell whether the tokens of ``first + second`` are those of ``first`` and those of ``second``, special tokens
        apart.
        """
        # What Python takes for a blank holds all that the patterns do.
        if not first or first[-1].isspace() or not self.second.match(second):
            return False
        text = first + second
        if self.form is not None and not is_normalized(self.form, text):
            return False
        return self.added is None or self.added.search(text) is None


def find_joint(tokenizer: Any) -> Joint | None:
    """Return where a tokenizer cuts any text; None where its parts are none of those that are known here."""
    if not _is_direct(tokenizer):
        return None
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return None
    normalizer = _part(backend.normalizer)
    second = AFTER_A_WORD.get(_rule(_part(backend.pre_tokenizer)))
    if second is None or normalizer not in ({}, {"type": "NFC"}):
        return None
    with_special, alone = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    if with_special[len(with_special) - len(alone) :] != alone:
        return None  # a token at the end, which a first part must not have
    added = [re.escape(token.content) for token in backend.get_added_tokens_decoder().values()]
    return Joint(
        second=re.compile(second),
        added=re.compile("|".join(added)) if added else None,
        form=normalizer.get("type"),
    )


def encode_texts(tokenizer: Any, texts: Sequence[str], *, special: bool | None) -> list[list[int]]:
    """Return the token ids of texts.

    Args:
        tokenizer: a transformers tokenizer. Of a fast one the library's own batches are taken, in parallel where the
            process allows it (``TOKENIZERS_PARALLELISM``); transformers would make several objects of each text.
        texts: any.
        special: add special tokens; None is the tokenizer's default.
    """
    if not texts:
        return []
    ids_only = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    options = {} if special is None else {"add_special_tokens": special}
    batches = (texts[start : start + ENCODE_BATCH] for start in range(0, len(texts), ENCODE_BATCH))
    if not _is_direct(tokenizer):
        return [ids for batch in batches for ids in tokenizer(list(batch), **ids_only, **options)["input_ids"]]
    # A call, be it of nothing, leaves the backend without truncation and padding, as this one would.
    tokenizer([""], **ids_only, **options)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    add = special is not False
    return [encoding.ids for batch in batches for encoding in encode(list(batch), add_special_tokens=add)]


def _is_direct(tokenizer: Any) -> bool:
    """Tell whether a tokenizer's call is transformers' own around the fast library's."""
    from transformers import PreTrainedTokenizerFast as Fast

    cls: Any = type(tokenizer)
    return issubclass(cls, Fast) and cls.__call__ is Fast.__call__ and cls._encode_plus is Fast._encode_plus


def _part(component: Any) -> dict[str, Any]:
    """Return a part of a tokenizer as tokenizer.json has it; {} for None."""
    found: dict[str, Any] = {} if component is None else json.loads(component.__getstate__())
    return found


def _rule(words: Mapping[str, Any]) -> str:
    """Return how a pre-tokenizer cuts words, as in ``AFTER_A_WORD``; '' for what isn't there."""
    if words.get("type") == BYTE_LEVEL:
        return BYTE_LEVEL if words["use_regex"] and not words["add_prefix_space"] else ""
    match words:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return str(pattern)
    return ""
