"""Spec of mixed bits: each layer its own bits, under a budget of average bits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, Self

from kbit.axes import axes_of, axis, like
from kbit.data_types import MAX_BITS, MIN_BITS, data_type
from kbit.errors import SpecError
from kbit.specs.base import ROW, Spec
from kbit.specs.blockwise import QuantSpec

RECIPE: Final = "1"
"""Version of how a layer's part in the loss is measured and bits are chosen: noise levels, seeds, regression, rounding.
It belongs to the identity, and is raised when a choice would change."""
ALL: Final = f"{MIN_BITS}-{MAX_BITS}"
_ABSMAX_BITS: Final = {"float16": 16, "float32": 32, "nested": 8}
_ALLOWED: Final = f"bits from {MIN_BITS} to {MAX_BITS}: a range (2-8), or some of them joined by + (2+3+4+8)"


@dataclass(frozen=True, kw_only=True)
class MixedSpec(Spec):
    """Bits per layer under a budget of average bits, with any data type of block-wise quantization.

    Attributes:
        bits: whole bits of the budget, which decides them; another number is refused.
        budget: stored bits of a quantized weight, overhead counted, that the layers' mean may reach; fractions too.
        candidates: bits that a layer may have: 'LEAST-MOST', or some joined by '+'.
        dtype, blocksize, scheme, subnormals, dynamic_interval, absmax_dtype, center, zero_point, clip, rotation: as for
            ``QuantSpec``, the same for all layers. Floats have the paper's exponent bits.

    Raises:
        SpecError: an axis has a value that is not allowed, or no candidates reach the budget.
    """

    method_name: ClassVar[str] = "mixed"
    runs: ClassVar[str] = "kbit.methods.mixed:quantize_layers"
    calibrates: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    effort: ClassVar[float] = 8.0
    passes: ClassVar[float] = 0.0
    measures: ClassVar[str | None] = "sensitivity"

    bits: int = axis(0, type="int64", doc="bits per code", unit="bit")
    budget: float = axis(
        type="float64", unit="bit/weight", doc="mean of stored bits that mixed may use", since=3, optional=True
    )
    candidates: str = axis(
        ALL, type="string", doc="bits that mixed may give a layer: 2-8, or some of them as 2+3+4", neutral=ALL, since=3
    )
    dtype: str = like(QuantSpec, "dtype")
    blocksize: int | None = like(QuantSpec, "blocksize", 64)
    scheme: str = like(QuantSpec, "scheme", "block")
    subnormals: str | None = like(QuantSpec, "subnormals", None)
    dynamic_interval: str | None = like(QuantSpec, "dynamic_interval", None)
    absmax_dtype: str = like(QuantSpec, "absmax_dtype", "float16")
    center: bool = like(QuantSpec, "center", False)
    zero_point: bool = like(QuantSpec, "zero_point", False)
    clip: bool = like(QuantSpec, "clip", False)
    rotation: int | None = like(QuantSpec, "rotation", None)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        chosen = _bits_of(self.candidates)
        set_(self, "candidates", _text_of(chosen))
        if not isinstance(self.dtype, str):
            raise SpecError("dtype", self.dtype, "the name of a data type: each of the candidates has its own codebook")
        for name in axes_of(MixedSpec).keys() & axes_of(QuantSpec).keys() - {"bits"}:
            set_(self, name, getattr(self.choices[-1], name))
        budget = self.budget
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
            raise SpecError("budget", budget, "a number of bits per weight")
        set_(self, "budget", float(budget))
        least, most = (_stored(self.choices[number]) for number in (0, -1))
        if budget < least:
            allowed = f"at least {least:g}: that many bits with their overhead has the least of candidates="
            raise SpecError("budget", budget, f"{allowed}{self.candidates}")
        if budget > most + (0 if self._is_counted else 1):
            allowed = f"at most {most:g}: no more bits with their overhead has the most of candidates="
            raise SpecError("budget", budget, f"{allowed}{self.candidates}")
        whole = max(chosen[0], min(int(budget), chosen[-1]))
        if isinstance(self.bits, bool) or self.bits not in (0, whole):
            raise SpecError("bits", self.bits, f"{whole}, the whole bits of budget={budget:g}: leave it out")
        set_(self, "bits", whole)

    @cached_property
    def choices(self) -> tuple[QuantSpec, ...]:
        """What a layer may be quantized by, from the fewest bits to the most."""
        shared = axes_of(MixedSpec).keys() & axes_of(QuantSpec).keys() - {"bits"}
        values: dict[str, Any] = {name: getattr(self, name) for name in shared}
        return tuple(QuantSpec(bits=bits, **values) for bits in _bits_of(self.candidates))

    @property
    def _is_counted(self) -> bool:
        """Whether overhead is known without the layers' shapes and values."""
        depends = self.blocksize in (None, ROW) or self.absmax_dtype == "nested" or self.center
        return not depends and not data_type(self.dtype, None).data_dependent

    @property
    def bits_per_param_nominal(self) -> float:
        """The budget."""
        return self.budget

    @property
    def why_not_packed(self) -> str | None:
        return self.choices[0].why_not_packed

    @property
    def why_not_layered(self) -> str:
        return "its noise is measured by the loss of the whole model"

    def canonical(self) -> dict[str, Any]:
        return {**super().canonical(), "recipe_version": RECIPE}

    @classmethod
    def from_canonical(cls, values: Mapping[str, Any]) -> Self:
        own = dict(values)
        version = own.pop("recipe_version", None)
        if version != RECIPE:
            raise SpecError("recipe_version", version, f"{RECIPE} here: plan the study again with this version")
        return super().from_canonical(own)

    @property
    def label(self) -> str:
        """A short name for people: 'mixed int 4.25 b64'."""
        block = f"{'g' if self.scheme == 'group' else 'b'}{self.blocksize}"
        parts = ["mixed", self.dtype, f"{self.budget:.6g}", {None: "tensor", ROW: "row"}.get(self.blocksize, block)]
        return " ".join([*parts, *self._words("bits", "budget", "dtype", "blocksize")])


def _bits_of(candidates: object) -> tuple[int, ...]:
    """Return the bits that candidates name, ascending.

    Raises:
        SpecError: they name none, or others than 2 to 8.
    """
    text = str(candidates).replace(" ", "")
    try:
        if isinstance(candidates, bool) or not isinstance(candidates, int | str):
            raise ValueError
        if "-" in text:
            least, most = map(int, text.split("-"))
            found = set(range(least, most + 1))
        else:
            found = set(map(int, text.split("+")))
    except ValueError:
        raise SpecError("candidates", candidates, _ALLOWED) from None
    if not found or not min(found) >= MIN_BITS or not max(found) <= MAX_BITS:
        raise SpecError("candidates", candidates, _ALLOWED)
    return tuple(sorted(found))


def _text_of(bits: tuple[int, ...]) -> str:
    """Return candidates as keys have them, one way for each set."""
    if len(bits) > 1 and bits[-1] - bits[0] == len(bits) - 1:
        return f"{bits[0]}-{bits[-1]}"
    return "+".join(map(str, bits))


def _stored(spec: QuantSpec) -> float:
    """Return the bits that a weight takes at least, as stored: codes, and what is known of their overhead."""
    if spec.blocksize in (None, ROW):
        return float(spec.bits)
    of_block = _ABSMAX_BITS[spec.absmax_dtype] + (spec.bits if spec.zero_point else 0)
    return spec.bits + of_block / (spec.blocksize or 1)
