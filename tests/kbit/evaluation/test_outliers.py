"""Outliers: correlations and shares against hooks and loops in float64, and planted features found exactly."""

from __future__ import annotations

import copy
import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config

from kbit.errors import ArchitectureError
from kbit.evaluation.outliers import OutliersEval
from kbit.evaluation.perplexity import PerplexityEval
from kbit.evaluation.rank_correlation import chance_deviation, spearman
from kbit.evaluation.watching import stored_as
from kbit.models.architectures import block_layers
from tests.kbit.models.test_outliers import PARTS, PREFIX, value_rows
from tests.kbit.tiny_models import CONFIGS, HIDDEN, VOCABULARY, bits_of, identical, tiny

WINDOWS, LENGTH = 5, 20
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def of_windows(windows: NDArray[np.int64]) -> OutliersEval:
    counts = np.full(len(windows), windows.shape[1], dtype=np.int64)
    return OutliersEval(
        text=PerplexityEval(windows=windows, window_bytes=counts, vocab_size=VOCABULARY, dataset_hash="")
    )


def some_windows(count: int = WINDOWS, length: int = LENGTH) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (count, length))


def lively(name: str) -> Any:
    """A tiny model in float64 with 16-bit weights, whose layer norms give some features large values."""
    model = tiny(name).half().double()
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            scale = torch.exp(torch.randn(module.weight.shape, generator=draw, dtype=torch.float64))
            module.weight.data.copy_(1.5 * scale)
    return model


def entering(model: Any, names: list[str], windows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """What enters layers, [windows, length, in_features], by their names: one window at a time."""
    modules, seen = dict(model.named_modules()), {name: [] for name in names}
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, x, n=name: seen[n].append(x[0].reshape(-1, x[0].shape[-1])))
        for name in names
    ]
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window[None]))
    for hook in hooks:
        hook.remove()
    return {name: np.stack([x.numpy() for x in each]) for name, each in seen.items()}


def spreads(model: Any, name: str, block: int) -> dict[str, NDArray[np.float64]]:
    """Standard deviations of rows, by what they are the rows of."""
    parts, prefix = PARTS[name], f"{PREFIX[name]}.{block}"
    weights = {n: layer.weight.double().tolist() for layer in block_layers(model) for n in [layer.name]}
    rows = {
        "value": value_rows(name, weights, parts, prefix),
        "attention": weights[f"{prefix}.{parts['attention']}"],
        "ffn1": weights[f"{prefix}.{parts['ffn1'][-1]}"],
        "ffn2": weights[f"{prefix}.{parts['ffn2']}"],
    }
    return {of: np.array(values).std(1) for of, values in rows.items()}


@pytest.mark.parametrize("name", ["neox", "opt", "gpt2", "llama-gqa"])
def test_its_numbers_are_those_of_hooks_and_loops(name: str) -> None:
    model, windows, parts = lively(name), some_windows(), PARTS[name]
    result = of_windows(windows).run(model, batch_tokens=3 * LENGTH)
    blocks = model.config.num_hidden_layers
    of_role = {
        role: [f"{PREFIX[name]}.{b}.{part if isinstance(part, str) else part[-1]}" for b in range(blocks)]
        for role, part in parts.items()
    }
    seen = entering(model, [n for names in of_role.values() for n in names], windows)
    made = [spreads(model, name, b) for b in range(blocks)]
    # neox has parallel branches: what FFN 1 reads comes from the previous block's FFN 2.
    is_parallel = name == "neox"
    pairs = {
        "value_output": [(made[b]["value"], of_role["attention"][b]) for b in range(blocks)],
        "ffn1_ffn2": [(made[b]["ffn1"], of_role["ffn2"][b]) for b in range(blocks)],
        "ffn2_qkv": [None, *((made[b - 1]["ffn2"], of_role["qkv"][b]) for b in range(1, blocks))],
        ("ffn2_ffn1" if is_parallel else "output_ffn1"): [
            (made[b]["attention"], of_role["ffn1"][b])
            if not is_parallel
            else ((made[b - 1]["ffn2"], of_role["ffn1"][b]) if b else None)
            for b in range(blocks)
        ],
    }
    assert {m.removeprefix("spearman_") for m in result.metrics if m.startswith("spearman_")} == set(pairs)
    for pair, of_blocks in pairs.items():
        magnitudes = [None if of is None else np.abs(seen[of[1]]).reshape(-1, len(of[0])) for of in of_blocks]
        there = [(of[0], m) for of, m in zip(of_blocks, magnitudes, strict=True) if of is not None]
        each = [spearmanr(s, m.mean(0)).statistic for s, m in there]
        assert result.metrics[f"spearman_{pair}"] == pytest.approx(np.mean(each), abs=1e-12)
        assert result.samples[pair][-len(each) :] == pytest.approx(each, abs=1e-6)
        assert np.isnan(result.samples[pair][: blocks - len(each)]).all()
        by_largest = [spearmanr(s, m.max(0)).statistic for s, m in there]
        assert result.samples[f"{pair}_largest"][-len(each) :] == pytest.approx(by_largest, abs=1e-6)
        pooled = spearmanr(np.concatenate([s for s, _ in there]), np.concatenate([m.mean(0) for _, m in there]))
        assert result.samples[f"{pair}_pooled"] == pytest.approx([pooled.statistic], abs=1e-6)
        chance = chance_deviation([s for s, _ in there], [m.mean(0) for _, m in there])
        assert result.samples[f"{pair}_chance"] == pytest.approx([chance], rel=1e-6)
        assert result.samples[f"{pair}_units"].tolist()[-len(each) :] == [len(s) for s, _ in there]
    least = [seen[n].min() for n in of_role["ffn2"]]
    assert result.samples["ffn1_ffn2_least"] == pytest.approx(least, rel=1e-6)
    assert (min(least) == 0) == (name == "opt")  # the one with a ReLU
    states = np.stack([[seen[of_role[role][b]] for role in ("qkv", "attention", "ffn1")] for b in range(blocks)])
    check_features(result, states)


def check_features(result: Any, states: NDArray[np.float64]) -> None:
    """Compare with the definition, of hidden states [blocks, states, windows, length, hidden], in loops."""
    blocks, _, windows, _, hidden = states.shape
    large = np.abs(states) >= 6.0
    positions = np.array([large[..., d].mean() for d in range(hidden)])
    layers = np.array(
        [np.mean([[large[b, :, w, :, d].any() for b in range(blocks)] for w in range(windows)]) for d in range(hidden)]
    )
    chosen = [d for d in range(hidden) if layers[d] >= 0.25 and positions[d] >= 0.06]
    assert 0 < len(chosen) < hidden / 2
    reached = large[..., chosen].any(-1)
    by_window = reached.any((1, 3)).mean(0)
    expected = {
        "outlier_features": len(chosen),
        "outlier_layers": by_window.mean(),
        "outlier_positions": reached.mean(),
        "widest_layers": layers[positions.argmax()],
        "widest_positions": positions.max(),
        "largest_input": np.abs(states).max(),
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.stderr["outlier_layers"] == pytest.approx(by_window.std(ddof=1) / math.sqrt(windows))
    in_windows = reached.mean((0, 1, 3))
    assert result.stderr["outlier_positions"] == pytest.approx(in_windows.std(ddof=1) / math.sqrt(windows))
    assert result.samples["block_positions"] == pytest.approx(reached.mean((1, 2, 3)), rel=1e-6)
    listed = result.samples["feature_dimension"]
    assert set(listed) == set(np.flatnonzero(positions))
    assert result.samples["feature_positions"] == pytest.approx(positions[listed], rel=1e-6)
    assert result.samples["feature_layers"] == pytest.approx(layers[listed], rel=1e-6)
    assert result.samples["feature_low"] == pytest.approx(states[..., listed].min((0, 1, 2, 3)), rel=1e-6)
    assert result.samples["feature_high"] == pytest.approx(states[..., listed].max((0, 1, 2, 3)), rel=1e-6)


class Planted(nn.Module):
    """Stands for a layer norm: small values, and in chosen dimensions given values at the first of 25 positions."""

    def __init__(self, values: dict[int, tuple[float, int]]) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(x)
        for dimension, (value, positions) in self.values.items():
            out.view(-1, 25, x.shape[-1])[:, :positions, dimension] = value  # OPT's FFN is given all tokens in a row
        return out


def planted(*of_blocks: tuple[dict[int, tuple[float, int]], dict[int, tuple[float, int]]]) -> Any:
    """An OPT of as many blocks, with what its attention and its FFN read given."""
    config = copy.deepcopy(CONFIGS["opt"])
    config.num_hidden_layers = len(of_blocks)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for block, (attention, ffn) in zip(model.model.decoder.layers, of_blocks, strict=True):
        block.self_attn_layer_norm, block.final_layer_norm = Planted(attention), Planted(ffn)
        block.self_attn.v_proj.weight.data.zero_()  # so that the attention output reads nothing that is large
        block.self_attn.v_proj.bias.data.zero_()
    return model


def test_planted_features_are_found_exactly_where_they_meet_the_definition() -> None:
    # 4 blocks of 3 hidden states, windows of 25 tokens: 300 positions, of which 6 % are 18.
    one = {
        3: (6.0, 9),  # in block 0 alone, twice 9: exactly 25 % and 6 %, of exactly the magnitude
        4: (5.9999, 25),  # everywhere, but too small
        5: (-50.0, 5),  # in all blocks, twice 5 each: 40 of 300
        6: (100.0, 2),  # in all blocks, at 16 positions: too few
    }
    rest = {d: one[d] for d in (4, 5, 6)}
    model = planted((one, one), (rest, rest), (rest, rest), (rest, rest))
    result = of_windows(some_windows(3, 25)).run(model, batch_tokens=50)
    assert result.metrics["outlier_features"] == 2
    assert dict(zip(result.samples["feature_dimension"], result.samples["feature_positions"], strict=True)) == {
        5: np.float32(40 / 300),
        3: np.float32(18 / 300),
        6: np.float32(16 / 300),
    }
    assert result.samples["feature_layers"].tolist() == [1.0, 0.25, 1.0]
    # Together, in block 0 twice 9 positions (5 of which both have), in the others twice 5.
    assert result.metrics["outlier_positions"] == pytest.approx((18 + 3 * 10) / 300)
    assert result.samples["block_positions"] == pytest.approx([18 / 75, 10 / 75, 10 / 75, 10 / 75])
    assert (result.metrics["outlier_layers"], result.metrics["widest_layers"]) == (1.0, 1.0)
    assert result.metrics["widest_positions"] == pytest.approx(40 / 300)
    assert result.metrics["largest_input"] == 100.0
    assert (result.stderr["outlier_layers"], result.stderr["outlier_positions"]) == (0.0, pytest.approx(0.0, abs=1e-15))
    assert result.n_tokens == 2 * 3 * 25  # a second time, to look for those that were found
    # In one of five blocks it is a feature of 20 % of the layers, and none of the model.
    five = planted(({7: (9.0, 25)}, {7: (9.0, 25)}), *[({}, {})] * 4)
    result = of_windows(some_windows(3, 25)).run(five, batch_tokens=50)
    assert (result.metrics["outlier_features"], result.metrics["outlier_positions"]) == (0.0, 0.0)
    assert result.metrics["widest_layers"] == pytest.approx(0.2)
    assert result.n_tokens == 3 * 25


def test_batches_change_nothing_and_the_model_stays_as_it_was() -> None:
    model, windows = lively("opt"), some_windows()
    before = bits_of(model)
    one, all_at_once = (of_windows(windows).run(model, batch_tokens=n) for n in (1, 10_000))
    assert one.metrics == pytest.approx(all_at_once.metrics)
    assert identical(before, bits_of(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_values_that_are_not_finite_are_a_divergence_and_no_correlation() -> None:
    model = planted(({2: (math.inf, 3)}, {}), ({}, {}))
    result = of_windows(some_windows(2, 25)).run(model, batch_tokens=100)
    assert result.diverged
    assert result.metrics["largest_input"] == math.inf or math.isnan(result.metrics["largest_input"])
    assert math.isnan(result.samples["output_ffn1"][0])


def test_experts_have_no_correlation_of_what_no_module_is_given() -> None:
    config = MixtralConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = some_windows()
    result = of_windows(windows).run(model, batch_tokens=60)
    assert {m for m in result.metrics if m.startswith("spearman_")} == {
        *("spearman_value_output", "spearman_output_ffn1", "spearman_ffn2_qkv")
    }
    # All experts read what their router reads.
    seen = entering(model, [f"model.layers.{b}.mlp.gate" for b in range(2)], windows)
    for b in range(2):
        spread = model.model.layers[b].self_attn.o_proj.weight.detach().half().double().std(1, correction=0).numpy()
        magnitude = np.abs(seen[f"model.layers.{b}.mlp.gate"].astype(np.float64)).mean((0, 1))
        assert result.samples["output_ffn1"][b] == pytest.approx(spearmanr(spread, magnitude).statistic, abs=1e-6)


def test_heads_of_another_width_are_no_hidden_state() -> None:
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[0].self_attn.v_proj.weight.data.fill_(5.0)  # large inputs of the attention output
    result = of_windows(some_windows()).run(model, batch_tokens=60)
    assert result.metrics["largest_input"] < 6
    assert result.samples["value_output_units"].tolist() == [64]


def test_a_model_of_unknown_order_is_refused_by_name() -> None:
    config = Phi3Config(
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    said = "outliers can't be measured: which layer follows which isn't known in Phi3ForCausalLM: .*qkv_proj"
    with pytest.raises(ArchitectureError, match=said):
        of_windows(some_windows()).run(model, batch_tokens=60)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_count_as_they_were_stored_whatever_is_computed_in(dtype: torch.dtype) -> None:
    stored = tiny("opt", dtype)
    assert stored_as(block_layers(stored)) == dtype
    assert stored_as(block_layers(stored.float())) == dtype


def test_equal_values_share_their_mean_rank() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.integers(0, 7, 200).astype(float), draw.integers(0, 5, 200).astype(float)
    rank = [np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v]) for v in (a, b)]
    assert (rank[0] == rankdata(a)).all()
    assert spearman(a, b) == pytest.approx(np.corrcoef(*rank)[0, 1], abs=1e-12)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, np.ones(200)))
    assert math.isnan(spearman(a, np.where(a == 1, np.inf, a)))


def test_chance_is_that_of_all_permutations_of_the_dimensions() -> None:
    draw = np.random.default_rng(5)
    # Blocks that are alike, as those of a residual stream are.
    base = draw.normal(size=(2, 6))
    spreads, magnitudes = (list(of + 0.3 * draw.normal(size=(3, 6))) for of in base)
    each = [
        np.mean([spearmanr(s[list(order)], m).statistic for s, m in zip(spreads, magnitudes, strict=True)])
        for order in permutations(range(6))
    ]
    assert chance_deviation(spreads, magnitudes) == pytest.approx(np.std(each), abs=1e-12)
    assert np.mean(each) == pytest.approx(0, abs=1e-12)
    assert np.std(each) > 1.3 / math.sqrt(3 * 5)  # of independent blocks it would be less
    # Of different widths they are independent: variances of 1/5 and 1/3 by themselves. A constant block says nothing.
    other, constant = draw.normal(size=(2, 4)), np.ones(6)
    found = chance_deviation([spreads[0], other[0], constant], [magnitudes[0], other[1], base[0]])
    assert found == pytest.approx(math.sqrt(1 / 5 + 1 / 3) / 2)
    assert math.isnan(chance_deviation([constant], [base[0]]))


@needs_gpu
def test_a_gpu_finds_the_same() -> None:
    model, windows = lively("opt"), some_windows()
    here = of_windows(windows).run(model, batch_tokens=60)
    there = of_windows(windows).run(model.to("cuda"), batch_tokens=60)
    assert there.metrics == pytest.approx(here.metrics)
    assert there.samples["feature_dimension"].tolist() == here.samples["feature_dimension"].tolist()
