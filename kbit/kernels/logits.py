"""What scoring needs of logits: their largest, where it is, and the log of the sum of their exponentials."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from kbit.kernels.availability import why_not_triton

_BLOCK: Final = 4096


def summarize_logits(logits: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Return m = max_j l_j, ln sum_j exp(l_j - m), and the lowest j with l_j = m, of each row of logits.

    So -ln p(t) = (m - l_t) + ln sum. A NaN or +inf makes the sum NaN. On an NVIDIA GPU the logits are read once, as
    they are; elsewhere a float32 copy is made.

    Args:
        logits: [rows, vocabulary] of any floating dtype; computed in float32.
        impl: 'torch', 'triton', or 'auto' for Triton's kernel where it runs.

    Returns:
        float32 [rows], float32 [rows], int64 [rows].
    """
    if impl == "torch" or (impl == "auto" and why_not_triton(logits.device) is not None):
        values = logits.float()
        largest, best = values.max(-1)
        return largest, (values - largest[:, None]).exp_().sum(-1).log_(), best
    import triton

    from kbit.kernels.logits_jit import summarize_rows

    rows, columns = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    largest, log_sum = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            summarize_rows[(rows,)](logits, largest, log_sum, best, logits.stride(0), columns, BLOCK=block, num_warps=8)
    return largest, log_sum, best
