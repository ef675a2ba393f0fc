"""Latency of a model as it is held: time to first token, tokens a second, memory, size. A number of the device.

A prompt of 128 tokens, the first of a text set, and 128 tokens generated greedily with a static cache, at batch 1 and
16: 3 repetitions that warm up, 10 that are measured. The prompt is the same in every row, and generation stops at no
token. Time to first token is that of the prompt's forward pass and the first tokens' way to the host. Tokens a second
count the tokens after the first ones, of all rows, over the time after them.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kbit.errors import SpecError
from kbit.evaluation.evaluators import BATCHES, NEW_TOKENS, PROMPT_TOKENS, REPETITIONS, WARM_UPS
from kbit.evaluation.spec import EvalResult, EvalSpec
from kbit.evaluation.texts import encode_text, read_documents
from kbit.sources import place_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUARTILES: Final = {"": 50, "_q25": 25, "_q75": 75}
"""A metric's suffix, and the percentile of the repetitions that it is."""
MEGABYTE: Final = 1e6


@dataclass(frozen=True, kw_only=True)
class LatencyEval:
    """Times the decoding of one prompt.

    Attributes:
        prompt: int64 [tokens].
        attention: the implementation that transformers computes attention with.
        execution: how a decoding step runs (``kbit.evaluation.spec.EXECUTIONS``).
        batches, new_tokens, warm_ups, repetitions: as the module says.
    """

    prompt: NDArray[np.int64]
    attention: str
    execution: str
    batches: tuple[int, ...] = BATCHES
    new_tokens: int = NEW_TOKENS
    warm_ups: int = WARM_UPS
    repetitions: int = REPETITIONS

    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:  # noqa: ARG002  # its batches are its own
        """Medians and quartiles of 'ttft_B' in ms and 'tokens_per_second_B' of each batch B, 'peak_memory_B' and
        'size_on_disk' in MB; samples: what each repetition gave, float32.
        """
        from kbit.packed.files import saved_bytes

        metrics: dict[str, float] = {}
        samples: dict[str, NDArray[Any]] = {}
        with _attending(model, self.attention):
            for batch in self.batches:
                ttft, rate, peak = self._measure(model, batch)
                samples |= {f"ttft_{batch}": ttft, f"tokens_per_second_{batch}": rate}
                metrics[f"peak_memory_{batch}"] = peak / MEGABYTE
        for name, values in samples.items():
            for suffix, percentile in QUARTILES.items():
                metrics[name + suffix] = float(np.percentile(values, percentile))
        metrics["size_on_disk"] = saved_bytes(model) / MEGABYTE
        each = (self.warm_ups + self.repetitions) * (len(self.prompt) + self.new_tokens)
        digest = hashlib.sha256(f"prompt {len(self.prompt)}\n".encode() + self.prompt.astype("<i4").tobytes())
        return EvalResult(
            metrics=metrics,
            stderr={},
            samples={name: values.astype(np.float32) for name, values in samples.items()},
            diverged=False,
            n_samples=self.repetitions,
            n_tokens=each * sum(self.batches),
            dataset_hash=digest.hexdigest(),
        )

    def _measure(self, model: Any, batch: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Return the milliseconds to the first token and the tokens a second of each repetition, and the peak bytes."""
        import torch

        from kbit.evaluation.decoding import Decoder

        memory = _Memory.of(model)
        decoder = Decoder(
            model=model,
            prompt=torch.from_numpy(self.prompt),
            batch=batch,
            new_tokens=self.new_tokens,
            execution=self.execution,
        )
        times = []
        for _ in range(self.warm_ups + self.repetitions):
            decoder.reset()
            memory.wait()
            began = time.perf_counter()
            decoder.first().cpu()
            first = time.perf_counter()
            decoder.rest().cpu()
            times.append((first - began, time.perf_counter() - first))
        peak = memory.peak()
        if self.execution == "compile":
            del decoder
            torch.compiler.reset()
        prompt, rest = np.array(times[self.warm_ups :]).T
        return 1e3 * prompt, batch * (self.new_tokens - 1) / rest, peak


def prepare_latency(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> LatencyEval:
    """Encode the prompt.

    Raises:
        SpecError: the model's context is shorter than prompt and new tokens.
        ValueError: the text has fewer tokens than the prompt, can't be read, or does not fit the vocabulary.
    """
    needed = PROMPT_TOKENS + NEW_TOKENS
    if context < needed:
        raise SpecError(f"eval.kinds.{spec.kind}", spec.name, f"left out for a context of {context}: {needed} are used")
    tokens = encode_text(read_documents(spec.source), tokenizer, limit=PROMPT_TOKENS).tokens
    if len(tokens) < PROMPT_TOKENS:
        where = place_of(spec.source)
        raise ValueError(f"{where}: the text set has {len(tokens)} tokens, and a prompt of {PROMPT_TOKENS} is needed")
    if tokens.max() >= vocab_size:
        raise ValueError(f"the tokenizer gives token {tokens.max()}; the model's vocabulary has {vocab_size} entries")
    return LatencyEval(prompt=tokens, attention=str(spec.attention), execution=str(spec.execution))


@contextmanager
def _attending(model: Any, attention: str) -> Iterator[None]:
    """Compute attention by an implementation while it lasts.

    Raises:
        SpecError: the model does not have it.
    """
    before = model.config._attn_implementation
    try:
        with suppress(ValueError, ImportError):
            model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            allowed = f"{before}, the only implementation that {type(model).__name__} has here"
            raise SpecError("eval.attention", attention, allowed)
        yield
    finally:
        with suppress(ValueError, ImportError):
            model.set_attn_implementation(before)


@dataclass(kw_only=True)
class _Memory:
    """Measures the memory that a model and what runs it take: the model's own, and the growth until the peak.

    What else lies there, such as originals that later cells begin from, does not count. On a CPU it is the growth of
    the process, in pages.
    """

    model: int
    gpus: list[torch.device]
    before: int = field(init=False)

    @classmethod
    def of(cls, model: Any) -> _Memory:
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
        gpus = sorted({t.device for t in tensors if t.is_cuda}, key=str)
        return cls(model=sum(t.nbytes for t in tensors), gpus=gpus)

    def __post_init__(self) -> None:
        import torch

        self.wait()
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if not self.gpus:
            # What was freed is given back, so that the growth is of what is used now.
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            # The peak of a process is set back to what it has now (proc(5)); where that is not allowed, it stays.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._now()

    def wait(self) -> None:
        """Wait for the GPUs."""
        import torch

        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)

    def peak(self) -> int:
        """Return the peak in bytes since this object was made."""
        import torch

        if self.gpus:
            most = sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in self.gpus)
        else:
            most = _of_process("VmHWM")
        return self.model + max(0, most - self.before)

    def _now(self) -> int:
        import torch

        if self.gpus:
            return sum(int(torch.cuda.memory_allocated(gpu)) for gpu in self.gpus)
        return _of_process("VmRSS")


def _of_process(name: str) -> int:
    """Return bytes of this process by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
