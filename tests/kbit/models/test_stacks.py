"""Experts: each matrix of a stack is a layer of its own, by whatever way it is stored; nothing is left in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, XLNetConfig

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.errors import ArchitectureError
from kbit.models.architectures import block_layers
from kbit.models.outliers import outlier_columns
from kbit.models.stacks import stacks_of
from tests.kbit.architectures import build
from tests.kbit.tiny_models import bits_of, identical

INT4 = QuantSpec(bits=4, dtype="int")
COMMON = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
MIXTRAL = MixtralConfig(vocab_size=2048, **COMMON, **HEADS)
GPT_OSS = GptOssConfig(vocab_size=256, **COMMON, **HEADS)


def made(config: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).half().eval()


def test_a_tiny_mixtral_has_the_bits_of_its_slices() -> None:
    model = made(MIXTRAL)
    before = bits_of(model)
    experts = [before[f"model.layers.{i}.mlp.experts.{n}"] for i in (0, 1) for n in ("gate_up_proj", "down_proj")]
    linear = [value for name, value in before.items() if "self_attn" in name]
    matrices = [*linear, *(slice_ for stack in experts for slice_ in stack)]
    assert [list(stack.shape) for stack in experts] == 2 * [[4, 256, 64], [4, 64, 128]]
    by_hand = sum(quantize(m, INT4).nbits - 16 * m.numel() for m in matrices)
    with quantize_model(model, INT4) as handle:
        assert handle.total_bits == 16 * sum(p.numel() for p in model.parameters()) + by_hand == 5_147_648
        assert handle.bits_per_param == 4.25
        assert len(handle.layers) == len(matrices) == 24
        for i in (0, 1):
            for name, shape in (("gate_up_proj", (256, 64)), ("down_proj", (64, 128))):
                stack = f"model.layers.{i}.mlp.experts.{name}"
                for expert in range(4):
                    assert handle.layers[f"{stack}.{expert}"] == shape
                    expected = dequantize(quantize(before[stack][expert], INT4))
                    assert torch.equal(model.get_parameter(stack)[expert], expected)
            gate = f"model.layers.{i}.mlp.gate.weight"
            assert torch.equal(model.get_parameter(gate), before[gate])
    assert identical(bits_of(model), before)


def test_matrices_that_are_stored_transposed_are_quantized_as_out_by_in() -> None:
    model = made(GPT_OSS)
    before = bits_of(model)
    spec = QuantSpec(bits=3, dtype="quantile", center=True, blocksize=48)
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    with quantize_model(model, spec) as handle:
        assert before[stack].shape == (4, 64, 256)
        assert handle.layers[f"{stack}.2"] == (256, 64)
        expected = dequantize(quantize(before[stack][2].t().contiguous(), spec)).t()
        assert torch.equal(model.get_parameter(stack)[2], expected)
    assert identical(bits_of(model), before)


def test_both_orientations_of_a_gated_expert_are_told_by_shapes_even_where_they_are_square() -> None:
    class Experts(nn.Module):
        def __init__(self, fused: tuple[int, ...], down: tuple[int, ...]) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(fused))
            self.down_proj = nn.Parameter(torch.zeros(down))

    rows = stacks_of(Experts((3, 64, 64), (3, 64, 32)))
    columns = stacks_of(Experts((3, 64, 64), (3, 32, 64)))
    assert {s.transposed for s in rows.values()} == {False}
    assert {s.transposed for s in columns.values()} == {True}
    assert stacks_of(Experts((3, 64, 48), (3, 64, 32))) == {}


def test_a_matrix_that_would_stay_in_16_bits_unseen_is_refused_by_name() -> None:
    with pytest.raises(ArchitectureError, match=r"rel_attn\.q \[64, 4, 16\].*stay|stay.*rel_attn\.q \[64, 4, 16\]"):
        block_layers(made(XLNetConfig(vocab_size=96, d_model=64, n_layer=2, n_head=4, d_inner=128)))


def test_packing_is_refused_with_the_reason() -> None:
    model = made(MIXTRAL)
    before = bits_of(model)
    with pytest.raises(ArchitectureError, match=r"experts\.gate_up_proj\.0: it is one of the matrices of a stack"):
        quantize_model(model, INT4, packed=True)
    assert identical(bits_of(model), before)


def largest(spread: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(spread)), key=lambda i: (-float(spread[i]), i))[:count])


def rows(weight: torch.Tensor) -> torch.Tensor:
    """Population standard deviation of each row."""
    return (weight.double() - weight.double().mean(1, keepdim=True)).square().mean(1).sqrt()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_outliers_of_experts_follow_the_attention_output_and_their_own_up_projection(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # rows of different spread, whichever way they lie
                parameter.mul_(torch.rand(parameter.shape[-2], 1)).mul_(torch.rand(parameter.shape[-1]))
    state = model.state_dict()
    columns = outlier_columns(model, 0.05)
    downs = []
    for expert in range(4):
        stacks = [state[f"model.layers.0.mlp.experts.{n}"][expert] for n in ("gate_up_proj", "down_proj")]
        fused, down = (m.t() if name == "gpt_oss" else m for m in stacks)
        half = fused.shape[0] // 2
        up = fused[1::2] if name == "gpt_oss" else fused[half:]
        entering = rows(state["model.layers.0.self_attn.o_proj.weight"])
        found = {n: columns[f"model.layers.0.mlp.experts.{n}.{expert}"] for n in ("gate_up_proj", "down_proj")}
        assert found["gate_up_proj"].tolist() == largest(entering, 3)
        assert found["down_proj"].tolist() == largest(rows(up), round(0.05 * half))
        downs.append(down)
    if name == "qwen2_moe":
        shared = "model.layers.0.mlp.shared_expert"
        assert columns[f"{shared}.up_proj"].tolist() == largest(entering, 3)
        assert columns[f"{shared}.down_proj"].tolist() == largest(rows(state[f"{shared}.up_proj.weight"]), 3)
        downs.append(state[f"{shared}.down_proj.weight"])
    assert columns["model.layers.0.self_attn.q_proj"] is None
    assert columns["model.layers.1.self_attn.q_proj"].tolist() == largest(rows(torch.cat(downs, 1)), 3)


def test_a_second_feed_forward_that_is_no_expert_has_no_known_order() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(16, 8)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
            self.first, self.second = Mlp(), Mlp()

    model = nn.Module()
    model.config, model.layers = SimpleNamespace(num_attention_heads=2), nn.ModuleList([Block()])
    with pytest.raises(ArchitectureError, match=r"layers\.0\.second\.up_proj belongs to a second feed-forward"):
        outlier_columns(model, 0.1)
