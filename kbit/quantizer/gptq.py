"""GPTQ of one matrix: its columns are rounded one after another, and each error is made up for by the columns to come.

Frantar et al. 2022, Algorithm 1, for any codebook: absmax, codes and dequantized values are those of block-wise
quantization with groups (``kbit.quantizer.blockwise``), so that without corrections it gives the same tensor. The error
of a column is that of its dequantized value as the model has it, rounded to the storage dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kbit.quantizer.blockwise import QuantizedTensor, source_of
from kbit.quantizer.codebooks import fitted_codebook, fixed_codebook, is_data_dependent
from kbit.quantizer.encode import midpoints
from kbit.quantizer.grids import Grids
from kbit.quantizer.hessian import Correction
from kbit.quantizer.packing import pack
from kbit.quantizer.rotation import rotate
from kbit.quantizer.storage import check_weight, non_finite, storage_dtype_of
from kbit.spec import QuantSpec
from kbit.specs.gptq import LAZY_COLUMNS, GptqSpec


class Segment(NamedTuple):
    """Columns [start, stop) that are rounded before the rest of the weight is corrected.

    Attributes:
        refreshes: groups in it are measured when their first columns are reached; it begins with a group.
        measures: groups that begin in it are measured before.
    """

    start: int
    stop: int
    refreshes: bool
    measures: bool


@torch.no_grad()
def quantize_corrected(
    weight: Tensor,
    spec: GptqSpec,
    by: Correction,
    *,
    storage_dtype: torch.dtype | None = None,
    fitted: Tensor | None = None,
    impl: str = "auto",
) -> tuple[QuantizedTensor, Tensor | None]:
    """Quantize a weight, correcting later columns for the errors of earlier ones.

    Args:
        weight: floating point [out_features, in_features]; isn't changed.
        spec: bits, codebook, groups, and how their scales are found.
        by: the correction of its inputs, with the spec's order and rotation, on its device.
        storage_dtype: as in ``kbit.quantizer.blockwise.quantize``.
        fitted: the same.
        impl: 'torch' is this reference; 'triton' is a kernel for 128 columns at once that gives the same, to the bit;
            'auto' is the faster one that runs on the weight's device.

    Returns:
        The quantized tensor, with groups of columns as they went; and their order where that is stored
        (``GptqSpec.permutes``): int32 [in], the column that each place of the tensor is of. Otherwise None.

    Raises:
        WeightError: as ``quantize``.
        ValueError: `impl` is unknown or can't run on the weight's device.
    """
    check_weight(weight)
    dtype, columns = storage_dtype_of(weight, storage_dtype), weight.shape[1]
    plain = spec.blockwise(columns)
    w = weight.detach().to(dtype).float().contiguous()
    if not bool(w.isfinite().all()):
        raise non_finite("weight", dtype)
    own = None
    if is_data_dependent(plain):
        source = source_of(weight, dtype, None, plain)
        own = fitted_codebook(plain, source) if fitted is None else fitted.to(w.device, copy=True)
    w[:, by.dead] = 0
    if plain.rotation is not None:
        w = rotate(w, plain.rotation)
    # A rotated weight is rounded to 16 bits when it is rotated back.
    grids = _grids(plain, own, w, dtype if plain.rotation is None else torch.float32)
    static = spec.static_groups or grids.scale.shape[1] == 1
    if static:
        grids.measure(w, 0)
    is_stored = spec.permutes and not static
    places = torch.arange(columns, device=w.device)
    if by.order is not None:
        w = w[:, by.order].contiguous()
        places = places if is_stored else by.order
    codes = _round_all(
        w, by.upper, grids, places // grids.size, list(_segments(columns, grids.size, spec, static)), impl
    )
    if by.order is not None and not is_stored:
        codes = torch.empty_like(codes).index_copy_(1, by.order, codes)
    q = QuantizedTensor(
        codes=pack(codes.view(-1), plain.bits),
        absmax=grids.scale.view(-1),
        codebook=grids.codebook.clone() if own is None else own,
        spec=plain,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        storage_dtype=dtype,
        zero_points=None if grids.zero is None else pack(grids.zero.to(torch.uint8).view(-1), plain.bits),
    )
    return q, by.order.to(torch.int32) if by.order is not None and is_stored else None


def _round_all(w: Tensor, upper: Tensor, grids: Grids, groups: Tensor, segments: list[Segment], impl: str) -> Tensor:
    """Return codes of all columns, uint8 [out, in]; `w` holds what is left of it at the end.

    Args:
        w: float32 [out, in], in the order in which columns go, as are the others.
        upper: the correction.
        grids: their scales are set, but those of static groups.
        groups: int64 [in], each column's.
        segments: the columns in order; of static groups none measures.
        impl: see ``quantize_corrected``.
    """
    from kbit.kernels.availability import choose_blockwise  # kernels import the reference

    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    if choose_blockwise(impl, w.device) == "triton":
        from kbit.kernels.gptq import round_segment  # triton may be absent
    else:
        round_segment = round_by_definition
    for segment in segments:
        start, stop, refreshes, measures = segment
        if measures:
            _measure_begun(w, segment, grids)
        part = slice(start, stop)
        errors = round_segment(w[:, part], upper[part, part], grids, groups[part], codes[:, part], refreshes=refreshes)
        if stop < w.shape[1]:
            w[:, stop:].addmm_(errors, upper[part, stop:], alpha=-1)
    return codes


def round_by_definition(
    w: Tensor, upper: Tensor, grids: Grids, groups: Tensor, codes: Tensor, *, refreshes: bool
) -> Tensor:
    """Round the columns of a segment one after another.

    Args:
        w: float32 [out, width]; it is not changed.
        upper: float32 [width, width], the correction.
        grids: its scales are read, and with `refreshes` set.
        groups: int64 [width], each column's group.
        codes: uint8 [out, width], which is filled.
        refreshes: groups are measured when their first columns are reached.

    Returns:
        The columns' errors over the diagonal, float32 [out, width].
    """
    columns = w.t().contiguous()
    errors = torch.empty_like(columns)
    for i, group in enumerate(groups.tolist()):
        if refreshes and i % grids.size == 0:
            grids.measure(columns[i : i + grids.size].t(), group)
        codes[:, i], values = grids.round(columns[i], group)
        torch.div(columns[i] - values, upper[i, i], out=errors[i])
        # A product and a difference, each rounded: what the kernel does too.
        columns[i + 1 :] -= upper[i, i + 1 :].unsqueeze(1) * errors[i]
    return errors.t().contiguous()


def _grids(plain: QuantSpec, own: Tensor | None, w: Tensor, storage: torch.dtype) -> Grids:
    """Return grids without scales yet, for a weight [out, in]."""
    assert plain.blocksize is not None
    values = fixed_codebook(plain, w.device) if own is None else own
    shape = (w.shape[0], -(-w.shape[1] // plain.blocksize))
    kind = torch.float16 if plain.absmax_dtype == "float16" else torch.float32
    return Grids(
        spec=plain,
        codebook=values,
        points=midpoints(values),
        scale=torch.zeros(shape, dtype=kind, device=w.device),
        zero=torch.zeros(shape, dtype=torch.float32, device=w.device) if plain.zero_point else None,
        storage=storage,
    )


def _segments(columns: int, size: int, spec: GptqSpec, static: bool) -> Iterator[Segment]:
    """Yield segments of at most 128 columns.

    Fresh scales are those of a weight that is corrected for all columns before the group: so a group of less than 128
    lies within a segment, and a larger one begins with one.
    """
    fresh = not static and spec.group_scales == "fresh"
    width = LAZY_COLUMNS // size * size if fresh and size < LAZY_COLUMNS else LAZY_COLUMNS
    start = 0
    while start < columns:
        stop = min(start + width, columns)
        if fresh and size > LAZY_COLUMNS:
            stop = min(stop, (start // size + 1) * size)
        refreshes = fresh and size < LAZY_COLUMNS
        yield Segment(start, stop, refreshes, measures=not static and not refreshes)
        start = stop


def _measure_begun(w: Tensor, segment: Segment, grids: Grids) -> None:
    """Set the scales of the groups that begin in a segment by what the weight is before it."""
    first, last = (-(-place // grids.size) for place in (segment.start, segment.stop))
    if first < last:
        grids.measure(w[:, first * grids.size : last * grids.size], first)
