"""Recipes: which format each matrix of a model gets, as llama.cpp's quantizer chooses it. Imports no torch.

The rules are those of ``llama-quant.cpp`` at the commit that ``kbit.ggml.formats.COMMIT`` names, without an importance
matrix. Of a GPT-2, GPT-NeoX or BLOOM the fused QKV counts as attention V there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kbit.ggml.formats import FORMATS


class Kind(StrEnum):
    """What a matrix is to a recipe."""

    EMBEDDING = "embedding"
    HEAD = "head"
    """The output head, or an embedding that is tied to it."""
    VALUE = "attention V"
    """Also a fused QKV."""
    KEY = "attention K"
    ATTENTION_OUT = "attention output"
    FFN_DOWN = "FFN down"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe: the format of most matrices, and which of them get more bits.

    Attributes:
        name: as llama.cpp spells it.
        number: in GGUF files (general.file_type).
        base: the format of most matrices.
        by_layer: it depends on what a layer is, and on its block.
    """

    name: str
    number: int
    base: str
    by_layer: bool = False


_ALL: Final = (
    Recipe(name="Q4_0", number=2, base="q4_0"),
    Recipe(name="Q4_1", number=3, base="q4_1"),
    Recipe(name="Q5_0", number=8, base="q5_0"),
    Recipe(name="Q5_1", number=9, base="q5_1"),
    Recipe(name="Q8_0", number=7, base="q8_0"),
    Recipe(name="Q4_K_S", number=14, base="q4_K", by_layer=True),
    Recipe(name="Q4_K_M", number=15, base="q4_K", by_layer=True),
    Recipe(name="Q5_K_S", number=16, base="q5_K"),
    Recipe(name="Q5_K_M", number=17, base="q5_K", by_layer=True),
    Recipe(name="Q6_K", number=18, base="q6_K"),
)
RECIPES: Final[Mapping[str, Recipe]] = {r.name: r for r in _ALL}
"""All recipes, by name."""
FALLBACKS: Final = {"q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0"}
"""What rows get that are no multiple of 256; other rows that fit no block stay at 16 bits."""
EIGHT: Final = 8
"""Experts of the mixtures that recipes treat apart."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a recipe asks about a model.

    Attributes:
        blocks: how many it has.
        experts: of each mixture; 0 for a dense model.
        falcon: it is a Falcon.
        many_queries: it has the 80 blocks and grouped heads of the 70-billion Llama.
    """

    blocks: int
    experts: int = 0
    falcon: bool = False
    many_queries: bool = False


def format_for(recipe: Recipe, kind: Kind, block: int, columns: int, about: About) -> str:
    """Return the name of a matrix's format.

    Args:
        recipe: the recipe.
        kind: what the matrix is.
        block: the number of its block; any for those outside the blocks.
        columns: values of a row.
        about: the model.
    """
    return fitting(_wanted(recipe, kind, block, columns, about), columns)


def fitting(name: str, columns: int) -> str:
    """Return a format, or what takes its place for rows of this length: ``FALLBACKS``, else 16 bits."""
    if columns % FORMATS[name].block == 0:
        return name
    name = FALLBACKS.get(name, name)
    return name if columns % FORMATS[name].block == 0 else "f16"


def _wanted(recipe: Recipe, kind: Kind, block: int, columns: int, about: About) -> str:
    base = recipe.base
    if kind is Kind.HEAD:
        if base == "q8_0" or about.falcon or columns % FORMATS[base].block:
            return "q8_0"
        return "q6_K"
    if kind is Kind.VALUE:
        return "q8_0" if about.experts == EIGHT else _of_values(recipe, block, about)
    if kind is Kind.KEY and about.experts == EIGHT:
        return "q8_0"
    if kind is Kind.FFN_DOWN:
        return _of_ffn_down(recipe, block, about)
    if kind is Kind.ATTENTION_OUT and about.experts == EIGHT and base == "q4_K" and not about.falcon:
        return "q5_K"
    return base


def _of_values(recipe: Recipe, block: int, about: About) -> str:
    if recipe.name in ("Q4_K_M", "Q5_K_M") and _more_bits(block, about.blocks):
        return "q6_K"
    if recipe.name == "Q4_K_S" and block < 4:
        return "q5_K"
    return "q5_K" if about.many_queries and recipe.base == "q4_K" else recipe.base


def _of_ffn_down(recipe: Recipe, block: int, about: About) -> str:
    more = _more_bits(block, about.blocks)
    if recipe.name == "Q4_K_M" and about.falcon:
        return "q6_K" if block < about.blocks // 16 else "q5_K" if more else "q4_K"
    if recipe.name in ("Q4_K_M", "Q5_K_M") and more:
        return "q6_K"
    return "q5_K" if recipe.name == "Q4_K_S" and not about.falcon and block < about.blocks // 8 else recipe.base


def _more_bits(block: int, blocks: int) -> bool:
    """Tell whether a block is of the first or last eighth, or each third in between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
