"""Whole models: which layers are taken, the way back, and the count of bits."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kbit import QuantSpec, codebook, dequantize, quantize, quantize_model
from kbit.errors import ArchitectureError, WeightError
from tests.kbit.tiny_models import FFN, HIDDEN, LAYERS, NAMES, bits_of, identical, tiny

ATTENTION = 4 * HIDDEN * HIDDEN
WEIGHTS_A_BLOCK = {
    "neox": ATTENTION + 2 * HIDDEN * FFN,
    "opt": ATTENTION + 2 * HIDDEN * FFN,
    "opt-350m": ATTENTION + 2 * HIDDEN * FFN,
    "gpt2": ATTENTION + 2 * HIDDEN * FFN,
    "bloom": ATTENTION + 2 * HIDDEN * 4 * HIDDEN,
    "llama-gqa": 3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN,  # K and V have half of the heads
    "llama-tied": 3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN,
    "mistral": 3 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN,
}
INT4 = QuantSpec(bits=4, dtype="int")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_restore_gives_the_originals_back_bit_for_bit(name, dtype):
    model = tiny(name, dtype)
    before = bits_of(model)
    spec = QuantSpec(bits=3, dtype="quantile", center=True, outlier_fraction=0.05)
    handle = quantize_model(model, spec)
    assert not identical(bits_of(model), before)
    handle.restore()
    assert identical(bits_of(model), before)
    quantize_model(model, INT4)
    handle.restore()  # a second time: nothing is left to give back
    assert not identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_as_a_context_manager_it_restores_at_the_end_and_on_errors(name):
    model = tiny(name)
    before = bits_of(model)
    with quantize_model(model, INT4):
        assert not identical(bits_of(model), before)
    assert identical(bits_of(model), before)
    with pytest.raises(ZeroDivisionError), quantize_model(model, INT4):
        _ = 1 / 0
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_linear_layers_of_attention_and_ffn_are_taken_and_nothing_else(name):
    model = tiny(name, torch.float16)
    before = bits_of(model)
    handle = quantize_model(model, INT4)
    changed = {
        key.removesuffix(".weight") for key, value in bits_of(model).items() if not torch.equal(value, before[key])
    }
    assert changed == set(handle.layers)
    assert sum(rows * columns for rows, columns in handle.layers.values()) == LAYERS * WEIGHTS_A_BLOCK[name]
    assert not [
        key for key in handle.layers if any(word in key for word in ("embed", "head", "norm", "project", "wte"))
    ]
    assert handle.layers == {
        key: tuple(reversed(shape)) if name == "gpt2" else tuple(shape)
        for key in handle.layers
        for shape in [before[f"{key}.weight"].shape]
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_what_quantize_gives_for_its_matrix(name):
    model = tiny(name)
    modules = dict(model.named_modules())
    before = bits_of(model)
    spec = QuantSpec(bits=3, dtype="normal", blocksize=48, scheme="group")
    handle = quantize_model(model, spec)
    for key in handle.layers:
        weight = before[f"{key}.weight"]
        if name == "gpt2":  # Conv1D is stored [in, out]
            expected = dequantize(quantize(weight.t().contiguous(), spec)).t()
        else:
            expected = dequantize(quantize(weight, spec))
        assert torch.equal(modules[key].weight, expected)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_counted_by_hand(name):
    model = tiny(name, torch.float16)
    parameters = sum(p.numel() for p in set(model.parameters()))
    quantized = LAYERS * WEIGHTS_A_BLOCK[name]
    rest = 16 * (parameters - quantized)

    handle = quantize_model(model, INT4)  # every matrix has whole blocks of 64
    assert handle.bits_per_param == 4.25
    assert handle.total_bits == quantized * 4.25 + rest
    assert handle.total_bits_nominal == handle.total_bits
    handle.restore()

    spec = QuantSpec(bits=3, dtype="int", blocksize=1000)
    handle = quantize_model(model, spec)
    sizes = [rows * columns for rows, columns in handle.layers.values()]
    stored = sum(3 * n + 16 * -(-n // 1000) for n in sizes)  # every matrix has a multiple of 8 weights
    assert handle.total_bits == stored + rest
    assert handle.bits_per_param == pytest.approx(stored / quantized)
    assert handle.total_bits_nominal == pytest.approx(quantized * 3.016 + rest)
    handle.restore()

    spec = QuantSpec(bits=3, dtype="quantile")
    handle = quantize_model(model, spec)
    values = 0
    modules = dict(model.named_modules())
    handle.restore()
    for key in handle.layers:
        values += codebook(spec, modules[key].weight).numel()
    assert handle.total_bits == quantized * 3.25 + 16 * values + rest


@pytest.mark.parametrize("name", ["opt", "gpt2", "bloom", "llama-tied"])
def test_tied_embeddings_stay_tied_and_count_once(name):
    model = tiny(name)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is embedding
    counted_twice = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    handle = quantize_model(model, INT4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    quantized = LAYERS * WEIGHTS_A_BLOCK[name]
    assert handle.total_bits == 4.25 * quantized + 16 * (counted_twice - head.numel() - quantized)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)


class Unknown(nn.Module):
    """An architecture of no known names: blocks next to an embedding, a head and a smaller list of adapters."""

    def __init__(self, width: int = 64, count: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.adapters = nn.ModuleList(nn.Linear(width, 4) for _ in range(count))
        self.stack = nn.ModuleList(Block(width) for _ in range(count))
        self.out = nn.Linear(width, 50)


def test_an_unknown_architecture_is_quantized_by_the_same_rule():
    handle = quantize_model(Unknown(), INT4)
    assert handle.layers == {f"stack.{i}.mixing": (64, 64) for i in range(3)}


def test_a_weight_tied_to_a_head_is_left_alone_wherever_it_stands():
    model = Unknown(width=50)
    model.stack[1].mixing.weight = model.out.weight
    assert list(quantize_model(model, INT4).layers) == ["stack.0.mixing", "stack.2.mixing"]
    # The same memory in another parameter object is the same weight.
    model.stack[0].mixing.weight = nn.Parameter(model.words.weight.data)
    model.stack[2].mixing.weight = nn.Parameter(model.words.weight.data)
    with pytest.raises(ArchitectureError, match="tied to a weight outside"):
        quantize_model(model, INT4)


def test_a_weight_shared_by_two_blocks_is_quantized_and_counted_once():
    model = Unknown()
    shared = model.stack[0].mixing.weight
    model.stack[2].mixing.weight = shared
    original = shared.detach().clone()
    handle = quantize_model(model, INT4)
    assert list(handle.layers) == ["stack.0.mixing", "stack.1.mixing"]
    assert torch.equal(shared, dequantize(quantize(original, INT4)))
    rest = sum(p.numel() for p in model.parameters()) - 2 * 64 * 64
    assert handle.total_bits == 2 * 64 * 64 * 4.25 + rest * 16
    handle.restore()
    assert torch.equal(shared, original)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ArchitectureError, match="nothing to quantize"):
        quantize_model(nn.Sequential(nn.Linear(8, 8)), INT4)


def test_a_model_that_is_quantized_already_is_refused():
    model = Unknown()
    model.stack[0].mixing.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match="quantized already"):
        quantize_model(model, INT4)


def test_when_a_layer_fails_the_model_is_restored_and_the_layer_named():
    model = tiny("neox")
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[3, 4] = torch.nan
    before = bits_of(model)
    with pytest.raises(WeightError, match="NaN") as caught:
        quantize_model(model, INT4)
    assert caught.value.__notes__ == ["in layer gpt_neox.layers.1.mlp.dense_4h_to_h"]
    assert identical(bits_of(model), before)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Unknown()
    with pytest.raises(WeightError, match="meta device"):
        quantize_model(model, INT4)


def test_the_baseline_changes_nothing_and_counts_16_bits():
    model = tiny("llama-tied")
    before = bits_of(model)
    with quantize_model(model, QuantSpec(bits=16)) as handle:
        assert identical(bits_of(model), before)
        assert handle.bits_per_param == 16
        assert handle.total_bits == handle.total_bits_nominal == 16 * sum(p.numel() for p in model.parameters())
        assert handle.layers == {}
        assert handle.codebook_hash is None


def test_codebook_hash_covers_every_codebook_used():
    model = tiny("neox", torch.float16)
    table = codebook(INT4).numpy().astype("<f4").tobytes()
    with quantize_model(model, INT4) as handle:
        assert handle.codebook_hash == hashlib.sha256(table).hexdigest()
    spec = QuantSpec(bits=4, dtype="quantile")
    with quantize_model(model, spec) as handle:
        first = handle.codebook_hash
    modules = dict(model.named_modules())
    tables = b"".join(codebook(spec, modules[name].weight).numpy().tobytes() for name in handle.layers)
    assert first == hashlib.sha256(tables).hexdigest()
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight *= -1.5
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[0] += 1
    with quantize_model(model, spec) as handle:
        assert handle.codebook_hash != first


def test_storage_dtype_of_a_model_that_was_cast_up():
    model = tiny("llama-gqa", torch.bfloat16)
    with quantize_model(model, INT4):
        narrow = bits_of(model)
    wide = tiny("llama-gqa", torch.bfloat16).float()
    with quantize_model(wide, INT4, storage_dtype=torch.bfloat16) as handle:
        assert all(torch.equal(narrow[f"{k}.weight"].float(), wide.state_dict()[f"{k}.weight"]) for k in handle.layers)
    with quantize_model(wide, INT4) as handle:
        assert any(
            not torch.equal(narrow[f"{k}.weight"].float(), wide.state_dict()[f"{k}.weight"]) for k in handle.layers
        )


@pytest.mark.assets
@pytest.mark.parametrize("name", ["neox-s", "opt-s", "gpt2-s", "bloom-s"])
def test_weight_error_of_real_models_grows_with_the_block_and_falls_with_bits(assets, name):
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / name, dtype=torch.float16)

    def error(spec: QuantSpec) -> float:
        before = bits_of(model)
        with quantize_model(model, spec) as handle:
            after = bits_of(model)
            keys = [f"{key}.weight" for key in handle.layers]
        return sum(float((after[k].double() - before[k].double()).square().sum()) for k in keys)

    by_block = [error(QuantSpec(bits=4, dtype="int", blocksize=b)) for b in (16, 64, 256, 1024)]
    assert by_block == sorted(by_block)
    by_bits = [error(QuantSpec(bits=k, dtype="float", exponent_bits="heuristic")) for k in (3, 4, 5, 6, 7, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    int4, quantile4 = (error(QuantSpec(bits=4, dtype=d)) for d in ("int", "quantile"))
    assert quantile4 < int4
