"""Spec of llama.cpp's formats and recipes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kbit.axes import axis
from kbit.errors import SpecError
from kbit.ggml.formats import FORMATS, QUANTIZED, Format
from kbit.ggml.recipes import RECIPES
from kbit.specs.base import Spec


@dataclass(frozen=True, kw_only=True)
class GgmlSpec(Spec):
    """llama.cpp's quantization: one format for the layers of the blocks, or one of its recipes for the whole model.

    Attributes:
        bits: of a code of the format, or of the recipe's most frequent one, which these decide; another number is
            refused.
        ggml_type: a name in ``kbit.ggml.formats.QUANTIZED``: the format of each layer in the blocks. Embedding and head
            stay at 16 bits, as for other methods.
        recipe: a name in ``kbit.ggml.recipes.RECIPES``: the formats of all layers, of the embedding and of the head.

    Raises:
        SpecError: both or none of `ggml_type` and `recipe`, or a value that is not allowed.
    """

    method_name: ClassVar[str] = "ggml"
    runs: ClassVar[str] = "kbit.methods.ggml:quantize_layers"
    effort: ClassVar[float] = 4.0

    bits: int = axis(0, type="int64", doc="bits per code", unit="bit")
    ggml_type: str | None = axis(
        None,
        type="string",
        doc="llama.cpp's format of the layers in the blocks: " + ", ".join(QUANTIZED),
        since=3,
        optional=True,
    )
    recipe: str | None = axis(
        None,
        type="string",
        doc="llama.cpp's recipe for the whole model: " + ", ".join(RECIPES),
        since=3,
        optional=True,
    )

    def __post_init__(self) -> None:
        if self.ggml_type is not None and self.ggml_type not in QUANTIZED:
            raise SpecError("ggml_type", self.ggml_type, "one of " + ", ".join(QUANTIZED))
        if self.recipe is not None and self.recipe not in RECIPES:
            raise SpecError("recipe", self.recipe, "one of " + ", ".join(RECIPES))
        if self.recipe is None and self.ggml_type is None:
            allowed = f"a recipe for the whole model ({', '.join(RECIPES)}), or ggml_type for the blocks alone"
            raise SpecError("recipe", None, allowed)
        if self.recipe is not None and self.ggml_type is not None:
            allowed = f"none beside recipe={self.recipe}, which decides every format: two blocks of the study have both"
            raise SpecError("ggml_type", self.ggml_type, allowed)
        if isinstance(self.bits, bool) or self.bits not in (0, self.base.bits):
            name = f"recipe={self.recipe}" if self.recipe else f"ggml_type={self.ggml_type}"
            raise SpecError("bits", self.bits, f"{self.base.bits}, the bits of {name}: leave it out, or choose another")
        object.__setattr__(self, "bits", self.base.bits)

    @property
    def base(self) -> Format:
        """The format of all layers, or of most."""
        return FORMATS[RECIPES[self.recipe].base if self.recipe else str(self.ggml_type)]

    @property
    def bits_per_param_nominal(self) -> float:
        """Bits of a weight in the format of all layers, or of most: 4.5 (q4_0, q4_K), 5, 5.5, 6, 6.5625, 8.5."""
        return self.base.bits_per_value

    @property
    def why_not_packed(self) -> str:
        return (
            "llama.cpp's formats run dense: the k-bit layer takes none of them (most have scales of scales, or minima)"
        )

    @property
    def why_not_layered(self) -> str | None:
        if self.recipe is None:
            return None
        return f"recipe={self.recipe} quantizes embedding and head, which all cells share in such a pass"

    @property
    def label(self) -> str:
        """A short name for people: 'ggml q4_K', 'ggml Q4_K_M'."""
        return f"ggml {self.recipe or self.ggml_type}"
