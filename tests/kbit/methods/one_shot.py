"""A small method that calibrates, as another package would bring it: weights scaled by their inputs before rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kbit.axes import axis
from kbit.spec import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kbit.methods.protocol import ModelPass, Undo
    from kbit.models.architectures import Layer


@dataclass(frozen=True, kw_only=True)
class ScaledSpec(QuantSpec):
    """Block-wise, of W diag(mean |x|^strength)."""

    method_name: ClassVar[str] = "scaled"
    runs: ClassVar[str] = f"{__name__}:quantize_layers"
    calibrates: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    strength: float = axis(0.5, type="float64", doc="exponent of the inputs' mean magnitude", neutral=0.5, since=2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled:
    """A layer's weight, and what was stored of it."""

    weight: Tensor
    nbits: int
    codebook: Tensor
    shares_codebook: bool = True

    def put(self, layer: Layer) -> Undo:
        from kbit.models.overwriting import overwrite

        return overwrite(layer, self.weight)

    def pack(self, model: nn.Module, layer: Layer) -> Undo:
        raise NotImplementedError


def quantize_layers(model: ModelPass, spec: ScaledSpec, calibration: Tensor) -> Iterator[tuple[Layer, Scaled]]:
    """Quantize block by block; each block's inputs come from the quantized blocks before it."""
    from kbit.quantizer.blockwise import dequantize, quantize

    kept = model.start(calibration)
    for block in model.blocks():
        inputs: dict[str, list[Tensor]] = {}
        block.run(kept, watch=lambda layer, x: inputs.setdefault(layer.name, []).append(x))  # noqa: B023
        for layer in block.layers:
            tokens = sum(len(x) for x in inputs[layer.name])
            total: Any = sum(x.float().abs().sum(0) for x in inputs[layer.name])
            scale = (total / tokens).clamp_min(1e-4) ** spec.strength
            q = quantize(layer.weight.float() * scale, spec, storage_dtype=model.storage_dtype)
            weight = (dequantize(q) / scale).to(layer.weight.dtype)
            yield layer, Scaled(weight=weight, nbits=q.nbits + 16 * scale.numel(), codebook=q.codebook)
        kept = block.run(kept)
