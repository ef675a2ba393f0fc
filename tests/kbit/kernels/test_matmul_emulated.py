"""The fused product's kernel, matmul.cu itself, run on the CPU (emulated/): needs a C++ compiler, and no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from kbit import QuantSpec
from kbit.kernels import variants
from kbit.kernels.tiles import TiledWeight
from kbit.kernels.variants import Gpu, Variant, choose, launch_shape
from kbit.specs.block_float import BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests import ROOT
from tests.kbit.kernels.tiled_weights import error, weight

HERE = Path(__file__).parent
KERNEL = ROOT / "kbit" / "kernels" / "matmul.cu"
COMMAND = ("g++", "-x", "c++", "-std=c++20", "-O1", "-w", "-fpermissive", "-shared", "-fPIC", "-pthread", "-DEMULATED")
# bits, rows and columns of W, block size, rows of x, multiprocessors: every width, block size and number of tiles; rows
# that fill no tile, columns that not all warps have, units that one CTA has and that several share. By turns in float16
# and bfloat16.
CASES = [
    (2, 100, 256, 32, 9, 132),
    (3, 192, 512, 64, 16, 2),
    (3, 130, 512, 128, 64, 6),
    (4, 64, 1024, 64, 1, 132),
    (4, 320, 512, 128, 29, 132),
    (5, 192, 512, 64, 40, 2),
    (5, 70, 256, 256, 3, 132),
    (6, 130, 512, 256, 12, 4),
    (6, 130, 512, 64, 30, 4),
    (6, 640, 512, 64, 30, 2),
    (4, 320, 1024, 64, 16, 4),
    (7, 100, 256, 64, 17, 132),
    (8, 192, 512, 32, 1, 4),
    (8, 100, 512, 32, 50, 132),
    (8, 640, 640, 64, 30, 2),
]
TOGETHER = [
    (2, 200, 256, 32, 100, 132),
    (3, 320, 640, 64, 23, 2),
    (4, 192, 512, 128, 64, 4),
    (5, 300, 256, 64, 40, 2),
    (8, 190, 1024, 256, 30, 2),
    (7, 192, 512, 32, 40, 4),
    (6, 320, 512, 128, 70, 2),
]
"""Where four warps multiply together, from as few values of W on as there are."""
ZEROS = [
    (3, 100, 256, 32, 9, 132),
    (4, 130, 256, 64, 3, 2),
    (5, 130, 256, 128, 40, 2),
    (8, 190, 256, 64, 40, 2),
    (3, 130, 256, 32, 30, 2),
    (5, 130, 512, 32, 16, 4),
]
"""With zero points, whole numbers in the first and the fourth, else float16. In the fourth and the fifth four warps
multiply together."""
FLOATS = [
    ("mxfp4", 130, 256, 3, 2, False),
    ("mxfp4", 130, 512, 29, 132, False),
    ("mxfp6_e2m3", 320, 512, 23, 2, True),
    ("nvfp4", 100, 512, 9, 132, False),
    ("nvfp4", 130, 512, 30, 4, False),
    ("mxfp4", 130, 512, 23, 2, True),
    ("nvfp4", 320, 256, 40, 2, True),
    ("mxfp6_e3m2", 200, 256, 12, 132, False),
    ("mxfp8_e5m2", 130, 256, 40, 2, True),
    ("mxfp8_e4m3", 70, 256, 3, 2, False),
    ("nvfp4", 130, 192, 1, 4, False),
    ("mxfp4", 130, 256, 100, 2, True),
]
"""Block-scaled floats: format, rows and columns of W, rows of x, multiprocessors, whether four warps go together."""
INVARIANT_FLOATS = (1, 2)
INVARIANT = (1, 4)
"""Cases of each in which a row is also computed alone."""


def compiles(folder: Path) -> bool:
    """Whether there is a compiler with 16-bit floats."""
    if shutil.which("g++") is None:
        return False
    source = folder / "half.cpp"
    source.write_text("_Float16 half(float f) { return (_Float16)f; }")
    command = ["g++", "-c", str(source), "-o", str(folder / "half.o")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def emulated(
    x: torch.Tensor,
    *,
    w: TiledWeight,
    bias: torch.Tensor,
    addend: torch.Tensor,
    variant: Variant,
    gpu: Gpu,
    folder: Path,
) -> torch.Tensor:
    """As ``kbit.kernels.matmul`` launches the kernel; the same whether its copies come at once or late."""
    library = folder / f"kernel{len(list(folder.iterdir()))}.so"
    header = ("-include", str(HERE / "emulated" / "cuda_on_cpu.h"))
    subprocess.run([*COMMAND, *variant.options(), *header, str(KERNEL), "-o", str(library)], check=True)
    ctas, sums = launch_shape(variant, w, gpu)
    kernel = ctypes.CDLL(str(library)).launch
    found = []
    for late in (False, True):
        y = torch.full((x.shape[0], w.n), float("nan"), dtype=x.dtype)
        partial = torch.full((sums,), float("nan"))
        table = w.codebook if variant.looks_up_floats else w.table
        tensors = (w.codes, w.scales, table, x, bias, addend, y, partial, w.arrived, w.unscale)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        kernel(ctas, variant.shared, *pointers, x.shape[0], w.n, w.k, x.stride(0), ctypes.c_bool(late))
        assert not w.arrived.any()
        found.append(y)
    assert torch.equal(*found)
    return found[0]


@pytest.mark.parametrize("number", range(len(CASES) + len(TOGETHER) + len(ZEROS)))
def test_the_kernel_computes_the_product(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, rows, columns, blocksize, x_rows, processors = (CASES + TOGETHER + ZEROS)[number]
    with_zeros = max(0, number + 1 - len(CASES) - len(TOGETHER))
    together = with_zeros in (4, 5) or len(CASES) <= number < len(CASES) + len(TOGETHER)
    spec: QuantSpec | HqqSpec = QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize)
    is_whole = with_zeros in (1, 4)
    if with_zeros:
        spec = HqqSpec(bits=bits, blocksize=blocksize)
        spec = spec.blockwise(columns) if is_whole else spec
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    w, exact = weight(rows, columns, spec, dtype=dtype)
    assert w.zero_bytes == (0 if not with_zeros else 1 if is_whole else 2)
    gpu = of_any_size(monkeypatch, processors, together=together)
    variant = choose(w, x_rows, dtype, gpu)
    assert variant.wgmma == together
    assert variant.folded == (together and (x_rows > 64 or (bits >= 6 and x_rows > 32)))
    check(w, exact, x_rows, dtype, gpu, tmp_path, alone=number in INVARIANT or with_zeros == 3)


@pytest.mark.parametrize("number", range(len(FLOATS)))
def test_the_kernel_multiplies_block_scaled_floats(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, rows, columns, x_rows, processors, together = FLOATS[number]
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    w, exact = weight(rows, columns, BlockFloatSpec(format=name), dtype=dtype)
    gpu = of_any_size(monkeypatch, processors, together=together)
    variant = choose(w, x_rows, dtype, gpu)
    assert variant.wgmma == together
    assert variant.folded == (name == "nvfp4" or (w.bits == 4 and x_rows > 8) or (together and x_rows > 32))
    check(w, exact, x_rows, dtype, gpu, tmp_path, alone=number in INVARIANT_FLOATS)


def of_any_size(monkeypatch: pytest.MonkeyPatch, processors: int, *, together: bool) -> Gpu:
    """Return a GPU on which small weights go as large ones do, with a clock that none has: choices are remembered."""
    for values in ("_LARGE", "_ENOUGH_VALUES"):
        monkeypatch.setattr(variants, values, 0)
    monkeypatch.setattr(variants, "_VERY_LARGE", 0)
    return Gpu(processors=processors, shared=227 * 1024, clock=1, bandwidth=3.35e12, wgmma=together)


def check(
    w: TiledWeight, exact: torch.Tensor, x_rows: int, dtype: torch.dtype, gpu: Gpu, folder: Path, *, alone: bool
) -> None:
    """Compare a product with float64's; where `alone`, also one that is batch-invariant with that of its first row."""
    if not compiles(folder):
        pytest.skip("needs g++ with _Float16")
    generator = torch.Generator().manual_seed(w.bits)
    x = torch.randn(x_rows, w.k, generator=generator).to(dtype)
    bias, addend = (torch.randn(shape, generator=generator) for shape in ((w.n,), (x_rows, w.n)))
    true = x.double() @ exact.T + bias.to(dtype).double() + addend.double()
    plain = (x.float() @ exact.to(dtype).float().T + bias.to(dtype).float() + addend).to(dtype)
    run = partial(emulated, w=w, bias=bias.to(dtype), gpu=gpu, folder=folder)
    found = run(x, addend=addend, variant=choose(w, x_rows, dtype, gpu))
    assert error(found, true) <= 1.1 * error(plain, true)
    if alone:
        choice = partial(choose, w, dtype=dtype, gpu=gpu, batch_invariant=True)
        found = run(x, addend=addend, variant=choice(m=x_rows))
        assert error(found, true) <= 1.1 * error(plain, true)
        single = run(x[:1], addend=addend[:1].contiguous(), variant=choice(m=1))
        assert torch.equal(single[0], found[0])
