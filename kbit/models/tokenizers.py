"""Tell tokenizers apart by everything that decides what they do, so that only equal ones share encoded data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

_WITHOUT_EFFECT: Final = frozenset(
    {
        "name_or_path",
        "chat_template",  # no evaluation applies one
        "model_max_length",  # nothing is truncated to it; where it is a model's context, that is told apart
        "deprecation_warnings",
        "auto_map",
    }
)


def tokenizer_hash(tokenizer: Any, files: Iterable[Path]) -> str:
    """SHA-256 of everything that decides what a tokenizer encodes, decodes and adds: two that share it are equal.

    Args:
        tokenizer: a transformers tokenizer.
        files: what it was read from. Only one without a backend in Rust, which can't be asked for its rules, is told
            apart by their contents; names and places of others differ between models that share a tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    else:
        rules = backend.to_str()
    kind = type(tokenizer)
    state = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "rules": rules,
        "settings": _settings(tokenizer.init_kwargs),
        "attributes": {k: v for k, v in _settings(vars(tokenizer)).items() if isinstance(v, bool | int | float | str)},
        # Not all in the backend: which of its tokens begin, end and pad a text is said beside it.
        "special_tokens": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())},
        "special_ids": [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad", "sep")],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in _WITHOUT_EFFECT and not k.endswith(("_file", "_path"))}
