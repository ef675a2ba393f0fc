"""The k-bit layer and its operators: products, layouts, state dicts, casts and moves, misuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from kbit import KBitLinear, QuantSpec, dequantize, quantize
from kbit.blocks import Part, load_absmax
from kbit.blockwise import QuantizedTensor
from kbit.kernels import ops
from kbit.kernels.tiles import tile, untile, untile_codes
from kbit.packing import unpack

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TILED = QuantSpec(bits=3, dtype="quantile", center=True)
SPECS = {
    "tiled": QuantSpec(bits=4, dtype="int"),
    "tiled, mean": TILED,
    "rows": QuantSpec(bits=5, dtype="float", blocksize=48),
    "rows, nested": QuantSpec(bits=6, dtype="dynamic", absmax_dtype="nested"),
    "rows, whole": QuantSpec(bits=7, dtype="normal", blocksize=None, absmax_dtype="float32"),
    "rows, groups": QuantSpec(bits=2, dtype="int", blocksize=100, scheme="group", center=True),
}


def quantized(
    spec: QuantSpec, rows: int = 100, columns: int = 192, dtype: torch.dtype = torch.float16, kept: int = 0
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows + columns + spec.bits)
    weight = (torch.randn(rows, columns, generator=generator) + 0.3).to(dtype)
    return quantize(weight, spec, outlier_columns=list(range(1, 1 + 3 * kept, 3)))


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def stored(q: QuantizedTensor) -> list[torch.Tensor]:
    absmax = [q.absmax] if isinstance(q.absmax, torch.Tensor) else [q.absmax.codes, q.absmax.scale, q.absmax.offset]
    return [q.codes, *absmax, q.codebook, *(t for t in (q.mean, q.kept_columns, q.kept_values) if t is not None)]


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = zip(stored(a), stored(b), strict=True)
    return (a.spec, a.shape, a.dtype, a.storage_dtype) == (b.spec, b.shape, b.dtype, b.storage_dtype) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
    )


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
def test_it_gives_the_product_with_the_dequantized_weight(name: str, dtype: torch.dtype, kept: int) -> None:
    q = quantized(SPECS[name], dtype=dtype, kept=kept)
    bias = inputs(100, dtype=dtype)
    layer = KBitLinear.from_quantized(q, bias=bias)
    assert layer.tiled == name.startswith("tiled")
    x = inputs(2, 7, 192, dtype=dtype)
    found = layer(x)
    assert found.shape == (2, 7, 100)
    assert found.dtype == dtype
    true = linear(x.double(), dequantize(q).double(), bias.double())
    # Roundings: of the sum, with kept columns or a mean again; and the weight's own where the mean is added last.
    allowed = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 5e-4 if q.mean is not None else 1e-6
    assert float((found.double() - true).norm() / true.norm()) < allowed


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", SPECS)
def test_what_was_quantized_comes_back_bit_for_bit(name: str, kept: int) -> None:
    q = quantized(SPECS[name], kept=kept)
    layer = KBitLinear.from_quantized(q)
    assert same(layer.quantized(), q)
    assert torch.equal(layer.dequantize(), dequantize(q))
    # Beside what is counted: rows up to a multiple of 64, codebooks for both paths, their scale, a counter a row block.
    counted = q.nbits - (16 * q.codebook.numel() if q.spec.dtype == "quantile" else 0)
    codebooks = (32 + 16) * 2**q.spec.bits + 32 + (32 * 256 if q.spec.absmax_dtype == "nested" else 0)
    tiles = 28 * 192 * (q.spec.bits + 16 / 64) + 32 * 2 if layer.tiled else 0
    assert 8 * layer.nbytes == counted + codebooks + tiles


@settings(deadline=None, max_examples=25)
@given(
    bits=st.integers(2, 8),
    blocksize=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 200),
    blocks=st.integers(1, 3),
    data=st.data(),
)
def test_any_run_of_row_blocks_comes_back_from_the_tiles(
    bits: int, blocksize: int, rows: int, blocks: int, data: st.DataObject
) -> None:
    q = quantized(QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize), rows, max(64, blocksize) * blocks)
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
    monkeypatch.setattr(ops, "chunk_length", lambda _: length)
    for absmax_dtype in ("float32", "nested"):
        spec = QuantSpec(bits=3, dtype="int", blocksize=blocksize, scheme=scheme, absmax_dtype=absmax_dtype)
        q = quantize(inputs(101, 250).to(device), spec)
        parts = ops.dequantized_rows(
            q.codes, load_absmax(q.absmax), q.codebook, 250, spec, rows=101, storage=torch.float16
        )
        assert torch.equal(torch.cat(list(parts)), dequantize(q))


@pytest.mark.parametrize("name", SPECS)
def test_a_state_dict_goes_into_an_empty_layer_and_gives_the_same_bits(name: str) -> None:
    q = quantized(SPECS[name], kept=2)
    layer = KBitLinear.from_quantized(q, bias=inputs(100))
    state = copy.deepcopy(layer.state_dict())
    assert not list(layer.parameters())
    for device, assign in (("cpu", False), ("meta", True)):
        other = KBitLinear(192, 100, q.spec, kept=2, bias=True, device=device)
        nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in state.items()}, assign=assign)
        assert same(other.quantized(), q)
        x = inputs(3, 192)
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="kept_columns"):
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
        torch.testing.assert_close(layer(x.to(dtype)).half(), expected, rtol=0.02, atol=0.1)
        if dtype == torch.bfloat16:
            with pytest.raises(ValueError, match=r"takes \[..., 192\] of torch.bfloat16"):
                layer(x)
    layer.half()
    assert torch.equal(layer(x), expected)
    assert same(layer.quantized(), q)
    with pytest.raises(TypeError, match="can't be cast"):
        layer.type(torch.float16)


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"kbit.linear.{operator}", lambda *args: calls.append(args) or kernel(*args))
        layer(inputs(3, 192))
    torch.library.opcheck(kernel, calls[0])


@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_layer_is_one_graph_and_gives_the_same(name: str) -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS[name], kept=2), bias=inputs(100))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (1, 5, 70):
            x = inputs(rows, 192)
            assert torch.equal(compiled(x), layer(x))


def test_a_backward_says_that_there_is_none() -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"]))
    x = inputs(2, 192).requires_grad_()
    with pytest.raises(NotImplementedError, match="for inference"):
        layer(x).sum().backward()


def test_misuse_is_refused() -> None:
    layer = KBitLinear.from_quantized(quantized(SPECS["tiled"]))
    for x in (inputs(2, 64), inputs(2, 192).double(), inputs(2, 192).bfloat16()):
        with pytest.raises(ValueError, match=r"takes \[\.\.\., 192\]"):
            layer(x)
    with pytest.raises(ValueError, match="are needed"):
        KBitLinear.from_quantized(quantized(SPECS["tiled"]), bias=inputs(99))
    with pytest.raises(ValueError, match="are needed"):
        KBitLinear.from_quantized(quantize(torch.randn(64), SPECS["tiled"]))
    with pytest.raises(ValueError, match="2 to 8 bits"):
        KBitLinear(64, 64, QuantSpec(bits=16))
    with pytest.raises(ValueError, match="without tiles: its block size is 48"):
        KBitLinear.from_quantized(quantized(SPECS["rows"])).tiled_weight()


def unrounded(q: QuantizedTensor) -> torch.Tensor:
    """float64 codebook value times absmax, plus the mean; and the kept columns."""
    values = q.codebook.double()[unpack(q.codes, q.spec.bits, q.numel).int()]
    Part(blocks=q.blocks, start=0, stop=q.numel).multiply_(values, load_absmax(q.absmax))
    exact = (values if q.mean is None else values + q.mean.double()).view(q.shape)
    if q.kept_columns is not None and q.kept_values is not None:
        exact[:, q.kept_columns.long()] = q.kept_values.double()
    return exact


def test_the_truth_that_gpus_are_held_to_is_the_weight_unrounded() -> None:
    for spec in SPECS.values():
        q = quantized(spec, 32, 256, kept=3)
        torch.testing.assert_close(unrounded(q).float(), dequantize(q).float(), rtol=2.0**-10, atol=2.0**-14)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize("name", SPECS)
def test_on_a_gpu_the_error_is_at_most_that_of_torch(name: str, kept: int, dtype: torch.dtype) -> None:
    q = quantized(SPECS[name], 320, 1024, dtype=dtype, kept=kept)
    layer = KBitLinear.from_quantized(q).cuda()
    weight = layer.dequantize()
    assert torch.equal(weight.cpu(), dequantize(q))
    exact = unrounded(q).cuda()
    # A mean and kept columns are added to sums that were rounded once.
    allowed = 2 if kept or q.mean is not None else 1.1
    for rows in (1, 16, 64, 65, 300):
        x = inputs(rows, 1024, dtype=dtype).cuda()
        true = linear(x.double(), exact)
        plain = float((linear(x, weight).double() - true).norm())
        assert float((layer(x).double() - true).norm()) <= allowed * plain
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
