"""What tests/test_triton.py compares, in processes of its own: the kernels with the reference, equal to the bit.

As a program: ``python -m tests.kbit.kernels.triton_cases sample | edges | refused | product BITS DTYPE``; with
TRITON_INTERPRET=1 on the CPU, else on a GPU. Ends with 1 if anything differs, and says what.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kbit import QuantizedTensor, QuantSpec, codebook, dequantize, quantize
from kbit.data_types import named_dtypes
from kbit.errors import WeightError
from kbit.quantizer.absmax import NestedAbsmax
from kbit.quantizer.encode import codes_by_definition, midpoints
from kbit.quantizer.packing import unpack

WEIGHTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SPECS: Mapping[str, Sequence[Any]] = {
    "bits": range(2, 9),
    "dtype": named_dtypes(),
    "blocksize": (1, 7, 32, 64, 100, 256, 1000, 4096, None),
    "scheme": ("block", "group"),
}
STORED: Mapping[str, Sequence[Any]] = {"absmax_dtype": ("float16", "float32", "nested"), "center": (False, True)}
SHAPES = ((1,), (3, 5), (2, 3, 50), (64, 128), (17, 129), (1, 4300))
LARGER_SHAPES = ((1,), (77, 131), (9, 4096))


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every two choices of different axes meet; greedy, so few but not the fewest."""
    chooser = random.Random(0)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(axes, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        for name in axes:
            if name not in row:
                options = list(range(len(axes[name])))
                chooser.shuffle(options)
                row[name] = max(options, key=lambda i: _met(missing, row, (name, i)))
        missing -= set(itertools.combinations(((name, row[name]) for name in axes), 2))
        rows.append({name: axes[name][row[name]] for name in axes})
    return rows


def _met(missing: set[Any], row: dict[str, int], choice: tuple[str, int]) -> int:
    return sum(pair in missing for other in row.items() for pair in ((other, choice), (choice, other)))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit."""
    pair = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*pair)


def stored(q: QuantizedTensor) -> Iterator[Tensor]:
    yield q.codes
    if isinstance(q.absmax, NestedAbsmax):
        yield from (q.absmax.codes, q.absmax.scale, q.absmax.offset)
    else:
        yield q.absmax
    yield from (t for t in (q.mean, q.kept_columns, q.kept_values) if t is not None)


def differences(weight: Tensor, spec: QuantSpec, **options: Any) -> list[str]:
    """What differs between the kernels and the reference, in words; nothing is right."""
    expected = quantize(weight, spec, impl="torch", **options)
    found = quantize(weight, spec, impl="triton", **options)
    name = f"{spec.label} {tuple(weight.shape)} {weight.dtype} {options}"
    wrong = [
        f"{name}: part {i} as stored"
        for i, (a, b) in enumerate(zip(stored(expected), stored(found), strict=True))
        if not same(a, b)
    ]
    if not same(dequantize(expected, impl="torch"), dequantize(expected, impl="triton")):
        wrong.append(f"{name}: dequantized")
    return wrong


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Random values of one of several scales, some blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (0.02, 1.0, 300.0, 1e-6)[seed % 4]
    if seed % 3 == 0:
        weight.view(-1)[weight.numel() // 3 :][:200] = 0
    return weight.to(dtype).to(device)


def at_midpoints(spec: QuantSpec, dtype: torch.dtype, device: str) -> Tensor:
    """Blocks of 64, each begun by its absmax, of values as near to absmax times each midpoint as `dtype` has them, and
    the next above and below."""
    points = midpoints(codebook(spec)).double()
    rows = []
    for absmax in (1.0, 14.0, 254.0, 0.01, 2.0**-14, 3 * 2.0**-24):
        largest = torch.tensor(absmax, dtype=torch.float64).to(dtype)
        middle = (points * largest.double()).to(dtype)
        near = torch.cat([middle, next_to(middle, 1), next_to(middle, -1)])
        near = torch.nn.functional.pad(near, (0, -near.numel() % 63)).view(-1, 63)
        rows.append(torch.cat([largest.expand(near.shape[0], 1), near], 1))
    return torch.cat(rows).to(device)


def next_to(values: Tensor, step: int) -> Tensor:
    """The neighbouring 16-bit values away from zero (1) or towards it (-1)."""
    bits = values.view(torch.int16)
    return torch.where(bits & 0x7FFF != 0, bits + step, bits).view(values.dtype)


def check_sample(device: str) -> list[str]:
    axes = {
        **SPECS,
        **STORED,
        "clip": (False, True),
        "weight": tuple(WEIGHTS),
        "shape": SHAPES,
        "kept": (False, True),
        "storage": tuple(WEIGHTS),
    }
    wrong = []
    for seed, row in enumerate(pairwise(axes)):
        spec = QuantSpec(**{name: row[name] for name in (*SPECS, *STORED, "clip")})
        weight = weight_of(row["shape"], WEIGHTS[row["weight"]], device, seed)
        options: dict[str, Any] = {"storage_dtype": {"float32": None}.get(row["storage"], WEIGHTS[row["storage"]])}
        if row["kept"] and weight.ndim == 2:
            options["outlier_columns"] = [0, weight.shape[1] // 2]
        wrong += differences(weight, spec, **options)
    return wrong


def check_edges(device: str) -> list[str]:
    """Ties and their neighbours, subnormal and huge values, ranges beyond float16, memory that isn't contiguous.

    The interpreter takes each midpoint with one storage dtype and a third of all values.
    """
    wrong = []
    storages, step = (torch.float16, torch.bfloat16), 1 if device == "cuda" else 3
    for i, (bits, dtype) in enumerate(itertools.product(range(2, 9), ("int", "float", "dynamic", "normal"))):
        for storage in storages if device == "cuda" else (storages[(i + i // 4) % 2],):
            spec = QuantSpec(bits=bits, dtype=dtype, blocksize=64, exponent_bits=bits - 1 if bits % 2 else None)
            wrong += differences(at_midpoints(spec, storage, device), spec)
        wrong += nearest_differs(codebook(spec), bits, device)
    # The midpoint of the middle two rounds to -0, which a value of 0 isn't above.
    wrong += nearest_differs(torch.tensor([-1.0, -(2.0**-149), 0.0, 1.0]), 2, device)
    patterns = torch.arange(0, 1 << 16, step, dtype=torch.int32, device=device).to(torch.int16)
    for storage in storages:
        weight = patterns.view(storage)
        weight = torch.where(weight.isfinite(), weight, 0)
        shuffled = weight[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0)).to(device)]
        tiny = torch.where(weight.abs() < 1e-30, weight, 0)
        for spec in (
            QuantSpec(bits=8, dtype="float", exponent_bits=7, blocksize=64),
            QuantSpec(bits=5, dtype="dynamic", blocksize=32, absmax_dtype="float32"),
            QuantSpec(bits=4, dtype="quantile", blocksize=256, absmax_dtype="nested"),
            QuantSpec(bits=3, dtype="quantile", blocksize=4096, center=True),
        ):
            for values in (weight, shuffled, tiny, shuffled[: 130 * 160].view(130, 160).t()):
                wrong += differences(values, spec)
    return wrong


def nearest_differs(values: Tensor, bits: int, device: str) -> list[str]:
    """Codes of every midpoint and its float32 neighbours, by the kernel alone: there nothing is rounded first."""
    import triton.language as tl

    from kbit.kernels.blockwise import midpoint_tree
    from kbit.kernels.blockwise_jit import encode_values

    points = midpoints(values)
    infinity = torch.tensor(torch.inf)
    y = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity), values, torch.tensor([0.0, -0.0])])
    y, values = y.to(device), values.to(device)
    tree, one = midpoint_tree(values, bits), torch.ones(1, device=device)
    words = torch.empty(-(-y.numel() * bits // 32), dtype=torch.int32, device=device)
    n = y.numel()
    constants = {"BITS": bits, "GROUPS": 64, "STORAGE": tl.float32, "CENTER": False, "KEPT": False, "FLAT": True}
    encode_values[(-(-n // 2048),)](
        y, words, one, tree, one, one, 4, n, words.numel(), n, n, 1, 1, WHOLE=False, INDEX=tl.int32, **constants
    )
    found = unpack(words.view(torch.uint8)[: -(-n * bits // 8)], bits, n)
    return [] if same(found, codes_by_definition(y, values)) else [f"{bits} bits: midpoints"]


def check_product(bits: int, dtype: torch.dtype) -> list[str]:
    """Everything of one width and one dtype, on the GPU."""
    wrong = []
    choices = itertools.product(*(values for name, values in SPECS.items() if name != "bits"), LARGER_SHAPES)
    for seed, (kind, blocksize, scheme, shape) in enumerate(choices):
        weight = weight_of(shape, dtype, "cuda", seed)
        wrong += differences(weight, QuantSpec(bits=bits, dtype=kind, blocksize=blocksize, scheme=scheme))
    return wrong


def interpret_exactly() -> None:
    """Make Triton's interpreter round float32 to bfloat16, which it cuts off, and keep bfloat16's small numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded


def check_refused(device: str) -> list[str]:
    """Whether each kernel sees the one value that is NaN or infinite, wherever it is."""
    wrong = []
    for size, bad, at in itertools.product((7, 64, None), (torch.nan, -torch.inf), (0, 9999)):
        weight = torch.randn(100, 100, device=device).half()
        weight.view(-1)[at] = bad
        for options in ({}, {"outlier_columns": [5]}):
            for spec in (
                QuantSpec(bits=4, dtype="int", blocksize=size, absmax_dtype=a) for a in STORED["absmax_dtype"]
            ):
                try:
                    quantize(weight, spec, impl="triton", **options)
                    wrong.append(f"{bad} at {at} passed: {spec.label} {options}")
                except WeightError as error:
                    if str(error) != refusal(weight, spec, **options):
                        wrong.append(str(error))
    return wrong


def refusal(weight: Tensor, spec: QuantSpec, **options: Any) -> str:
    with pytest.raises(WeightError) as refused:
        quantize(weight, spec, impl="torch", **options)
    return str(refused.value)


def main(what: str, *arguments: str) -> int:
    device = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
    if device == "cpu":
        interpret_exactly()
    if what == "product":
        wrong = check_product(int(arguments[0]), WEIGHTS[arguments[1]])
    else:
        wrong = {"sample": check_sample, "edges": check_edges, "refused": check_refused}[what](device)
    print(*wrong[:20], f"{len(wrong)} differences", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
