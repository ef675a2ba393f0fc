"""LAYOUTS: how others store quantized weights in a Hugging Face directory, told from config.json and the headers.

Imports no torch: planning asks what a checkpoint is, and which weights its tensors stand for. Values are read by
``Layout.read``, for which torch is imported.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from kbit.doors import Door
from kbit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kbit.models.checkpoint import StoredTensor

KEY: Final = "quantization_config"
"""The key of config.json that says how a checkpoint is quantized."""
WEIGHT: Final = ".weight"
WORD: Final = 32
"""Bits of an integer in which codes are packed."""
_NUMBERS: Final = {"U8": "B", "I8": "b", "I32": "i", "I64": "q"}

PACKAGES: Final = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "eetq": "eetq",
    "fbgemm_fp8": "fbgemm-gpu",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant",
    "higgs": "flute-kernel",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "sinq": "sinq",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""The package that reads the layout of a quant_method which is not read here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight as quantized tensors of the files hold it.

    Attributes:
        name: what the 16-bit checkpoint calls it: 'model.layers.0.mlp.up_proj.weight'.
        shape: (out_features, in_features).
        parts: the tensors that hold it, by their roles in the layout.
        settings: what of config.json and small tensors its reader needs.
        layout: reads it.
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    layout: Layout

    @property
    def nbits(self) -> int:
        """Bits of all its tensors in the files."""
        return 8 * sum(part.stop - part.start for part in self.parts.values())

    def as_16_bit(self) -> StoredTensor:
        """Return the tensor that a 16-bit checkpoint has in their place; its bytes are one part's."""
        return replace(next(iter(self.parts.values())), name=self.name, dtype="F16", shape=self.shape)


class Layout(ABC):
    """How one tool stores quantized weights.

    Attributes:
        quant_method: config.json's word for it.
    """

    quant_method: ClassVar[str]

    @abstractmethod
    def bits(self, settings: Mapping[str, Any]) -> frozenset[int]:
        """Return the bits per code of its weights.

        Args:
            settings: quantization_config of config.json.

        Raises:
            CheckpointError: a variant that can't be read, by name, with what is read; or settings that are missing.
        """

    @abstractmethod
    def weights(self, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Iterator[QuantizedWeight]:
        """Yield the quantized weights among a checkpoint's tensors.

        Raises:
            CheckpointError: tensors that do not fit together.
        """

    @abstractmethod
    def read(self, weight: QuantizedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return a weight's values, [out_features, in_features], computed in float32 and rounded once to a dtype.

        Args:
            weight: what is known of it.
            parts: its tensors' values, by role.
            dtype: float16 or bfloat16.
        """


LAYOUTS: Final = Door[Layout](
    "kbit_sweep.layouts",
    "quant_method",
    {
        "gptq": "kbit.models.prequantized.gptq:LAYOUT",
        "awq": "kbit.models.prequantized.awq:LAYOUT",
        "bitsandbytes": "kbit.models.prequantized.bitsandbytes:LAYOUT",
        "hqq": "kbit.models.prequantized.hqq:LAYOUT",
        "compressed-tensors": "kbit.models.prequantized.compressed_tensors:LAYOUT",
    },
)
"""The layouts: config.json's quant_method to what reads it."""


def stored_as(config: Mapping[str, Any]) -> tuple[Layout, frozenset[int]] | None:
    """Return the layout of a checkpoint's quantized weights and the bits of its codes; None where it has none.

    Raises:
        CheckpointError: it is quantized in a way that is not read here; says which package reads it, or why not.
    """
    settings = config.get(KEY)
    if not settings:
        return None
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
    if not isinstance(method, str) or method not in LAYOUTS:
        package = PACKAGES.get(str(method))
        reads = f"; the package {package} reads it" if package else ""
        raise CheckpointError(f"quant_method={method!r} is not read here ({', '.join(LAYOUTS)} are){reads}")
    layout = LAYOUTS[method]
    return layout, layout.bits(settings)


def quantized_weights(config: Mapping[str, Any], tensors: Collection[StoredTensor]) -> dict[str, QuantizedWeight]:
    """Return a checkpoint's quantized weights by name; empty where none of it is quantized.

    Args:
        config: config.json.
        tensors: what its safetensors files hold.

    Raises:
        CheckpointError: as ``stored_as``; or the tensors are not those of the layout.
    """
    known = stored_as(config)
    if known is None:
        return {}
    layout, _ = known
    found = {w.name: w for w in layout.weights(config[KEY], {tensor.name: tensor for tensor in tensors})}
    if tensors and not found:
        raise CheckpointError(
            f"config.json has {KEY} (quant_method={layout.quant_method!r}), and no tensor of the files belongs to "
            "such weights"
        )
    return found


def as_16_bit(config: Mapping[str, Any] | None, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return a checkpoint's tensors as those of the 16-bit checkpoint that it stands for.

    Raises:
        CheckpointError: as ``quantized_weights``.
    """
    weights = quantized_weights(config or {}, tensors)
    parts = part_names(weights)
    return [t for t in tensors if t.name not in parts] + [w.as_16_bit() for w in weights.values()]


def part_names(weights: Mapping[str, QuantizedWeight]) -> set[str]:
    """Return the names of the tensors that hold quantized weights."""
    return {part.name for weight in weights.values() for part in weight.parts.values()}


def layers_with(
    role: str, tensors: Mapping[str, StoredTensor], roles: Collection[str]
) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Yield each layer that has a tensor of a role, 'LAYER.ROLE', with its tensors of all `roles`."""
    for name in tensors:
        layer, _, own = name.rpartition(".")
        if own == role:
            yield layer, {r: tensors[t] for r in roles if (t := f"{layer}.{r}") in tensors}


def numbers_in(tensor: StoredTensor) -> tuple[int, ...]:
    """Read a small tensor's whole numbers.

    Raises:
        CheckpointError: it has others.
    """
    letter = _NUMBERS.get(tensor.dtype)
    if letter is None:
        raise CheckpointError(f"{tensor.name} is {tensor.dtype}, and whole numbers are needed")
    return struct.unpack(f"<{prod(tensor.shape)}{letter}", raw_bytes(tensor))


def raw_bytes(tensor: StoredTensor) -> bytes:
    """Read a small tensor's bytes."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.stop - tensor.start)


def number(settings: Mapping[str, Any], name: str, allowed: Collection[int]) -> int:
    """Return a whole number of quantization_config.

    Raises:
        CheckpointError: it is missing or another one; names it and what is read.
    """
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise CheckpointError(f"{KEY}.{name}={value!r} is not read here: {', '.join(map(str, allowed))} are")
    return value


def size_of_groups(declared: object, inputs: int, groups: int) -> int | None:
    """Return how many columns share a scale; the last group may have fewer.

    Args:
        declared: group_size of quantization_config, -1 for the whole row; None where it has none, for equal groups.
        inputs: columns of the layer.
        groups: its scales per row.

    Returns:
        The columns of a group; None where the three do not fit together.
    """
    if declared is None:
        return inputs // groups if groups and not inputs % groups else None
    size = inputs if declared == -1 else declared
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return None
    return size if -(-inputs // size) == groups else None


def unfitting(weight: str, tensors: Mapping[str, StoredTensor]) -> CheckpointError:
    """Return the error for tensors that do not fit together."""
    shapes = ", ".join(f"{role} {t.dtype} {list(t.shape)}" for role, t in tensors.items())
    return CheckpointError(f"the tensors of {weight} do not fit together: {shapes}")
