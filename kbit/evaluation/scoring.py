"""Log-probabilities of given tokens under a causal language model, in bounded memory."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

HEAD_CHUNK: Final = 2**24
"""Logits computed at once (float32: 64 MB, and as much again for their log-softmax): with a vocabulary of 250,000
those of 67 tokens, not of a batch.
"""
PROBE_TOKENS: Final = 4
LOGIT_CHANGES: Final = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of configurations (Gemma 2, Cohere, Granite) by which a model changes what its head gives; near zero a soft
cap is too weak for a comparison to show.
"""


class TokenScorer:
    """Scores chosen tokens of right-padded batches with a transformers causal language model in eval mode.

    The base model runs once per batch; its head is applied to the scored positions only, a chunk at a time, with a
    float32 log-softmax. Padding is on the right and attention causal, so no scored position sees it, and no attention
    mask is passed (lm-eval's HFLM does the same). A model spread over several GPUs takes its inputs where its embedding
    lies.

    Models that do more to their logits than apply the head (soft caps, scales) are found by their configuration, and
    by comparing on a few tokens; theirs are computed by the model itself, one sequence at a time.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # A composite model (Llama 4) may keep a whole causal model as its language part, and have no base of its own.
        self.base = model.base_model if model.base_model is not model else model.get_decoder().base_model
        self.head = model.get_output_embeddings()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.separable = self.head is not None and self._head_gives_logits()

    @torch.inference_mode()
    def score(
        self,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        targets: NDArray[np.int64],
        *,
        greedy: bool = True,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Nats of each target, and whether the model's most probable token is that target.

        Args:
            input_ids: int64 [batch, length], right-padded with any token.
            rows: int64 [n]: the row where each prediction is made.
            positions: int64 [n]: where in the row; position t predicts the token at t + 1.
            targets: int64 [n]: the tokens that are scored.
            greedy: False spares looking for the most probable token; the second array is then empty.

        Returns:
            float32 [n], -ln p(target), and bool [n]. What is not finite stays so.
        """
        ids, row, position, target = (
            torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in (input_ids, rows, positions, targets)
        )
        if self.separable:
            states = self.base(ids, use_cache=False).last_hidden_state
            # Those of a model spread over GPUs may lie on another than its inputs.
            hidden = states[row.to(states.device), position.to(states.device)]
            chunk = max(1, HEAD_CHUNK // int(self.head.weight.shape[0]))
            pieces = zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True)
            parts = [_nats(self.head(piece), of_piece, greedy) for piece, of_piece in pieces]
            return np.concatenate([nats for nats, _ in parts]), np.concatenate([best for _, best in parts])
        nats = np.empty(len(targets), dtype=np.float32)
        best = np.empty(len(targets) if greedy else 0, dtype=np.bool_)
        for index in range(len(ids)):
            chosen = np.flatnonzero(rows == index)
            logits = self.model(ids[index : index + 1], use_cache=False).logits[0, position[row == index]]
            nats[chosen], of_row = _nats(logits, target[row == index], greedy)
            if greedy:
                best[chosen] = of_row
        return nats, best

    @torch.inference_mode()
    def _head_gives_logits(self) -> bool:
        config = self.model.config.get_text_config()
        if any(getattr(config, name, None) not in (None, 1) for name in LOGIT_CHANGES):
            return False
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None]
        expected = self.model(ids, use_cache=False).logits
        outputs = self.base(ids, use_cache=False)
        if not hasattr(outputs, "last_hidden_state"):
            return False
        logits = self.head(outputs.last_hidden_state).to(expected.device)
        # The arithmetic is the same: what may differ is the last bit or two of 16.
        close = 1e-4 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
        # A model that diverged gives NaN both ways.
        return logits.shape == expected.shape and torch.allclose(
            logits.float(), expected.float(), rtol=close, atol=close, equal_nan=True
        )


def _nats(logits: torch.Tensor, targets: torch.Tensor, greedy: bool) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    targets = targets.to(logits.device)
    nats = functional.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()
    best = (logits.argmax(-1) == targets).cpu().numpy() if greedy else np.empty(0, dtype=np.bool_)
    return nats, best
