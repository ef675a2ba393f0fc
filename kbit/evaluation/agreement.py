"""Agreement with the 16-bit model: how far a model's predictions of a text's tokens lie from those before quantizing.

At each scored token, of the float32 log-softmax of both: KL(p16 || pk), whether the most probable token is the same,
and the change of the target's probability. The windows are perplexity's, and so are the nats that come along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kbit.evaluation.perplexity import PerplexityEval, prepare_perplexity
from kbit.evaluation.reference import KeptHead, Reference, host_rows, sent_ahead
from kbit.evaluation.scoring import TokenScorer, put
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.kernels.logits import Summary, runs_kernels, summarize_both, summarize_logits, target_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_AT_ONCE: Final = {"cpu": 2**17, "cuda": 2**24}
"""Logits that are compared at once without kernels, of each side. In float32 they are half a megabyte on a CPU, which
stays in its cache from one operation to the next, and 64 MB on a GPU, where several times as much is made of them.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAgreement:
    """What is compared at each scored token; tensors of one shape, float32, where the logits were.

    Attributes:
        kl: KL(p16 || pk) in nats.
        top_token: 1 where both have the same most probable token (the lowest of equals), else 0; NaN where kl is.
        p_change: pk(target) - p16(target).
        nats: -ln pk(target).
    """

    kl: Tensor
    top_token: Tensor
    p_change: Tensor
    nats: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowAgreement:
    """The same on the host: float32 [windows, tokens]."""

    kl: NDArray[np.float32]
    top_token: NDArray[np.float32]
    p_change: NDArray[np.float32]
    nats: NDArray[np.float32]

    @classmethod
    def joined(cls, parts: list[TokenAgreement], *, windows: int) -> WindowAgreement:
        """Put what was compared one after the other. A GPU is waited for here, once."""
        tensors = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        return cls(**{name: tensor.cpu().numpy().reshape(windows, -1) for name, tensor in tensors.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class AgreementEval:
    """A text set cut into perplexity's windows, and the 16-bit model's predictions.

    Attributes:
        text: the windows.
        reference: of the model that is compared with; None before ``refer``.
    """

    text: PerplexityEval
    reference: Reference | None = None

    @torch.inference_mode()
    def refer(self, model: PreTrainedModel, *, batch_tokens: int) -> AgreementEval:
        """Keep what enters the head of ``model``, which is in its 16-bit form, at every scored position.

        That is [windows, L - 1, hidden] in the compute dtype: 2 bytes x 524,288 tokens x 2,048 dimensions are 2.1 GB,
        on the host (``kbit.evaluation.reference``).

        Raises:
            ValueError: the model has no head, or doesn't use it as one.
            OSError: they need a file, and the temporary directory has no room for it.
        """
        scorer = TokenScorer(model)
        if scorer.head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: its agreement can't be measured")
        kept: Tensor | None = None
        for start, ids in self.text.batches(batch_tokens):
            states = _separate_states(scorer, ids) if scorer.separable else _entering_states(scorer, ids)
            if kept is None:
                kept = host_rows((len(self.text.windows), *states.shape[1:]), states.dtype)
            kept[start : start + len(ids)] = states.to(kept.device)
        assert kept is not None  # there is at least one window
        reference = Reference(states=kept, head=KeptHead(scorer.head), separable=scorer.separable)
        return replace(self, reference=reference)

    @torch.inference_mode()
    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:
        """Return metrics as ``summarize``; perplexity's of the same windows come with them (``EvalResult.also``).

        Raises:
            ValueError: called before ``refer``, or the model doesn't use its head as one.
        """
        if self.reference is None:
            raise ValueError("agreement is measured against a model's 16-bit form: call refer with it first")
        compare = _compare_separate if self.reference.separable else _compare_whole
        scorer, head = TokenScorer(model), self.reference.head.original()
        parts: list[TokenAgreement] = []
        batches = list(self.text.batches(batch_tokens))
        states = (self.reference.states[start : start + len(ids)] for start, ids in batches)
        for (_, ids), kept in zip(batches, sent_ahead(states, scorer.head.weight.device), strict=True):
            parts += compare(scorer, ids, kept, head)
        count, length = self.text.windows.shape
        by_window = WindowAgreement.joined(parts, windows=count)
        perplexity = self.text.result(by_window.nats.sum(1, dtype=np.float64))
        metrics, stderr, samples = summarize(by_window)
        return EvalResult(
            metrics=metrics,
            stderr=stderr,
            samples={**samples, "tokens": np.full(count, length - 1, dtype=np.int32)},
            diverged=not np.isfinite(by_window.kl).all(),
            n_samples=count,
            n_tokens=perplexity.n_tokens,
            dataset_hash=self.text.dataset_hash,
            also={"perplexity": perplexity},
        )


def prepare_agreement(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> AgreementEval:
    """Encode a text set and cut it into windows, as perplexity does.

    Raises:
        SpecError, ValueError: as ``kbit.evaluation.perplexity.prepare_perplexity``.
    """
    return AgreementEval(text=prepare_perplexity(spec, tokenizer, context=context, vocab_size=vocab_size))


def compare_in_pieces(logits: Tensor, reference: Tensor, targets: Tensor) -> Iterator[TokenAgreement]:
    """Yield ``compare_logits`` of some tokens at a time, or of all where kernels make no copies."""
    reference, targets = (x.to(logits.device, non_blocking=True) for x in (reference, targets))
    if runs_kernels(logits.device):
        yield compare_logits(logits, reference, targets)
        return
    rows = max(1, COMPARED_AT_ONCE.get(logits.device.type, COMPARED_AT_ONCE["cpu"]) // logits.shape[-1])
    for piece in zip(*(torch.split(x, rows) for x in (logits, reference, targets)), strict=True):
        yield compare_logits(*piece)


def compare_logits(logits: Tensor, reference: Tensor, targets: Tensor, *, impl: str = "auto") -> TokenAgreement:
    """Compare a model's logits with the 16-bit model's.

    A token that the 16-bit model gives no probability at all adds nothing to the KL divergence, whatever the other
    gives it. What is not finite otherwise stays so. The steps to the nats are those by which perplexity scores, so that
    they are the same to the bit.

    Args:
        logits: [n, vocabulary], of any dtype.
        reference: the 16-bit model's, the same.
        targets: int64 [n].
        impl: as of ``kbit.kernels.logits.summarize_logits``.
    """
    if runs_kernels(logits.device, impl):
        now, before, kl = summarize_both(logits, reference)
    else:
        now, before = (summarize_logits(x, impl=impl) for x in (logits, reference))
        kl = _divergence(_log_softmax(logits, now), _log_softmax(reference, before))
    rows = torch.arange(len(targets), device=logits.device)
    nats, nats16 = (target_nats(x, s, rows, targets) for x, s in ((logits, now), (reference, before)))
    same = (now[2] == before[2]).float().masked_fill_(kl.isnan(), math.nan)
    return TokenAgreement(kl=kl, top_token=same, p_change=nats.neg().exp() - nats16.neg().exp(), nats=nats)


def _divergence(log_p: Tensor, log_p16: Tensor) -> Tensor:
    """Return KL(p16 || p) of each row; the logarithms are used up."""
    p16 = log_p16.exp()
    terms = log_p16.sub_(log_p).mul_(p16)
    kl = terms.sum(-1)
    return terms.masked_fill_(p16 == 0, 0).sum(-1) if kl.isnan().any() else kl


def _log_softmax(logits: Tensor, summary: Summary) -> Tensor:
    """Return ln p [n, vocabulary] in float32."""
    largest, log_sum, _ = summary
    return (logits.float() - largest[:, None]).sub_(log_sum[:, None])


def summarize(
    tokens: WindowAgreement,
) -> tuple[dict[str, float], dict[str, float], dict[str, NDArray[np.float32]]]:
    """Metrics, their standard errors over windows, and samples: means of each window.

    'kl', 'top_token' and 'p_change' are means over tokens, with the standard error of a mean over windows;
    'p_change_rms' is the root of the mean square, its error to first order (delta method); 'kl_median' and 'kl_p99' are
    percentiles over tokens (linear interpolation), without one. With one window there is none.

    Args:
        tokens: arrays [windows, tokens].
    """
    count = len(tokens.kl)
    with np.errstate(over="ignore", invalid="ignore"):
        means = {name: getattr(tokens, name).mean(1, dtype=np.float64) for name in ("kl", "top_token", "p_change")}
        squares = np.square(tokens.p_change, dtype=np.float64).mean(1)
        rms = math.sqrt(float(squares.mean()))
        median, p99 = np.percentile(tokens.kl.astype(np.float64), (50, 99))
        average = {name: float(of_windows.mean()) for name, of_windows in means.items()}
        metrics = {"kl": average["kl"], "kl_median": float(median), "kl_p99": float(p99)}
        metrics |= {"top_token": average["top_token"], "p_change": average["p_change"], "p_change_rms": rms}
        stderr = {}
        if count > 1:
            stderr = {name: _standard_error(of_windows) for name, of_windows in means.items()}
            # Where nothing changed, nothing varies.
            stderr["p_change_rms"] = _standard_error(squares) / (2 * rms) if rms else 0.0
    samples = {**means, "p_change_squares": squares}
    return metrics, stderr, {name: of_windows.astype(np.float32) for name, of_windows in samples.items()}


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _separate_states(scorer: TokenScorer, ids: NDArray[np.int64]) -> Tensor:
    """Return what enters the head where a token is predicted: [batch, L - 1, hidden]."""
    states: Tensor = scorer.base(put(ids, scorer.device), use_cache=False).last_hidden_state
    return states[:, :-1]


def _compare_separate(
    scorer: TokenScorer, ids: NDArray[np.int64], kept: Tensor, head: Callable[[Tensor], Tensor]
) -> Iterator[TokenAgreement]:
    """Compare windows ids [batch, L], whose states in the 16-bit model are kept [batch, L - 1, hidden]."""
    states = _separate_states(scorer, ids).reshape(-1, kept.shape[-1])
    targets = put(ids[:, 1:].reshape(-1), states.device)
    # Perplexity's own pieces: matrix products of other sizes may differ in the last bit.
    chunk = scorer.chunk(states.device)
    pieces = (torch.split(x, chunk) for x in (states, kept.to(states.device).view(-1, kept.shape[-1]), targets))
    for now, before, of_piece in zip(*pieces, strict=True):
        yield from compare_in_pieces(scorer.head(now), head(before), of_piece)


def _entering_states(scorer: TokenScorer, ids: NDArray[np.int64]) -> Tensor:
    """Return what enters the head of a model that does more to its logits: [batch, L, hidden]."""
    entered: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        entered.append(args[0])

    for row in ids:
        _hooked(scorer, row, keep)
    return torch.cat(entered)


def _compare_whole(
    scorer: TokenScorer, ids: NDArray[np.int64], kept: Tensor, head: Callable[[Tensor], Tensor]
) -> Iterator[TokenAgreement]:
    """Compare as ``_compare_separate`` where the head's output is not yet the logits (soft caps, scales).

    What the 16-bit head gives goes on beside the cell's as a second sequence, so that the model itself does the same to
    both. One window at a time, as such models are scored.
    """
    for row, before in zip(ids, kept, strict=True):
        second = head(before[None])
        both = _hooked(
            scorer, row, lambda _module, _args, output, second=second: torch.cat([output, second.to(output.device)])
        )
        yield from compare_in_pieces(both[0, :-1], both[1, :-1], put(row[1:], both.device))


def _hooked(scorer: TokenScorer, row: NDArray[np.int64], hook: Callable[..., Tensor | None]) -> Tensor:
    """Return the logits of one window, [1 or what the hook made of it, L, vocabulary], with a forward hook on the head.

    Raises:
        ValueError: the head didn't run once on the whole window: what it is given says nothing of the logits.
    """
    shapes = []

    def watch(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        shapes.append(tuple(args[0].shape[:-1]))

    hooks = [scorer.head.register_forward_hook(h) for h in (watch, hook)]
    try:
        logits: Tensor = scorer.model(put(row[None], scorer.device), use_cache=False).logits
    finally:
        for each in hooks:
            each.remove()
    if shapes != [(1, len(row))]:
        raise ValueError(
            f"{type(scorer.model).__name__} runs its output embeddings on positions {shapes}, not once on all of a "
            "window: its agreement can't be measured"
        )
    return logits
