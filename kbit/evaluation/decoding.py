"""Greedy decoding with a static cache: a prompt at once, then a step for each token; on a GPU as a captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.memory import is_out_of_memory

_WARM_STEPS: Final = 2
T = TypeVar("T")


def capture(step: Callable[[], T], *, ready: Callable[[], None] = lambda: None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Run a step twice on the current GPU, then capture it; return the graph and what the captured step gave.

    Args:
        step: launches kernels, and waits for none.
        ready: called once the step has run, before it is captured.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_STEPS):
            step()
        torch.cuda.synchronize()
        ready()
        with torch.cuda.graph(graph, stream=stream):
            given = step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, given


@dataclass(kw_only=True, eq=False)
class Decoder:
    """Decodes a batch of equal prompts with a transformers causal language model in eval mode.

    Everything that a step reads or writes has one address for as long as this object lives: cache, tokens, position.

    Attributes:
        model: the model.
        prompt: token ids, int64 [length].
        batch: rows, each with the same prompt.
        new_tokens: how many are generated.
        execution: one of ``kbit.evaluation.spec.EXECUTIONS``.

    Raises:
        SpecError: an execution that this model or device does not allow.
    """

    model: Any
    prompt: Tensor
    batch: int
    new_tokens: int
    execution: str = "eager"
    _cache: Any = field(init=False)
    _step: Callable[[], object] = field(init=False)
    _one: Callable[..., Any] = field(init=False)
    _fixed: dict[str, Tensor] = field(init=False)

    @torch.no_grad()
    def __post_init__(self) -> None:
        device = self.model.get_input_embeddings().weight.device
        self._check(device)
        length, total = len(self.prompt), len(self.prompt) + self.new_tokens
        self._cache = self._make_cache(total)
        ids = self.prompt.to(device).expand(self.batch, length).contiguous()
        taken = inspect.signature(self.model.forward).parameters
        # Of every place of the cache: which of them are filled is a matter of positions.
        mask = torch.ones(self.batch, total, dtype=torch.int64, device=device)
        self._fixed = {"attention_mask": mask} if "attention_mask" in taken else {}
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._has_positions = "position_ids" in taken
        self._ids, self._first = ids, torch.arange(length, device=device).expand(self.batch, length).contiguous()
        self._token = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
        self._position = torch.full((self.batch, 1), length, dtype=torch.int64, device=device)
        self._count = torch.ones(1, dtype=torch.int64, device=device)
        self._new = torch.zeros(self.batch, self.new_tokens, dtype=torch.int64, device=device)
        self._one = self.model.forward
        if self.execution == "compile":
            self._one = torch.compile(self.model.forward, dynamic=False)
        self.begin()
        self._step = self._decode
        if self.execution == "eager":
            return
        if device.type != "cuda":
            self._decode()  # compiles
            return
        expected = self.rest().clone() if self.execution == "graph" else None
        self.begin()  # capturing takes steps, for which a full cache has no room
        self._step = self._capture()
        self.begin()
        if expected is not None and not torch.equal(self.rest(), expected):
            raise self._needs_eager("whose steps a CUDA graph does not repeat: it gave other tokens")

    @torch.no_grad()
    def begin(self) -> Tensor:
        """Empty the cache and run the prompt; return the first token of each row, int64 [batch, 1], on the device."""
        self.reset()
        return self.first()

    def reset(self) -> None:
        """Empty the cache."""
        self._cache.reset()
        self._position.fill_(len(self.prompt))
        self._count.fill_(1)

    @torch.no_grad()
    def first(self) -> Tensor:
        """Run the prompt through an empty cache; return the first token of each row, int64 [batch, 1]."""
        positions = {"position_ids": self._first} if self._has_positions else {}
        out = self.model(
            self._ids, past_key_values=self._cache, use_cache=True, **positions, **self._fixed, **self._last
        )
        self._token.copy_(out.logits[:, -1:].argmax(-1))
        self._new[:, :1] = self._token
        return self._token

    @torch.no_grad()
    def rest(self) -> Tensor:
        """Generate what is left; return all new tokens, int64 [batch, new_tokens], on the device."""
        for _ in range(self.new_tokens - 1):
            self._step()
        return self._new

    @torch.no_grad()
    def _decode(self) -> None:
        positions = {"position_ids": self._position} if self._has_positions else {}
        out = self._one(self._token, past_key_values=self._cache, use_cache=True, **positions, **self._fixed)
        self._token.copy_(out.logits[:, -1:].argmax(-1))
        self._new.index_copy_(1, self._count, self._token)
        self._position.add_(1)
        self._count.add_(1)

    def _check(self, device: torch.device) -> None:
        name = type(self.model).__name__
        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(f"{name} takes no cache of keys and values (past_key_values): its decoding can't be timed")
        if self.execution == "graph" and device.type != "cuda":
            raise SpecError("eval.execution", self.execution, "eager or compile on a CPU, which has no CUDA graphs")
        apart = set((getattr(self.model, "hf_device_map", None) or {}).values())
        if self.execution != "eager" and len(apart) > 1:
            allowed = f"eager for a model that is spread over {len(apart)} GPUs, which no graph can hold"
            raise SpecError("eval.execution", self.execution, allowed)

    def _capture(self) -> Callable[[], object]:
        try:
            return capture(self._decode)[0].replay
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()[0]
            raise self._needs_eager(f"whose steps can't be captured as a CUDA graph: {said}") from error

    def _make_cache(self, total: int) -> Any:
        """Make a cache of `total` tokens; refuse a graph of layers whose steps change with their number, in Python."""
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        cache: Any = StaticCache(config=self.model.config, max_cache_len=total)
        for number, layer in enumerate(cache.layers):
            if layer.is_sliding and layer.max_cache_len == total:
                # Within the window nothing slides; and a sliding layer counts its tokens in Python.
                cache.layers[number] = StaticLayer(max_cache_len=total)
        if self.execution != "eager" and any(layer.is_sliding for layer in cache.layers):
            raise self._needs_eager(f"whose attention slides within {total} tokens")
        return cache

    def _needs_eager(self, why: str) -> SpecError:
        return SpecError("eval.execution", self.execution, f"eager for {type(self.model).__name__}, {why}")
