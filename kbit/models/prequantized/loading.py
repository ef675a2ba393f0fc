"""Load a checkpoint that others quantized as the 16-bit model that it stands for, tensor by tensor.

transformers makes the model by its own rules on names and tied weights, from tensors of which each is read, and
dequantized, when it is asked for: no file is in memory whole, and no quantizer's package is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kbit.errors import SpecError
from kbit.models.architectures import block_layers, text_config
from kbit.models.checkpoint import StoredTensor, tensors_in
from kbit.models.prequantized.layouts import KEY, WEIGHT, QuantizedWeight, part_names
from kbit.models.stored import SAFETENSORS_DTYPES
from kbit.models.streaming.skeleton import parts_of, read_generation_config
from kbit.specs.checkpoint import STORED_BITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kbit.models.loadable import Checkpoint

_STORED: Final = 16
"""Bits of a weight that the files do not quantize, as all is counted."""


class _Later:
    """Stands for a tensor where transformers loads a model: it is read when its values are asked for."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor], nbits: int | None = None
    ) -> None:
        self.shape, self.dtype, self._read, self._nbits = shape, dtype, read, nbits

    @property
    def is_quantized(self) -> bool:
        return self._nbits is not None

    @property
    def nbits(self) -> int:
        """Bits that the files store of it, as they are counted: 16 a value where it is not quantized."""
        return _STORED * prod(self.shape) if self._nbits is None else self._nbits

    def __getitem__(self, _: object) -> _Later:
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return self._read().to(device=device, dtype=dtype or self.dtype)


def from_quantized(auto_class: Any, directory: Path, found: Checkpoint) -> tuple[PreTrainedModel, Any]:
    """Load a model, its quantized weights dequantized, with the bits of each under ``STORED_BITS`` of its config.

    Args:
        auto_class: of transformers, whose ``from_pretrained`` would load it.
        directory: holds its configuration, and its own code.
        found: the checkpoint.

    Returns:
        The model, and transformers' report of what is missing, or of no use.

    Raises:
        SpecError: a dequantized value is not finite.
        OSError, ValueError, KeyError, RuntimeError: as from_pretrained's.
    """
    from transformers import AutoConfig

    weights, storage = found.quantized, found.storage_dtype
    config = AutoConfig.from_pretrained(directory, trust_remote_code=found.remote_code)
    delattr(config, KEY)
    with torch.device("meta"):
        like = auto_class.from_config(config, trust_remote_code=found.remote_code)
    parts = part_names(weights)
    state = {
        t.name: _Later(t.shape, SAFETENSORS_DTYPES[t.dtype], partial(_read, t))
        for t in tensors_in(found.headers)
        if t.name not in parts
    }
    turned = _turned(like)
    for weight in weights.values():
        turn = _ends_like(weight.name, turned)
        shape = weight.shape[::-1] if turn else weight.shape
        read = partial(_dequantized, weight, storage, turn=turn, name=found.name)
        state[weight.name] = _Later(shape, storage, read, weight.nbits)
    loaded: Any = type(like).from_pretrained(
        None, config=like.config, state_dict=dict(state), dtype=storage, output_loading_info=True
    )
    model, info = loaded
    read_generation_config(model, directory, remote_code=found.remote_code)
    setattr(text_config(model), STORED_BITS, _stored_bits(model, state))
    return model, info


def _read(tensor: StoredTensor) -> Tensor:
    """Read a tensor from its file."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(tensor.name)  # type: ignore[no-any-return]


def _dequantized(weight: QuantizedWeight, storage: torch.dtype, *, turn: bool, name: str) -> Tensor:
    """Read a quantized weight; transposed where the module's weight is [in, out].

    Raises:
        SpecError: a value is not finite.
    """
    values = weight.layout.read(weight, {role: _read(part) for role, part in weight.parts.items()}, storage)
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
        allowed = f"a checkpoint of finite weights; values of {weight.name} are not, or lie beyond the 16-bit dtype"
        raise SpecError("path", name, allowed)
    return values.t().contiguous() if turn else values


def _turned(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the weights that are stored [in, out]: GPT-2's."""
    return frozenset(f"{name}{WEIGHT}" for name, module in model.named_modules() if isinstance(module, Conv1D))


def _ends_like(name: str, names: Collection[str]) -> bool:
    """Tell whether a tensor's name is one of these, with the base model's prefix or without."""
    return name in names or any(own.endswith(f".{name}") or name.endswith(f".{own}") for own in names)


def _stored_bits(model: PreTrainedModel, state: Mapping[str, _Later]) -> dict[str, int]:
    """Return the bits that the files store of each layer in the blocks, and of others that they quantize, by name."""
    of_parameter: dict[str, int] = {}
    quantized: set[str] = set()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for part in parts_of(model, state):
        made = [name for name in part.targets if name in shapes]
        total = sum(prod(shapes[name]) for name in made)
        stored = sum(tensor.nbits for _, tensor in part.sources)
        of_parameter |= {name: stored * prod(shapes[name]) // total for name in made}
        quantized.update(made if any(tensor.is_quantized for _, tensor in part.sources) else ())
    found: dict[str, int] = {}
    for layer in block_layers(model):
        parameter = f"{layer.name}{WEIGHT}" if layer.stack is None else layer.name.rpartition(".")[0]
        found[layer.name] = of_parameter[parameter] // (1 if layer.stack is None else layer.stack.count)
        quantized.discard(parameter)
    return found | {name.removesuffix(WEIGHT): of_parameter[name] for name in sorted(quantized)}
