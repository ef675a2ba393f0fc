"""llama.cpp's formats and recipes over whole models: each matrix's format, bits, the way back, other passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kbit
from kbit import SpecError, quantize_model
from kbit.errors import ArchitectureError, LayeredError, WeightError
from kbit.ggml.formats import FORMATS, QUANTIZED
from kbit.ggml.recipes import RECIPES, About, Kind, fitting, format_for
from kbit.methods.ggml import about_model, kind_of
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.spec import QuantSpec, spec_from_canonical, spec_of
from kbit.specs.ggml import GgmlSpec
from tests.kbit.architectures import build
from tests.kbit.layered.test_pass import layered, whole
from tests.kbit.tiny_models import NAMES, tiny

LLAMA = About(blocks=32)


def of_llama_7b(recipe: str) -> Iterator[tuple[str, int]]:
    """Formats and counts of values of Llama-2-7B's matrices: 32 blocks, 4,096 wide, FFN 11,008, vocabulary 32,000."""
    hidden, inner, vocabulary = 4096, 11008, 32000
    for kind in (Kind.EMBEDDING, Kind.HEAD):
        yield format_for(RECIPES[recipe], kind, 0, hidden, LLAMA), hidden * vocabulary
    kinds = [*((k, hidden, hidden) for k in (Kind.OTHER, Kind.KEY, Kind.VALUE, Kind.ATTENTION_OUT))]
    kinds += [(Kind.OTHER, inner, hidden), (Kind.OTHER, inner, hidden), (Kind.FFN_DOWN, hidden, inner)]
    for block in range(32):
        for kind, rows, columns in kinds:
            yield format_for(RECIPES[recipe], kind, block, columns, LLAMA), rows * columns


@pytest.mark.parametrize(("recipe", "bits"), [("Q4_K_M", 4.84), ("Q5_K_M", 5.68), ("Q6_K", 6.56), ("Q4_K_S", 4.57)])
def test_bits_of_llama_2_7b_are_those_that_llama_cpp_publishes(recipe: str, bits: float) -> None:
    found = list(of_llama_7b(recipe))
    total = sum(FORMATS[name].bits_per_value * count for name, count in found)
    assert total / sum(count for _, count in found) == pytest.approx(bits, abs=0.015)


def test_more_bits_go_to_the_first_and_last_eighth_and_each_third_between() -> None:
    wanted = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for recipe in ("Q4_K_M", "Q5_K_M"):
        for kind in (Kind.VALUE, Kind.FFN_DOWN):
            formats = [format_for(RECIPES[recipe], kind, block, 4096, LLAMA) for block in range(32)]
            assert {i for i, name in enumerate(formats) if name == "q6_K"} == wanted
            assert set(formats) == {"q6_K", RECIPES[recipe].base}
    small = [
        [b for b in range(32) if format_for(RECIPES["Q4_K_S"], k, b, 4096, LLAMA) == "q5_K"]
        for k in (Kind.VALUE, Kind.FFN_DOWN, Kind.OTHER)
    ]
    assert small == [[0, 1, 2, 3], [0, 1, 2, 3], []]


def test_mixtures_of_eight_falcons_and_the_70b_llama_are_treated_apart() -> None:
    def get(recipe: str, kind: Kind, about: About, block: int = 5) -> str:
        return format_for(RECIPES[recipe], kind, block, 4096, about)

    eight, falcon, large = (
        About(blocks=32, experts=8),
        About(blocks=32, falcon=True),
        About(blocks=80, many_queries=True),
    )
    assert [get("Q4_K_M", k, eight) for k in (Kind.VALUE, Kind.KEY, Kind.ATTENTION_OUT)] == ["q8_0", "q8_0", "q5_K"]
    assert [get("Q4_K_M", Kind.FFN_DOWN, falcon, b) for b in (1, 3, 4, 6)] == ["q6_K", "q5_K", "q4_K", "q5_K"]
    assert (get("Q4_K_M", Kind.HEAD, falcon), get("Q4_K_M", Kind.HEAD, LLAMA)) == ("q8_0", "q6_K")
    assert [get("Q4_K_M", Kind.VALUE, large, b) for b in (11, 12)] == ["q5_K", "q6_K"]


def test_rows_that_fit_no_block_fall_back() -> None:
    found = {name: [fitting(name, columns) for columns in (512, 96, 40)] for name in QUANTIZED}
    assert found["q4_K"] == ["q4_K", "q5_0", "f16"]
    assert found["q5_K"] == ["q5_K", "q5_1", "f16"]
    assert found["q6_K"] == ["q6_K", "q8_0", "f16"]
    assert found["q4_0"] == ["q4_0", "q4_0", "f16"]
    # A head's rows are looked at before: q8_0 where the recipe's own format doesn't fit.
    assert format_for(RECIPES["Q4_K_M"], Kind.HEAD, 0, 96, LLAMA) == "q8_0"
    assert format_for(RECIPES["Q4_0"], Kind.HEAD, 0, 96, LLAMA) == "q8_0"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_is_quantized_by_recipe_and_comes_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    storage = torch.float16 if dtype == torch.float32 else dtype
    for spec in (GgmlSpec(recipe="Q4_K_M"), GgmlSpec(recipe="Q5_1"), GgmlSpec(ggml_type="q4_1")):
        with quantize_model(model, spec) as handle:
            inside = {layer.name for layer in block_layers(model)}
            outside = [] if spec.recipe is None else ends_of(model)
            assert set(handle.layers) == inside | set(outside)
            bits = 0
            for layer, (rows, columns) in handle.layers.items():
                weight = before[f"{layer}.weight"].to(storage)
                weight = weight.t() if name == "gpt2" and layer in inside else weight
                kind = format_of(spec, model, layer, columns)
                stored = weight if kind == "f16" else kbit.ggml_quantize(weight, kind)
                values = stored if kind == "f16" else kbit.ggml_dequantize(stored, kind).to(storage)
                held = model.get_submodule(layer).weight.detach()
                held = held.t() if name == "gpt2" and layer in inside else held
                assert torch.equal(held, values.to(dtype)), layer
                assert values.shape == (rows, columns)
                bits += 8 * stored.nbytes
            weights = sum(rows * columns for rows, columns in handle.layers.values())
            assert handle.bits_per_param == bits / weights
            unique = {p.data_ptr(): p.numel() for p in model.parameters()}
            assert handle.total_bits == bits + 16 * (sum(unique.values()) - weights)
            assert handle.codebook_hash is None
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def ends_of(model: Any) -> list[str]:
    """Names of embedding and head; a tied head is the embedding."""
    names = {m: n for n, m in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [names[embedding], *([] if head.weight is embedding.weight else [names[head]])]


def format_of(spec: GgmlSpec, model: nn.Module, layer: str, columns: int) -> str:
    """The format that a layer should have by its place in the model."""
    if spec.recipe is None:
        return fitting(str(spec.ggml_type), columns)
    ends = ends_of(model)
    if layer in ends:
        kind = Kind.HEAD if layer == ends[-1] else Kind.EMBEDDING
        return format_for(RECIPES[spec.recipe], kind, 0, columns, about_model(model))
    found = next(found for found in block_layers(model) if found.name == layer)
    return format_for(RECIPES[spec.recipe], kind_of(found, required=True), found.block, columns, about_model(model))


def test_kinds_by_architecture() -> None:
    wanted = {
        "neox": {"query_key_value": Kind.VALUE, "dense": Kind.ATTENTION_OUT, "dense_4h_to_h": Kind.FFN_DOWN},
        "gpt2": {"c_attn": Kind.VALUE, "attn.c_proj": Kind.ATTENTION_OUT, "mlp.c_proj": Kind.FFN_DOWN},
        "opt": {"v_proj": Kind.VALUE, "k_proj": Kind.KEY, "fc2": Kind.FFN_DOWN, "fc1": Kind.OTHER},
        "llama-gqa": {"v_proj": Kind.VALUE, "down_proj": Kind.FFN_DOWN, "gate_proj": Kind.OTHER, "q_proj": Kind.OTHER},
    }
    for name, kinds in wanted.items():
        layers = block_layers(tiny(name))
        for end, kind in kinds.items():
            assert {kind_of(layer, required=True) for layer in layers if layer.name.endswith(f".{end}")} == {kind}


def test_a_layer_of_unknown_role_is_refused_where_a_recipe_depends_on_it() -> None:
    model = build("jamba")
    with pytest.raises(ArchitectureError, match=r"whose role isn't known, and the recipe depends on it: ggml_type"):
        quantize_model(model, GgmlSpec(recipe="Q4_K_M"))
    with quantize_model(model, GgmlSpec(recipe="Q6_K")) as handle:
        assert set(handle.layers) > {layer.name for layer in block_layers(model)}


def test_many_cells_of_a_model_have_the_weights_of_each_alone() -> None:
    """The embedding that a recipe quantized is the 16-bit one again in the next cell that leaves it alone."""
    model = tiny("bloom", torch.float16)
    specs = [
        GgmlSpec(recipe="Q4_0"),
        GgmlSpec(ggml_type="q5_0"),
        QuantSpec(bits=4, dtype="int"),
        GgmlSpec(recipe="Q6_K"),
    ]
    specs += [specs[0], QuantSpec(bits=16)]
    alone = []
    for spec in specs:
        with quantize_model(model, spec):
            alone.append({key: value.clone() for key, value in model.state_dict().items()})
    originals = Originals(model=model)
    for spec, expected in zip(specs, alone, strict=True):
        quantize_model(model, spec, originals=originals)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items()), spec.label


def test_formats_run_layer_by_layer_and_recipes_are_refused_there_by_name() -> None:
    model = build("llama").float()
    specs = {"q4_0": GgmlSpec(ggml_type="q4_0"), "q6_K": GgmlSpec(ggml_type="q6_K")}
    expected, found = whole(model, specs), layered(model, specs)
    for key, (result, handle) in expected.items():
        assert found[key][0].metrics == result.metrics
        assert found[key][1].total_bits == handle.total_bits
    with pytest.raises(LayeredError, match=r"'ggml Q6_K' can't run layer by layer: recipe=Q6_K quantizes embedding"):
        refused(model)


def refused(model: nn.Module) -> None:
    from kbit.layered.blocks import HostBlocks
    from kbit.layered.cells import PassCell
    from kbit.layered.hollow import Hollow
    from kbit.layered.run import LayeredPass

    blocks = HostBlocks(model, "cpu")
    cell = PassCell(key="x", spec=GgmlSpec(recipe="Q6_K"), calls=[])
    LayeredPass(blocks=blocks, hollow=Hollow(blocks), cells=[cell])
    assert cell.error is not None
    raise cell.error


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "recipe=None is not valid: a recipe for the whole model (Q4_0,"),
        ({"recipe": "Q4_K"}, "recipe='Q4_K' is not valid: one of Q4_0"),
        ({"ggml_type": "Q4_K"}, "ggml_type='Q4_K' is not valid: one of q4_0"),
        ({"ggml_type": "q4_0", "recipe": "Q6_K"}, "ggml_type='q4_0' is not valid: none beside recipe=Q6_K"),
        ({"recipe": "Q6_K", "bits": 4}, "bits=4 is not valid: 6, the bits of recipe=Q6_K: leave it out"),
        ({"recipe": "Q6_K", "blocksize": 32}, "method ggml has no such axis; it has bits, ggml_type, recipe"),
    ],
)
def test_bad_values_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError) as error:
        spec_of({"method": "ggml", **values})
    assert said in str(error.value)


def test_bits_follow_and_specs_come_back() -> None:
    for name, bits, nominal in (("Q4_K_M", 4, 4.5), ("Q5_K_S", 5, 5.5), ("Q6_K", 6, 6.5625), ("Q8_0", 8, 8.5)):
        spec = spec_of({"method": "ggml", "recipe": name})
        assert (spec.bits, spec.bits_per_param_nominal, spec.label) == (bits, nominal, f"ggml {name}")
        assert spec_from_canonical(spec.canonical()) == spec
        assert spec == spec_of({"method": "ggml", "recipe": name, "bits": bits})


def test_layers_are_not_held_in_k_bits_and_bad_weights_are_named() -> None:
    model = tiny("opt")
    with pytest.raises(SpecError, match="whose layers can be held in k bits"):
        quantize_model(model, GgmlSpec(ggml_type="q4_0"), packed=True)
    layer = block_layers(model)[3]
    layer.working[0, 0] = torch.nan
    with pytest.raises(WeightError) as error:
        quantize_model(model, GgmlSpec(ggml_type="q4_0"))
    assert f"in layer {layer.name}" in error.value.__notes__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["neox", "gpt2", "llama-gqa"])
def test_a_gpu_gives_the_same_weights(name: str) -> None:
    spec = GgmlSpec(recipe="Q4_K_M")

    def weights(device: str) -> dict[str, Tensor]:
        model = tiny(name, torch.float16).to(device)
        quantize_model(model, spec)
        return {key: value.cpu() for key, value in model.state_dict().items()}

    assert all(torch.equal(value, weights("cuda")[key]) for key, value in weights("cpu").items())
