"""A tokenizer as GGUF files hold it: byte-level BPE, from and to tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kbit.errors import CheckpointError, SpecError

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
_Part = tuple[str, object]
"""A part of what cuts a text: its type, with the pattern of a Split, or the flag that decides."""
CUTS: Final[Mapping[str, tuple[_Part, ...]]] = {
    "gpt-2": (("ByteLevel", True),),
    "smollm": (("Digits", True), ("ByteLevel", True)),
    **{name: (("Split", pattern), ("ByteLevel", False)) for pattern, name in _SPLITS.items()},
}
"""By llama.cpp's names, in order."""
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
    cuts = tuple(map(_cut, parts))
    for name, known in CUTS.items():
        if cuts == known:
            return name
    allowed = "packed: the tokenizer cuts texts in a way that has no name in llama.cpp"
    raise SpecError("format", "gguf", f"{allowed} ({json.dumps(pre)[:200]})")


def _cut(part: Mapping[str, Any]) -> _Part | None:
    match part["type"]:
        case "ByteLevel" if not part.get("add_prefix_space"):
            return "ByteLevel", bool(part.get("use_regex", True))
        case "Digits":
            return "Digits", bool(part.get("individual_digits"))
        case "Split" if part.get("behavior") == "Isolated" and not part.get("invert"):
            return "Split", part["pattern"].get("Regex")
    return None


def _pre_tokenizer(name: str) -> dict[str, Any]:
    """Return what cuts a text, as tokenizer.json has it: the inverse of ``_name_of``."""
    parts: list[dict[str, Any]] = []
    for kind, what in CUTS[name]:
        match kind:
            case "ByteLevel":
                parts.append({"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": what})
            case "Digits":
                parts.append({"type": kind, "individual_digits": what})
            case _:
                parts.append({"type": kind, "pattern": {"Regex": what}, "behavior": "Isolated", "invert": False})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def tokenizer_of(metadata: Mapping[str, Any], context: int) -> dict[str, dict[str, Any]]:
    """Return a tokenizer's files by name, of the metadata that ``vocabulary_of`` gives.

    Raises:
        CheckpointError: no byte-level BPE, or one that cuts texts in a way that isn't known here.
    """
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre not in CUTS:
        raise CheckpointError(
            f"the tokenizer is {kind!r} with pre={pre!r}: byte-level BPE ('gpt2') with {', '.join(CUTS)} is read"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = [
        {"id": number, "content": text, "special": kind == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    special = {
        f"{name}_token": tokens[metadata[key]]
        for name in _SPECIAL
        if (key := f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id") in metadata
    }
    bos = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token") else None
    vocabulary = {text: n for n, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    about = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None},
        "pre_tokenizer": _pre_tokenizer(str(pre)),
        "post_processor": None if bos is None else _bos_first(bos, vocabulary[bos]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False},
            **{"vocab": vocabulary, "merges": metadata["tokenizer.ggml.merges"]},
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **special}
    return {"tokenizer.json": about, "tokenizer_config.json": settings}


def _bos_first(bos: str, number: int) -> dict[str, Any]:
    """Return what puts a token before each text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
