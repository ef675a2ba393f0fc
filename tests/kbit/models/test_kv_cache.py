"""The size of a cache by config.json is that of the cache that transformers fills; None where it can't be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kbit.models.kv_cache import kv_values_per_token

SMALL: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
    "llama": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "intermediate_size": 32,
    },
    "qwen3": {
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        "intermediate_size": 32,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": True},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_token_takes_as_many_values_as_its_cache_has(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=64, **SMALL[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_values_per_token(config.to_dict()) == held / 5


def test_a_multi_query_model_of_falcons_new_architecture_has_the_heads_that_it_says() -> None:
    config = {"hidden_size": 64, "n_layer": 2, "n_head": 8, "num_kv_heads": 4, "multi_query": True}
    assert kv_values_per_token(config) == 2 * 2 * 1 * 8
    assert kv_values_per_token({**config, "new_decoder_architecture": True}) == 2 * 2 * 4 * 8


def test_of_a_composite_model_the_text_decoders_part_counts() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2}
    assert kv_values_per_token({"text_config": text, "vision_config": {"hidden_size": 1}}) == 2 * 3 * 2 * 8


@pytest.mark.parametrize(
    "more",
    [
        {"kv_lora_rank": 512},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"mamba_n_heads": 8},
        {"attn_layer_period": 8},
        {"num_attention_heads": None},
    ],
    ids=lambda more: next(iter(more)),
)
def test_another_kind_of_cache_has_no_size_that_we_know(more: dict[str, Any]) -> None:
    plain = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    assert kv_values_per_token(plain) == 256
    assert kv_values_per_token({**plain, "layer_types": ["sliding_attention", "full_attention"]}) == 256
    assert kv_values_per_token({**plain, **more}) is None
