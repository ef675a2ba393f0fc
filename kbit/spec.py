"""The methods and their axes: what a study writes to a spec. Imports no torch: planning stays light.

A method's spec is a frozen dataclass in ``kbit.specs``, validated and canonical, whose fields are axes (``kbit.axes``),
each declared once. ``QuantSpec`` is that of the 16-bit baseline and of block-wise quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, Final

from kbit.axes import Axis, axes_of
from kbit.data_types import read_codebook_file
from kbit.doors import Door
from kbit.errors import SpecError
from kbit.specs.base import BASELINE_BITS, Spec
from kbit.specs.blockwise import QuantSpec

__all__ = ["METHODS", "QuantSpec", "Spec", "axes", "spec_from_canonical", "spec_of"]

METHODS: Final = Door[type[Spec]](
    "kbit_sweep.methods",
    "method",
    {
        "baseline": QuantSpec,
        "blockwise": QuantSpec,
        "awq": "kbit.specs.awq:AwqSpec",
        "block_float": "kbit.specs.block_float:BlockFloatSpec",
        "ggml": "kbit.specs.ggml:GgmlSpec",
        "checkpoint": "kbit.specs.checkpoint:CheckpointSpec",
        "hqq": "kbit.specs.hqq:HqqSpec",
        "gptq": "kbit.specs.gptq:GptqSpec",
        "llm_int8": "kbit.specs.llm_int8:LlmInt8Spec",
        "mixed": "kbit.specs.mixed:MixedSpec",
    },
)
"""The methods: name to spec. ``Spec.runs`` names what does it."""


@cache
def axes() -> Mapping[str, Axis]:
    """Return every axis of every method, by name.

    Raises:
        SpecError: two methods declare an axis of one name differently.
    """
    found: dict[str, Axis] = {}
    for name in METHODS:
        for declared in axes_of(METHODS[name]).values():
            known = found.setdefault(declared.name, declared)
            if known != declared:
                raise SpecError("method", name, f"its axis {declared.name!r} is declared otherwise than {known}")
    return found


def spec_of(values: Mapping[str, Any]) -> Spec:
    """Make the spec of a combination of axes, as a study writes it.

    Args:
        values: axis values. Without `method` it is 'blockwise' (16 bits are the baseline). `dtype` may be
            ``{"file": PATH}``.

    Raises:
        SpecError: a value that is not allowed, or an axis that the method does not have.
    """
    given = dict(values)
    named = given.pop("method", None)
    if named is not None and named not in METHODS:
        raise METHODS.unknown(named)
    if named == "baseline":
        given.setdefault("bits", BASELINE_BITS)
    cls = METHODS[named or "blockwise"]
    if "bits" not in given and _must_be_given(cls, "bits"):
        raise SpecError("bits", None, "must be given")
    if isinstance(given.get("dtype"), Mapping) and "codebook" in axes_of(cls):
        given |= _dtype_from_file(given["dtype"], given.get("bits"))
    foreign = sorted(given.keys() - axes_of(cls).keys())
    if foreign:
        has = ", ".join(cls.offered())
        raise SpecError(foreign[0], given[foreign[0]], f"method {named or 'blockwise'} has no such axis; it has {has}")
    missing = next((name for name in axes_of(cls) if name not in given and _must_be_given(cls, name)), None)
    if missing is not None:
        raise SpecError(missing, None, f"must be given with method={named or 'blockwise'}: {axes_of(cls)[missing].doc}")
    spec = cls(**given)
    if named is not None and spec.method != named:
        raise SpecError("method", named, f"bits={spec.bits} is method {spec.method}")
    return spec


def spec_from_canonical(canonical: Mapping[str, Any]) -> Spec:
    """Return the inverse of ``Spec.canonical``."""
    cls = METHODS[canonical["method"]]
    return cls.from_canonical({k: v for k, v in canonical.items() if k != "method"})


def _must_be_given(cls: type[Spec], name: str) -> bool:
    """Tell whether an axis of a method has no default."""
    declared = cls.__dataclass_fields__[name]
    return declared.default is MISSING and declared.default_factory is MISSING


def _dtype_from_file(value: Mapping[str, Any], bits: Any) -> dict[str, Any]:
    if set(value) != {"file"}:
        raise SpecError("dtype", dict(value), "the name of a data type, or {file: PATH.json}")
    if bits == BASELINE_BITS:
        return {"dtype": None}
    file = read_codebook_file(Path(str(value["file"])))
    if bits not in file.values:
        has = ", ".join(map(str, sorted(file.values)))
        raise SpecError("dtype", dict(value), f"with bits={bits} the file needs values for them; it has them for {has}")
    return {"dtype": file.name, "codebook": file.values[bits]}
