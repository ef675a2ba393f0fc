"""The size of a model's key and value cache, by its config.json. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kbit.models.limits import DEPTHS, HEADS, KV_HEADS, WIDTHS, first_count, of_decoder

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
    known = of_decoder(config)
    attention = known.get("attn_config")
    known |= dict(attention) if isinstance(attention, Mapping) else {}
    kinds = known.get("layer_types")
    if any(known.get(name) for name in _OTHER_STATES) or (kinds and not set(map(str, kinds)) <= _CACHED):
        return None
    if any(name.startswith(_OTHER_NAMES) for name in known):
        return None
    layers, width, heads = (first_count(known, names) for names in (DEPTHS, WIDTHS, HEADS))
    size = first_count(known, ("head_dim",)) or (width // heads if width and heads else None)
    if not layers or not heads or not size:
        return None
    return 2 * layers * _kv_heads(known, heads) * size


def _kv_heads(known: Mapping[str, Any], heads: int) -> int:
    """Key-value heads: one under multi-query attention, which Falcon's new architecture says and doesn't have."""
    if known.get("multi_query") and not known.get("new_decoder_architecture"):
        return 1
    return first_count(known, KV_HEADS) or heads
