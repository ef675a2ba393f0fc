"""A model whose blocks do not run: it tells what evaluations ask of it, and answers them later.

An evaluation that scores given tokens runs twice on such a model. The first time what enters its blocks is recorded,
and what leaves them means nothing. Then the blocks run, one after another, on what was recorded. The second time what
left the last block is played back, and the model's own code does what comes before and after its blocks. So evaluations
need not know how a model is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kbit.calibration import WINDOWS_PER_BATCH
from kbit.errors import ArchitectureError, LayeredError, SeenError
from kbit.evaluation.scoring import PROBE_TOKENS, TokenScorer, base_of
from kbit.evaluation.sharing import forgo_sharing
from kbit.layered.blocks import Blocks
from kbit.models.activations import BlockArguments
from kbit.models.architectures import decoder_blocks
from kbit.models.verification import check_causal

_CACHES: Final = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_HANDED_ON: Final = object()
"""Stands for what a block gives besides hidden states, such as attention's weights. Most models drop it."""
_STATES: Final = "hidden_states"
NOT_SHARED: Final = "not shared: layer by layer"

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One forward pass that an evaluation asks for.

    Attributes:
        key: SHA-256 of its tokens, and of whatever else it was given.
        entering: what enters the first block, [rows, length, hidden], on the host.
        arguments: what each block is given besides.
    """

    key: str
    entering: Tensor
    arguments: tuple[BlockArguments, ...]

    @property
    def tokens(self) -> int:
        return self.entering.shape[0] * self.entering.shape[1]


class Hollow:
    """A model of ``Blocks`` whose forward passes are recorded and played back.

    Args:
        blocks: of the model. Its first block runs on a few tokens, to see in what form blocks give their results, and
            that no token changes what is predicted before it.
        name: what the user calls the model; None leaves the latter out.

    Attributes:
        calls: what was recorded, by key.

    Raises:
        ArchitectureError: its blocks can't be told.
        SpecError: it is no causal model.
    """

    def __init__(self, blocks: Blocks, *, name: str | None = None) -> None:
        self.model: Any = blocks.model
        self.calls: dict[str, Call] = {}
        self._modules = list(decoder_blocks(self.model)[1])
        self._base: Any = base_of(self.model)
        self._embedding: Any = self.model.get_input_embeddings()
        self._known = _Pool()
        self._ids: Tensor | None = None
        self._given: dict[str, Tensor] = {}
        self._rest: tuple[object, ...] | None = None
        forgo_sharing(self.model, NOT_SHARED)
        self._try(blocks, name)

    @torch.inference_mode()
    def record(self, evaluate: Callable[[], object]) -> list[str]:
        """Run an evaluation, and return the keys of the forward passes that it asks for, each once.

        Its result means nothing. New passes are added to ``calls``.

        Raises:
            LayeredError: the evaluation generates: what it asks for depends on what it is answered.
            ArchitectureError: the model's blocks hand more than hidden states from one to the next.
        """
        asked: dict[str, None] = {}
        key, entering, arguments = "", torch.empty(0), list[BlockArguments]()

        def note(number: int, states: Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
            nonlocal key, entering, arguments
            if any(named.get(name) is not None for name in _CACHES):
                raise LayeredError(
                    "it generates text, token by token: a model that runs layer by layer is read once for all tokens"
                )
            if any(value is _HANDED_ON for value in (*rest, *named.values())):
                raise ArchitectureError(
                    f"{type(self.model).__name__} can't run layer by layer: its blocks hand on more than hidden states"
                )
            if number == 0:
                key, entering, arguments = self._key(), states, []
                asked[key] = None
                self._known.next_call()
            if key not in self.calls:
                arguments.append(BlockArguments(rest=self._known.one(rest), named=self._known.one(dict(named))))
                if number == len(self._modules) - 1:
                    self.calls[key] = Call(key=key, entering=entering.cpu(), arguments=tuple(arguments))
            return states

        with self._patched(note):
            evaluate()
        return list(asked)

    def record_windows(self, tokens: Tensor) -> list[str]:
        """Record the forward passes over windows of tokens, int64 [windows, length], in batches as a whole model's.

        Raises:
            ArchitectureError: as ``record``.
        """
        device = self._embedding.weight.device
        batches = torch.split(tokens, WINDOWS_PER_BATCH)
        return self.record(lambda: [self._base(batch.to(device), use_cache=False) for batch in batches])

    @contextmanager
    def playing(self, leaving: Callable[[str], Tensor]) -> Iterator[None]:
        """Have the model answer as if its blocks ran.

        Args:
            leaving: gives what left the last block in a recorded call, by its key, on the device.
        """

        def play(number: int, states: Tensor, _rest: object, _named: object) -> Tensor:
            if number:
                return states
            key = self._key()
            if key not in self.calls:
                raise LayeredError(
                    "it asks for other forward passes than it did before: what it asks for depends on the model's "
                    "answers, and a model that runs layer by layer is read once for all of them"
                )
            return leaving(key)

        with self._patched(play):
            yield

    def _key(self) -> str:
        """Return the key of the forward pass that is under way."""
        assert self._ids is not None
        digest = hashlib.sha256()
        for name, tensor in {"ids": self._ids, **self._given}.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _try(self, blocks: Blocks, name: str | None) -> None:
        """Look at what the first block gives, and at what the model does after its blocks."""
        with blocks.on_device(0) as first:
            own = first.forward

            def see(_: int, states: Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
                raise SeenError(own(states, *rest, **named))

            def run_one(number: int, states: Tensor, rest: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
                out = states if number else own(states, *rest, **named)
                return out[0] if isinstance(out, tuple) else out

            try:
                with self._patched(see):
                    self._base(torch.arange(PROBE_TOKENS, device=blocks.device)[None], use_cache=False)
            except SeenError as seen:
                out = seen.args[0]
            else:
                raise ArchitectureError(f"{type(self.model).__name__} can't run layer by layer: no block of it runs")
            if isinstance(out, tuple):
                self._rest = tuple(None if value is None else _HANDED_ON for value in out[1:])
            with self._patched(run_one):
                TokenScorer(self.model)  # whether the head alone gives the logits is found now, and remembered
                if name is not None:
                    check_causal(self.model, name=name)

    @contextmanager
    def _patched(self, act: Callable[[int, Tensor, tuple[Any, ...], Mapping[str, Any]], Tensor]) -> Iterator[None]:
        """Have the blocks do something else than to run: from what they are given to the hidden states they give."""

        def forward_of(number: int) -> Forward:
            def forward(*given: Any, **named: Any) -> Any:
                states = given[0] if given else named[_STATES]
                others = {name: value for name, value in named.items() if name != _STATES}
                out = act(number, states, given[1:], others)
                return out if self._rest is None else (out, *self._rest)

            return forward

        def note_given(_: nn.Module, __: object, named: dict[str, Any]) -> None:
            told = {k: v for k, v in named.items() if k not in ("input_ids", "inputs_embeds")}
            self._given = {k: v for k, v in told.items() if isinstance(v, Tensor)}

        def note_ids(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._ids = given[0]

        hooks = [
            self._base.register_forward_pre_hook(note_given, with_kwargs=True),
            self._embedding.register_forward_pre_hook(note_ids),
        ]
        for number, module in enumerate(self._modules):
            module.forward = forward_of(number)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward
            for hook in hooks:
                hook.remove()


class _Pool:
    """Arguments of blocks, each distinct value once: masks and rotary embeddings are the same for all blocks, and for
    all batches of one shape.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[object, ...], list[Tensor]] = {}
        self._of_call: dict[int, tuple[Tensor, Tensor]] = {}

    def next_call(self) -> None:
        self._of_call.clear()

    def one(self, value: Any) -> Any:
        """Return an equal value, made of tensors that are kept."""
        if isinstance(value, Tensor):
            known = self._of_call.get(id(value))
            if known is None:
                # The tensor itself is kept too, so that no other gets its id meanwhile.
                known = self._of_call[id(value)] = value, self._kept(value)
            return known[1]
        if isinstance(value, dict):
            return {key: self.one(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._each(value))
        return value

    def _each(self, values: Iterable[Any]) -> list[Any]:
        return [self.one(item) for item in values]

    def _kept(self, tensor: Tensor) -> Tensor:
        alike = self._values.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for other in alike:
            if torch.equal(other, tensor):
                return other
        alike.append(tensor)
        return tensor
