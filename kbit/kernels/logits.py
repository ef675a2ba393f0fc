"""What scoring needs of logits: their largest, where it is, the log of the sum of exponentials, and divergences."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from kbit.kernels.availability import why_not_triton
from kbit.kernels.launching import on

_BLOCK: Final = 2048
_WARPS: Final = 8
"""How a row is read. Both kernels read alike, so that their summaries are equal to the bit.

Milliseconds on an H200, launch included, of one model's rows / of two models' in one reading; float16; block, warps:

                    4096, 8       2048, 8       1024, 4       2048, 4
 2,560 x  50,272    .181 / .519   .169 / .373   .180 / .343   .188 / .414
   512 x 250,880    .247 / .563   .178 / .384   .228 / .401   .223 / .560
 1,024 x 250,880    .373 / .920   .263 / .660   .280 / .573   .362 / .756

Two summaries and a kernel for the divergence apart, of 4096 and 8, took .525, .684 and 1.074. A whole evaluation gains
about a hundredth: products with the heads take most of it.
"""

Summary = tuple[Tensor, Tensor, Tensor]
"""Of each row of logits l: m = max_j l_j, float32; ln sum_j exp(l_j - m), float32; the lowest j with l_j = m, int64."""


def summarize_logits(logits: Tensor, *, impl: str = "auto") -> Summary:
    """Return the summary of each row of logits.

    A NaN or +inf makes the sum NaN. On an NVIDIA GPU the logits are read once,
    as they are; elsewhere a float32 copy is made.

    Args:
        logits: [rows, vocabulary] of any floating dtype; computed in float32.
        impl: 'torch', 'triton', or 'auto' for Triton's kernel where it runs.
    """
    if not runs_kernels(logits.device, impl):
        values = logits.float()
        largest, best = values.max(-1)
        return largest, (values - largest[:, None]).exp_().sum(-1).log_(), best
    from kbit.kernels.logits_jit import summarize_rows

    rows, columns = logits.shape
    logits, summary = _row_by_row(logits), _empty_summary(logits)
    if rows:
        with on(logits.device):
            summarize_rows[(rows,)](
                logits, *summary, logits.stride(0), columns, BLOCK=_block(columns), num_warps=_WARPS
            )
    return summary


def target_nats(logits: Tensor, summary: Summary, rows: Tensor, targets: Tensor) -> Tensor:
    """Return -ln p(target) = (m - l_target) + ln sum, float32 [n].

    Args:
        logits: [rows, vocabulary].
        summary: of the logits.
        rows: int64 [n], the row of each target.
        targets: int64 [n].
    """
    largest, log_sum, _ = summary
    return (largest[rows] - logits[rows, targets].float()) + log_sum[rows]


def summarize_both(logits: Tensor, reference: Tensor) -> tuple[Summary, Summary, Tensor]:
    """Return both summaries, and KL(p || q) in nats of each row, p of ``reference`` and q of ``logits``.

    Triton's kernel reads each once. The summaries are those of ``summarize_logits``, to the bit.
    A token of p = 0 adds nothing. What is not finite otherwise stays so.

    Args:
        logits: [rows, vocabulary], where ``runs_kernels``.
        reference: the same.

    Returns:
        The summaries, and float32 [rows].
    """
    from kbit.kernels.logits_jit import compare_rows

    rows, columns = logits.shape
    logits, reference = _row_by_row(logits), _row_by_row(reference)
    of_logits, of_reference = _empty_summary(logits), _empty_summary(reference)
    kl = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with on(logits.device):
            compare_rows[(rows,)](
                logits,
                reference,
                *of_logits,
                *of_reference,
                kl,
                logits.stride(0),
                reference.stride(0),
                columns,
                BLOCK=_block(columns),
                num_warps=_WARPS,
            )
    return of_logits, of_reference, kl


def runs_kernels(device: torch.device, impl: str = "auto") -> bool:
    """Tell whether Triton's kernels are to run on a device; 'triton' says so anywhere."""
    return impl == "triton" or (impl == "auto" and why_not_triton(device) is None)


def _empty_summary(logits: Tensor) -> Summary:
    largest, log_sum = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    return largest, log_sum, torch.empty(len(logits), dtype=torch.int64, device=logits.device)


def _row_by_row(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _block(columns: int) -> int:
    return min(_BLOCK, 1 << (columns - 1).bit_length())
