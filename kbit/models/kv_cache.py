"""The size of a model's key and value cache, by its config.json. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

_DEPTHS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTHS: Final = ("hidden_size", "n_embd", "d_model")
_HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_CACHED: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_OTHER_STATES: Final = ("kv_lora_rank", "num_kv_shared_layers", "layers_block_type", "attn_layer_period")
_OTHER_NAMES: Final = ("mamba", "ssm", "rwkv", "linear_num_key_heads")


def kv_values_per_token(config: Mapping[str, Any]) -> int | None:
    """Return how many values one token takes in the cache: keys and values, of every layer and key-value head.

    2 x layers x key-value heads x head size. Layers that attend to a window are counted in full, as a cache of fixed
    size holds them.

    Args:
        config: a config.json; of a composite model, its text decoder's part counts.

    Returns:
        The number of values; None where the configuration doesn't say it, or the cache is of another kind (latent,
        shared between layers, recurrent states).
    """
    text = config.get("text_config")
    known = {**config, **text} if isinstance(text, Mapping) else dict(config)
    attention = known.get("attn_config")
    known |= dict(attention) if isinstance(attention, Mapping) else {}
    kinds = known.get("layer_types")
    if any(known.get(name) for name in _OTHER_STATES) or (kinds and not set(map(str, kinds)) <= _CACHED):
        return None
    if any(name.startswith(_OTHER_NAMES) for name in known):
        return None
    layers, width, heads = (_first(known, names) for names in (_DEPTHS, _WIDTHS, _HEADS))
    size = _first(known, ("head_dim",)) or (width // heads if width and heads else None)
    if not layers or not heads or not size:
        return None
    return 2 * layers * _kv_heads(known, heads) * size


def _kv_heads(known: Mapping[str, Any], heads: int) -> int:
    """Key-value heads: one under multi-query attention, which Falcon's new architecture says and doesn't have."""
    if known.get("multi_query") and not known.get("new_decoder_architecture"):
        return 1
    return _first(known, _KV_HEADS) or heads


def _first(config: Mapping[str, Any], names: Collection[str]) -> int | None:
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
