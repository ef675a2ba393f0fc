"""Products with k-bit weights as torch operators, ``kbit::matmul_tiled`` and ``kbit::matmul_rows``.

torch.compile takes an operator as a whole, whatever runs inside. Both are for inference: they have no backward. A
GPU's x of the table's dtype goes to ``kbit.kernels.matmul``. On the CPU, for another x, and without tiles, the weight
is dequantized by chunks that stay in cache and rounded to its storage dtype, as ``kbit.dequantize`` rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from math import lcm
from typing import Any, Final

import torch
from torch import Tensor

from kbit.kernels.availability import choose_blockwise
from kbit.kernels.dense import product
from kbit.kernels.tiles import TiledWeight, check_tiles, row_block_chunks, untile
from kbit.quantizer.absmax import NestedAbsmax, load_absmax
from kbit.quantizer.blocks import Blocks, Part
from kbit.quantizer.blockwise import scaled_values
from kbit.quantizer.packing import packed_bytes
from kbit.quantizer.storage import chunk_length
from kbit.spec import QuantSpec

_ALIGNMENT: Final = 16
_library: Final[Any] = torch.library.Library("kbit", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "matmul_tiled(Tensor x, int rows, Tensor codes, Tensor scales, Tensor codebook, Tensor table, Tensor unscale, "
    "Tensor arrived, Tensor? bias, Tensor? addend, int bits, int blocksize, ScalarType storage, "
    "bool batch_invariant) -> Tensor"
)
_library.define(
    "matmul_rows(Tensor x, int rows, Tensor codes, Tensor absmax, Tensor[] nested, Tensor codebook, Tensor? mean, "
    "Tensor? bias, Tensor? addend, int bits, int? blocksize, str scheme, ScalarType storage, "
    "bool batch_invariant) -> Tensor"
)

matmul_tiled: Final[Any] = torch.ops.kbit.matmul_tiled.default
"""x · W^T (+ bias + addend) for a weight in tiles.

Args:
    x: [any, columns], contiguous; of table's dtype, or float32 (or anything, on the CPU).
    rows, codes, scales, codebook, table, unscale, arrived, bits, blocksize: as in ``TiledWeight``.
    bias: [rows]. addend: float32 [x's rows, rows]. Both are added before the sums are rounded.
    storage: 16-bit dtype that dequantized values are rounded to, where ``kbit.kernels.matmul`` does not do the work.
    batch_invariant: a row's result depends on no other row, nor on how many there are.

Returns:
    x's dtype [x's rows, rows], summed in float32.
"""

matmul_rows: Final[Any] = torch.ops.kbit.matmul_rows.default
"""x · W^T (+ bias + addend) for a weight that has no tiles.

Args:
    x: [any, columns]. rows: the weight's, as are bits, blocksize and scheme.
    codes: as in ``QuantizedTensor``. absmax: its values, or their codes where `nested` has scale, offset and codebook.
    mean: the weight's, added before its values are rounded to `storage`, as ``kbit.dequantize`` does; or None.
    codebook, bias, addend, storage, batch_invariant: as above.

Returns:
    x's dtype [x's rows, rows].
"""


def by_row(product: Callable[..., Tensor], *inputs: Tensor, apart: bool) -> Tensor:
    """product(*inputs), or where `apart` one row at a time, so that no row's sums depend on how many there are."""
    if not apart or inputs[0].shape[0] <= 1:
        return product(*inputs)
    # Copies, since cuBLAS chooses kernels by alignment too.
    rows = zip(*(torch.split(x, 1) for x in inputs), strict=True)
    return torch.cat([product(*(x.clone() for x in row)) for row in rows])


def dequantized_rows(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    mean: Tensor | None,
    columns: int,
    spec: QuantSpec,
    rows: int,
    storage: torch.dtype,
) -> Iterator[Tensor]:
    """A weight in row-major order, with the mean alone in its kept columns: [some rows, columns], one after another.

    As ``kbit.dequantize`` has them, to the bit. Nothing is read back from a GPU, so that a CUDA graph can hold it.

    Args:
        absmax: float, one a block.
    """
    blocks = Blocks.of((rows, columns), spec)
    step, apart = _rows_at_a_time(blocks, columns, chunk_length(codes.device))
    triton = apart and _runs_triton(codes.device)
    for first in range(0, rows, step):
        part = Part(blocks=blocks, start=first * columns, stop=min(first + step, rows) * columns)
        if triton:
            taken = codes[part.start * spec.bits // 8 : packed_bytes(part.stop, spec.bits)]
            yield _from_triton(taken, absmax, part, codebook, mean, spec, storage).view(-1, columns)
            continue
        values, limit = scaled_values(codes, absmax, codebook, part, spec.bits, mean), torch.finfo(storage).max
        yield values.clamp_(-limit, limit).to(storage).view(-1, columns)


def _rows_at_a_time(blocks: Blocks, columns: int, length: int) -> tuple[int, bool]:
    """(rows of about `length` values, whether such parts begin with a block each). All begin at a whole byte."""
    single = blocks.size >= blocks.length or blocks.rows > 1
    unit = 8 if single else lcm(8, lcm(blocks.size, columns) // columns)
    if unit * columns > max(length, 8 * columns):
        return max(1, length // (8 * columns)) * 8, False
    return max(1, length // (unit * columns)) * unit, True


@cache
def _runs_triton(device: torch.device) -> bool:
    return choose_blockwise("auto", device) == "triton"


def _from_triton(
    codes: Tensor,
    absmax: Tensor,
    part: Part,
    codebook: Tensor,
    mean: Tensor | None,
    spec: QuantSpec,
    storage: torch.dtype,
) -> Tensor:
    """The values of a part that begins with a block, flat, in the storage dtype."""
    from kbit.kernels.blockwise import dequantize_values  # triton may be absent

    whole, count = part.blocks, part.stop - part.start
    if whole.rows > 1:
        blocks = Blocks(rows=count // whole.length, length=whole.length, size=whole.size)
        absmax = absmax.view(whole.rows, -1)[part.start // whole.length : part.stop // whole.length].view(-1)
    else:
        blocks = Blocks(rows=1, length=count, size=min(whole.size, count))
        absmax = absmax[part.start // whole.size : -(-part.stop // whole.size)]
    out = torch.empty(count, dtype=storage, device=codes.device)
    dequantize_values(codes, absmax, blocks, spec, out, dtype=storage, values=codebook, mean=mean)
    return out


def _by_dequantizing(
    x: Tensor, weights: Iterable[Tensor], bias: Tensor | None, addend: Tensor | None, rows: int, apart: bool
) -> Tensor:
    # The CPU's 16-bit products are slow, and not all of them are summed in float32.
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    y = torch.empty(x.shape[0], rows, dtype=compute, device=x.device)
    runs = [slice(i, i + 1) for i in range(x.shape[0])] if apart else [slice(None)]
    # Copies where rows go alone, since cuBLAS chooses kernels by alignment too.
    inputs = [x[run].to(compute, copy=apart) for run in runs]
    first = 0
    for weight in weights:
        some = slice(first, first + weight.shape[0])
        first = some.stop
        wide, part = weight.to(compute), None if bias is None else bias[some].to(compute)
        for run, row in zip(runs, inputs, strict=True):
            product(row, wide, part, None if addend is None else addend[run, some], y[run, some])
    return y.to(x.dtype)


def _matmul_tiled(
    x: Tensor,
    rows: int,
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    table: Tensor,
    unscale: Tensor,
    arrived: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    bits: int,
    blocksize: int,
    storage: torch.dtype,
    batch_invariant: bool,
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    w = TiledWeight(
        codes=codes,
        scales=scales,
        codebook=codebook,
        table=table,
        unscale=unscale,
        arrived=arrived,
        rows=rows,
        columns=x.shape[1],
        bits=bits,
        blocksize=blocksize,
    )
    check_tiles(w)
    if x.is_cuda and x.dtype == table.dtype:
        from kbit.kernels.matmul import matmul

        # A view may begin anywhere.
        aligned = x.clone() if x.data_ptr() % _ALIGNMENT else x
        return matmul(aligned, w, bias, addend, batch_invariant=batch_invariant)
    chunks = row_block_chunks(w.row_blocks, w.columns, x.device)
    weights = (untile(w, first, last).to(storage) for first, last in chunks)
    return _by_dequantizing(x, weights, bias, addend, rows, batch_invariant)


def _matmul_rows(
    x: Tensor,
    rows: int,
    codes: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    codebook: Tensor,
    mean: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    bits: int,
    blocksize: int | None,
    scheme: str,
    storage: torch.dtype,
    batch_invariant: bool,
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    if nested:
        scale, offset, values = nested
        absmax = load_absmax(NestedAbsmax(codes=absmax, scale=scale, offset=offset, codebook=values))
    spec = QuantSpec(bits=bits, dtype="int", blocksize=blocksize, scheme=scheme)
    weights = dequantized_rows(codes, absmax, codebook, mean, x.shape[1], spec, rows, storage)
    return _by_dequantizing(x, weights, bias, addend, rows, batch_invariant)


def _without_values(x: Tensor, rows: int, *arguments: object) -> Tensor:
    """A result without values. Torch comes here too for real tensors of which some have none."""
    for tensor in chain.from_iterable(a if isinstance(a, list) else [a] for a in arguments):
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ValueError(
                f"x is on {x.device}, and a tensor of the weight on {tensor.device}: both must be on one device, and "
                "none on meta: load a state dict, or call layer.derive()"
            )
    return x.new_empty(x.shape[0], rows)


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
