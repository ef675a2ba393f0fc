"""Perplexity of a text set: its documents joined by blank lines, encoded once, cut into disjoint windows; the first
token of each is context only, be it of the text or the beginning-of-sequence token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kbit.errors import SpecError
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.evaluation.texts import encode_text, read_documents
from kbit.sources import place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PerplexityEval:
    """A text set cut into windows.

    Attributes:
        windows: int64 [n, L], the tokens of each window; the first of each is context only.
        window_bytes: int64 [n], UTF-8 bytes of the scored tokens of each window. From the tokenizer's offsets where it
            keeps them (a character whose tokens lie in two windows counts with its first token); else from the decoded
            tokens.
        vocab_size: entries of the model's vocabulary.
        dataset_hash: SHA-256 of the windows' tokens as little-endian int32, and of L.
    """

    windows: NDArray[np.int64]
    window_bytes: NDArray[np.int64]
    vocab_size: int
    dataset_hash: str

    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:
        """Loss in nats a scored token, perplexity and bits per byte; samples 'nats' float32 and 'tokens' int32, one a
        window.
        """
        from kbit.evaluation.scoring import TokenBatch, TokenScorer

        scorer = TokenScorer(model)
        count, length = self.windows.shape
        scored = []
        for _, ids in self.batches(batch_tokens):
            rows, positions = np.indices((len(ids), length - 1)).reshape(2, -1)
            tokens = TokenBatch.of(ids, rows * length + positions, ids[:, 1:].reshape(-1))
            scored.append(scorer.score(tokens)[0])
        # A GPU is waited for here, once.
        of_tokens = np.concatenate([nats.cpu().numpy() for nats in scored]).reshape(count, length - 1)
        return self.result(of_tokens.sum(1, dtype=np.float64))

    def batches(self, batch_tokens: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the windows by batches of at most ``batch_tokens`` tokens, or one window, each with its first's
        number.
        """
        batch = max(1, batch_tokens // self.windows.shape[1])
        for start in range(0, len(self.windows), batch):
            yield start, self.windows[start : start + batch]

    def result(self, nats: NDArray[np.float64]) -> EvalResult:
        """Return what ``run`` does, of the nats [n] of each window's scored tokens."""
        count, length = self.windows.shape
        metrics, stderr = summarize(nats, length - 1, self.window_bytes)
        return EvalResult(
            metrics=metrics,
            stderr=stderr,
            samples={"nats": nats.astype(np.float32), "tokens": np.full(count, length - 1, dtype=np.int32)},
            diverged=bool(not np.isfinite(nats).all() or metrics["loss"] > math.log(self.vocab_size) + 1),
            n_samples=count,
            n_tokens=self.windows.size,
            dataset_hash=self.dataset_hash,
        )


def prepare_perplexity(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> PerplexityEval:
    """Encode a text set and cut it into windows of L = min(context, spec.window) tokens; the tail is dropped.

    With ``spec.bos`` 'each', a window is the beginning-of-sequence token of the tokenizer and L - 1 tokens of text. The
    token is no text: it counts neither as a token of the limit nor in bytes. With 'each' and 'none' the tokenizer adds
    no special tokens.

    Raises:
        SpecError: ``spec.limit`` is less than one window; or 'each' is asked for and the tokenizer has no such token.
        ValueError: the text has fewer tokens than one window, a file is missing or malformed, or a token is not in the
            model's vocabulary.
    """
    length = context if spec.window is None else min(context, spec.window)
    begin = _begin(spec, tokenizer)
    of_text = length - len(begin)
    if spec.limit is not None and spec.limit < of_text:
        raise SpecError(
            spec.limit_key,
            spec.limit,
            f"at least one window of {of_text} tokens for the text set {spec.name!r}, or null for all",
        )
    encoded = encode_text(read_documents(spec.source), tokenizer, limit=spec.limit, special=spec.bos is None)
    tokens = encoded.tokens
    count = len(tokens) // of_text
    if count == 0:
        where = place_of(spec.source)
        raise ValueError(
            f"{where}: the text set {spec.name!r} has {len(tokens)} tokens, less than one window of {of_text}"
        )
    text = tokens[: count * of_text].reshape(count, of_text)
    windows = np.concatenate([np.tile(np.array(begin, dtype=np.int64), (count, 1)), text], axis=1)
    if windows.max() >= vocab_size:
        vocabulary = f"the model's vocabulary has {vocab_size} entries: they don't match"
        raise ValueError(f"the tokenizer gives token {windows.max()}; {vocabulary}")
    window_bytes = _scored_bytes(text, encoded.ends, tokenizer, all_scored=bool(begin))
    digest = hashlib.sha256(f"window {length}\n".encode() + windows.astype("<i4").tobytes()).hexdigest()
    return PerplexityEval(windows=windows, window_bytes=window_bytes, vocab_size=vocab_size, dataset_hash=digest)


def _begin(spec: EvalSpec, tokenizer: Any) -> list[int]:
    """Return the tokens that each window begins with, before its text."""
    if spec.bos != "each":
        return []
    token = tokenizer.bos_token_id
    if token is None:
        raise SpecError("eval.bos", spec.bos, "first or none: this model's tokenizer has no token that begins a text")
    return [int(token)]


def _scored_bytes(
    text: NDArray[np.int64], ends: NDArray[np.int64] | None, tokenizer: Any, *, all_scored: bool
) -> NDArray[np.int64]:
    """Return the UTF-8 bytes of the scored tokens of each window: int64 [n].

    Args:
        text: int64 [n, tokens], those of text.
        ends: as of ``EncodedText``.
        tokenizer: decodes where there are no ends.
        all_scored: the first of each window too.
    """
    skipped = 0 if all_scored else 1
    if ends is None:
        scored = [
            tokenizer.decode(w[skipped:], clean_up_tokenization_spaces=False, skip_special_tokens=True)
            for w in text.tolist()
        ]
        return np.array([len(piece.encode("utf-8", "surrogatepass")) for piece in scored], dtype=np.int64)
    of_window = ends[: text.size].reshape(text.shape)
    before = np.concatenate([[0], of_window[:-1, -1]]) if all_scored else of_window[:, 0]
    return np.asarray(of_window[:, -1] - before, dtype=np.int64)


def summarize(
    nats: NDArray[np.float64], tokens_per_window: int, window_bytes: NDArray[np.int64]
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a text set and their standard errors over windows, from the nats [n] and the bytes [n] of each window.

    The standard error of the loss is that of a mean over windows; of perplexity = exp(loss) and of bits per byte, a
    ratio of two sums, it is to first order (delta method). With one window there is none. Overflow gives inf, and NaN
    stays NaN.
    """
    count, total_bytes = len(nats), int(window_bytes.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        losses = nats / tokens_per_window
        loss = float(losses.mean())
        perplexity = float(np.exp(loss))
        nats_per_byte = float(nats.sum()) / total_bytes if total_bytes else math.nan
        metrics = {"loss": loss, "perplexity": perplexity, "bits_per_byte": nats_per_byte / math.log(2)}
        if count < 2:
            return metrics, {}
        loss_stderr = float(losses.std(ddof=1)) / math.sqrt(count)
        residuals = nats - nats_per_byte * window_bytes
        spread = math.sqrt(float((residuals**2).sum()) / (count - 1) / count) if total_bytes else math.nan
    stderr = {
        "loss": loss_stderr,
        "perplexity": perplexity * loss_stderr,
        "bits_per_byte": spread / (total_bytes / count) / math.log(2) if total_bytes else math.nan,
    }
    return metrics, stderr
