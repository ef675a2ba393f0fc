"""The k-bit layer and its operators: products, layouts, state dicts, casts and moves, misuse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear

from kbit import KBitLinear, QuantSpec, codebook, dequantize, quantize
from kbit.kernels import ops, rowmajor
from kbit.kernels.tiles import lookup_table, tile, untile, untile_codes
from kbit.quantizer.absmax import NESTED_SPEC, load_absmax
from kbit.quantizer.blocks import Piece
from kbit.quantizer.blockwise import QuantizedTensor, zeros_of
from kbit.quantizer.codebooks import is_data_dependent
from kbit.quantizer.hqq import as_blockwise, quantize_hqq
from kbit.quantizer.packed import Packed
from kbit.quantizer.packing import unpack
from kbit.specs.hqq import HqqSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TILED = QuantSpec(bits=3, dtype="quantile", center=True)
SPECS = {
    "tiled": QuantSpec(bits=4, dtype="int"),
    "tiled, mean": TILED,
    "tiled, no zero": QuantSpec(bits=3, dtype="lloyd", center=True),
    "rows, no zero": QuantSpec(bits=4, dtype="lloyd", blocksize=48, center=True),
    "rows": QuantSpec(bits=5, dtype="float", blocksize=48),
    "rows, nested": QuantSpec(bits=6, dtype="dynamic", absmax_dtype="nested"),
    "rows, whole": QuantSpec(bits=7, dtype="normal", blocksize=None, absmax_dtype="float32"),
    "rows, groups": QuantSpec(bits=2, dtype="int", blocksize=100, scheme="group", center=True),
    "tiled, zero points": QuantSpec(bits=4, dtype="int", zero_point=True, center=True),
    "rows, zero points": QuantSpec(bits=5, dtype="int", blocksize=48, zero_point=True),
}
FLOAT_ZEROS = {
    "tiled, float zero points": HqqSpec(bits=3, blocksize=32),
    "rows, float zero points": HqqSpec(bits=3, blocksize=80),
}
"""HQQ's, without kept columns or a mean; with layers like those of zero points in all but what is stored."""


def quantized(
    spec: QuantSpec | HqqSpec, rows: int = 100, columns: int = 192, dtype: torch.dtype = torch.float16, kept: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows + columns + spec.bits)
    weight = (torch.randn(rows, columns, generator=generator) + 0.3).to(dtype)
    if isinstance(spec, HqqSpec):
        return as_blockwise(quantize_hqq(weight, spec))
    return quantize(weight, spec, outlier_columns=list(range(1, 1 + 3 * kept, 3)))


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def stored(q: QuantizedTensor) -> list[torch.Tensor]:
    absmax = [q.absmax] if isinstance(q.absmax, torch.Tensor) else [q.absmax.codes, q.absmax.scale, q.absmax.offset]
    optional = (q.mean, q.kept_columns, q.kept_values, q.zero_points)
    return [q.codes, *absmax, q.codebook, *(t for t in optional if t is not None)]


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = zip(stored(a), stored(b), strict=True)
    return (a.spec, a.shape, a.dtype, a.storage_dtype) == (b.spec, b.shape, b.dtype, b.storage_dtype) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
    )


def assert_derived(layer: KBitLinear, dtype: torch.dtype) -> None:
    table, unscale = lookup_table(layer.codebook, dtype, whole=layer.spec.zero_point)
    assert layer.table.dtype == dtype
    assert torch.equal(layer.table, table)
    assert torch.equal(layer.unscale, unscale)
    assert ("arrived" in dict(layer.named_buffers())) == layer.tiled
    if layer.spec.absmax_dtype == "nested":
        assert torch.equal(layer.absmax_codebook, codebook(NESTED_SPEC))


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*SPECS, *FLOAT_ZEROS])
def test_it_gives_the_product_with_the_dequantized_weight(name: str, dtype: torch.dtype, kept: int) -> None:
    q = quantized((SPECS | FLOAT_ZEROS)[name], dtype=dtype, kept=kept)
    bias = inputs(100, dtype=dtype)
    layer = KBitLinear.from_quantized(q, bias=bias)
    assert layer.tiled == name.startswith("tiled")
    x = inputs(2, 7, 192, dtype=dtype)
    found = layer(x)
    assert found.shape == (2, 7, 100)
    assert found.dtype == dtype
    true = linear(x.double(), dequantize(q).double(), bias.double())
    # Roundings: of the sum; and the weight's own, which a layer of tiles with a mean does not do.
    unrounded_mean = q.mean is not None and layer.tiled
    allowed = torch.finfo(dtype).eps if dtype != torch.float32 else 5e-4 if unrounded_mean else 1e-6
    assert float((found.double() - true).norm() / true.norm()) < allowed


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", [*SPECS, *FLOAT_ZEROS])
def test_what_was_quantized_comes_back_bit_for_bit(name: str, kept: int) -> None:
    q = quantized((SPECS | FLOAT_ZEROS)[name], kept=kept)
    layer = KBitLinear.from_quantized(q)
    assert same(layer.quantized(), q)
    assert torch.equal(layer.dequantize(), dequantize(q))
    # Beside what is counted: rows up to a multiple of 64, codebooks for both paths, their scale, a counter a row block.
    counted = q.nbits - (16 * q.codebook.numel() if is_data_dependent(q.spec) else 0)
    codebooks = (32 + 16) * 2**q.spec.bits + 32 + (32 * 256 if q.spec.absmax_dtype == "nested" else 0)
    zero = 0 if q.zero_points is None else 16 if name in FLOAT_ZEROS else 8  # a byte, in tiles
    size = q.spec.blocksize or 1
    tiles = 28 * 192 * (q.spec.bits + (16 + zero) / size) + 32 * 2 if layer.tiled else 0
    if layer.tiled and zero == 8:
        tiles += 100 * 192 / size * (8 - q.spec.bits)
    assert 8 * layer.nbytes == counted + codebooks + tiles


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(2, 8),
    blocksize=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 200),
    blocks=st.integers(1, 3),
    zeros=st.sampled_from([None, "whole", "float"]),
    data=st.data(),
)
def test_any_run_of_row_blocks_comes_back_from_the_tiles(
    bits: int, blocksize: int, rows: int, blocks: int, zeros: str | None, data: st.DataObject
) -> None:
    spec: QuantSpec | HqqSpec = HqqSpec(bits=bits, blocksize=blocksize)
    if zeros != "float":
        codes_of = {"dtype": "int", "zero_point": True} if zeros else {"dtype": "quantile"}
        spec = QuantSpec(bits=bits, blocksize=blocksize, **codes_of)
    q = quantized(spec, rows, max(64, blocksize) * blocks)
    w = tile(q, torch.float16)
    first = data.draw(st.integers(0, w.row_blocks - 1))
    last = data.draw(st.integers(first + 1, w.row_blocks))
    codes = unpack(q.codes, bits, q.numel).view(q.shape)
    assert torch.equal(untile_codes(w, first, last), codes[64 * first : 64 * last])
    found = untile(w, first, last)
    assert torch.equal(found.half(), dequantize(q)[64 * first : 64 * last])


@pytest.mark.parametrize("length", [1, 3000, 1 << 20])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("blocksize", [17, 48, 64, 250, 1000, None])
@pytest.mark.parametrize("scheme", ["block", "group"])
def test_parts_in_row_major_order_are_those_of_the_whole(
    scheme: str, blocksize: int | None, device: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowmajor, "chunk_length", lambda _: length)
    for absmax_dtype in ("float32", "nested"):
        center = absmax_dtype == "nested"
        spec = QuantSpec(
            bits=3, dtype="int", blocksize=blocksize, scheme=scheme, absmax_dtype=absmax_dtype, center=center
        )
        q = quantize(inputs(101, 250).to(device), spec)
        w = Packed(
            codes=q.codes,
            absmax=load_absmax(q.absmax),
            codebook=q.codebook,
            mean=q.mean,
            bits=3,
            blocks=q.blocks,
        )
        parts = rowmajor.dequantized_rows(w, 250, torch.float16)
        assert torch.equal(torch.cat(list(parts)), dequantize(q))


@pytest.mark.parametrize("name", [*SPECS, *FLOAT_ZEROS])
def test_a_state_dict_goes_into_an_empty_layer_and_gives_the_same_bits(name: str) -> None:
    q = quantized((SPECS | FLOAT_ZEROS)[name], kept=2)
    layer = KBitLinear.from_quantized(q, bias=inputs(100))
    state = copy.deepcopy(layer.state_dict())
    assert not list(layer.parameters())
    has = {"float_zeros": True} if name in FLOAT_ZEROS else {"kept": 2}
    for device, assign in (("cpu", False), ("meta", True)):
        other = KBitLinear(192, 100, q.spec, bias=True, device=device, **has)
        nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=assign)
        assert same(other.quantized(), q)
        assert_derived(other, torch.float16)
        x = inputs(3, 192)
        assert torch.equal(other(x), layer(x))
    # Without kept columns, or with whole numbers as zero points.
    refused, why = (ValueError, "float_zeros") if name in FLOAT_ZEROS else (RuntimeError, "kept_columns")
    with pytest.raises(refused, match=why):
        KBitLinear(192, 100, q.spec, bias=True).load_state_dict(state)


@pytest.mark.parametrize("name", SPECS)
def test_casts_change_the_bias_and_the_dtype_of_x_and_nothing_else(name: str) -> None:
    q = quantized(SPECS[name], kept=2)
    layer = KBitLinear.from_quantized(q, bias=torch.ones(100).half())
    x = inputs(3, 192)
    expected = layer(x)
    for cast, dtype in ((nn.Module.bfloat16, torch.bfloat16), (nn.Module.float, torch.float32)):
        cast(layer)
        assert layer.bias is not None
        assert layer.bias.dtype == layer.dtype == dtype
        assert torch.equal(layer.dequantize(), dequantize(q).to(dtype))
        assert_derived(layer, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
        torch.testing.assert_close(layer(x.to(dtype)).half(), expected, rtol=0.02, atol=0.1)
        if dtype == torch.bfloat16:
            with pytest.raises(ValueError, match=r"takes \[..., 192\] of torch.bfloat16"):
                layer(x)
    layer.half()
    assert torch.equal(layer(x), expected)
    assert same(layer.quantized(), q)
    for cast in (lambda: layer.type(torch.float16), layer.double):
        with pytest.raises(TypeError, match="can't be cast"):
            cast()
    assert same(layer.quantized(), q)


@pytest.mark.parametrize("name", SPECS)
def test_empty_batches_and_single_vectors(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], kept=2), bias=inputs(100))
    assert layer(inputs(0, 192)).shape == (0, 100)
    assert layer(inputs(2, 0, 192)).shape == (2, 0, 100)
    one = layer(inputs(192))
    assert one.shape == (100,)
    torch.testing.assert_close(one, layer(inputs(192).view(1, 1, 192))[0, 0], rtol=0, atol=0)
    strided = inputs(192, 6).t()
    assert torch.equal(layer(strided), layer(strided.contiguous()))


@pytest.mark.parametrize("name", SPECS)
def test_batch_invariant_rows_do_not_depend_on_the_others(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], kept=5))
    layer.batch_invariant = True
    x = inputs(9, 192)
    alone = torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(layer(x), alone)
    assert torch.equal(layer(x[2:5]), alone[2:5])


@pytest.mark.parametrize("name", SPECS)
def test_the_operators_pass_torch_s_own_check(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name]))
    calls = []
    operator = "matmul_tiled" if layer.tiled else "matmul_rows"
    kernel = getattr(ops, operator)

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return kernel(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"kbit.packed.{'base' if layer.tiled else 'linear'}.{operator}", record)
        layer(inputs(3, 192))
    torch.library.opcheck(kernel, *calls[0])


def test_settings_of_the_operators_go_by_name_alone() -> None:
    for operator in (ops.matmul_tiled, ops.matmul_rows):
        by_name = {a.name for a in operator._schema.arguments if a.kwarg_only}
        assert {"n", "bits", "blocksize", "storage", "batch_invariant"} <= by_name


@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_layer_is_one_graph_and_gives_the_same(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], kept=2), bias=inputs(100))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (1, 5, 70):
            x = inputs(rows, 192)
            assert torch.equal(compiled(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))


def test_a_backward_says_that_there_is_none() -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"]))
    x = inputs(2, 192).requires_grad_()
    with pytest.raises(NotImplementedError, match="for inference"):
        layer(x).sum().backward()


def test_misuse_is_refused() -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"]))
    for x in (inputs(2, 64), inputs(2, 192).double(), inputs(2, 192).bfloat16(), torch.ones(()).half()):
        with pytest.raises(ValueError, match=r"takes \[\.\.\., 192\]"):
            layer(x)
    with pytest.raises(ValueError, match="are needed"):
        KBitLinear.from_quantized(quantized(SPECS["tiled"]), bias=inputs(99))
    with pytest.raises(ValueError, match="are needed"):
        KBitLinear.from_quantized(quantize(torch.randn(64), SPECS["tiled"]))
    with pytest.raises(ValueError, match="2 to 8 bits"):
        KBitLinear(64, 64, QuantSpec(bits=16))
    for sizes, more, why in [
        ((0, 64), {}, "in_features=0"),
        ((64, -1), {}, "out_features=-1"),
        ((64, 64), {"kept": 65}, "kept=65"),
        ((64, 64), {"kept": -1}, "kept=-1"),
        ((64, 64), {"dtype": torch.float64}, "dtype=torch.float64"),
        ((64, 64), {"float_zeros": True}, "float_zeros=True with 'int4 b64'"),
    ]:
        with pytest.raises(ValueError, match=why):
            KBitLinear(*sizes, SPECS["tiled"], **more)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="autocast"):
            layer(inputs(2, 192).bfloat16())
        assert layer(inputs(2, 192)).dtype == torch.float16
    with pytest.raises(ValueError, match="without tiles: its block size is 48"):
        KBitLinear.from_quantized(quantized(SPECS["rows"])).tiled_weight()


def unrounded(q: QuantizedTensor) -> torch.Tensor:
    """float64 codebook value times absmax, plus the mean; and the kept columns."""
    values = q.codebook.double()[unpack(q.codes, q.spec.bits, q.numel).int()]
    whole = Piece(blocks=q.blocks, start=0, stop=q.numel)
    if q.zero_points is not None:
        whole.add_(values, zeros_of(q).double(), sign=-1)
    whole.multiply_(values, load_absmax(q.absmax))
    exact = (values if q.mean is None else values + q.mean.double()).view(q.shape)
    if q.kept_columns is not None and q.kept_values is not None:
        exact[:, q.kept_columns.long()] = q.kept_values.double()
    return exact


def test_the_truth_that_gpus_are_held_to_is_the_weight_unrounded() -> None:
    for spec in (SPECS | FLOAT_ZEROS).values():
        q = quantized(spec, 32, 256, kept=3)
        torch.testing.assert_close(unrounded(q).float(), dequantize(q).float(), rtol=2.0**-10, atol=2.0**-14)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize("name", [*SPECS, *FLOAT_ZEROS])
def test_on_a_gpu_the_error_is_at_most_that_of_torch(name: str, kept: int, dtype: torch.dtype) -> None:
    q = quantized((SPECS | FLOAT_ZEROS)[name], 320, 1024, dtype=dtype, kept=kept)
    layer = KBitLinear.from_quantized(q).cuda()
    weight = layer.dequantize()
    assert torch.equal(weight.cpu(), dequantize(q))
    exact = unrounded(q).cuda()
    for rows in (1, 16, 64, 65, 300):
        x = inputs(rows, 1024, dtype=dtype).cuda()
        true = linear(x.double(), exact)
        plain = float((linear(x, weight).double() - true).norm())
        assert float((layer(x).double() - true).norm()) <= 1.1 * plain
    wide = inputs(70, 1024, dtype=torch.float32).cuda()
    true = linear(wide.double(), exact)
    assert float((layer(wide).double() - true).norm() / true.norm()) < 2 * torch.finfo(dtype).eps


@needs_gpu
@pytest.mark.parametrize("name", SPECS)
def test_on_a_gpu_batch_invariant_rows_do_not_depend_on_the_others(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], 320, 1024, kept=20)).cuda()
    layer.batch_invariant = True
    x = inputs(100, 1024).cuda()
    alone = torch.cat([layer(row) for row in x.split(1)])
    for rows in (2, 16, 64, 100):
        assert torch.equal(layer(x[:rows]), alone[:rows])


@needs_gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_cuda_graph_holds_a_layer(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], 320, 1024, kept=20), bias=inputs(320)).cuda()
    for rows in (1, 16, 100):
        x = inputs(rows, 1024).cuda()
        expected = layer(x)  # also compiles the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert torch.equal(y, expected)
        x.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_a_16_bit_default_dtype_changes_nothing() -> None:
    x = inputs(3, 192)
    for spec in SPECS.values():
        weight = inputs(100, 192)
        expected = KBitLinear.from_quantized(quantize(weight, spec))
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = KBitLinear(192, 100, spec)
            layer.load_state_dict(KBitLinear.from_quantized(quantize(weight, spec)).state_dict())
            assert torch.equal(layer(x), expected(x))
            assert {n: b.dtype for n, b in layer.named_buffers()} == {n: b.dtype for n, b in expected.named_buffers()}
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_kept_columns_and_mean_are_added_before_the_only_rounding(device: str, dtype: torch.dtype) -> None:
    weight = torch.full((64, 192), 400.0)
    weight[:, 0] = -400
    x = torch.ones(3, 192)
    x[:, 0] = 191  # what is not kept sums to 76,400, beyond float16, and the whole to 0
    x[2, 1] = 2
    for center in (False, True):
        spec = QuantSpec(bits=4, dtype="int", center=center)
        layer = KBitLinear.from_quantized(quantize(weight.to(dtype), spec, outlier_columns=[0])).to(device)
        # A GPU rounds the codebook; and what is right for a mean is the weight before its rounding.
        rounded = 400 * 191 if center or device == "cuda" else 0
        found = layer(x.to(device, dtype)).cpu()
        true = linear(x.double(), layer.dequantize().double().cpu()).to(dtype)
        torch.testing.assert_close(found, true, rtol=1e-3, atol=torch.finfo(dtype).eps / 2 * rounded)


def test_batch_invariance_reaches_every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    by_row = ops.by_row
    monkeypatch.setattr(
        "kbit.packed.linear.by_row", lambda *args, apart: seen.append(apart) or by_row(*args, apart=apart)
    )
    # The kept columns' product, the sums of x where the mean is not in the rows, and those of kept columns.
    for spec, sums in ((TILED, 3), (SPECS["rows, groups"], 2)):
        layer = KBitLinear.from_quantized(quantized(spec, kept=5))
        for batch_invariant in (False, True):
            layer.batch_invariant = batch_invariant
            layer(inputs(3, 192))
            assert seen == sums * [batch_invariant]
            seen.clear()


@pytest.mark.parametrize("name", ["tiled, mean", "rows, nested"])
def test_loading_in_place_keeps_addresses(name: str) -> None:
    spec = QuantSpec(**{**vars(SPECS[name]), "dtype": "quantile"})
    layer = KBitLinear.from_quantized(quantized(spec, kept=2))
    other = KBitLinear.from_quantized(quantize(inputs(100, 192) * 3, spec, outlier_columns=[5, 7]))
    assert not torch.equal(layer.table, other.table)
    addresses = {key: buffer.data_ptr() for key, buffer in layer.named_buffers()}
    layer.load_state_dict(other.state_dict())
    assert {key: buffer.data_ptr() for key, buffer in layer.named_buffers()} == addresses
    assert_derived(layer, torch.float16)
    assert torch.equal(layer(inputs(3, 192)), other(inputs(3, 192)))


@needs_gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_captured_graph_computes_with_what_is_loaded_later(name: str) -> None:
    # Another codebook, or with zero points those of another weight.
    other_values = {} if SPECS[name].zero_point else {"dtype": "quantile", "exponent_bits": None, "subnormals": None}
    spec = QuantSpec(**{**vars(SPECS[name]), **other_values})
    layer = KBitLinear.from_quantized(quantized(spec, 320, 1024, kept=2)).cuda()
    other = KBitLinear.from_quantized(quantize(inputs(320, 1024) * 3, spec, outlier_columns=[5, 7])).cuda()
    x = inputs(16, 1024).cuda()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    layer.load_state_dict(other.state_dict())
    graph.replay()
    assert torch.equal(y, other(x))


def test_a_state_dict_that_is_not_the_layer_s_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"], kept=2))
    state = layer.state_dict()
    for key, changed in [
        ("codes", state["codes"].long()),
        ("scales", state["scales"].bfloat16()),
        ("codebook", state["codebook"][:8]),
        ("kept_values", state["kept_values"].t().contiguous().t()),
    ]:
        for assign in (False, True):
            other = KBitLinear(192, 100, SPECS["tiled"], kept=2)
            with pytest.raises(ValueError, match=rf"0\.{key} is "):
                nn.Sequential(other).load_state_dict(
                    {f"0.{k}": v for k, v in {**state, key: changed}.items()}, assign=assign
                )
            assert not any(buffer.any() for buffer in other.buffers())
    other = KBitLinear(192, 100, QuantSpec(bits=4, dtype="normal"), kept=2)
    with pytest.raises(ValueError, match=r'"int".* does not fit a layer of .*"normal"'):
        other.load_state_dict(state)
    assert not other.codes.any()
    other = KBitLinear(192, 100, SPECS["tiled"], kept=2, storage_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict(state)
    layer._buffers["scales"] = layer.scales[:1]
    with pytest.raises(ValueError, match="scales is"):
        layer.derive()
    # Both kinds of file hold all of a state dict.
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for read in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        other = KBitLinear(192, 100, SPECS["tiled"], kept=2)
        other.load_state_dict(read)
        assert torch.equal(other.codes, state["codes"])


def test_a_layer_that_is_not_all_where_x_is_says_so() -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"]))
    with pytest.raises(ValueError, match="x is on meta and this layer's codes on cpu"):
        layer(inputs(2, 192).to("meta"))
    x = inputs(2, 192)
    expected = layer(x)
    layer._buffers["table"] = layer.table.to("meta")
    with pytest.raises(ValueError, match=r"table on meta.*load a state dict, or call layer\.derive"):
        layer(x)
    layer.derive()
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="codes on meta"):
        KBitLinear(192, 100, SPECS["tiled"], device="meta")(x)


@pytest.mark.parametrize("name", SPECS)
def test_accelerate_offloads_a_layer(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    layer = nn.Sequential(KBitLinear.from_quantized(quantized(SPECS[name], kept=2)))
    x = inputs(3, 192)
    expected = layer(x)
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"), offload_buffers=True)
    assert layer[0].codes.is_meta
    assert torch.equal(layer(x), expected)
