"""The role of each layer in its block: which layer follows which, for proxy quantization (section 3).

A mixture's feed-forwards stand side by side: each expert has an FFN 1, a gate and an FFN 2 of its own, and so has a
shared expert. All of them read what a dense block's FFN 1 reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from kbit.errors import ArchitectureError
from kbit.models.architectures import Layer

QKV, QUERY, KEY, VALUE = "qkv", "query", "key", "value"
ATTENTION_OUT, FFN_1, FFN_GATE, FFN_2 = "attention output", "FFN 1", "FFN gate", "FFN 2"
FFN_FUSED: Final = "FFN gate and FFN 1"
"""An expert's gate and up projection as one matrix."""

_ROLES: Final[Mapping[str, str]] = {
    "query_key_value": QKV,  # GPT-NeoX, BLOOM
    "c_attn": QKV,  # GPT-2
    "q_proj": QUERY,
    "k_proj": KEY,
    "v_proj": VALUE,
    "dense": ATTENTION_OUT,  # GPT-NeoX, BLOOM
    "out_proj": ATTENTION_OUT,  # OPT
    "o_proj": ATTENTION_OUT,  # Llama
    "dense_h_to_4h": FFN_1,
    "fc1": FFN_1,
    "c_fc": FFN_1,
    "up_proj": FFN_1,
    "gate_proj": FFN_GATE,
    "dense_4h_to_h": FFN_2,
    "fc2": FFN_2,
    "down_proj": FFN_2,
}
_STACKED_ROLES: Final[Mapping[str, str]] = {
    "gate_up_proj": FFN_FUSED,
    "up_proj": FFN_1,
    "gate_proj": FFN_GATE,
    "down_proj": FFN_2,
}
_FFN: Final = frozenset({FFN_1, FFN_GATE, FFN_FUSED, FFN_2})


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRoles:
    """The layers of one block by role.

    Attributes:
        attention: its attention's.
        feed_forwards: those of each feed-forward: one, or one per expert.
    """

    attention: dict[str, Layer] = field(default_factory=dict)
    feed_forwards: list[dict[str, Layer]] = field(default_factory=list)

    def layers(self) -> Iterable[tuple[str, Layer, dict[str, Layer]]]:
        """Yield each layer with its role, and the layers that its role is among."""
        for roles in (self.attention, *self.feed_forwards):
            for role, layer in roles.items():
                yield role, layer, roles


def role_of(layer: Layer) -> str | None:
    """Return what a layer does in its block, by its name; None if the name isn't known."""
    if layer.stack is not None:
        return _STACKED_ROLES.get(layer.stack.parameter)
    *parents, name = layer.name.split(".")
    if name == "c_proj":  # GPT-2 has two of them
        return FFN_2 if "mlp" in parents else ATTENTION_OUT
    return _ROLES.get(name)


def block_roles(layers: Iterable[Layer]) -> BlockRoles:
    """Return the layers of one block by role, each role once in its attention or feed-forward, none missing.

    Raises:
        ArchitectureError: a role isn't known, or there is one too many, or one is missing.
    """
    found = BlockRoles()
    by_place: dict[tuple[str, int | None], dict[str, Layer]] = {}
    for layer in layers:
        role = role_of(layer)
        if role is None:
            raise ArchitectureError(f"{layer.name} has a name whose role isn't known")
        roles = found.attention
        if role in _FFN:
            place = (layer.name.rsplit(".", 1 if layer.stack is None else 2)[0], layer.number)
            roles = by_place.setdefault(place, {})
        if role in roles:
            raise ArchitectureError(f"{layer.name} is a second {role} after {roles[role].name}")
        roles[role] = layer
    found.feed_forwards.extend(by_place.values())
    _check(found)
    return found


def up_rows(layer: Layer, spread: Tensor) -> Tensor:
    """Of a value per row of a fused gate and up projection, return those of the up projection.

    The gate's rows come first, but in GPT-OSS, which has them in turns.
    """
    return spread[spread.numel() // 2 :] if getattr(layer.module, "is_concatenated", True) else spread[1::2]


def _check(found: BlockRoles) -> None:
    stacked = [layer for ffn in found.feed_forwards for layer in ffn.values() if layer.stack is not None]
    if len(found.feed_forwards) > 1 and not stacked:
        first, second = (next(iter(ffn.values())).name for ffn in found.feed_forwards[:2])
        raise ArchitectureError(f"{second} belongs to a second feed-forward after that of {first}")
    attention = {QKV} if QKV in found.attention else {QUERY, KEY, VALUE}
    wanted = [(found.attention, attention | {ATTENTION_OUT})]
    wanted += [(ffn, {FFN_FUSED if FFN_FUSED in ffn else FFN_1, FFN_2}) for ffn in found.feed_forwards or [{}]]
    for roles, needed in wanted:
        missing = needed - roles.keys()
        extra = {QUERY, KEY, VALUE} & roles.keys() if QKV in roles else set()
        extra |= {FFN_1, FFN_GATE} & roles.keys() if FFN_FUSED in roles else set()
        if missing or extra:
            named = ", ".join(layer.name for layer in roles.values()) or "its layers"
            what = f"no {min(missing)}" if missing else f"a fused projection and a {min(extra)}"
            raise ArchitectureError(f"among {named} there is {what}")
