"""Products with k-bit weights as torch operators, ``kbit::matmul_tiled`` and ``kbit::matmul_rows``.

torch.compile takes an operator as a whole, whatever runs inside. Both are for inference: they have no backward. A
GPU's x of the table's dtype goes to ``kbit.kernels.matmul``. On the CPU, for another x, and without tiles, the weight
is dequantized by chunks that stay in cache and rounded to its storage dtype, as ``kbit.dequantize`` rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from kbit.kernels.dense import product
from kbit.kernels.rowmajor import dequantized_rows
from kbit.kernels.tiles import SCALE_DTYPES, TiledWeight, check_tiles, row_block_chunks, untile
from kbit.quantizer.absmax import NestedAbsmax, load_absmax
from kbit.quantizer.blocks import Blocks
from kbit.quantizer.blockwise import unpacked_zeros
from kbit.quantizer.packed import Packed

_ALIGNMENT: Final = 16
"""Bytes at whose multiples the fused kernel reads x."""
_library: Final[Any] = torch.library.Library("kbit", "DEF")  # type: ignore[no-untyped-call]
# Callers name every argument but x. Tensors stand before the *: torch takes no autograd of keyword-only ones.
_library.define(
    "matmul_tiled(Tensor x, Tensor codes, Tensor scales, Tensor codebook, Tensor table, Tensor unscale, "
    "Tensor arrived, Tensor? tensor_scale, Tensor? bias, Tensor? addend, *, int n, int bits, int blocksize, "
    "ScalarType storage, bool batch_invariant) -> Tensor"
)
_library.define(
    "matmul_rows(Tensor x, Tensor codes, Tensor absmax, Tensor[] nested, Tensor codebook, Tensor? mean, "
    "Tensor? zero_points, Tensor? tensor_scale, Tensor? bias, Tensor? addend, *, int n, int bits, int? blocksize, "
    "str scheme, ScalarType storage, bool batch_invariant) -> Tensor"
)

matmul_tiled: Final[Any] = torch.ops.kbit.matmul_tiled.default
"""y = x · W^T (+ bias + addend) for a W [n, k] in tiles.

Args:
    x: [m, k], contiguous; of table's dtype, or float32 (or anything, on the CPU).
    codes, scales, codebook, table, unscale, arrived, tensor_scale, n, bits, blocksize: as in ``TiledWeight``.
    bias: [n]. addend: float32 [m, n]. Both are added before the sums are rounded.
    storage: 16-bit dtype that dequantized values are rounded to, where ``kbit.kernels.matmul`` does not do the work.
    batch_invariant: a row of y depends on no other row of x, nor on m.

Returns:
    y: x's dtype [m, n], summed in float32.
"""

matmul_rows: Final[Any] = torch.ops.kbit.matmul_rows.default
"""y = x · W^T (+ bias + addend) for a W [n, k] that has no tiles.

Args:
    x: [m, k].
    codes: as in ``QuantizedTensor``, as are n, bits, blocksize and scheme.
    absmax: its values; or their codes where `nested` has scale, offset and codebook; or scales of block-scaled floats,
        float8 [n, blocks of a row].
    zero_points: likewise; or None.
    tensor_scale: float32 [1], what such scales are multiplied by; or None.
    mean: the weight's, added before its values are rounded to `storage`, as ``kbit.dequantize`` does; or None.
    codebook, bias, addend, storage, batch_invariant: as above.

Returns:
    y: x's dtype [m, n].
"""


def by_row(product: Callable[..., Tensor], *inputs: Tensor, apart: bool) -> Tensor:
    """Return product(*inputs); where `apart`, row by row, so that no row's sums depend on how many there are."""
    if not apart or inputs[0].shape[0] <= 1:
        return product(*inputs)
    # Copies, since cuBLAS chooses kernels by alignment too.
    rows = zip(*(torch.split(x, 1) for x in inputs), strict=True)
    return torch.cat([product(*(x.clone() for x in row)) for row in rows])


def _by_dequantizing(
    x: Tensor, weights: Iterable[Tensor], bias: Tensor | None, addend: Tensor | None, n: int, batch_invariant: bool
) -> Tensor:
    """Multiply with the rows of W as they come, [some of n, k], one run after another."""
    # The CPU's 16-bit products are slow, and not all of them are summed in float32.
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    m = x.shape[0]
    y = torch.empty(m, n, dtype=compute, device=x.device)
    runs = [slice(i, i + 1) for i in range(m)] if batch_invariant else [slice(None)]
    # Copies where rows go alone, since cuBLAS chooses kernels by alignment too.
    inputs = [x[run].to(compute, copy=batch_invariant) for run in runs]
    first = 0
    for weight in weights:
        some = slice(first, first + weight.shape[0])
        first = some.stop
        wide, part = weight.to(compute), None if bias is None else bias[some].to(compute)
        for run, row in zip(runs, inputs, strict=True):
            product(row, wide, part, None if addend is None else addend[run, some], y[run, some])
    return y.to(x.dtype)


def _matmul_tiled(  # noqa: PLR0913  # the operator's schema
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    table: Tensor,
    unscale: Tensor,
    arrived: Tensor,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    *,
    n: int,
    bits: int,
    blocksize: int,
    storage: torch.dtype,
    batch_invariant: bool,
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    w = TiledWeight(
        codes=codes,
        scales=scales,
        codebook=codebook,
        table=table,
        unscale=unscale,
        arrived=arrived,
        n=n,
        k=x.shape[1],
        bits=bits,
        blocksize=blocksize,
        tensor_scale=tensor_scale,
    )
    check_tiles(w)
    if x.is_cuda and x.dtype == table.dtype:
        from kbit.kernels.matmul import matmul

        # A view may begin anywhere.
        aligned = x.clone() if x.data_ptr() % _ALIGNMENT else x
        return matmul(aligned, w, bias, addend, batch_invariant=batch_invariant)
    chunks = row_block_chunks(w.row_blocks, w.k, x.device)
    limit = torch.finfo(storage).max
    weights = (untile(w, first, last) for first, last in chunks)
    if w.zero_bytes or w.scale_format:  # without, none is beyond the largest absmax
        weights = (values.clamp_(-limit, limit) for values in weights)
    weights = (values.to(storage) for values in weights)
    return _by_dequantizing(x, weights, bias, addend, n, batch_invariant)


def _matmul_rows(  # noqa: PLR0913  # the operator's schema
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    codebook: Tensor,
    mean: Tensor | None,
    zero_points: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    *,
    n: int,
    bits: int,
    blocksize: int | None,
    scheme: str,
    storage: torch.dtype,
    batch_invariant: bool,
) -> Tensor:
    m, k = x.shape
    if m == 0:
        return x.new_empty(0, n)
    if nested:
        scale, offset, values = nested
        absmax = load_absmax(NestedAbsmax(codes=absmax, scale=scale, offset=offset, codebook=values))
    if absmax.dtype in SCALE_DTYPES:
        absmax = absmax.view(-1).float()
        absmax = absmax if tensor_scale is None else absmax * tensor_scale
    blocks = Blocks.cut((n, k), blocksize=blocksize, scheme=scheme)
    zero = None if zero_points is None else unpacked_zeros(zero_points, bits, absmax.numel()).float()
    w = Packed(codes=codes, absmax=absmax, codebook=codebook, mean=mean, bits=bits, blocks=blocks, zero=zero)
    return _by_dequantizing(x, dequantized_rows(w, k, storage), bias, addend, n, batch_invariant)


def _without_values(x: Tensor, *weight: Tensor | list[Tensor] | None, n: int, **_: object) -> Tensor:
    """Return a y without values. Torch comes here too for real tensors of which some have none."""
    for tensor in chain.from_iterable(a if isinstance(a, list) else [a] for a in weight):
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device}, and a tensor of the weight on {tensor.device}: both must be on one device, and "
                "none on meta: load a state dict, or call layer.derive()"
            )
    return x.new_empty(x.shape[0], n)


def _no_backward(ctx: object, gradient: Tensor) -> Tensor:
    raise NotImplementedError(
        "k-bit layers have no backward: they are for inference. Call the model under torch.no_grad(), "
        "or train the model that quantize_model(...).restore() gives back"
    )


for _name, _implementation in (("matmul_tiled", _matmul_tiled), ("matmul_rows", _matmul_rows)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"kbit::{_name}", _without_values, lib=_library)
    torch.library.register_autograd(f"kbit::{_name}", _no_backward, lib=_library)
