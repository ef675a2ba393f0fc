"""What a quantization is: ``QuantSpec``, frozen, validated and canonical. Imports no torch: planning stays light.

The axes are the paper's (Dettmers & Zettlemoyer 2023, sections 2-5, Appendices A-C); what each one means to the last
bit is in ``kbit.quantizer.blockwise`` and ``kbit.quantizer.codebooks``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from kbit.errors import SpecError

DType = Literal["int", "float", "dynamic", "quantile", "normal"]
Scheme = Literal["block", "group"]
AbsmaxDType = Literal["float16", "float32", "nested"]
Subnormals = Literal["ieee", "bnb"]
DynamicInterval = Literal["bnb", "paper"]

DTYPES: Final[tuple[str, ...]] = get_args(DType)
MIN_BITS: Final = 2
MAX_BITS: Final = 8
BASELINE_BITS: Final = 16
ALLOWED_BITS: Final = f"a whole number from {MIN_BITS} to {MAX_BITS}, or {BASELINE_BITS} for the baseline"
LARGEST_NUMBER: Final = 2**40
"""No block or text has as many values, and twice of it still is a 64-bit number."""
ALLOWED_BLOCKSIZE: Final = "a whole number of at least 1 (and at most 2^40), or null for the whole tensor"
NESTED_BLOCKSIZE: Final = 256
"""Absmax values that share one float32 scale when absmax_dtype is 'nested'."""

PAPER_EXPONENT_BITS: Final = {2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 3}
"""Appendix A: 2 exponent bits at 3 bits, 3 at 4 to 8 (2 bits leave room for one only)."""
HEURISTIC_EXPONENT_BITS: Final = {2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
"""Appendix C.4: at least half of the bits, rounded up."""
EXPONENT_RULES: Final = {"paper": PAPER_EXPONENT_BITS, "heuristic": HEURISTIC_EXPONENT_BITS}


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """One way to quantize a weight matrix; ``QuantSpec(bits=16)`` is the 16-bit baseline.

    Axes that can't matter are normalised away on construction (a 16-bit baseline has no data type; only floats have
    exponent bits), so two specs that quantize alike are equal and hash alike. Their values must be possible ones all
    the same.

    Attributes:
        bits: bits a code, 2 to 8; or 16, the baseline, with every other axis unset.
        dtype: data type of the codes (Appendix A), or 'normal' (NF-k, QLoRA). None for the baseline only.
        blocksize: values that share one absmax; None is one block, the whole tensor.
        scheme: 'block' cuts the flattened tensor (the paper); 'group' cuts each row.
        exponent_bits: floats only. A number, or 'paper' (Appendix A) or 'heuristic' (Appendix C.4), which are resolved
            here to their number.
        subnormals: floats only. 'ieee' gradual underflow, or 'bnb', bitsandbytes' create_fp8_map.
        dynamic_interval: dynamic only. 'bnb' cuts [0.1, 1]; 'paper' [0.1, 0.9] (Appendix A's text).
        absmax_dtype: how absmax is stored: 'float16' (the paper's 16 bits), 'float32', or 'nested' (8-bit, QLoRA's
            double quantization).
        center: subtract the tensor's mean first, add it last (Appendix B).
        outlier_fraction: fraction of input dimensions kept in 16 bits by proxy quantization (section 3), 0 <= p < 1.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    bits: int
    dtype: str | None = None
    blocksize: int | None = 64
    scheme: str = "block"
    exponent_bits: int | str | None = None
    subnormals: str | None = None
    dynamic_interval: str | None = None
    absmax_dtype: str = "float16"
    center: bool = False
    outlier_fraction: float = 0.0

    def __post_init__(self) -> None:
        _integer("bits", self.bits, ALLOWED_BITS)
        if self.bits != BASELINE_BITS and not MIN_BITS <= self.bits <= MAX_BITS:
            raise SpecError("bits", self.bits, ALLOWED_BITS)
        self._validate()
        if self.is_baseline:
            for f in fields(self):
                if f.name != "bits":
                    object.__setattr__(self, f.name, None if f.name in ("dtype", "blocksize") else f.default)
        else:
            self._normalise()

    def _validate(self) -> None:
        """Every axis by itself, whether it matters for this spec or not: a misspelt value must not pass unseen."""
        if self.dtype is not None or not self.is_baseline:
            _choice("dtype", self.dtype, DTYPES)
        _choice("scheme", self.scheme, get_args(Scheme))
        _choice("absmax_dtype", self.absmax_dtype, get_args(AbsmaxDType))
        if self.blocksize is not None:
            _integer("blocksize", self.blocksize, ALLOWED_BLOCKSIZE)
            if not 1 <= self.blocksize <= LARGEST_NUMBER:
                raise SpecError("blocksize", self.blocksize, ALLOWED_BLOCKSIZE)
        if self.exponent_bits is not None:
            self._validate_exponent_bits(self.exponent_bits)
        if self.subnormals is not None:
            _choice("subnormals", self.subnormals, get_args(Subnormals))
        if self.dynamic_interval is not None:
            _choice("dynamic_interval", self.dynamic_interval, get_args(DynamicInterval))
        if not isinstance(self.center, bool):
            raise SpecError("center", self.center, "true or false")
        fraction = self.outlier_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise SpecError("outlier_fraction", fraction, "a number from 0 (none) to below 1")

    def _validate_exponent_bits(self, value: int | str) -> None:
        if self.dtype == "float" and not self.is_baseline:
            most, why = self.bits - 1, f"bits - 1 = {self.bits - 1} (with bits={self.bits})"
        else:
            most, why = MAX_BITS - 1, str(MAX_BITS - 1)
        allowed = f"a whole number from 1 to {why}, or 'paper' or 'heuristic'"
        if isinstance(value, str):
            if value not in EXPONENT_RULES:
                raise SpecError("exponent_bits", value, allowed)
            return
        _integer("exponent_bits", value, allowed)
        if not 1 <= value <= most:
            raise SpecError("exponent_bits", value, allowed)

    def _normalise(self) -> None:
        set_ = object.__setattr__
        set_(self, "outlier_fraction", float(self.outlier_fraction) + 0.0)  # -0.0 is 0.0, with another name in JSON
        if self.blocksize is None:
            set_(self, "scheme", "block")
        exponent_bits, subnormals = None, None
        if self.dtype == "float":
            named = self.exponent_bits or "paper"
            exponent_bits = EXPONENT_RULES[named][self.bits] if isinstance(named, str) else named
            # Without fraction bits there is no subnormal number, so both rules give the same values.
            subnormals = (self.subnormals or "ieee") if self.bits - 1 - exponent_bits > 0 else "ieee"
        set_(self, "exponent_bits", exponent_bits)
        set_(self, "subnormals", subnormals)
        set_(self, "dynamic_interval", (self.dynamic_interval or "bnb") if self.dtype == "dynamic" else None)

    @property
    def is_baseline(self) -> bool:
        return self.bits == BASELINE_BITS

    @property
    def method(self) -> str:
        """'baseline' (16 bits, nothing quantized) or 'blockwise' (a codebook and an absmax a block)."""
        return "baseline" if self.is_baseline else "blockwise"

    @property
    def bits_per_param_nominal(self) -> float:
        """The paper's count of the bits of a quantized weight: k + 16/B + p (16 - k) (sections 2.3, 5.2)."""
        if self.is_baseline:
            return float(BASELINE_BITS)
        overhead = 16 / self.blocksize if self.blocksize else 0.0
        return self.bits + overhead + self.outlier_fraction * (BASELINE_BITS - self.bits)

    def canonical(self) -> dict[str, Any]:
        """The axes that matter for this spec, as plain JSON values: what a cell's key is made of."""
        if self.is_baseline:
            return {"method": self.method, "bits": self.bits}
        values = {"method": self.method, **{f.name: getattr(self, f.name) for f in fields(self)}}
        optional = ("exponent_bits", "subnormals", "dynamic_interval")
        return {k: v for k, v in values.items() if not (k in optional and v is None)}

    @property
    def label(self) -> str:
        """A short name for people: 'float4 e2 b64', '16-bit'."""
        if self.is_baseline:
            return "16-bit"
        parts = [f"{self.dtype}{self.bits}"]
        if self.exponent_bits is not None:
            parts.append(f"e{self.exponent_bits}")
        parts.append(
            "tensor" if self.blocksize is None else f"{'g' if self.scheme == 'group' else 'b'}{self.blocksize}"
        )
        if self.subnormals == "bnb":
            parts.append("bnb-subnormals")
        if self.dynamic_interval == "paper":
            parts.append("paper-interval")
        if self.absmax_dtype != "float16":
            parts.append(f"absmax-{self.absmax_dtype}")
        if self.center:
            parts.append("centered")
        if self.outlier_fraction:
            parts.append(f"outliers {self.outlier_fraction:.3g}")
        return " ".join(parts)


def _integer(key: str, value: object, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(key, value, allowed)


def _choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(key, value, "one of " + ", ".join(allowed))
