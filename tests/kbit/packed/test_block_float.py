"""Layers held in block-scaled floats: products, what comes back, state dicts, casts, whole models, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from kbit import QuantSpec, load_packed, quantize_model, save_packed
from kbit.errors import CheckpointError
from kbit.kernels import ops
from kbit.kernels.tiles import scale_dtype
from kbit.packed.base import PackedLinear
from kbit.packed.block_float import BlockFloatLinear
from kbit.quantizer.block_float import BlockFloatTensor, code_values, dequantize_block_float, quantize_block_float
from kbit.quantizer.packing import unpack
from kbit.specs.block_float import FORMATS, BlockFloatSpec
from tests.kbit.packed.test_packed import difference, logits, wide
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TILED = (100, 192)
ROWS = (100, 200)
"""[out, in]; 200 columns are no whole tiles, and their last block is short."""
SHAPES = [TILED, ROWS, (7, 20), (1, 33), (65, 48), (130, 64)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0]).unsqueeze(1)).to(dtype)


def quantized(
    name: str, shape: tuple[int, int] = TILED, dtype: torch.dtype = torch.float16, *, scale: float = 1
) -> BlockFloatTensor:
    return quantize_block_float(weight_of(shape, dtype) * scale, BlockFloatSpec(format=name))


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a: BlockFloatTensor, b: BlockFloatTensor) -> bool:
    scales = a.tensor_scale, b.tensor_scale
    return (
        (a.spec, a.shape, a.dtype, a.storage_dtype) == (b.spec, b.shape, b.dtype, b.storage_dtype)
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (scales == (None, None) or torch.equal(*scales))
    )


def layers_of(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_it_gives_the_product_with_the_dequantized_weight(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    q = quantized(name, shape, dtype)
    bias = inputs(shape[0], dtype=dtype)
    layer = BlockFloatLinear.from_quantized(q, bias=bias)
    assert layer.tiled == (shape[1] % 64 == 0)
    x = inputs(2, 7, shape[1], dtype=dtype)
    found = layer(x)
    assert found.shape == (2, 7, shape[0])
    assert found.dtype == dtype
    true = linear(x.double(), dequantize_block_float(q).double(), bias.double())
    allowed = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert float((found.double() - true).norm() / true.norm()) < allowed


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(FORMATS)),
    rounding=st.sampled_from(["floor", "ceil"]),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 5).map(lambda n: 32 * n) | st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
)
def test_what_was_quantized_comes_back_bit_for_bit(
    name: str, rounding: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    spec = BlockFloatSpec(format=name, scale_rounding=None if name == "nvfp4" else rounding)
    q = quantize_block_float(weight_of(shape, dtype), spec)
    layer = BlockFloatLinear.from_quantized(q)
    assert same(layer.quantized(), q)
    weight = layer.dequantize()
    assert weight.dtype == dtype
    assert torch.equal(weight, dequantize_block_float(q))
    # Beside what is counted: the values of the codes for both paths, their scale; of tiles rows up to a multiple of 64,
    # and a counter for each 64.
    values = (32 + 16) * 2**spec.bits + 32
    row_blocks = -(-shape[0] // 64)
    padding = (64 * row_blocks - shape[0]) * shape[1] * spec.bits_per_param_nominal + 32 * row_blocks
    assert 8 * layer.nbytes == q.nbits + values + (padding if layer.tiled else 0)


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 6e3), (torch.bfloat16, 2.0**124)])
@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_the_storage_dtype_saturate_in_products_too(
    name: str, dtype: torch.dtype, scale: float, shape: tuple[int, int]
) -> None:
    limit = torch.finfo(dtype).max
    weight = (weight_of(shape).double() * scale).clamp(-limit, limit).to(dtype)
    q = quantize_block_float(weight, BlockFloatSpec(format=name, scale_rounding=None if name == "nvfp4" else "ceil"))
    held = dequantize_block_float(q)
    assert held.isfinite().all()
    assert float(held.abs().max()) >= limit / 2
    layer = BlockFloatLinear.from_quantized(q, dtype=torch.float32)
    one = torch.eye(shape[1])  # products with the columns themselves
    assert torch.equal(layer(one).t(), held.float())


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", FORMATS)
def test_a_state_dict_goes_into_an_empty_layer_and_gives_the_same_bits(name: str, shape: tuple[int, int]) -> None:
    q = quantized(name, shape)
    layer = BlockFloatLinear.from_quantized(q, bias=inputs(shape[0]))
    state = copy.deepcopy(layer.state_dict())
    of_tensor = {"tensor_scale"} if name == "nvfp4" else set()
    assert state.keys() == {"codes", "scales", "bias", "_extra_state"} | of_tensor
    assert not list(layer.parameters())
    x = inputs(3, shape[1])
    for device, assign in (("cpu", False), ("meta", True)):
        other = BlockFloatLinear(shape[1], shape[0], q.spec, bias=True, device=device)
        nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=assign)
        assert same(other.quantized(), q)
        assert torch.equal(other.codebook, code_values(q.spec.element, torch.device("cpu")))
        assert torch.equal(other(x), layer(x))


def test_a_state_dict_of_another_format_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    layer = BlockFloatLinear.from_quantized(quantized("mxfp6_e2m3"))
    state = layer.state_dict()
    for other, why in [
        (BlockFloatLinear(192, 100, BlockFloatSpec(format="mxfp6_e3m2")), r'"mxfp6_e2m3".* layer of .*"mxfp6_e3m2"'),
        (BlockFloatLinear(192, 100, BlockFloatSpec(format="mxfp6_e2m3", scale_rounding="ceil")), "layer of .*ceil"),
        (BlockFloatLinear(192, 100, layer.spec, storage_dtype=torch.bfloat16), "layer of .*bfloat16"),
    ]:
        with pytest.raises(ValueError, match=why):
            other.load_state_dict(state)
        assert not any(buffer.any() for buffer in other.buffers())
    for key, changed in [("codes", state["codes"].long()), ("scales", state["scales"][:1])]:
        for assign in (False, True):
            other = BlockFloatLinear(192, 100, layer.spec)
            with pytest.raises(ValueError, match=rf"^{key} is "):
                other.load_state_dict({**state, key: changed}, assign=assign)
            assert not any(buffer.any() for buffer in other.buffers())
    # Both kinds of file hold all of a state dict.
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for read in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        other = BlockFloatLinear(192, 100, layer.spec)
        other.load_state_dict(read)
        assert same(other.quantized(), layer.quantized())


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", FORMATS)
def test_casts_change_the_bias_and_the_dtype_of_x_and_nothing_else(name: str, shape: tuple[int, int]) -> None:
    q = quantized(name, shape)
    layer = BlockFloatLinear.from_quantized(q, bias=torch.ones(shape[0]).half())
    x = inputs(3, shape[1])
    expected = layer(x)
    for cast, dtype in ((nn.Module.bfloat16, torch.bfloat16), (nn.Module.float, torch.float32)):
        cast(layer)
        assert layer.bias is not None
        assert layer.bias.dtype == layer.dtype == dtype
        assert layer.table.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
        assert torch.equal(layer.dequantize(), dequantize_block_float(q).to(dtype))
        assert difference(layer(x.to(dtype)), expected) < torch.finfo(torch.bfloat16).eps
    layer.half()
    assert torch.equal(layer(x), expected)
    assert same(layer.quantized(), q)
    with pytest.raises(TypeError, match=r"BlockFloatLinear can't be cast to torch\.float64"):
        layer.double()
    assert same(layer.quantized(), q)


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6_e3m2"])
def test_rows_of_x_single_and_none(name: str, shape: tuple[int, int]) -> None:
    layer = BlockFloatLinear.from_quantized(quantized(name, shape), bias=inputs(shape[0]))
    assert layer(inputs(2, 0, shape[1])).shape == (2, 0, shape[0])
    one = inputs(shape[1])
    assert torch.equal(layer(one), layer(one.view(1, 1, -1))[0, 0])
    layer.batch_invariant = True
    x = inputs(9, shape[1])
    alone = torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(layer(x), alone)
    assert torch.equal(layer(x[2:5]), alone[2:5])


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8_e5m2"])
def test_the_operators_pass_torch_s_own_check(name: str, shape: tuple[int, int], monkeypatch) -> None:
    layer = BlockFloatLinear.from_quantized(quantized(name, shape))
    calls = []
    where, operator = ("base", "matmul_tiled") if layer.tiled else ("block_float", "matmul_rows")
    kernel = getattr(ops, operator)

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(f"kbit.packed.{where}.{operator}", record)
    layer(inputs(3, shape[1]))
    # Of float8 torch has no products, by which the check of the schema compares arguments.
    rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kernel, *calls[0], test_utils=rest)


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp6_e2m3"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(name: str, shape: tuple[int, int]) -> None:
    layer = BlockFloatLinear.from_quantized(quantized(name, shape), bias=inputs(shape[0]))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (1, 5, 70):
            x = inputs(rows, shape[1])
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [TILED, ROWS])
@pytest.mark.parametrize("name", FORMATS)
def test_a_16_bit_default_dtype_changes_nothing(name: str, shape: tuple[int, int]) -> None:
    expected = BlockFloatLinear.from_quantized(quantized(name, shape))
    code_values.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = BlockFloatLinear(shape[1], shape[0], expected.spec)
        layer.load_state_dict(expected.state_dict())
        x = inputs(3, shape[1])
        assert torch.equal(layer(x), expected(x))
        assert {n: b.dtype for n, b in layer.named_buffers()} == {n: b.dtype for n, b in expected.named_buffers()}
    finally:
        torch.set_default_dtype(torch.float32)
        code_values.cache_clear()


@pytest.mark.parametrize("shape", [TILED, ROWS])
def test_accelerate_offloads_a_layer(shape: tuple[int, int]) -> None:
    accelerate = pytest.importorskip("accelerate")
    layer = nn.Sequential(BlockFloatLinear.from_quantized(quantized("nvfp4", shape)))
    x = inputs(3, shape[1])
    expected = layer(x)
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"), offload_buffers=True)
    assert layer[0].codes.is_meta
    assert torch.equal(layer(x), expected)


def test_misuse_is_refused() -> None:
    layer = BlockFloatLinear.from_quantized(quantized("mxfp4"))
    for x in (inputs(2, 64), inputs(2, 192).double(), inputs(2, 192).bfloat16()):
        with pytest.raises(ValueError, match=r"takes \[\.\.\., 192\]"):
            layer(x)
    spec = BlockFloatSpec(format="mxfp4")
    for sizes, more, why in [
        ((0, 64), {}, "in_features=0"),
        ((64, 64), {"dtype": torch.float64}, "dtype=torch.float64"),
        ((64, 64), {"storage_dtype": torch.float32}, "storage_dtype=torch.float32"),
    ]:
        with pytest.raises(ValueError, match=why):
            BlockFloatLinear(*sizes, spec, **more)
    for q, bias in ((quantized("mxfp4"), inputs(99)), (quantize_block_float(torch.randn(64), spec), None)):
        with pytest.raises(ValueError, match=r"\[out, in\] and \[out\] are needed"):
            BlockFloatLinear.from_quantized(q, bias=bias)
    with pytest.raises(ValueError, match="without tiles: its 200 columns are no multiple of 64"):
        BlockFloatLinear.from_quantized(quantized("mxfp4", ROWS)).tiled_weight()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [tiny, wide])
@pytest.mark.parametrize("name", NAMES)
def test_packed_models_give_the_outputs_of_models_quantized_in_place(make, name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    before = bits_of(model)
    spec = BlockFloatSpec(format=list(FORMATS)[(NAMES.index(name) + DTYPES.index(dtype)) % len(FORMATS)])
    with quantize_model(model, spec) as handle:
        expected = logits(model)
    packed = quantize_model(model, spec, packed=True)
    assert layers_of(model).keys() == packed.layers.keys() == handle.layers.keys()
    for attribute in ("spec", "layers", "bits_per_param", "total_bits", "total_bits_nominal", "codebook_hash"):
        assert getattr(packed, attribute) == getattr(handle, attribute)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert difference(logits(model), expected) < 2 * rounding
    packed.restore()
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_model_comes_back_with_the_same_bits(name: str, tmp_path: Path) -> None:
    number = list(FORMATS).index(name)
    model = (tiny, wide)[number % 2](NAMES[number % len(NAMES)], DTYPES[number // 2 % 2])
    quantize_model(model, BlockFloatSpec(format=name), packed=True)
    next(iter(layers_of(model).values())).batch_invariant = True
    expected = logits(model)
    save_packed(model, tmp_path)
    metadata = json.loads((tmp_path / "kbit.json").read_text())
    assert metadata["version"] == 3
    loaded = load_packed(tmp_path)
    assert [layer.batch_invariant for layer in layers_of(loaded).values()].count(True) == 1
    assert torch.equal(logits(loaded), expected)
    assert identical(bits_of(loaded), bits_of(model))
    layers, first = metadata["layers"], next(iter(layers_of(model)))
    for key, value, why in [
        ("spec", {"method": "block_float", "format": "mxfp5"}, "format='mxfp5'"),
        ("spec", {"method": "block_float", "bits": 3, "format": name}, "bits=3"),
        ("spec", {"method": "hqq", "bits": 4}, "method='hqq' has no layers of its own"),
        ("spec", {"method": "no_such"}, "method='no_such'"),
        ("spec", {"bits": 4, "dtype": "int"}, "it has no kept"),
        ("bias", 1, "bias is 1"),
    ]:
        changed = {**metadata, "layers": {**layers, first: {**layers[first], key: value}}}
        (tmp_path / "kbit.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=why):
            load_packed(tmp_path)


def test_a_model_of_both_kinds_of_layer_is_of_the_later_version(tmp_path: Path) -> None:
    model = wide("opt", torch.float16)
    quantize_model(model, QuantSpec(bits=4, dtype="int", zero_point=True), packed=True)
    name, old = next(iter(layers_of(model).items()))
    q = quantize_block_float(old.dequantize(), BlockFloatSpec(format="nvfp4"))
    model.set_submodule(name, BlockFloatLinear.from_quantized(q, bias=old.bias))
    save_packed(model, tmp_path)
    assert json.loads((tmp_path / "kbit.json").read_text())["version"] == 3
    assert torch.equal(logits(load_packed(tmp_path)), logits(model))


def unrounded(q: BlockFloatTensor) -> Tensor:
    """float64 element times scale."""
    element, (rows, columns) = q.spec.element, q.shape
    values = code_values(element, q.codes.device).double()[unpack(q.codes, q.spec.bits, rows * columns).int()]
    factor = q.scales.view(scale_dtype(q.spec)).double() * (1 if q.tensor_scale is None else q.tensor_scale.double())
    return values.view(rows, columns) * factor.repeat_interleave(element.block, 1)[:, :columns]


def test_the_truth_that_gpus_are_held_to_is_the_weight_unrounded() -> None:
    for name in FORMATS:
        q = quantized(name, ROWS)
        torch.testing.assert_close(
            unrounded(q).float(), dequantize_block_float(q).float(), rtol=2.0**-10, atol=2.0**-14
        )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(320, 1024), (320, 1000)])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_the_error_is_at_most_that_of_torch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    q = quantized(name, shape, dtype)
    layer = BlockFloatLinear.from_quantized(q).cuda()
    weight = layer.dequantize()
    assert torch.equal(weight.cpu(), dequantize_block_float(q))
    exact = unrounded(q).cuda()
    for rows in (1, 16, 64, 65, 300):
        x = inputs(rows, shape[1], dtype=dtype).cuda()
        true = linear(x.double(), exact)
        plain = float((linear(x, weight).double() - true).norm())
        assert float((layer(x).double() - true).norm()) <= 1.1 * plain
    wide_x = inputs(70, shape[1], dtype=torch.float32).cuda()
    true = linear(wide_x.double(), exact)
    assert float((layer(wide_x).double() - true).norm() / true.norm()) < 2 * torch.finfo(dtype).eps


@needs_gpu
@pytest.mark.parametrize("shape", [(320, 1024), (320, 1000)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cuda_graph_holds_a_layer_and_computes_with_what_is_loaded_later(name: str, shape: tuple[int, int]) -> None:
    layer = BlockFloatLinear.from_quantized(quantized(name, shape), bias=inputs(shape[0])).cuda()
    other = BlockFloatLinear.from_quantized(quantized(name, shape, scale=3), bias=inputs(shape[0])).cuda()
    state = copy.deepcopy(layer.state_dict())
    for rows in (1, 16, 100):
        x = inputs(rows, shape[1]).cuda()
        expected = layer(x)  # also compiles the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, expected)
        layer.load_state_dict(other.state_dict())
        graph.replay()
        assert torch.equal(y, other(x))
        layer.load_state_dict(state)


@needs_gpu
@pytest.mark.parametrize("shape", [(320, 1024), (320, 1000)])
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_batch_invariant_rows_do_not_depend_on_the_others(name: str, shape: tuple[int, int]) -> None:
    layer = BlockFloatLinear.from_quantized(quantized(name, shape)).cuda()
    layer.batch_invariant = True
    x = inputs(100, shape[1]).cuda()
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in (2, 16, 64, 100):
        assert torch.equal(layer(x[:rows]), alone[:rows])
