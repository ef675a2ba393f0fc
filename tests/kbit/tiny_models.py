"""Tiny random models of every supported architecture, for the tests of whole models."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

VOCABULARY, HIDDEN, FFN, LAYERS = 96, 32, 80, 2
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
LLAMA = {
    **COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "neox": GPTNeoXConfig(
        **COMMON, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4
    ),
    "opt": OPTConfig(
        **COMMON,
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        word_embed_proj_dim=HIDDEN,
    ),
    "opt-350m": OPTConfig(
        **COMMON,
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=HIDDEN, n_inner=FFN, n_layer=LAYERS, n_head=4),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
    "llama-gqa": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mistral": MistralConfig(**LLAMA),
}
NAMES = list(CONFIGS)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    # Saving a model writes its dtype into the configuration it was made from.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model.to(dtype)


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit: as bytes, so that -0 and 0 differ."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].contiguous().view(-1).view(torch.uint8), b[k].contiguous().view(-1).view(torch.uint8))
        for k in a
    )
