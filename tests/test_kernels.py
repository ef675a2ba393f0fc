"""Kernels: the layout on any machine, compilation where nvcc is, results where a GPU is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kbit import QuantSpec, dequantize, quantize
from kbit.kernels.matmul import Variant, choose, matmul
from kbit.kernels.tiles import BLOCKSIZES, TiledWeight, tile, untile, why_not_tiled
from kbit.packing import unpack

KERNEL = Path(__file__).parent.parent / "kbit" / "kernels" / "matmul.cu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def weight(rows: int, columns: int, spec: QuantSpec, device: str = "cpu") -> tuple[TiledWeight, torch.Tensor]:
    """A tiled weight, and in float64 what it stands for: codebook value times absmax, unrounded."""
    generator = torch.Generator().manual_seed(rows + columns + spec.bits)
    w = torch.randn(rows, columns, generator=generator).to(torch.float16)
    q = quantize(w.to(device), spec)
    assert isinstance(q.absmax, torch.Tensor)
    assert spec.blocksize is not None
    values = q.codebook.double()[unpack(q.codes, spec.bits, q.numel).int()].view(rows, columns)
    exact = values * q.absmax.double().view(rows, -1).repeat_interleave(spec.blocksize, 1)
    return tile(q, torch.float16), exact


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_the_layout_holds_every_code_and_absmax_and_rounds_no_more_than_float16(bits: int, blocksize: int) -> None:
    tiled, exact = weight(100, 256, QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize))
    # Rounding the codebook, scaled, must not be worse than rounding each weight, as any float16 matmul does.
    assert error(untile(tiled), exact) <= 1.05 * error(exact.half(), exact)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_exactly_k_bits(bits: int) -> None:
    tiled, _ = weight(128, 512, QuantSpec(bits=bits, dtype="int", blocksize=64))
    assert tiled.codes.nbytes * 8 == bits * 128 * 512
    assert tiled.scales.nbytes * 8 == 16 * 128 * 512 // 64


@pytest.mark.parametrize(
    ("spec", "shape", "why"),
    [
        (QuantSpec(bits=4, dtype="int", blocksize=64), (64, 100), "no multiple of 64"),
        (QuantSpec(bits=4, dtype="int", blocksize=16), (64, 128), "block size is 16"),
        (QuantSpec(bits=4, dtype="int", blocksize=None), (64, 128), "block size is None"),
        (QuantSpec(bits=4, dtype="int", blocksize=256), (64, 128 + 256), "blocks of 256 don't divide"),
        (QuantSpec(bits=4, dtype="int", blocksize=64, absmax_dtype="float32"), (64, 128), "absmax is float32"),
        (QuantSpec(bits=4, dtype="int", blocksize=64), (2, 64, 64), "3 dimensions"),
    ],
)
def test_what_has_no_layout_is_refused_with_the_reason(spec: QuantSpec, shape: tuple[int, ...], why: str) -> None:
    q = quantize(torch.randn(shape), spec)
    assert why in str(why_not_tiled(q))
    with pytest.raises(ValueError, match="no tiled layout"):
        tile(q, torch.float16)


def test_x_of_another_shape_dtype_or_device_is_refused_before_any_launch() -> None:
    tiled, _ = weight(64, 128, QuantSpec(bits=4, dtype="int", blocksize=64))
    for x, why in [
        (torch.zeros(1, 64, dtype=torch.float16), "128] is needed"),
        (torch.zeros(65, 128, dtype=torch.float16), "1 to 64"),
        (torch.zeros(0, 128, dtype=torch.float16), "1 to 64"),
        (torch.zeros(128, dtype=torch.float16), "128] is needed"),
        (torch.zeros(1, 128, dtype=torch.bfloat16), "laid out for torch.float16"),
        (torch.zeros(1, 128, dtype=torch.float16), "one GPU"),
    ]:
        with pytest.raises(ValueError, match="x is ") as refused:
            matmul(x, tiled)
        assert why in str(refused.value)


def variants() -> list[Variant]:
    """Every way in which the kernel is compiled for a block size of 64, and some for others."""
    found = {}
    for bits in range(2, 9):
        for rows in (1, 16, 32, 64):
            for out in (4096, 16384):
                spec = QuantSpec(bits=bits, dtype="int", blocksize=BLOCKSIZES[bits % 4])
                tiled, _ = weight(64, 256, spec)
                object.__setattr__(tiled, "rows", out)
                object.__setattr__(tiled, "columns", 4096)
                found[choose(tiled, rows, (torch.float16, torch.bfloat16)[bits % 2], 132)] = None
    return list(found)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_kernel_compiles_and_fits_the_hardware(tmp_path: Path) -> None:
    chosen = variants()
    assert all(v.shared * v.ctas <= 227 * 1024 for v in chosen)
    for variant in chosen[:: len(chosen) // 6]:
        command = ["nvcc", "-arch=sm_90a", "--cubin", *variant.options(), str(KERNEL), "-o", str(tmp_path / "k.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 32, 61, 64])
def test_the_product_is_as_exact_as_torchs_and_the_same_each_time(bits: int, rows: int) -> None:
    for (n, k), blocksize in zip([(64, 64), (576, 1280), (1000, 4096), (4096, 256)], (64, 32, 128, 256), strict=True):
        tiled, exact = weight(n, k, QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize), "cuda")
        x = torch.randn(rows, k, device="cuda").half()
        true = x.double() @ exact.T
        plain = x @ exact.half().T
        found = matmul(x, tiled)
        assert error(found, true) <= 1.1 * error(plain, true)
        for _ in range(3):
            assert torch.equal(matmul(x, tiled), found)
        # A row's result does not depend on its neighbours.
        other = torch.cat([x[:1], torch.randn(rows - 1, k, device="cuda").half()])
        assert torch.equal(matmul(other, tiled)[0], found[0])


@needs_gpu
def test_bfloat16_and_a_captured_graph() -> None:
    q = quantize(torch.randn(512, 1024, device="cuda").bfloat16(), QuantSpec(bits=5, dtype="float", blocksize=64))
    tiled, x = tile(q, torch.bfloat16), torch.randn(16, 1024, device="cuda").bfloat16()
    true = x.double() @ dequantize(q).double().T
    assert error(matmul(x, tiled), true) < 0.01
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, tiled)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, matmul(x, tiled))
