"""Find the layers of a language model that are quantized, and the role of each in its block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.errors import ArchitectureError

QKV, QUERY, KEY, VALUE = "qkv", "query", "key", "value"
ATTENTION_OUT, FFN_1, FFN_GATE, FFN_2 = "attention output", "FFN 1", "FFN gate", "FFN 2"

_ROLES: Mapping[str, str] = {
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
_ALWAYS_PARALLEL = frozenset({"codegen", "cohere", "cohere2", "gptj", "phi"})
"""Architectures with parallel residual branches and no flag for it in their configuration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One linear layer of a transformer block.

    Attributes:
        name: the module's name in the model.
        block: the block's number.
        module: nn.Linear, or transformers' Conv1D (GPT-2), whose weight is stored [in, out].
    """

    name: str
    block: int
    module: nn.Module

    @property
    def parameter(self) -> nn.Parameter:
        return _weight(self.module, self.name)

    @property
    def weight(self) -> Tensor:
        """The weight as [out_features, in_features]: a view of the parameter."""
        weight = self.parameter.detach()
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def role(self) -> str | None:
        """What the layer does in its block, by its name; None if the name isn't known."""
        *parents, name = self.name.split(".")
        if name == "c_proj":  # GPT-2 has two of them
            return FFN_2 if "mlp" in parents else ATTENTION_OUT
        return _ROLES.get(name)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the repeated transformer blocks.

    The model says which part is its text decoder, and which parts read no text: a vision tower may be larger. Of the
    decoder's ModuleLists that lie in no other, they are the one with most weights in linear layers. A decoder that has
    none is no decoder but a head of that name: then the whole model's count.

    Raises:
        ArchitectureError: no ModuleList has linear layers; or one of these has a weight that is computed.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    sizes = {
        name: sum(_weight(m, path).numel() for path, m in blocks.named_modules(prefix=name) if _is_linear(m))
        for name, blocks in lists.items()
    }
    decoder, towers = f"{_decoder(model)}.", tuple(f"{name}." for name in _towers(model))
    reading = [name for name, size in sizes.items() if size and not name.startswith(towers)]
    within = [name for name in reading if name.startswith(decoder)] or reading
    if not within:
        raise ArchitectureError(
            f"{type(model).__name__} has nothing to quantize: "
            "no ModuleList of transformer blocks with linear layers (nn.Linear or Conv1D)"
        )
    best = max(within, key=lambda name: sizes[name])
    return best, lists[best]


def block_layers(model: nn.Module) -> list[Layer]:
    """Return the linear layers of attention and FFN: every nn.Linear and Conv1D inside the repeated blocks, in order.

    Of layers that are tied to one another the first is listed. Outside of the blocks nothing is taken: embeddings,
    heads, and OPT-350M's project_in and project_out, which belong to its embedding. Norms and biases are no matrices. A
    weight tied to anything outside the blocks is left alone, whatever layer holds it.

    Raises:
        ArchitectureError: no such layer; or one whose weight isn't floating point, so that it is quantized already.
    """
    name, blocks = decoder_blocks(model)
    inside = f"{name}."
    taken_elsewhere = {
        key_of(parameter)
        for owner, parameter in model.named_parameters(remove_duplicate=False)
        if not owner.startswith(inside)
    }
    layers: list[Layer] = []
    seen: set[tuple[object, ...]] = set()
    for number, block in enumerate(blocks):
        for path, module in block.named_modules(prefix=f"{name}.{number}"):
            if not _is_linear(module):
                continue
            weight = _weight(module, path)
            if not weight.is_floating_point():
                raise ArchitectureError(
                    f"{path} has weights of {weight.dtype}: quantized already; load the 16-bit model"
                )
            key = key_of(weight)
            if key not in taken_elsewhere and key not in seen:
                seen.add(key)
                layers.append(Layer(name=path, block=number, module=module))
    if not layers:
        raise ArchitectureError(
            f"{type(model).__name__} has nothing to quantize: every linear layer in {name} is tied to a weight outside"
        )
    return layers


def key_of(parameter: Tensor) -> tuple[object, ...]:
    """Equal for two parameters that are one tensor, whether one object or two on the same memory."""
    if parameter.is_meta or parameter.numel() == 0:
        return (id(parameter),)
    return (parameter.device, parameter.data_ptr(), parameter.numel())


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's language part, which composite models nest in theirs; None without one."""
    config = getattr(model, "config", None)
    ask = getattr(config, "get_text_config", None)
    return config if ask is None else ask(decoder=True)


def has_parallel_residual(model: nn.Module) -> bool:
    """Tell whether attention and FFN read the same input, so that FFN 1 does not follow its own block's attention."""
    config = text_config(model)
    flags = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    return (
        any(bool(getattr(config, flag, False)) for flag in flags)
        or getattr(config, "model_type", "") in _ALWAYS_PARALLEL
    )


def _decoder(model: nn.Module) -> str:
    """Name of the module that the model says is its text decoder; "" where it names none, or itself."""
    ask = getattr(model, "get_decoder", None)
    decoder = model if ask is None else ask()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _towers(model: nn.Module) -> list[str]:
    """Names of the parts that say that they take images or sounds, and no text."""
    kinds = {name: getattr(module, "input_modalities", "text") for name, module in model.named_modules() if name}
    return [name for name, kind in kinds.items() if "text" not in ((kind,) if isinstance(kind, str) else kind)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise ArchitectureError(
            f"{name} has a weight that is computed (parametrized or weight-normed), not a parameter: remove the "
            "parametrization first, leaving its result"
        )
    return weight
