"""The fused product: its variants and their compilation on any machine, results where a GPU is."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kbit import QuantSpec, codebook
from kbit.kernels.matmul import dequantize_rows, matmul
from kbit.kernels.tiles import BLOCKSIZES, TiledWeight, tile, untile
from kbit.kernels.variants import Gpu, Variant, choose, fused_is_faster, most_rows
from kbit.quantizer.block_float import dequantize_block_float, quantize_block_float
from kbit.specs.block_float import FORMATS, BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests import ROOT
from tests.kbit.kernels.tiled_weights import error, weight

KERNELS = ROOT / "kbit" / "kernels"
H100 = Gpu(processors=132, shared=227 * 1024, clock=1.98e9, bandwidth=3.35e12, wgmma=True)
H200 = replace(H100, bandwidth=4.81e12)
ALONE = {gpu: replace(gpu, wgmma=False) for gpu in (H100, H200)}
"""As these would be if no warps multiplied together: later GPUs don't have Hopper's instructions."""
GPUS = {
    "H100": H100,
    "A100": Gpu(processors=108, shared=163 * 1024, clock=1.41e9, bandwidth=2.04e12, wgmma=False),
    "RTX 4090": Gpu(processors=128, shared=99 * 1024, clock=2.52e9, bandwidth=1.01e12, wgmma=False),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def variants(gpu: Gpu) -> list[Variant]:
    """Every way in which the kernel is compiled for some shapes of large models and odd ones."""
    found = {}
    specs: list[QuantSpec | HqqSpec | BlockFloatSpec] = [BlockFloatSpec(format=name) for name in FORMATS]
    for bits in range(2, 9):
        size = BLOCKSIZES[bits % 4]
        specs += [QuantSpec(bits=bits, dtype="int", blocksize=size, zero_point=zeros) for zeros in (False, True)]
        specs.append(HqqSpec(bits=bits, blocksize=size))
    for number, spec in enumerate(specs):
        tiled, _ = weight(64, 256, spec)
        for rows, columns in [(16384, 4096), (4096, 16384), (36864, 12288), (5120, 5120), (200, 192)]:
            shaped = replace(tiled, n=rows, k=columns)
            for x_rows, invariant in itertools.product((1, 16, 32, 64, 128), (False, True)):
                dtype = (torch.float16, torch.bfloat16)[number % 2]
                if x_rows > most_rows(gpu, batch_invariant=invariant):
                    continue
                found[choose(shaped, x_rows, dtype, gpu, batch_invariant=invariant)] = None
    return list(found)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_variant_fits_its_gpu_and_the_kernel(gpu: Gpu) -> None:
    for v in variants(gpu):
        assert (v.shared + 1024) * v.blocks_per_sm <= gpu.shared
        assert v.warps <= 32
        assert v.m_tiles * 2 % (v.n_tiles * v.warps_per_tile) == 0
        assert v.m_tiles % v.sum_tiles == 0
        assert v.n_tiles * v.warps_per_tile % 4 == 0 or not v.wgmma
    together = [v for v in variants(gpu) if v.wgmma]
    assert {v.zero_bytes for v in together} == {v.scale_format for v in together} == ({0, 1, 2} if gpu.wgmma else set())
    assert all(v.folded for v in variants(gpu) if v.blocksize == 16)  # a tensor core sums columns of several blocks


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_batch_invariant_sums_have_one_order_for_any_number_of_rows(gpu: Gpu) -> None:
    specs: list[QuantSpec | HqqSpec | BlockFloatSpec] = [BlockFloatSpec(format=name) for name in FORMATS]
    specs += [QuantSpec(bits=bits, dtype="int", blocksize=64) for bits in range(2, 9)]
    specs += [HqqSpec(bits=bits) for bits in range(2, 9)]
    for spec in specs:
        tiled, _ = weight(64, 256, spec)
        for rows, columns in [(16384, 4096), (4096, 16384), (200, 192)]:
            shaped = replace(tiled, n=rows, k=columns)
            chosen = [choose(shaped, m, torch.float16, gpu, batch_invariant=True) for m in (1, 9, 32, 64)]
            assert len({(v.k_tiles, v.split_k, v.folded, v.apart) for v in chosen}) == 1


@pytest.mark.parametrize(
    ("gpu", "bits", "rows", "columns", "x_rows", "faster"),
    # How many times as fast it was measured to be.
    [
        (ALONE[H100], 8, 16384, 4096, 192, True),  # 1.14
        (ALONE[H100], 3, 12288, 4096, 192, False),  # 0.94
        (ALONE[H100], 4, 20480, 5120, 192, False),  # 0.74 to 0.87
        (ALONE[H100], 4, 2048, 4096, 128, False),  # few values
        (ALONE[H100], 4, 16384, 2048, 128, False),  # few columns
        (ALONE[H100], 4, 49152, 12288, 256, False),  # four launches
        (ALONE[H200], 4, 16384, 4096, 128, True),  # 1.43
        (ALONE[H200], 4, 16384, 4096, 65, True),
        (ALONE[H200], 5, 12288, 49152, 128, True),  # 1.17
        (ALONE[H200], 8, 16384, 4096, 192, False),  # 0.94
        (ALONE[H200], 4, 49152, 12288, 192, True),  # 1.18
        (ALONE[H200], 5, 20480, 5120, 128, False),  # 0.90
        (ALONE[H200], 8, 20480, 5120, 128, False),  # 0.86
        (ALONE[H200], 8, 768, 768, 64, True),  # one launch
        (replace(ALONE[H200], bandwidth=0), 4, 16384, 4096, 128, False),  # the driver doesn't say
        (H200, 4, 49152, 12288, 128, True),  # 2.01
        (H200, 8, 16384, 4096, 192, True),  # 1.60
        (H200, 4, 4096, 16384, 192, True),  # 1.42
        (H200, 4, 16384, 4096, 256, True),  # 1.36
        (H200, 4, 28672, 7168, 384, True),  # 1.08
        (H200, 4, 28672, 7168, 385, False),  # four launches
        (H200, 4, 12288, 4096, 256, True),  # 1.04
        (H200, 4, 12288, 4096, 264, False),  # 0.93
        (H200, 4, 8192, 4096, 192, True),  # 1.13
        (H200, 4, 8192, 4096, 256, False),  # 0.95
        (H200, 4, 4096, 4096, 128, True),  # 1.23
        (H200, 4, 4096, 4096, 192, False),  # 0.87
        (H200, 4, 2560, 2560, 100, False),  # 0.84
        (H200, 4, 768, 768, 64, True),  # 1.40
    ],
)
def test_more_than_64_rows_take_several_launches_where_those_are_faster(
    gpu: Gpu, bits: int, rows: int, columns: int, x_rows: int, faster: bool
) -> None:
    tiled, _ = weight(64, 256, QuantSpec(bits=bits, dtype="int", blocksize=64))
    assert fused_is_faster(replace(tiled, n=rows, k=columns), x_rows, gpu) == faster


@needs_gpu
def test_a_gpu_tells_what_decides() -> None:
    gpu = Gpu.of(0)
    assert 0.5e9 < gpu.clock < 5e9
    assert 1e11 < gpu.bandwidth < 2e13


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_the_kernels_compile(tmp_path: Path, target: str) -> None:
    # Each kind once: kinds are what the kernel has code of its own for.
    kinds = {
        (v.wgmma, v.scale_format, v.zero_bytes, v.folded, v.apart, v.m_tiles > 4): v
        for v in variants(GPUS["A100"] if target == "sm_80" else H100)
    }
    for variant in kinds.values():
        assert_compiles("matmul.cu", variant.options(), target, tmp_path)
    zeros = "-DZEROS=2" if target == "sm_80" else "-DZEROS=1"
    assert_compiles("untile.cu", ("-DBITS=5", "-DBLOCKSIZE=32", "-DSCALE=0", zeros, "-DBF16=1"), target, tmp_path)
    scale = "-DSCALE=2" if target == "sm_80" else "-DSCALE=1"
    assert_compiles("untile.cu", ("-DBITS=4", "-DBLOCKSIZE=16", scale, "-DZEROS=0", "-DBF16=0"), target, tmp_path)


def assert_compiles(name: str, options: tuple[str, ...], target: str, folder: Path) -> None:
    architecture = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    command = ["nvcc", architecture, "--cubin", *options, str(KERNELS / name), "-o", str(folder / "k.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiles_of_another_weight_or_out_of_order_are_refused() -> None:
    tiled, _ = weight(64, 128, QuantSpec(bits=4, dtype="int", blocksize=64))
    floats, _ = weight(64, 128, BlockFloatSpec(format="nvfp4"))
    x = torch.zeros(1, 128, dtype=torch.float16)
    for wrong in (
        replace(tiled, n=128),
        replace(tiled, bits=5),
        replace(tiled, codes=tiled.codes[::2]),
        replace(tiled, scales=tiled.scales[:, :1]),
        replace(tiled, scales=torch.zeros(1, 2, 64, dtype=torch.uint8)),
        replace(tiled, scales=tiled.scales.to(torch.float8_e4m3fn)),
        replace(tiled, tensor_scale=torch.ones(1)),
        replace(tiled, scales=tiled.scales.float()),
        replace(floats, scales=floats.scales.view(torch.uint8)),
        replace(floats, tensor_scale=None),
        replace(floats, blocksize=32),
        replace(floats, scales=floats.scales.view(torch.uint8).view(torch.float8_e8m0fnu), tensor_scale=None),
    ):
        with pytest.raises(ValueError, match="are not those of a weight"):
            matmul(x, wrong)
    channels_last = replace(tiled, codes=tiled.codes.to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="in order"):
        matmul(x, channels_last)


def test_x_of_another_shape_dtype_or_device_is_refused_before_any_launch() -> None:
    tiled, _ = weight(64, 128, QuantSpec(bits=4, dtype="int", blocksize=64))
    for x, why in [
        (torch.zeros(1, 64, dtype=torch.float16), "128] is needed"),
        (torch.zeros(0, 128, dtype=torch.float16), "at least 1"),
        (torch.zeros(128, dtype=torch.float16), "128] is needed"),
        (torch.zeros(1, 128, dtype=torch.bfloat16), "laid out for torch.float16"),
        (torch.zeros(1, 128, dtype=torch.float16), "one GPU"),
    ]:
        with pytest.raises(ValueError, match="x is ") as refused:
            matmul(x, tiled)
        assert why in str(refused.value)


def test_what_is_beyond_the_kernel_s_offsets_is_refused() -> None:
    tiled, _ = weight(64, 128, QuantSpec(bits=4, dtype="int", blocksize=64))
    x = torch.empty_strided((64, 128), (2**27, 1), dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="rows are 134,217,728 values apart"):
        matmul(x, tiled)
    with pytest.raises(ValueError, match="one GPU"):  # as far apart as offsets reach
        matmul(torch.empty_strided((64, 128), (2**25, 1), dtype=torch.float16, device="meta"), tiled)
    columns = 2**25
    codes = torch.empty(64 * columns // 64, 4, 32, 4, dtype=torch.int32, device="meta")
    scales = torch.empty(64, columns // 64, 8, 8, dtype=torch.float16, device="meta")
    huge = replace(tiled, codes=codes, scales=scales, n=64 * 64, k=columns)
    with pytest.raises(ValueError, match="codes take 68,719,476,736 bytes"):
        matmul(torch.empty(1, columns, dtype=torch.float16, device="meta"), huge)


@needs_gpu
def test_x_whose_rows_lie_askew_is_refused() -> None:
    tiled, _ = weight(64, 128, QuantSpec(bits=4, dtype="int", blocksize=64), "cuda")
    x = torch.zeros(4, 129, dtype=torch.float16, device="cuda")
    for askew in (x[:, 1:], x[:, :128], torch.zeros(128, 4, dtype=torch.float16, device="cuda").T):
        with pytest.raises(ValueError, match="contiguous"):
            matmul(askew, tiled)


def products(
    tiled: TiledWeight, exact: torch.Tensor, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ours, torch's with the rounded weight, and the truth: of enough x that errors don't hang on chance."""
    torch.manual_seed(rows)
    found, plain, true = [], [], []
    for _ in range(-(-64 // rows)):
        x = torch.randn(rows, tiled.k, device="cuda").to(dtype)
        found.append(matmul(x, tiled))
        plain.append(x @ exact.to(dtype).T)
        true.append(x.double() @ exact.T)
    return torch.cat(found), torch.cat(plain), torch.cat(true)


@needs_gpu
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 32, 61, 64, 65, 150, 193])
def test_the_product_is_as_exact_as_torchs_and_the_same_each_time(bits: int, rows: int) -> None:
    shapes = [(64, 64), (576, 1280), (1000, 4096), (4096, 256), (4096, 11008)]
    for (n, k), blocksize in zip(shapes, (64, 32, 128, 256, 64), strict=True):
        tiled, exact = weight(n, k, QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize), "cuda")
        found, plain, true = products(tiled, exact, rows, torch.float16)
        assert error(found, true) <= 1.1 * error(plain, true)
        x = torch.randn(rows, k, device="cuda").half()
        found = matmul(x, tiled)
        for _ in range(3):
            assert torch.equal(matmul(x, tiled), found)
        if rows <= 64:  # a row's result does not depend on what the others hold
            other = torch.cat([x[:1], torch.randn(rows - 1, k, device="cuda").half()])
            assert torch.equal(matmul(other, tiled)[0], found[0])


@needs_gpu
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_many_row_blocks(bits: int) -> None:
    """Some fill an H100 with one launch's units, the last gives each CTA several."""
    for n, k in [(5120, 1280), (8512, 1280), (33856, 1024)]:
        tiled, exact = weight(n, k, QuantSpec(bits=bits, dtype="normal", blocksize=64), "cuda")
        for rows in (1, 16, 32, 64):
            found, plain, true = products(tiled, exact, rows, torch.float16)
            assert error(found, true) <= 1.1 * error(plain, true)


@needs_gpu
@pytest.mark.parametrize(("with_bias", "with_addend"), [(False, False), (True, False), (True, True)])
def test_many_rows_by_parts_of_the_weight(monkeypatch: pytest.MonkeyPatch, with_bias: bool, with_addend: bool) -> None:
    monkeypatch.setattr("kbit.kernels.matmul._PART_BYTES", 1 << 20)
    tiled, exact = weight(1000, 4096, QuantSpec(bits=3, dtype="normal", blocksize=64), "cuda")
    x = torch.randn(300, 4096, device="cuda").half()
    bias = torch.randn(1000, device="cuda").half()
    addend = torch.randn(300, 1000, device="cuda")
    true, plain = x.double() @ exact.T, torch.mm(x, exact.half().T, out_dtype=torch.float32)
    for added, given in ((bias, with_bias), (addend, with_addend)):
        true, plain = true + added.double() * given, plain + added * given
    found = matmul(x, tiled, bias if with_bias else None, addend if with_addend else None)
    assert error(found, true) <= 1.1 * error(plain.half(), true)


@needs_gpu
@pytest.mark.parametrize("dtype", ["int", "float", "dynamic", "quantile", "normal", "zero points", "hqq"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_data_type_in_bfloat16_and_float16(dtype: str, blocksize: int) -> None:
    for storage in (torch.float16, torch.bfloat16):
        for bits in range(2, 9):
            hqq = HqqSpec(bits=bits, blocksize=blocksize)
            known = {"zero points": hqq.blockwise(768), "hqq": hqq}
            spec = known[dtype] if dtype in known else QuantSpec(bits=bits, dtype=dtype, blocksize=blocksize)
            tiled, exact = weight(320, 768, spec, "cuda", storage)
            for rows in (1, 24):
                found, plain, true = products(tiled, exact, rows, storage)
                assert error(found, true) <= 1.1 * error(plain, true)


@needs_gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_scaled_floats(name: str, dtype: torch.dtype) -> None:
    for n, k in [(64, 64), (1000, 4096), (8512, 1280)]:
        tiled, exact = weight(n, k, BlockFloatSpec(format=name), "cuda", dtype)
        for rows in (1, 3, 16, 29, 64, 100, 300):
            found, plain, true = products(tiled, exact, rows, dtype)
            assert error(found, true) <= 1.1 * error(plain, true)
        x = torch.randn(40, k, device="cuda").to(dtype)
        whole = matmul(x, tiled, batch_invariant=True)
        assert torch.equal(matmul(x[3:4].contiguous(), tiled, batch_invariant=True), whole[3:4])


@needs_gpu
@pytest.mark.parametrize("kind", ["plain", "zero points", "hqq", *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_weights_of_every_kind(kind: str, dtype: torch.dtype) -> None:
    for bits in (2, 3, 4, 5, 6, 8) if kind not in FORMATS else (FORMATS[kind].bits,):
        hqq = HqqSpec(bits=bits)
        known = {"plain": QuantSpec(bits=bits, dtype="normal"), "zero points": hqq.blockwise(4096), "hqq": hqq}
        spec = known[kind] if kind in known else BlockFloatSpec(format=kind)
        tiled, exact = weight(12288, 4096, spec, "cuda", dtype)
        gpu = Gpu.of(0)
        for rows in (24, 64, 100, 150):
            assert choose(tiled, min(rows, 128), dtype, gpu).wgmma or not gpu.wgmma or rows == 24
            found, plain, true = products(tiled, exact, rows, dtype)
            assert error(found, true) <= 1.1 * error(plain, true)


@needs_gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_scaled_floats_are_dequantized_as_elsewhere(name: str, dtype: torch.dtype) -> None:
    w = torch.randn(200, 512, device="cuda").mul(torch.randn(200, 1, device="cuda").mul(6).exp()).to(dtype)
    for rounding in (None, *(["ceil"] if name != "nvfp4" else [])):
        q = quantize_block_float(w.clamp(-65504, 65504), BlockFloatSpec(format=name, scale_rounding=rounding))
        out = torch.full((200, 512), float("nan"), dtype=dtype, device="cuda")
        dequantize_rows(tile(q, dtype), 0, out)
        assert torch.equal(out, dequantize_block_float(q))


@needs_gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_batch_invariant_rows_do_not_depend_on_the_batch(bits: int) -> None:
    for n, k in [(4096, 4096), (192, 16384)]:
        tiled, _ = weight(n, k, QuantSpec(bits=bits, dtype="int", blocksize=64), "cuda")
        x = torch.randn(200, k, device="cuda").half()
        whole = matmul(x, tiled, batch_invariant=True)
        for start, stop in [(0, 1), (7, 8), (0, 16), (5, 38), (64, 128), (3, 199)]:
            assert torch.equal(matmul(x[start:stop].contiguous(), tiled, batch_invariant=True), whole[start:stop])


@needs_gpu
@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_dequantized_from_tiles_are_those_of_the_layout(bits: int) -> None:
    for (blocksize, dtype), zeros in itertools.product(
        zip(BLOCKSIZES, [torch.float16, torch.bfloat16] * 2, strict=True), (0, 1, 2)
    ):
        hqq = HqqSpec(bits=bits, blocksize=blocksize)
        spec = (QuantSpec(bits=bits, dtype="normal", blocksize=blocksize), hqq.blockwise(512), hqq)[zeros]
        tiled, _ = weight(200, 512, spec, "cuda", dtype)
        for first, stop in [(0, 200), (1, 128), (3, 200)]:
            out = torch.full((stop - 64 * first, 512), float("nan"), dtype=dtype, device="cuda")
            dequantize_rows(tiled, first, out)
            assert torch.equal(out, untile(tiled).to(dtype)[64 * first : stop])


@needs_gpu
def test_a_captured_graph_computes_what_a_launch_does() -> None:
    tiled, _ = weight(512, 1024, QuantSpec(bits=5, dtype="float", blocksize=64), "cuda", torch.bfloat16)
    for rows in (1, 16, 100):
        x = torch.randn(rows, 1024, device="cuda").bfloat16()
        matmul(x, tiled)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = matmul(x, tiled)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, matmul(x, tiled))


@needs_gpu
def test_a_codebook_of_fewer_values_than_codes() -> None:
    spec = QuantSpec(bits=6, dtype="float", exponent_bits=5, blocksize=64)
    assert codebook(spec).numel() < 64
    tiled, exact = weight(128, 256, spec, "cuda")
    x = torch.randn(4, 256, device="cuda").half()
    true = x.double() @ exact.T
    assert error(matmul(x, tiled), true) <= 1.1 * error(x @ exact.half().T, true)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 40, 64, 100, 300])
def test_bias_and_addend_are_added_before_the_only_rounding(rows: int) -> None:
    for n, k in [(192, 512), (4096, 16384)]:
        tiled, exact = weight(n, k, QuantSpec(bits=4, dtype="normal", blocksize=64), "cuda")
        x, bias = torch.randn(rows, k, device="cuda").half(), torch.randn(n, device="cuda").half()
        true = x.double() @ exact.T + bias.double()
        assert error(matmul(x, tiled, bias), true) <= 1.1 * error(torch.addmm(bias, x, exact.half().T), true)
        addend = torch.randn(rows, n, device="cuda")
        plain = (torch.mm(x, exact.half().T, out_dtype=torch.float32) + bias + addend).half()
        assert error(matmul(x, tiled, bias, addend), true + addend.double()) <= 1.1 * error(
            plain, true + addend.double()
        )


@needs_gpu
def test_a_bias_of_another_shape_or_dtype_is_refused() -> None:
    tiled, _ = weight(128, 128, QuantSpec(bits=4, dtype="int", blocksize=64), "cuda")
    x = torch.zeros(1, 128, dtype=torch.float16, device="cuda")
    wrong = torch.zeros(64, device="cuda").half(), torch.zeros(128, device="cuda"), torch.zeros(128).half()
    for bias in (*wrong, torch.zeros(256, device="cuda").half()[::2]):
        with pytest.raises(ValueError, match=r"bias is .* is needed"):
            matmul(x, tiled, bias)
