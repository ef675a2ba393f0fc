"""Place a model's modules on one device, or its blocks in order over several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from kbit.models.architectures import decoder_blocks, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place(model: PreTrainedModel, device: str, compute: torch.dtype, *, gpus: int = 1) -> None:
    """Move a model to its device, or spread it over the first ``gpus`` GPUs, and cast its parameters up.

    A spread model's modules carry hooks (accelerate's) that move what they are given to where they lie; it takes inputs
    and gives logits on the first GPU, and the hidden states of its base model where its last module lies.
    ``model.to(dtype=...)`` would cast buffers down too, and transformers keeps rotary frequencies in float32 whatever
    the weights are.
    """
    if gpus > 1:
        spread(model, device_map(model, gpus))
    else:
        model.to(device=device)  # type: ignore[call-arg]
    for parameter in model.parameters():  # tied ones are one object: they stay tied
        if parameter.is_floating_point() and parameter.dtype.itemsize < compute.itemsize:
            parameter.data = parameter.data.to(compute)


def spread(model: nn.Module, devices: Mapping[str, int]) -> None:
    """Put modules on their GPUs, with hooks that move what they are given there (``place``)."""
    from accelerate import dispatch_model

    # Caches have no device of their own: each layer's part stays where the layer is.
    apart = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=dict(devices), main_device=0, skip_keys=apart)


def device_map(
    model: nn.Module, gpus: int, *, nbytes: Callable[[nn.Parameter], int] = lambda parameter: parameter.nbytes
) -> dict[str, int]:
    """Return the GPU of each module: in the model's order, cut into runs of about equal bytes; blocks are never split.

    What shares a weight with a module before it goes where that one is.

    Args:
        model: the model.
        gpus: how many there are.
        nbytes: the bytes that a parameter will take there.

    Returns:
        GPU, from 0 to ``gpus`` - 1, by module name.

    Raises:
        ArchitectureError: no transformer blocks.
    """
    blocks, _ = decoder_blocks(model)
    total = sum({key_of(p): nbytes(p) for p in model.parameters()}.values())
    homes: dict[tuple[object, ...], int] = {}
    placed: dict[str, int] = {}
    before = 0
    for name, module in _pieces(model, "", blocks):
        keys = {key_of(p): nbytes(p) for p in module.parameters()}
        own = sum(size for key, size in keys.items() if key not in homes)
        gpu = next((homes[key] for key in keys if key in homes), int(gpus * (before + own / 2) / total))
        placed[name] = min(gpu, gpus - 1)
        homes.update(dict.fromkeys(keys, placed[name]))
        before += own
    return placed


def _pieces(module: nn.Module, prefix: str, blocks: str) -> Iterator[tuple[str, nn.Module]]:
    """Return the blocks and the modules around them: together the whole model, in its order."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path == blocks:
            yield from ((f"{path}.{number}", block) for number, block in child.named_children())
        elif blocks.startswith(f"{path}."):
            yield from _pieces(child, f"{path}.", blocks)
        else:
            yield path, child
