"""Models that others quantized: their layers stay as they were loaded, and their bits are counted from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kbit.errors import SpecError
from kbit.methods.protocol import ModelPass, Undo
from kbit.models.architectures import Layer, text_config
from kbit.models.overwriting import overwrite
from kbit.specs.checkpoint import STORED_BITS, CheckpointSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredElsewhere:
    """What files store of one layer: its bits."""

    nbits: int
    codebook: None = None
    shares_codebook: bool = True

    def put(self, layer: Layer) -> Undo:
        """Give the layer its own weight, which an earlier cell may have overwritten."""
        return overwrite(layer, layer.weight)


def count_layers(
    model: ModelPass, spec: CheckpointSpec, calibration: Tensor | None = None
) -> Iterator[tuple[Layer, StoredElsewhere]]:
    """Yield each layer that the files quantize, with its bits.

    Raises:
        SpecError: the model's configuration doesn't say what was stored of it.
    """
    config: Any = text_config(model.module)
    bits: Mapping[str, int] = getattr(config, STORED_BITS, {})
    if not bits:
        allowed = (
            "one for a checkpoint that others quantized, or for a directory that python -m kbit.gguf made: this "
            f"config.json has no {STORED_BITS}"
        )
        raise SpecError("method", spec.method, allowed)
    left = dict(bits)
    for block in model.blocks():
        for layer in block.layers:
            yield layer, StoredElsewhere(nbits=left.pop(layer.name))
    for name, stored in left.items():  # embedding, head, and whatever else the file quantizes
        yield model.outside(name), StoredElsewhere(nbits=stored)
