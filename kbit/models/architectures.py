"""Find the layers of a language model that are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.errors import ArchitectureError
from kbit.models.stacks import Stack, has_stacks, stacks_of
from kbit.models.unquantized import why_kept

_ALWAYS_PARALLEL = frozenset({"codegen", "cohere", "cohere2", "cohere2_moe", "gptj", "phi"})
"""Architectures with parallel residual branches and no flag for it in their configuration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One matrix of a transformer block: a linear layer's weight, or one of a stack.

    Attributes:
        name: the module's name in the model; of a stack, with the parameter's and the matrix's number.
        block: the block's number.
        module: nn.Linear, or transformers' Conv1D (GPT-2), whose weight is stored [in, out]; or what holds the stack.
        stack, number: the stack and the place in it; None for a linear layer.
        original: the parameter's values as they were loaded, where they are kept (``kbit.models.originals``), on any
            device; None where nothing but the parameter holds them.
        reads_original: the parameter may hold other values now, and ``weight`` is the original's, on its device.
        fetch: of a model that is quantized as it is read: has the parameter hold the original, which it need not keep.
    """

    name: str
    block: int
    module: nn.Module
    stack: Stack | None = None
    number: int | None = None
    original: Tensor | None = None
    reads_original: bool = False
    fetch: Callable[[Layer], None] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight; a stack's holds others too."""
        if self.stack is None:
            return _weight(self.module, self.name)
        return self.module.get_parameter(self.stack.parameter)

    @property
    def weight(self) -> Tensor:
        """The weight that is to be quantized, [out_features, in_features]: a view of the parameter, or the original."""
        if self.original is not None and self.reads_original:
            return self.matrix(self.original)
        if self.fetch is not None:
            self.fetch(self)
        return self.working

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), which are known before the weight is there."""
        return (shape := self.working.shape)[0], shape[1]

    @property
    def working(self) -> Tensor:
        """What the model computes with, [out_features, in_features]: a view of the parameter."""
        return self.matrix(self.parameter.detach())

    def matrix(self, values: Tensor) -> Tensor:
        """Return the layer's matrix [out_features, in_features] among values of the parameter's shape: a view."""
        if self.stack is not None and self.number is not None:
            return self.stack.matrix(values, self.number)
        return values.t() if isinstance(self.module, Conv1D) else values


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
    """Return the matrices of attention and FFN in order: all in the repeated blocks, but for ``unquantized``'s.

    They are the weights of every nn.Linear and Conv1D, and each matrix of every stack (experts). Of layers that are
    tied to one another the first is listed. Outside of the blocks nothing is taken: embeddings, heads, and OPT-350M's
    project_in and project_out, which belong to its embedding. Norms and biases are no matrices. A weight tied to
    anything outside the blocks is left alone, whatever layer holds it.

    Raises:
        ArchitectureError: no such layer; one whose weight isn't floating point, so that it is quantized already; or a
            parameter of two or more dimensions that is neither a layer nor an exception.
    """
    name, blocks = decoder_blocks(model)
    inside = f"{name}."
    among_experts = has_stacks(blocks)
    seen = {
        key_of(parameter)
        for owner, parameter in model.named_parameters(remove_duplicate=False)
        if not owner.startswith(inside)
    }
    layers: list[Layer] = []
    unknown: list[str] = []
    for number, block in enumerate(blocks):
        for path, module in block.named_modules():
            where = f"{name}.{number}.{path}" if path else f"{name}.{number}"
            for own, weight in _matrices(module, path, where, among_experts=among_experts):
                if not weight.is_floating_point():
                    raise ArchitectureError(
                        f"{where} has weights of {weight.dtype}: quantized already; load the 16-bit model"
                    )
                if key_of(weight) in seen:
                    continue
                seen.add(key_of(weight))
                found = _layers(module, own, where, number)
                layers += found
                if not found:
                    unknown.append(f"{where}.{own} {list(weight.shape)}")
    if unknown:
        raise ArchitectureError(
            f"{type(model).__name__} has {len(unknown)} parameters in its blocks that can't be quantized and would "
            f"stay in 16 bits unseen: {', '.join(unknown[:3])}. This architecture isn't known to kbit.models.stacks"
        )
    if not layers:
        raise ArchitectureError(
            f"{type(model).__name__} has nothing to quantize: every linear layer in {name} is tied to a weight outside"
        )
    return layers


def _matrices(module: nn.Module, path: str, where: str, *, among_experts: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own parameters of two or more dimensions that are no exceptions, by name."""
    if _is_linear(module):
        _weight(module, where)
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2:
            continue
        if why_kept(module, path, name, parameter, among_experts=among_experts) is None:
            yield name, parameter


def _layers(module: nn.Module, name: str, where: str, block: int) -> list[Layer]:
    """Return the layers that a parameter holds; none where it isn't known."""
    if _is_linear(module) and name == "weight":
        return [Layer(name=where, block=block, module=module)]
    stack = stacks_of(module).get(name)
    return [
        Layer(name=f"{where}.{name}.{number}", block=block, module=module, stack=stack, number=number)
        for number in range(0 if stack is None else stack.count)
    ]


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
