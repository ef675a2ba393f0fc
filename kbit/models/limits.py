"""What a configuration says of a model's dimensions, under the names that architectures give them. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any, Final

WIDTHS: Final = ("hidden_size", "n_embd", "d_model")
"""Of the residual stream."""
DEPTHS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_CONTEXT: Final = ("n_positions", "max_position_embeddings", "n_ctx")
_BOUNDS: Final = (
    *("max_seq_len", "max_seq_length", "max_sequence_length", "seq_length"),
    *("context_length", "model_max_length", "max_target_positions"),
)
"""Names of a largest length where there is none of the usual ones (MPT, and code that repositories bring): they can
lower the tokenizer's, and never raise it.
"""
_DEFAULT_CONTEXT: Final = 2048
_NO_CONTEXT: Final = 10**9
"""Tokenizers without a limit say a number beyond this one."""


def of_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's keys, with those of its text decoder's part in place of the same ones of a composite."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else dict(config)


def first_count(config: Mapping[str, Any], names: Collection[str]) -> int | None:
    """Return the first whole number above 0 under these names; None where there is none."""
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def context_of(config: Any, tokenizer_limit: int) -> int:
    """Return a model's context in tokens.

    Args:
        config: a transformers configuration. A composite one is asked first, then the one of its text decoder.
        tokenizer_limit: the tokenizer's ``model_max_length``; it counts where the configuration names no context. Where
            it is none either, 2048 does (ALiBi has no limit).
    """
    known = named_context(config)
    if known is not None:
        return known
    fallback = int(tokenizer_limit) if tokenizer_limit < _NO_CONTEXT else _DEFAULT_CONTEXT
    return min(fallback, _first(config, _BOUNDS) or fallback)


def named_context(config: Any) -> int | None:
    """Return the context that a configuration names by itself; None where it names none."""
    known = _first(config, _CONTEXT)
    return known if known is None or known < _NO_CONTEXT else _DEFAULT_CONTEXT


def vocabulary_of(config: Any) -> int:
    """Return the entries of a model's vocabulary, padding included; of a composite configuration, its text decoder's.

    Raises:
        AttributeError: the configuration names none.
    """
    size = _first(config, ("vocab_size",))
    if size is None:
        raise AttributeError(f"{type(config).__name__} has no vocab_size, nor has its text decoder's configuration")
    return size


def as_namespace(config: Mapping[str, Any]) -> SimpleNamespace:
    """Return the contents of a config.json as a configuration that the functions here can ask."""
    text = config.get("text_config")
    part = as_namespace(text) if isinstance(text, Mapping) else None
    made = SimpleNamespace(**config)
    made.get_text_config = lambda **_: part or made
    return made


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(part, name, None) for part in _parts(config) for name in names)
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def _parts(config: Any) -> tuple[Any, ...]:
    """Return the configuration, and that of its text decoder where it is another."""
    ask = getattr(config, "get_text_config", None)
    text = config if ask is None else ask(decoder=True)
    return (config,) if text is config else (config, text)
