"""Models held in k bits: the same outputs as quantized in place, the size that is counted, the way back, files."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from kbit import KBitLinear, QuantSpec, load_packed, quantize_model, save_packed
from kbit.errors import ArchitectureError, CheckpointError, WeightError
from kbit.models.placement import place
from kbit.specs.block_float import BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests.kbit.models.test_quantize_model import Unknown
from tests.kbit.tiny_models import CONFIGS, NAMES, VOCABULARY, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
INT4 = QuantSpec(bits=4, dtype="int")
FLOATS = [BlockFloatSpec(format="mxfp4"), BlockFloatSpec(format="nvfp4")]
SPECS = [
    INT4,
    QuantSpec(bits=3, dtype="quantile", center=True, outlier_fraction=0.05),
    QuantSpec(bits=5, dtype="float", blocksize=24, scheme="group", outlier_fraction=0.02),
    QuantSpec(bits=8, dtype="dynamic", absmax_dtype="nested"),
    QuantSpec(bits=2, dtype="int", blocksize=1000),
    QuantSpec(bits=6, dtype="normal", blocksize=32, center=True),
    HqqSpec(bits=3, blocksize=32),
    QuantSpec(bits=4, dtype="int", zero_point=True, outlier_fraction=0.02),
]
DERIVED = ("table", "unscale", "arrived", "absmax_codebook")
TOKENS = torch.arange(34).view(2, 17)


def wide(name: str, dtype: torch.dtype) -> nn.Module:
    """As tiny, of 64 or 128 columns: its weights have the kernels' tiles."""
    config = copy.deepcopy(CONFIGS[name])
    for key in ("hidden_size", "n_embd", "intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, key, None):
            setattr(config, key, 64 if key in ("hidden_size", "n_embd") else 128)
    if name == "opt":
        config.word_embed_proj_dim = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model.to(dtype)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor = TOKENS, **options: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(next(model.parameters()).device), **options).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def packed_layers(model: nn.Module) -> dict[str, KBitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KBitLinear)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [tiny, wide])
def test_packed_models_give_the_outputs_of_models_quantized_in_place(make, name, dtype):
    model = make(name, dtype)
    before = bits_of(model)
    first = 3 * NAMES.index(name) + [torch.float16, torch.bfloat16, torch.float32].index(dtype)
    for spec in (SPECS[first % len(SPECS)], SPECS[(first + 2) % len(SPECS)]):
        with quantize_model(model, spec) as handle:
            expected = logits(model)
        packed = quantize_model(model, spec, packed=True)
        assert packed_layers(model).keys() == packed.layers.keys() == handle.layers.keys()
        for attribute in ("spec", "layers", "bits_per_param", "total_bits", "total_bits_nominal", "codebook_hash"):
            assert getattr(packed, attribute) == getattr(handle, attribute)
        # With a mean the weight's own 16-bit rounding is gone.
        rounding = (
            torch.finfo(dtype).eps if dtype != torch.float32 else 5e-4 if getattr(spec, "center", False) else 1e-6
        )
        assert difference(logits(model), expected) < 2 * rounding
        packed.restore()
        assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back_with_the_same_bits(name, tmp_path):
    number = NAMES.index(name)
    model = (tiny, wide)[number % 2](name, (torch.float16, torch.bfloat16)[number // 2 % 2])
    quantize_model(model, SPECS[1 if number % 3 == 0 else 6 if number == 1 else number], packed=True)
    next(iter(packed_layers(model).values())).batch_invariant = True
    model.generation_config.max_new_tokens = 7
    model.set_attn_implementation("eager")
    expected = logits(model)
    save_packed(model, tmp_path / "packed")
    has_zeros = any(layer.spec.zero_point for layer in packed_layers(model).values())
    assert json.loads((tmp_path / "packed" / "kbit.json").read_text())["version"] == (2 if has_zeros else 1)
    written = load_file(tmp_path / "packed" / "kbit.safetensors")
    # Neither 16-bit weights of the layers nor a tied tensor twice.
    assert not [key for key in packed_layers(model) if f"{key}.weight" in written]
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    derived = sum(b.nbytes for m in packed_layers(model).values() for k, b in m.named_buffers() if k in DERIVED)
    assert sum(t.nbytes for t in written.values()) == size - derived
    loaded = load_packed(tmp_path / "packed")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert [layer.batch_invariant for layer in packed_layers(loaded).values()].count(True) == 1
    assert next(iter(packed_layers(loaded).values())).batch_invariant
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(logits(loaded), expected)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
    assert identical(bits_of(loaded), bits_of(model))
    save_packed(loaded, tmp_path / "packed")  # over the files that it was read from
    assert torch.equal(logits(load_packed(tmp_path / "packed")), expected)


def test_a_model_of_no_transformers_class_is_loaded_into_a_skeleton(tmp_path):
    model = Unknown().half()
    quantize_model(model, INT4, packed=True)
    save_packed(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a Unknown, .* load_packed\(directory, model="):
        load_packed(tmp_path)
    with torch.device("meta"):
        skeleton = Unknown()
    assert identical(bits_of(load_packed(tmp_path, model=skeleton)), bits_of(model))
    with pytest.raises(CheckpointError, match=r"has no linear layer 'stack\.2\.mixing'"):
        load_packed(tmp_path, model=Unknown(count=2))
    other = Unknown(count=4)
    with pytest.raises(CheckpointError, match=r"lacks .* stack\.3\.mixing"):
        load_packed(tmp_path, model=other)
    assert not packed_layers(other)
    with pytest.raises(CheckpointError, match=r"words\.weight is F16 \[50, 64\]"):
        load_packed(tmp_path, model=Unknown(width=128))
    other = nn.ModuleDict({"stack": Unknown().stack})
    with pytest.raises(CheckpointError, match=r"has, beyond the model's, .* adapters"):
        load_packed(tmp_path, model=other)


BROKEN = [
    ("in_features", -64, "in_features=-64"),
    ("in_features", 10**30, "is damaged"),
    ("out_features", True, "out_features is True"),
    ("kept", "1", "kept is '1'"),
    ("kept", 65, "kept=65"),
    ("dtype", "float64", r"dtype=torch\.float64"),
    ("dtype", "Tensor", "dtype='Tensor' is no dtype"),
    ("storage_dtype", "float32", r"storage_dtype=torch\.float32"),
    ("spec", {"bits": 9}, "bits=9"),
    ("spec", {"no": 1}, "no"),
    ("batch_invariant", None, "batch_invariant is None"),
    ("float_zeros", 1, "float_zeros is 1"),
    ("float_zeros", True, "float_zeros=True with 'int4 b64'"),
]


def test_damaged_files_are_refused_with_what_is_wrong(tmp_path):
    model = wide("opt", torch.float16)
    with pytest.raises(ValueError, match="no layers in k bits"):
        save_packed(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"no packed model: it has no kbit\.json"):
        load_packed(tmp_path)
    quantize_model(model, INT4, packed=True)
    save_packed(model, tmp_path)
    metadata = json.loads((tmp_path / "kbit.json").read_text())
    layers = metadata["layers"]
    first = next(iter(layers))
    for changed, why in [
        ({**metadata, "version": 4}, "version 4 of the format"),
        ({**metadata, "format": "gguf"}, "another program's"),
        ({**metadata, "layers": None}, "layers is None"),
        ({k: v for k, v in metadata.items() if k != "tied"}, "no tied"),
        ({**metadata, "tied": {"lm_head.weight": 3}}, r"tied is damaged: lm_head\.weight is 3"),
        ({**metadata, "model": {**metadata["model"], "class": 1}}, "model is damaged: class is 1"),
        ({**metadata, "model": {**metadata["model"], "class": "NoSuchModel"}}, "holds a NoSuchModel"),
        ({**metadata, "model": {**metadata["model"], "attention": "none such"}}, "attention 'none such'"),
        *(
            ({**metadata, "layers": {**layers, first: {**layers[first], key: value}}}, why)
            for key, value, why in BROKEN
        ),
        *(
            (
                {**metadata, "layers": {**layers, first: {k: v for k, v in layers[first].items() if k != key}}},
                rf"{first} is damaged: it has no {key}",
            )
            for key in layers[first]
        ),
        (
            {**metadata, "layers": {"lm_head": {"spec": {"bits": 9}}}},
            "layers: lm_head is damaged: it has no in_features",
        ),
    ]:
        (tmp_path / "kbit.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=why):
            load_packed(tmp_path)
    (tmp_path / "kbit.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_packed(tmp_path)
    (tmp_path / "kbit.json").write_text(json.dumps(metadata))
    weights = tmp_path / "kbit.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("codes"))
    for changed, why in [
        ({k: v for k, v in tensors.items() if k != name}, "lacks 1 tensors"),
        ({**tensors, "more": torch.zeros(1)}, "beyond the model's, 1 tensors: more"),
        ({**tensors, name: tensors[name].to(torch.int16)}, "is I16 .* the model's is torch.int32"),
        ({**tensors, name: tensors[name][1:].clone()}, r"I32 \[\d"),
    ]:
        save_file(changed, weights)
        with pytest.raises(CheckpointError, match=why):
            load_packed(tmp_path)
    # Another version may have other names.
    earlier = {**metadata, "model": {**metadata["model"], "transformers": "5.0.1"}}
    (tmp_path / "kbit.json").write_text(json.dumps(earlier))
    with pytest.raises(CheckpointError, match=r"saved with transformers 5\.0\.1, and this is \d.*\): .* I32"):
        load_packed(tmp_path)
    save_file(tensors, weights)
    assert torch.equal(logits(load_packed(tmp_path)), logits(model))
    (tmp_path / "kbit.json").write_text(json.dumps(metadata))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="should have"):
        load_packed(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no kbit\.safetensors"):
        load_packed(tmp_path)


def test_the_baseline_packs_nothing_and_a_packed_model_is_not_quantized_again():
    model = tiny("neox")
    before = bits_of(model)
    with quantize_model(model, QuantSpec(bits=16), packed=True) as handle:
        assert identical(bits_of(model), before)
        assert handle.bits_per_param == 16
    with quantize_model(model, INT4, packed=True), pytest.raises(ArchitectureError, match="packed in k bits already"):
        quantize_model(model, INT4)
    assert identical(bits_of(model), before)


def test_when_a_layer_fails_the_modules_are_put_back():
    model = tiny("llama-gqa")
    modules = dict(model.named_modules())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    before = bits_of(model)
    with pytest.raises(WeightError, match="NaN"):
        quantize_model(model, INT4, packed=True)
    assert dict(model.named_modules()) == modules
    assert identical(bits_of(model), before)


def test_one_module_in_two_places_is_packed_once_and_two_with_one_weight_are_refused(tmp_path):
    model = Unknown()
    model.stack[2] = model.stack[0]
    original = model.stack[0].mixing
    handle = quantize_model(model, INT4, packed=True)
    assert isinstance(model.stack[0].mixing, KBitLinear)
    assert model.stack[2].mixing is model.stack[0].mixing
    save_packed(model, tmp_path)
    skeleton = Unknown()
    skeleton.stack[2] = skeleton.stack[0]
    loaded = load_packed(tmp_path, model=skeleton)
    assert loaded.stack[2].mixing is loaded.stack[0].mixing
    assert identical(bits_of(loaded), bits_of(model))
    handle.restore()
    assert model.stack[0].mixing is model.stack[2].mixing is original

    model = Unknown()
    model.stack[2].mixing.weight = model.stack[0].mixing.weight
    with pytest.raises(ArchitectureError, match=r"stack\.0\.mixing: it shares its weight"):
        quantize_model(model, INT4, packed=True)


def test_hooks_that_move_inputs_survive_and_others_are_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    model = Unknown()
    layer = model.stack[1].mixing
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    handle = quantize_model(model, INT4, packed=True)
    packed = model.stack[1].mixing
    x = torch.randn(2, 64)
    assert packed(x).shape == (2, 64)
    assert packed._hf_hook.execution_device == "cpu"
    handle.restore()
    assert model.stack[1].mixing is layer
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    with pytest.raises(ArchitectureError, match=r"stack\.1\.mixing: it has a changed forward"):
        quantize_model(model, INT4, packed=True)
    model = Unknown()
    model.stack[0].mixing.register_forward_hook(lambda *_: None)
    with pytest.raises(ArchitectureError, match="has forward or backward hooks"):
        quantize_model(model, INT4, packed=True)
    assert not packed_layers(model)


def test_devices_that_hold_nothing_are_refused_first(tmp_path):
    with pytest.raises(ValueError, match="meta"):
        load_packed(tmp_path, device="meta")
    with pytest.raises(ValueError, match=f"cuda:{torch.cuda.device_count()}"):
        load_packed(tmp_path, device=f"cuda:{torch.cuda.device_count()}")


def test_a_failure_while_saving_leaves_the_model_that_was_there(tmp_path):
    model = tiny("neox", torch.float16)
    quantize_model(model, INT4, packed=True)
    save_packed(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"config.json", "generation_config.json", "kbit.json", "kbit.safetensors"}
    model.gpt_neox.embed_in.weight.data += 1
    model.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match="max_new_tokens"):
        save_packed(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_tensors_that_share_memory_in_part_are_saved_apart(tmp_path):
    model = Unknown().half()
    whole = torch.arange(12.0)
    model.register_buffer("head", whole[:8])
    model.register_buffer("tail", whole[4:])
    quantize_model(model, INT4, packed=True)
    save_packed(model, tmp_path)
    skeleton = Unknown()
    skeleton.register_buffer("head", torch.zeros(8))
    skeleton.register_buffer("tail", torch.zeros(8))
    loaded = load_packed(tmp_path, model=skeleton)
    assert torch.equal(loaded.head, whole[:8])
    assert torch.equal(loaded.tail, whole[4:])


def test_a_packed_model_that_was_cast_is_restored_in_its_dtype_now():
    model = tiny("opt", torch.float32)
    before = bits_of(model)
    handle = quantize_model(model, INT4, packed=True)
    model.bfloat16()
    handle.restore()
    assert identical(bits_of(model), {key: value.bfloat16() for key, value in before.items()})
    assert logits(model).dtype == torch.bfloat16
    handle = quantize_model(model, INT4, packed=True)
    model.to("meta")
    with pytest.raises(ValueError, match="meta device"):
        handle.restore()


def test_layers_that_can_not_be_packed_are_refused_before_any_is_replaced():
    model = Unknown().double()
    with pytest.raises(ArchitectureError, match=r"stack\.0\.mixing: it has weights of torch\.float64"):
        quantize_model(model, INT4, packed=True)
    assert not packed_layers(model)
    model = Unknown()
    nn.utils.parametrizations.weight_norm(model.stack[1].mixing)
    for packed in (False, True):
        with pytest.raises(ArchitectureError, match=r"stack\.1\.mixing has a weight that is computed"):
            quantize_model(model, INT4, packed=packed)


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: s.label)
def test_a_packed_model_compiles_as_one_graph(spec):
    model = wide("opt", torch.float16)
    quantize_model(model, spec, packed=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, logits(model))


def medium(dtype: torch.dtype = torch.float16) -> nn.Module:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        word_embed_proj_dim=2048,
        ffn_dim=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        max_position_embeddings=256,
        # Others choose their kernel by whether a graph is captured.
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def ready_made(tokens: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a model would make of the CPU's memory, which a graph can't hold: a causal mask, and positions."""
    rows, columns = tokens.shape
    above = torch.full((columns, columns), torch.finfo(dtype).min, dtype=dtype, device=tokens.device).triu(1)
    positions = torch.arange(columns, device=tokens.device)
    return {
        "attention_mask": above.expand(rows, 1, columns, columns),
        "position_ids": positions.expand(rows, columns),
    }


def held() -> int:
    """Bytes asked for: the allocator rounds each up, and keeps what is left of large blocks."""
    torch.cuda.synchronize()
    gc.collect()  # a model has circles of references
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_gpu_memory_is_what_the_bits_say_while_packing_and_after_loading(bits, tmp_path):
    before = held()
    model = medium()
    full = held() - before
    largest = max(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    handle = quantize_model(model, QuantSpec(bits=bits, dtype="quantile"), packed=True)
    # One layer's row-major codes and its tiles, and what works on some rows of it.
    assert torch.cuda.max_memory_allocated() - before <= full + 1.1 * largest + 2**28
    assert abs(held() - before - handle.total_bits / 8) <= 0.03 * handle.total_bits / 8
    expected = logits(model)
    save_packed(model, tmp_path)
    del model, handle
    torch.cuda.reset_peak_memory_stats()
    before = held()
    loaded = load_packed(tmp_path, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * (held() - before)
    assert torch.equal(logits(loaded), expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[3], *FLOATS], ids=lambda s: s.label)
def test_on_a_gpu_graphs_and_compiled_models_give_the_outputs_of_models_quantized_in_place(spec, dtype):
    model = medium(dtype)
    before = bits_of(model)
    tokens = torch.arange(2 * 48).view(2, 48).cuda() % VOCABULARY
    with quantize_model(model, spec):
        expected = logits(model, tokens)
    handle = quantize_model(model, spec, packed=True)
    found = logits(model, tokens)
    assert difference(found, expected) < 8 * torch.finfo(dtype).eps
    for columns in (1, 48):
        part = tokens[:, :columns].contiguous()
        given = ready_made(part, dtype)
        alone = logits(model, part, **given)
        assert difference(alone, logits(model, part)) < 8 * torch.finfo(dtype).eps
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = model(part, use_cache=False, **given).logits
        graph.replay()
        assert torch.equal(captured, alone)
        del graph
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(tokens, use_cache=False).logits, expected) < 8 * torch.finfo(dtype).eps
    handle.restore()
    assert identical(bits_of(model), before)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_spread_over_gpus_is_packed_where_it_lies():
    pytest.importorskip("accelerate")
    model = wide("opt", torch.float16)
    expected = logits(model)
    place(model, "cuda", torch.float16, gpus=2)
    with quantize_model(model, QuantSpec(bits=8, dtype="int"), packed=True):
        assert {layer.codes.device.index for layer in packed_layers(model).values()} == {0, 1}
        assert difference(logits(model).cpu(), expected) < 0.05
    assert not packed_layers(model)
