"""Proxy outlier dimensions against loops over rows and heads in plain Python, float64."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, GPTNeoXConfig, PhiConfig

from kbit import QuantSpec, quantize_model
from kbit.errors import ArchitectureError
from kbit.models.outliers import outlier_columns
from tests.kbit.tiny_models import CONFIGS, HIDDEN, LAYERS, NAMES, bits_of, identical, tiny

HEADS, HEAD_DIM = 4, HIDDEN // 4
PREFIX = {
    "neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "opt-350m": "model.decoder.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "llama-gqa": "model.layers",
    "llama-tied": "model.layers",
    "mistral": "model.layers",
}
LLAMA = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention": "self_attn.o_proj",
    "ffn1": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn2": "mlp.down_proj",
}
OPT = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention": "self_attn.out_proj",
    "ffn1": ["fc1"],
    "ffn2": "fc2",
}
PARTS = {
    "neox": {
        "qkv": ["attention.query_key_value"],
        "attention": "attention.dense",
        "ffn1": ["mlp.dense_h_to_4h"],
        "ffn2": "mlp.dense_4h_to_h",
    },
    "bloom": {
        "qkv": ["self_attention.query_key_value"],
        "attention": "self_attention.dense",
        "ffn1": ["mlp.dense_h_to_4h"],
        "ffn2": "mlp.dense_4h_to_h",
    },
    "gpt2": {"qkv": ["attn.c_attn"], "attention": "attn.c_proj", "ffn1": ["mlp.c_fc"], "ffn2": "mlp.c_proj"},
    "opt": OPT,
    "opt-350m": OPT,
    "llama-gqa": LLAMA,
    "llama-tied": LLAMA,
    "mistral": LLAMA,
}


def spread(rows: list[list[float]]) -> list[float]:
    return [statistics.pstdev(row) for row in rows]


def largest(values: list[float], fraction: float) -> list[int]:
    count = max(1, round(fraction * len(values)))
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def value_rows(name: str, weight: dict[str, list[list[float]]], parts: dict, block: str) -> list[list[float]]:
    """The rows that make input dimension 0, 1, 2 ... of the attention output, head by head."""
    rows = []
    for head in range(HEADS):
        for d in range(HEAD_DIM):
            if name in ("neox", "bloom"):  # q, k, v of head 0, then of head 1, ...
                rows.append(weight[f"{block}.{parts['qkv'][0]}"][head * 3 * HEAD_DIM + 2 * HEAD_DIM + d])
            elif name == "gpt2":  # all q, all k, all v
                rows.append(weight[f"{block}.{parts['qkv'][0]}"][2 * HIDDEN + head * HEAD_DIM + d])
            else:
                value = weight[f"{block}.{parts['qkv'][2]}"]
                kv_heads = len(value) // HEAD_DIM
                rows.append(value[head * kv_heads // HEADS * HEAD_DIM + d])
    return rows


def columns_by_hand(name: str, model: nn.Module, fraction: float) -> dict[str, list[int] | None]:
    modules = {k: m for k, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2}
    weight = {k: (m.weight.t() if name == "gpt2" else m.weight).half().double().tolist() for k, m in modules.items()}
    parts, columns, before = PARTS[name], {}, None
    for number in range(LAYERS):
        block = f"{PREFIX[name]}.{number}"
        for key in parts["qkv"]:
            columns[f"{block}.{key}"] = before
        columns[f"{block}.{parts['attention']}"] = largest(spread(value_rows(name, weight, parts, block)), fraction)
        after_attention = largest(spread(weight[f"{block}.{parts['attention']}"]), fraction)
        for key in parts["ffn1"]:
            columns[f"{block}.{key}"] = before if name == "neox" else after_attention  # parallel residual
        columns[f"{block}.{parts['ffn2']}"] = largest(spread(weight[f"{block}.{parts['ffn1'][-1]}"]), fraction)
        before = largest(spread(weight[f"{block}.{parts['ffn2']}"]), fraction)
    return columns


def scattered(name: str) -> nn.Module:
    """A tiny model whose rows have spreads that differ widely."""
    model = tiny(name)
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if hasattr(module, "weight") and module.weight.ndim == 2:
            rows = module.weight.shape[1] if name == "gpt2" else module.weight.shape[0]
            scale = torch.rand(rows, generator=generator) * 3
            module.weight.data.mul_(scale if name == "gpt2" else scale[:, None])
    return model


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_columns_follow_the_previous_layers_spread(name, fraction):
    model = scattered(name)
    ours = {k: None if v is None else v.tolist() for k, v in outlier_columns(model, fraction).items()}
    assert ours == columns_by_hand(name, model, fraction)


@pytest.mark.parametrize("name", NAMES)
def test_kept_columns_of_a_model_are_its_original_values(name):
    model = scattered(name).half()
    before = bits_of(model)
    columns = outlier_columns(model, 0.1)
    with quantize_model(model, QuantSpec(bits=3, dtype="int", outlier_fraction=0.1)) as handle:
        after = bits_of(model)
        for key in handle.layers:
            old, new = before[f"{key}.weight"], after[f"{key}.weight"]
            old, new = (old.t(), new.t()) if name == "gpt2" else (old, new)
            kept = [] if columns[key] is None else columns[key].tolist()
            others = [c for c in range(old.shape[1]) if c not in kept]
            assert torch.equal(old[:, kept], new[:, kept])
            assert not torch.equal(old[:, others], new[:, others])
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_kept_columns_and_their_indices_are_counted(name):
    model = scattered(name).half()
    columns = outlier_columns(model, 0.1)
    plain = quantize_model(model, QuantSpec(bits=4, dtype="int"))
    plain.restore()
    proxy = quantize_model(model, QuantSpec(bits=4, dtype="int", outlier_fraction=0.1))
    extra = sum(c.numel() * (16 * proxy.layers[k][0] + 32) for k, c in columns.items() if c is not None)
    assert proxy.total_bits == plain.total_bits + extra
    weights = sum(rows * inputs for rows, inputs in plain.layers.values())
    assert proxy.total_bits_nominal == pytest.approx(plain.total_bits_nominal + weights * 0.1 * 12)


def test_the_parallel_residual_flag_decides_what_ffn_1_follows():
    values = {**CONFIGS["neox"].to_dict(), "use_parallel_residual": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**values))
    columns = outlier_columns(model, 0.1)
    assert columns["gpt_neox.layers.0.mlp.dense_h_to_4h"] is not None
    assert columns["gpt_neox.layers.0.attention.query_key_value"] is None
    model.config.use_parallel_residual = True
    assert outlier_columns(model, 0.1)["gpt_neox.layers.0.mlp.dense_h_to_4h"] is None


def test_phi_is_parallel_without_a_flag():
    config = PhiConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    columns = outlier_columns(AutoModelForCausalLM.from_config(config), 0.1)
    assert columns["model.layers.0.mlp.fc1"] is None
    assert columns["model.layers.1.mlp.fc1"].tolist() == columns["model.layers.1.self_attn.q_proj"].tolist()


def test_ties_go_to_the_lower_index():
    model = tiny("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight.copy_(torch.tensor([1.0, -1.0]).repeat(16))
    columns = outlier_columns(model, 0.05)
    assert columns["model.decoder.layers.0.fc2"].tolist() == [0, 1, 2, 3]


def test_columns_come_from_the_originals_and_not_from_quantized_layers():
    """The second block's columns need the first block's weights, which are quantized by then."""
    model = scattered("opt")
    expected = outlier_columns(model, 0.1)
    with torch.no_grad():
        keys = [k for k in expected if k.endswith("q_proj") and expected[k] is not None]
    with quantize_model(model, QuantSpec(bits=2, dtype="int", blocksize=None, outlier_fraction=0.1)):
        kept = dict(model.named_modules())
        original = scattered("opt").half().float().state_dict()
        for key in keys:
            same = (kept[key].weight == original[f"{key}.weight"]).all(0).nonzero().view(-1).tolist()
            assert set(expected[key].tolist()) <= set(same)


class Nameless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))


def test_unknown_layer_names_are_refused_only_where_the_order_matters():
    model = Nameless()
    quantize_model(model, QuantSpec(bits=4, dtype="int")).restore()
    before = bits_of(model)
    with pytest.raises(ArchitectureError, match=r"blocks\.0\.0 has a name whose role isn't known.*outlier_fraction=0"):
        quantize_model(model, QuantSpec(bits=4, dtype="int", outlier_fraction=0.02))
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("multi_query", [True, False])
def test_a_fused_qkv_of_another_layout_is_refused(multi_query):
    config = GPTBigCodeConfig(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, multi_query=multi_query)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match="c_attn"):
        outlier_columns(model, 0.02)
