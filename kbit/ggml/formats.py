"""The formats: what a block of each holds. Imports no torch, since plans count with them.

Layouts are those of ggml (``ggml-common.h``) and numbers those of the GGUF specification; llama.cpp at the commit that
``COMMIT`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kbit.errors import SpecError

COMMIT: Final = "007dbbf"
"""llama.cpp, whose search and recipes these are."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How values of a row are stored, block by block.

    Attributes:
        name: as llama.cpp spells it.
        number: in GGUF files.
        block: values of a block.
        nbytes: bytes of a block, with its scales.
        bits: of a code; 16 and 32 are no codes.
    """

    name: str
    number: int
    block: int
    nbytes: int
    bits: int

    @property
    def bits_per_value(self) -> float:
        """Bits that a value takes, with its share of the block's scales."""
        return 8 * self.nbytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row.

        Raises:
            SpecError: columns are no multiple of the block.
        """
        if columns <= 0 or columns % self.block:
            raise SpecError("columns", columns, f"{self.name} takes rows of a multiple of {self.block} values")
        return columns // self.block * self.nbytes


_ALL: Final = (
    Format(name="f32", number=0, block=1, nbytes=4, bits=32),
    Format(name="f16", number=1, block=1, nbytes=2, bits=16),
    Format(name="q4_0", number=2, block=32, nbytes=18, bits=4),
    Format(name="q4_1", number=3, block=32, nbytes=20, bits=4),
    Format(name="q5_0", number=6, block=32, nbytes=22, bits=5),
    Format(name="q5_1", number=7, block=32, nbytes=24, bits=5),
    Format(name="q8_0", number=8, block=32, nbytes=34, bits=8),
    Format(name="q4_K", number=12, block=256, nbytes=144, bits=4),
    Format(name="q5_K", number=13, block=256, nbytes=176, bits=5),
    Format(name="q6_K", number=14, block=256, nbytes=210, bits=6),
    Format(name="bf16", number=30, block=1, nbytes=2, bits=16),
)
FORMATS: Final[Mapping[str, Format]] = {f.name: f for f in _ALL}
"""All that is read and written, by name."""
QUANTIZED: Final = tuple(f.name for f in _ALL if f.bits <= 8)
"""Names of those that hold codes."""


def format_of(name: object) -> Format:
    """Return a format that holds codes.

    Raises:
        SpecError: there is none of that name.
    """
    if name not in QUANTIZED:
        raise SpecError("type", name, "one of " + ", ".join(QUANTIZED))
    return FORMATS[str(name)]
