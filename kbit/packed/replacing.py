"""Layers of a model replaced by their k-bit form, with the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kbit.errors import ArchitectureError
from kbit.models.architectures import Layer, key_of
from kbit.packed.base import LAYER_DTYPES
from kbit.packed.linear import KBitLinear
from kbit.quantizer.blockwise import QuantizedTensor

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_replaceable(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse layers that one in k bits could not stand for.

    Accelerate's hooks that move inputs to the layer's GPU are fine: they are passed on. So is one module that a model
    has in several places.

    Raises:
        ArchitectureError: a matrix of a stack; or a layer with other hooks or a forward of its own, whose weight
            another module has too, or whose weight is no float16, bfloat16 or float32.
    """
    modules = {id(module): module for module in model.modules()}.values()
    owners = Counter(key_of(p) for module in modules for p in module.parameters(recurse=False))
    for layer in layers:
        module = layer.module
        if layer.stack is not None:
            why = "is one of the matrices of a stack (experts), which its module multiplies itself"
        elif owners[key_of(layer.parameter)] > 1:
            why = "shares its weight with another module"
        elif layer.parameter.dtype not in LAYER_DTYPES:
            why = f"has weights of {layer.parameter.dtype}, not float16, bfloat16 or float32: cast the model"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            why = "has forward or backward hooks: register them on the packed model"
        elif type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            why = f"is a {type(module).__name__} with a forward of its own"
        elif "forward" in vars(module) and not _only_moves(module):
            why = "has a changed forward (an offloading hook of accelerate?)"
        else:
            continue
        raise ArchitectureError(f"packed=True can't replace {layer.name}: it {why}. Use packed=False with this model")


def pack_layer(model: nn.Module, layer: Layer, q: QuantizedTensor, order: Tensor | None = None) -> Callable[[], None]:
    """Put a KBitLinear, of a weight whose columns have this order, in the layer's place. Returns the way back.

    The layer's weight goes to the host; or its parameter holds the original where that is kept (``Layer.original``),
    and who keeps it moves it back; or who read it drops it (``Layer.fetch``).
    """
    return put_in_place(
        model, layer, lambda bias: KBitLinear.from_quantized(q, bias=bias, dtype=layer.parameter.dtype, order=order)
    )


class Replacement(Protocol):
    """A layer's module in another form: its codes are on its device, and it takes x of its dtype."""

    codes: Tensor
    dtype: torch.dtype


def put_in_place(model: nn.Module, layer: Layer, make: Callable[[Tensor | None], nn.Module]) -> Callable[[], None]:
    """Put a module in a layer's place, as ``pack_layer`` says. Returns the way back.

    Args:
        model: the model.
        layer: one of its layers.
        make: from the layer's bias, or None, the module: a ``Replacement``.
    """
    module, parameter = layer.module, layer.parameter
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    before = parameter.dtype
    made = make(bias)
    packed = cast(Replacement, made)
    made.train(module.training)
    _pass_on_hook(module, made)
    is_sent_away = layer.original is None and layer.fetch is None
    if is_sent_away:
        parameter.data = parameter.data.to("cpu")
    elif layer.original is not None:
        parameter.data = layer.original
    replace(model, module, made)

    def undo() -> None:
        if packed.codes.is_meta:
            raise ValueError(f"{layer.name} is on the meta device: move the model to a real one before restoring it")
        if is_sent_away:
            # A layer that was not cast keeps a bias of another dtype than its weight's.
            module.to(packed.codes.device, None if packed.dtype == before else packed.dtype)
        module.train(made.training)
        replace(model, made, module)

    return undo


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has that."""
    # Once per layer, and a large part of a load's time: nn.Module.modules() makes every module's name, and most modules
    # have no others in them.
    seen, waiting = {id(model)}, [model]
    while waiting:
        parent = waiting.pop()
        for name, child in tuple(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
            elif child is not None and child._modules and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _only_moves(module: nn.Module) -> bool:
    """Tell whether accelerate wraps the module, and only to move what it is given to where it lies."""
    hook = getattr(module, "_hf_hook", None)
    return type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", True)


def _pass_on_hook(module: nn.Module, packed: nn.Module) -> None:
    if not _only_moves(module):
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook: Any = module._hf_hook
    # Its map of tied weights is by address, and the packed layer may lie where a weight lay.
    fresh = AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
    add_hook_to_module(packed, fresh)
