"""One decode step of an OPT-shaped transformer: what has to be read for a token, and little else.

The modules are the same at any precision: what differs is the linear layers that the caller makes. Query, key and value
are one layer. Compiled are three pieces: up to the first layer's first FFN matmul, from there to the same place of the
next layer, and the end; the middle one is compiled once for all layers. Cut there, sums, norms and activations are one
kernel each.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

Source = Callable[[str, tuple[int, ...]], Tensor]
"""A parameter by its name and shape."""
MakeLinear = Callable[[Tensor, Tensor], nn.Module]
"""A layer of a weight [out, in] and a bias [out]."""
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
State = tuple[Tensor, Tensor]
"""Between two pieces: the residual stream [batch, hidden], and an FFN's activations [batch, ffn]."""
LINEARS: Final = ("qkv", "out", "fc1", "fc2")
_OFFSET: Final = 2
"""OPT's position embeddings begin at the third row."""
_STD: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of an OPT-shaped model; embeddings and the head are one tied matrix."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int = 50272
    positions: int = 2048

    @property
    def linear_weights(self) -> int:
        """Weights of attention and FFN: those that are quantized."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)

    @property
    def other_parameters(self) -> int:
        """Embeddings, norms and biases, which stay at 16 bits."""
        norms_and_biases = self.layers * (9 * self.hidden + self.ffn) + 2 * self.hidden
        return (self.vocab + self.positions + _OFFSET) * self.hidden + norms_and_biases


PRESETS: Final = {
    a.name: a
    for a in (
        Architecture(name="opt-1.3b", hidden=2048, ffn=8192, layers=24, heads=32),
        Architecture(name="opt-6.7b", hidden=4096, ffn=16384, layers=32, heads=32),
        Architecture(name="opt-13b", hidden=5120, ffn=20480, layers=40, heads=40),
        Architecture(name="opt-30b", hidden=7168, ffn=28672, layers=48, heads=56),
    )
}


class DecoderLayer(nn.Module):
    """Attention over a full cache, and an FFN, with norms before them."""

    qkv: nn.Module
    out: nn.Module
    fc1: nn.Module
    fc2: nn.Module
    keys: Tensor
    values: Tensor

    def __init__(
        self, a: Architecture, name: str, source: Source, linear: MakeLinear, *, batch: int, context: int
    ) -> None:
        super().__init__()
        self.heads = a.heads
        sizes = {"qkv": (3 * a.hidden, a.hidden), "out": (a.hidden, a.hidden)}
        sizes |= {"fc1": (a.ffn, a.hidden), "fc2": (a.hidden, a.ffn)}
        for part in LINEARS:
            weight = source(f"{name}.{part}.weight", sizes[part])
            setattr(self, part, linear(weight, source(f"{name}.{part}.bias", sizes[part][:1])))
        self.attention_norm = _norm(f"{name}.attention_norm", a.hidden, source)
        self.ffn_norm = _norm(f"{name}.ffn_norm", a.hidden, source)
        cache = (batch, a.heads, context, a.hidden // a.heads)
        self.register_buffer("keys", source(f"{name}.keys", cache), persistent=False)
        self.register_buffer("values", source(f"{name}.values", cache), persistent=False)

    def to_ffn(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, hidden] after attention, and the activations [batch, ffn] that ``fc2`` takes."""
        query, key, value = self.qkv(self.attention_norm(x)).view(x.shape[0], 3, self.heads, 1, -1).unbind(1)
        self.keys[:, :, position] = key
        self.values[:, :, position] = value
        attended = functional.scaled_dot_product_attention(query, self.keys, self.values)
        x = x + self.out(attended.reshape(x.shape))
        return x, functional.relu(self.fc1(self.ffn_norm(x)))

    def replaced(self, plain: Callable[[nn.Module], nn.Module]) -> DecoderLayer:
        """This layer with ``plain(linear)`` in place of each linear one; the rest is shared."""
        other = copy(self)
        other._modules = {name: plain(m) if name in LINEARS and m else m for name, m in self._modules.items()}
        return other


class Decoder(nn.Module):
    """The model, with a cache of ``context`` tokens, of which the step's own is one.

    Args:
        source: parameters, and what is in the cache.
        linear: makes the layers of attention and FFN.
        compiler: of the three pieces; None runs them as they are.

    Raises:
        ValueError: ``context`` is beyond the model's positions.
    """

    def __init__(
        self,
        a: Architecture,
        source: Source,
        linear: MakeLinear,
        *,
        batch: int = 1,
        context: int,
        compiler: Compiler | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= context <= a.positions:
            raise ValueError(f"context={context} is not possible: {a.name} has positions for 1 to {a.positions} tokens")
        self.tokens = nn.Parameter(source("tokens", (a.vocab, a.hidden)), requires_grad=False)
        self.positions = nn.Parameter(source("positions", (a.positions + _OFFSET, a.hidden)), requires_grad=False)
        self.layers = nn.ModuleList(
            DecoderLayer(a, f"layers.{i}", source, linear, batch=batch, context=context) for i in range(a.layers)
        )
        self.norm = _norm("norm", a.hidden, source)
        compiled = compiler or (lambda piece: piece)
        self._begin, self._next, self._end = compiled(_begin), compiled(_next), compiled(_end)

    def in_order(self) -> list[DecoderLayer]:
        """Return the layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [batch, vocab] of what comes after ``tokens`` [batch], int64, which are at ``position`` [1], int64."""
        layer, *others = self.in_order()
        state = self._begin(layer, self.tokens, self.positions, tokens, position)
        for following in others:
            state = self._next(layer.fc2, following, *state, position)
            layer = following
        logits: Tensor = self._end(layer.fc2, self.norm, self.tokens, *state)
        return logits

    def reference(self, tokens: Tensor, position: Tensor, plain: Callable[[nn.Module], nn.Module]) -> Tensor:
        """Return the same, uncompiled, with ``plain(linear)`` for each linear layer, made two layers at a time."""
        first, *others = self.in_order()
        layer = first.replaced(plain)
        state = _begin(layer, self.tokens, self.positions, tokens, position)
        for other in others:
            following = other.replaced(plain)
            state = _next(layer.fc2, following, *state, position)
            layer = following
        return _end(layer.fc2, self.norm, self.tokens, *state)


def random_source(device: str, dtype: torch.dtype) -> Source:
    """Normally distributed parameters, made on the device; the same name has the same values each time."""

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if name.endswith(("keys", "values")):
            return values
        return values.mul_(_STD).add_(1.0 if name.endswith("norm.weight") else 0.0)

    return source


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a 16-bit layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _norm(name: str, size: int, source: Source) -> nn.LayerNorm:
    norm = nn.LayerNorm(size, device="meta")
    norm.weight = nn.Parameter(source(f"{name}.weight", (size,)), requires_grad=False)
    norm.bias = nn.Parameter(source(f"{name}.bias", (size,)), requires_grad=False)
    return norm


def _begin(layer: DecoderLayer, embedding: Tensor, positions: Tensor, tokens: Tensor, position: Tensor) -> State:
    return layer.to_ffn(embedding[tokens] + positions[position + _OFFSET], position)


def _next(fc2: nn.Module, layer: DecoderLayer, x: Tensor, activations: Tensor, position: Tensor) -> State:
    return layer.to_ffn(x + fc2(activations), position)


def _end(fc2: nn.Module, norm: nn.Module, embedding: Tensor, x: Tensor, activations: Tensor) -> Tensor:
    return functional.linear(norm(x + fc2(activations)), embedding)
