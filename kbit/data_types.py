"""The data types of codes: a mapping from name to the function that gives their values. Imports no torch.

A data type is its codebook (``kbit.quantizer.codebooks``) and what planning needs to know of it. To add one, write its
function and enter it here, or in another package under the entry point group ``kbit_sweep.dtypes``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from kbit.doors import Door
from kbit.errors import SpecError

MIN_BITS: Final = 2
MAX_BITS: Final = 8

PAPER_EXPONENT_BITS: Final = {2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}
"""Appendix A: 2 exponent bits at 3 bits, 3 at 4 to 8 (2 bits leave room for one only)."""
HEURISTIC_EXPONENT_BITS: Final = {2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
"""Appendix C.4: at least half of the bits, rounded up."""
EXPONENT_RULES: Final = {"paper": PAPER_EXPONENT_BITS, "heuristic": HEURISTIC_EXPONENT_BITS}


def _no_axes(_bits: int, _given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class DataType:
    """A data type of codes.

    Attributes:
        values: "module:function" or the function itself. A fixed type's takes the spec and returns its codebook on the
            CPU; a data-dependent one's takes a ``kbit.quantizer.source.Source`` and the spec, and returns the codebook
            of that tensor on the tensor's device. Either is float32 [2 to 2^bits], sorted, distinct, within [-1, 1].
        data_dependent: each tensor has a codebook of its own, whose bits count.
        of_blocks: a data-dependent codebook depends on how the tensor is cut into blocks, and on how their absmax are
            stored. Without it, one fitted to a tensor serves every block size.
        has_zero: every codebook of the type has an exact 0.
        axes: from the number of bits and the optional axes as they were given, the ones that apply to this type, with
            their resolved values.
    """

    values: str | Callable[..., Any]
    data_dependent: bool = False
    of_blocks: bool = True
    has_zero: bool = True
    axes: Callable[[int, Mapping[str, Any]], dict[str, Any]] = _no_axes


def _float_axes(bits: int, given: Mapping[str, Any]) -> dict[str, Any]:
    named = given["exponent_bits"] or "paper"
    exponent_bits = EXPONENT_RULES[named][bits] if isinstance(named, str) else named
    # Without fraction bits there is no subnormal number, so both rules give the same values.
    subnormals = (given["subnormals"] or "ieee") if bits - 1 - exponent_bits > 0 else "ieee"
    return {"exponent_bits": exponent_bits, "subnormals": subnormals}


def _dynamic_axes(_bits: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"dynamic_interval": given["dynamic_interval"] or "bnb"}


def _lloyd_axes(_bits: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"weighting": given.get("weighting")}


def _file_axes(_bits: int, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"codebook": given["codebook"]}


DTYPES: Final = Door[DataType](
    "kbit_sweep.dtypes",
    "dtype",
    {
        "int": DataType(values="kbit.quantizer.codebooks:int_values"),
        "float": DataType(values="kbit.quantizer.codebooks:float_values", axes=_float_axes),
        "dynamic": DataType(values="kbit.quantizer.codebooks:dynamic_values", axes=_dynamic_axes),
        "quantile": DataType(values="kbit.quantizer.codebooks:quantile_values", data_dependent=True, of_blocks=False),
        "normal": DataType(values="kbit.quantizer.codebooks:normal_values"),
        "lloyd": DataType(
            values="kbit.quantizer.lloyd:lloyd_values", data_dependent=True, has_zero=False, axes=_lloyd_axes
        ),
        "file": DataType(values="kbit.quantizer.codebooks:file_values", axes=_file_axes, has_zero=False),
    },
)


def named_dtypes() -> tuple[str, ...]:
    """Return the data types that a name alone identifies: all except those from files."""
    return tuple(name for name in DTYPES if name != "file")


def data_type(dtype: str, codebook: object) -> DataType:
    """Return the data type of a spec: one from a file goes by the name that its file gives.

    Raises:
        SpecError: there is none of that name.
    """
    return DTYPES["file" if codebook is not None else dtype]


@dataclass(frozen=True, kw_only=True)
class CodebookFile:
    """A data type from a file.

    Attributes:
        name: what the type is called in results.
        values: by number of bits, sorted, distinct, within [-1, 1].
    """

    name: str
    values: Mapping[int, tuple[float, ...]]


def read_codebook_file(path: Path) -> CodebookFile:
    """Read a data type from JSON: ``{"name": "mine", "codebooks": {"3": [-1, ...], "4": [...]}}``.

    The name is the file's own where it gives none. A list alone is the codebook of the fewest bits that hold it.

    Raises:
        SpecError: the file is missing or malformed; says what is wrong with it.
    """
    try:
        data = json.loads(path.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise SpecError("dtype.file", str(path), f"a JSON file that can be read ({error})") from error
    if isinstance(data, list):
        data = {"codebooks": {str(max(MIN_BITS, math.ceil(math.log2(max(2, len(data)))))): data}}
    books = data.get("codebooks") if isinstance(data, dict) else None
    if not isinstance(books, dict) or not books:
        form = '{"name": "mine", "codebooks": {"4": [-1.0, ..., 1.0]}}, or a list of values'
        raise SpecError("dtype.file", str(path), form)
    name = str(data.get("name", path.stem))
    check_name(name, f"{path}: name")
    values = {}
    for bits, listed in books.items():
        if str(bits) not in map(str, range(MIN_BITS, MAX_BITS + 1)):
            raise SpecError(f"{path}: codebooks", bits, f"bits from {MIN_BITS} to {MAX_BITS}")
        values[int(bits)] = check_codebook(listed, int(bits), f"{path}: codebooks.{bits}")
    return CodebookFile(name=name, values=values)


def check_name(name: str, key: str) -> None:
    """Refuse a name that a data type from a file can't have.

    Raises:
        SpecError: it is no name, or another data type's.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise SpecError(key, name, "a letter, then letters, digits, '_' and '-'")
    if name in DTYPES:
        raise SpecError(key, name, f"another name than the data types {', '.join(DTYPES)}")


def check_codebook(values: object, bits: int, key: str) -> tuple[float, ...]:
    """Return the values of a codebook, rounded to float32.

    Raises:
        SpecError: they are not 2 to 2^bits distinct finite numbers in ascending order within [-1, 1].
    """
    allowed = f"2 to {2**bits} distinct numbers from -1 to 1 in ascending order"
    if not isinstance(values, list | tuple) or not 2 <= len(values) <= 2**bits:
        raise SpecError(key, values, allowed)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and -1 <= v <= 1 for v in values):
        raise SpecError(key, values, allowed)
    import numpy as np

    rounded = tuple(float(v) + 0.0 for v in np.asarray(values, dtype=np.float32))
    if any(a >= b for a, b in pairwise(rounded)):
        raise SpecError(key, values, allowed + " (float32)")
    return rounded
