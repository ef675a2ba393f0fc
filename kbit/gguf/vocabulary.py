"""A tokenizer as GGUF files hold it: byte-level BPE, from and to tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kbit.errors import SpecError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""
_SPLITS: Final[Mapping[str, str]] = {
    " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+": "bloom",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ): "qwen2",
}
"""Patterns by which texts are cut into words, to llama.cpp's names for them; GPT-2's is that of ByteLevel itself."""
_PATTERNS: Final = {name: pattern for pattern, name in _SPLITS.items()}
_SPECIAL: Final = ("bos", "eos", "unk", "pad")
_KEYS: Final = {"unk": "unknown", "pad": "padding"}


def vocabulary_of(tokenizer: Any, size: int) -> dict[str, Any]:
    """Return a tokenizer's metadata.

    Args:
        tokenizer: transformers' fast tokenizer.
        size: entries of the model's vocabulary; those beyond the tokenizer's are marked as unused.

    Raises:
        SpecError: no byte-level BPE, or one that cuts texts in a way that has no name in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = json.loads(backend.to_str()) if backend is not None else {}
    model = about.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type") or type(tokenizer).__name__
        raise SpecError("format", "gguf", f"packed: the tokenizer is {kind}, and only byte-level BPE is written")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    for added in about.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name_of(about.get("pre_tokenizer")),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    for name in _SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id"] = int(number)
    found["tokenizer.ggml.add_bos_token"] = bool(_puts_bos(tokenizer))
    return found


def _puts_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _name_of(pre: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name for the way in which a text is cut before it is encoded."""
    parts = [] if pre is None else pre.get("pretokenizers", [pre])
    byte_level = next((p for p in parts if p["type"] == "ByteLevel"), None)
    splits = [p for p in parts if p["type"] == "Split"]
    if byte_level is not None and not byte_level.get("add_prefix_space"):
        if byte_level.get("use_regex", True) and len(parts) == 1:
            return "gpt-2"
        patterns = [p["pattern"].get("Regex", "") for p in splits]
        if len(patterns) == 1 and len(parts) == 2 and patterns[0] in _SPLITS:
            return _SPLITS[patterns[0]]
    allowed = "packed: the tokenizer cuts texts in a way that has no name in llama.cpp"
    raise SpecError("format", "gguf", f"{allowed} ({json.dumps(pre)[:200]})")
