"""Log-probabilities of given tokens under a causal language model, in bounded memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.evaluation.forests import Forest, forest_mask
from kbit.evaluation.positions import placed
from kbit.kernels.logits import summarize_logits, target_nats
from kbit.models.sizes import LOGITS_AT_ONCE

HEAD_CHUNK: Final = LOGITS_AT_ONCE
GPU_TILE: Final = 256
"""Rows of a product that a GPU computes together, at most: 535 hidden states would take as long as 640 or 768."""
PROBE_TOKENS: Final = 4
LOGIT_CHANGES: Final = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of configurations (Gemma 2, Cohere, Granite) by which a model changes what its head gives; near zero a soft
cap is too weak for a comparison to show.
"""
_SEPARABLE: Final[WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()
"""By model, whether its head alone gives its logits: quantizing its weights changes nothing in how they are made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Tokens for one forward pass, and what is scored on them.

    Attributes:
        ids: int64 [rows, length], right-padded with any token.
        places: int64 [m], ascending: where predictions are made, row x length + position; position t predicts the token
            that follows it.
        of_target: int64 [n], the index in ``places`` of each target.
        targets: int64 [n], the tokens that are scored. Several may be scored at one place.
        forest: what each token follows, where rows are no plain sequences.
    """

    ids: NDArray[np.int64]
    places: NDArray[np.int64]
    of_target: NDArray[np.int64]
    targets: NDArray[np.int64]
    forest: Forest | None = None

    @classmethod
    def of(
        cls,
        ids: NDArray[np.int64],
        at: NDArray[np.int64],
        targets: NDArray[np.int64],
        *,
        forest: Forest | None = None,
    ) -> TokenBatch:
        """Return the batch of targets, int64 [n], at places, int64 [n]."""
        places, of_target = np.unique(at, return_inverse=True)
        return cls(ids=ids, places=places, of_target=of_target, targets=targets, forest=forest)

    def row(self, row: int) -> tuple[TokenBatch, NDArray[np.int64]]:
        """Return one row as a batch, and which targets of this one are its own."""
        length = self.ids.shape[1]
        first, last = np.searchsorted(self.places, (row * length, (row + 1) * length))
        mine = np.flatnonzero((self.of_target >= first) & (self.of_target < last))
        one = TokenBatch(
            ids=self.ids[row : row + 1],
            places=self.places[first:last] - row * length,
            of_target=self.of_target[mine] - first,
            targets=self.targets[mine],
            forest=None if self.forest is None else self.forest.row(row),
        )
        return one, mine


class TokenScorer:
    """Scores chosen tokens of right-padded batches with a transformers causal language model in eval mode.

    The base model runs once per batch; its head is applied to the scored positions only, each once, a chunk at a time.
    Of the logits only their log-sum-exp in float32, the targets' and the largest are kept. Padding is on the right and
    attention causal, so no scored position sees it, and no attention mask is passed (lm-eval's HFLM does the same). A
    model spread over several GPUs takes its inputs where its embedding lies.

    Nothing here waits for a GPU: results stay there until the caller asks for them (``OnItsWay``).

    Models that do more to their logits than apply the head (soft caps, scales) are found by their configuration, and
    by comparing on a few tokens, once a model; theirs are computed by the model itself, one row at a time.

    Attributes:
        of_sequences: what the model computes of a token depends on the whole sequence, padding included (LLM.int8()):
            rows of a batch are to be of one length, and share nothing.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = base_of(model)
        self.head = model.get_output_embeddings()
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.of_sequences = any(getattr(module, "of_sequences", False) for module in model.modules())
        self.separable = self._find_separable()

    @torch.inference_mode()
    def score(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats of each target, and whether the model's most probable token is that target.

        Args:
            batch: tokens, places and targets.

        Returns:
            float32 [n], -ln p(target), and bool [n], on the device of the head. What is not finite stays so.
        """
        if self.separable:
            ids, places = self._put(batch.ids), self._put(batch.places)
            with self._following(batch.forest) as options:
                states = self.base(ids, use_cache=False, **options).last_hidden_state
            # Those of a model spread over GPUs may lie on another than its inputs.
            return self._by_chunks(states.flatten(0, 1)[places.to(states.device)], batch)
        numbers, parts = [], []
        for row in range(len(batch.ids)):
            one, mine = batch.row(row)
            ids, places = self._put(one.ids), self._put(one.places)
            with self._following(one.forest) as options:
                logits = self.model(ids, use_cache=False, **options).logits[0]
            numbers.append(mine)
            place, target = (put(a, logits.device) for a in (one.of_target, one.targets))
            parts.append(_nats(logits[places.to(logits.device)], place, target))
        return _in_order(np.concatenate(numbers), parts)

    def chunk(self, device: torch.device) -> int:
        """Return how many hidden states on a device meet the head at once."""
        rows = max(1, HEAD_CHUNK.get(device.type, HEAD_CHUNK["cpu"]) // int(self.head.weight.shape[0]))
        return rows - rows % GPU_TILE if device.type == "cuda" and rows > GPU_TILE else rows

    def _by_chunks(self, hidden: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Score hidden states [places, hidden]."""
        chunk = self.chunk(hidden.device)
        order = np.argsort(batch.of_target, kind="stable")
        place, target = (put(a[order], hidden.device) for a in (batch.of_target, batch.targets))
        starts = np.searchsorted(batch.of_target[order], np.arange(0, len(hidden) + chunk, chunk))
        parts = []
        for number, piece in enumerate(torch.split(hidden, chunk)):
            mine = slice(starts[number], starts[number + 1])
            parts.append(_nats(self.head(piece), place[mine] - number * chunk, target[mine]))
        return _in_order(order, parts)

    def _following(self, forest: Forest | None) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """Return the arguments of a forward pass in which each token follows what the forest says."""
        if forest is None:
            return nullcontext({})
        positions = self._put(forest.positions)
        mask = forest_mask(self._put(forest.ends), self.model.dtype)
        return placed(self.base, positions, mask)

    def _put(self, array: NDArray[Any]) -> torch.Tensor:
        return put(array, self.device)

    def _find_separable(self) -> bool:
        if self.model not in _SEPARABLE:
            config = self.model.config.get_text_config()
            changes = any(getattr(config, name, None) not in (None, 1) for name in LOGIT_CHANGES)
            found, is_certain = (False, True) if self.head is None or changes else self._try_head()
            if not is_certain:
                return found
            _SEPARABLE[self.model] = found
        return _SEPARABLE[self.model]

    @torch.inference_mode()
    def _try_head(self) -> tuple[bool, bool]:
        """Tell whether the head gives the logits, and whether that is certain."""
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None]
        expected = self.model(ids, use_cache=False).logits
        outputs = self.base(ids, use_cache=False)
        if not hasattr(outputs, "last_hidden_state"):
            return False, True
        logits = self.head(outputs.last_hidden_state).to(expected.device)
        # The arithmetic is the same: what may differ is the last bit or two of 16.
        close = 1e-4 if logits.dtype == torch.float32 else 2 * torch.finfo(logits.dtype).eps
        is_equal = logits.shape == expected.shape and torch.allclose(
            logits.float(), expected.float(), rtol=close, atol=close, equal_nan=True
        )
        # A cell that diverged gives NaN both ways, which says nothing of the model's other cells.
        return is_equal, bool(expected.isfinite().all())


def put(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to a device; to a GPU without waiting for what it does."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class OnItsWay:
    """Tensors on their way to the host, where a GPU goes on with what it is asked for next."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event = None
        if tensors[0].device.type != "cuda":
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        with torch.cuda.device(tensors[0].device):
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            ]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def arrays(self) -> list[NDArray[Any]]:
        """Return the tensors' values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def base_of(model: Any) -> Any:
    """Return a causal language model without its head."""
    # A composite model (Llama 4) may keep a whole causal model as its language part, and have no base of its own.
    return model.base_model if model.base_model is not model else model.get_decoder().base_model


def _in_order(
    numbers: NDArray[np.int64], parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what was scored by parts, in the order of the batch's targets; ``numbers`` int64 [n] are those scored."""
    nats, best = (torch.cat(list(of_all)) for of_all in zip(*parts, strict=True))
    if (numbers[:-1] < numbers[1:]).all():
        return nats, best
    back = put(np.argsort(numbers), nats.device)
    return nats[back], best[back]


def _nats(logits: torch.Tensor, place: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nats, float32 [n], and whether each target is the most probable token, bool [n].

    Args:
        logits: [places, vocabulary].
        place: int64 [n], that of each target.
        target: int64 [n].
    """
    summary = summarize_logits(logits)
    return target_nats(logits, summary, place, target), summary[2][place] == target
