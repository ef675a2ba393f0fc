"""Launches of the kernel that rounds the columns of a segment for GPTQ (``kbit.kernels.gptq_jit``).

Importing this imports triton.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.kernels.gptq_jit import round_columns
from kbit.kernels.launching import on
from kbit.quantizer.grids import Grids
from kbit.quantizer.storage import FLOAT16_MAX
from kbit.specs.gptq import LAZY_COLUMNS

_ROWS: Final = 4
"""Rows that a CTA of four warps takes: a row is a warp's, so that what is summed over columns stays in it. No
measurement of others is on record."""
_TYPES: Final = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def round_segment(w: Tensor, upper: Tensor, grids: Grids, groups: Tensor, codes: Tensor, *, refreshes: bool) -> Tensor:
    """Round the columns of a segment by one launch: ``kbit.quantizer.gptq.round_by_definition``, to the bit."""
    rows, width = w.shape
    assert w.stride(1) == upper.stride(1) == codes.stride(1) == grids.scale.stride(1) == 1
    bits = grids.spec.bits
    errors = torch.empty(rows, width, dtype=torch.float32, device=w.device)
    zero = grids.scale if grids.zero is None else grids.zero
    with on(w.device):
        round_columns[(triton.cdiv(rows, _ROWS),)](
            w,
            upper,
            groups,
            grids.scale,
            zero,
            _padded(grids.points, bits, torch.inf),
            _padded(grids.codebook, bits, 0.0),
            codes,
            errors,
            rows,
            width,
            w.stride(0),
            upper.stride(0),
            grids.scale.stride(0),
            codes.stride(0),
            grids.size,
            BITS=bits,
            ROWS=_ROWS,
            WIDTH=LAZY_COLUMNS,
            REFRESHES=refreshes,
            ASYMMETRIC=grids.zero is not None,
            STORAGE=_TYPES[grids.storage],
            LIMIT=torch.finfo(grids.storage).max,
            HALF_SCALES=grids.scale.dtype == torch.float16,
            HALF_LIMIT=FLOAT16_MAX,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return errors


def _padded(values: Tensor, bits: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, (1 << bits) - values.numel()), value=filler)
