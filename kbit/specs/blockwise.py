"""Spec of the 16-bit baseline and of block-wise quantization. Imports no torch.

Its axes are the paper's (Dettmers & Zettlemoyer 2023, sections 2-5, Appendices A-C) and the options that came later.
What each one means to the last bit is in ``kbit.quantizer``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, Self, get_args

from kbit.axes import axes_of, axis
from kbit.data_types import DTYPES, EXPONENT_RULES, MAX_BITS, MIN_BITS, check_codebook, check_name, data_type
from kbit.errors import SpecError
from kbit.specs.base import BASELINE_BITS, LARGEST_NUMBER, ROW, Spec

Scheme = Literal["block", "group"]
AbsmaxDType = Literal["float16", "float32", "nested"]
Subnormals = Literal["ieee", "bnb"]
OutlierCriterion = Literal["std", "activation"]
DynamicInterval = Literal["bnb", "paper"]

ALLOWED_BITS: Final = f"a whole number from {MIN_BITS} to {MAX_BITS}, or {BASELINE_BITS} for the baseline"
ALLOWED_BLOCKSIZE: Final = (
    "a whole number of at least 1 (and at most 2^40), row for each whole row (with scheme=group), or null for the "
    "whole tensor"
)
OPTIONS: Final = ("clip", "rotation", "weighting", "outlier_criterion")
"""Axes of ``QuantSpec`` that not every method built on it obeys."""
NESTED_BLOCKSIZE: Final = 256
"""Absmax values that share one float32 scale when absmax_dtype is 'nested'."""

ZERO_BITS: Final = 8
"""Of a zero point in the kernels' layout, where bytes are read; counted, and stored in rows, are k."""
WEIGHTED_FIT_BYTES: Final = 48
"""Of a weight, while a codebook is fitted to weighted errors: its value, its weight, three sums and a summand (44)."""


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """Block-wise quantization with a codebook; ``QuantSpec(bits=16)`` is the 16-bit baseline.

    Axes that can't matter are normalised away on construction (a 16-bit baseline has no data type; only floats have
    exponent bits), so two specs that quantize alike are equal and hash alike. Their values must be possible ones all
    the same.

    Attributes:
        bits: bits per code, 2 to 8; or 16, the baseline, with every other axis unset.
        dtype: data type of the codes: a name in ``kbit.data_types.DTYPES``, or the name that goes with `codebook`.
            None for the baseline only.
        blocksize: values that share one absmax; None is one block, the whole tensor; 'row', with scheme='group', each
            whole row (``ROW``, and what a layer's row is in its ``QuantizedTensor``).
        scheme: 'block' cuts the flattened tensor (the paper); 'group' cuts each row.
        exponent_bits: floats only. A number, or 'paper' (Appendix A) or 'heuristic' (Appendix C.4), which are resolved
            here to their number.
        subnormals: floats only. 'ieee' gradual underflow, or 'bnb', bitsandbytes' create_fp8_map.
        dynamic_interval: dynamic only. 'bnb' cuts [0.1, 1]; 'paper' [0.1, 0.9] (Appendix A's text).
        absmax_dtype: how absmax is stored: 'float16' (the paper's 16 bits), 'float32', or 'nested' (8-bit, QLoRA's
            double quantization).
        center: subtract the tensor's mean first, add it last (Appendix B).
        codebook: the values of a data type from a file (``spec_of`` reads it): 2 to 2^bits of them, ascending.
        outlier_fraction: fraction of input dimensions kept in 16 bits by proxy quantization (section 3), 0 <= p < 1.
        zero_point: int only. Codes 0 to 2^k - 1 with a float16 scale and a zero point of k bits per block
            (``kbit.quantizer.asymmetric``).
        clip: each block's absmax is the best of ten by squared error (``kbit.quantizer.clipping``).
        rotation: seed of a random rotation of the input dimensions (``kbit.quantizer.rotation``); None for none.
        weighting: lloyd only. 'activation' fits the codebook with the inputs' mean squares on calibration data as
            weights.
        outlier_criterion: 'std' is proxy quantization; 'activation' keeps the input dimensions of the largest mean
            magnitude on calibration data, as many.
        takes: of the axes that change how weights are quantized (``OPTIONS``), those that the class's method obeys. It
            is not inherited: a method that does not say so has them refused.

    Raises:
        SpecError: an axis has a value that is not allowed.
    """

    method_name: ClassVar[str] = "blockwise"
    runs: ClassVar[str] = "kbit.methods.blockwise:quantize_layers"
    packs: ClassVar[bool] = True
    calibrates_on: ClassVar[Literal["original", "quantized"] | None] = "original"
    takes: ClassVar[frozenset[str]] = frozenset(OPTIONS)

    dtype: str | None = axis(None, type="string", doc="data type of the codes; null for the baseline")
    blocksize: int | None = axis(
        64,
        type="int64",
        unit="values",
        doc="values that share an absmax; null for the whole tensor and the baseline, -1 for the whole row",
        names=(("row", ROW),),
    )
    scheme: str = axis(
        "block", type="string", doc="block (of the flattened tensor) or group (of a row)", neutral="block", label=""
    )
    exponent_bits: int | str | None = axis(None, type="int64", unit="bit", doc="of a float", optional=True)
    subnormals: str | None = axis(
        None, type="string", doc="of a float: ieee or bnb", neutral="ieee", optional=True, label="{}-subnormals"
    )
    dynamic_interval: str | None = axis(
        None, type="string", doc="of dynamic: bnb or paper", neutral="bnb", optional=True, label="{}-interval"
    )
    absmax_dtype: str = axis(
        "float16",
        type="string",
        doc="how absmax is stored: float16, float32, nested",
        neutral="float16",
        label="absmax-{}",
    )
    center: bool = axis(
        False,
        type="bool",
        doc="the tensor's mean is subtracted before quantizing",
        neutral=False,
        baseline=False,
        label="centered",
    )
    outlier_fraction: float = axis(
        0.0,
        type="float64",
        unit="fraction",
        doc="input dimensions kept in 16 bits",
        neutral=0.0,
        baseline=0.0,
        label="outliers {:.3g}",
    )
    codebook: tuple[float, ...] | None = axis(
        None,
        type="string",
        doc="hash of the values of a data type from a file; null for the others",
        optional=True,
        since=2,
        label="codebook {}",
    )
    zero_point: bool = axis(
        False,
        type="bool",
        doc="integers from 0 to 2^k - 1, with a zero point of k bits per block",
        neutral=False,
        baseline=False,
        since=3,
        label="asymmetric",
    )
    clip: bool = axis(
        False,
        type="bool",
        doc="absmax of each block clipped: the best of ten",
        neutral=False,
        baseline=False,
        since=3,
        label="clipped",
    )
    rotation: int | None = axis(
        None, type="int64", doc="seed of a random rotation of inputs; null for none", neutral=None, since=3
    )
    weighting: str | None = axis(
        None,
        type="string",
        doc="of lloyd: errors count by the inputs' squares (activation), or alike (null)",
        neutral=None,
        optional=True,
        since=3,
        label="{}-weighted",
    )
    outlier_criterion: str = axis(
        "std",
        type="string",
        doc="kept input dimensions are the largest by std (of the weights before) or activation",
        neutral="std",
        since=3,
        label="by {}",
    )

    def __post_init__(self) -> None:
        for name, a in axes_of(type(self)).items():
            if a.names:
                object.__setattr__(self, name, a.number(getattr(self, name)))
        _integer("bits", self.bits, ALLOWED_BITS)
        if self.bits != BASELINE_BITS and not MIN_BITS <= self.bits <= MAX_BITS:
            raise SpecError("bits", self.bits, ALLOWED_BITS)
        self._validate()
        if self.is_baseline:
            for f in fields(self):
                if f.name != "bits":
                    object.__setattr__(self, f.name, None if f.name == "blocksize" else f.default)
        else:
            self._normalise()

    def _validate(self) -> None:
        """Every axis by itself, whether it matters for this spec or not: a misspelt value must not pass unseen."""
        self._validate_dtype()
        _choice("scheme", self.scheme, get_args(Scheme))
        _choice("absmax_dtype", self.absmax_dtype, get_args(AbsmaxDType))
        if self.blocksize is not None:
            _integer("blocksize", self.blocksize, ALLOWED_BLOCKSIZE)
            if not 1 <= self.blocksize <= LARGEST_NUMBER and self.blocksize != ROW:
                raise SpecError("blocksize", self.blocksize, ALLOWED_BLOCKSIZE)
        if self.blocksize == ROW and self.scheme != "group" and not self.is_baseline:
            raise SpecError("blocksize", "row", f"with scheme=group: blocks of scheme={self.scheme} know no rows")
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
        self._validate_zero_point()
        self._validate_options()

    def _validate_zero_point(self) -> None:
        if not isinstance(self.zero_point, bool):
            raise SpecError("zero_point", self.zero_point, "true or false")
        if not self.zero_point or self.is_baseline:
            return
        if self.dtype != "int":
            raise SpecError("zero_point", True, f"false with dtype={self.dtype}: only integers (dtype=int) have one")
        if self.absmax_dtype != "float16":
            raise SpecError("zero_point", True, f"false with absmax_dtype={self.absmax_dtype}: its scale is float16")

    def _validate_options(self) -> None:
        if not isinstance(self.clip, bool):
            raise SpecError("clip", self.clip, "true or false")
        if self.rotation is not None:
            allowed = "null, or a seed: a whole number of at least 0 (and at most 2^40)"
            _integer("rotation", self.rotation, allowed)
            if not 0 <= self.rotation <= LARGEST_NUMBER:
                raise SpecError("rotation", self.rotation, allowed)
        if self.weighting is not None:
            _choice("weighting", self.weighting, ("activation",), more=", or null")
            if self.rotation is not None and self.dtype == "lloyd":
                allowed = "null with a rotation: its weights are of inputs, which a rotation mixes"
                raise SpecError("weighting", self.weighting, allowed)
        _choice("outlier_criterion", self.outlier_criterion, get_args(OutlierCriterion))
        if self.clip and self.zero_point and self.method_name == QuantSpec.method_name:
            raise SpecError("clip", True, "false with zero_point=true: the search is of absmax, which that has none of")
        declared, takes = axes_of(QuantSpec), type(self).__dict__.get("takes", frozenset())
        for name in OPTIONS:
            value = getattr(self, name)
            if name not in takes and not declared[name].is_neutral(value):
                raise SpecError(name, value, f"leave it out: method={self.method_name} does not obey it")
        for name, why in self.refuses.items():
            value = getattr(self, name)
            if not self.is_baseline and not declared[name].is_neutral(value):
                neutral = json.dumps(declared[name].neutral).removesuffix(".0")
                raise SpecError(name, value, f"{neutral} with method={self.method_name}: {why}")

    def _validate_dtype(self) -> None:
        if self.codebook is not None:
            check_name(str(self.dtype), "dtype")
            values = check_codebook(self.codebook, min(self.bits, MAX_BITS), f"codebook of dtype={self.dtype}")
            object.__setattr__(self, "codebook", values)
        elif self.dtype == "file":
            raise SpecError("dtype", self.dtype, "a data type from a file is written {file: PATH.json}")
        elif (self.dtype is not None or not self.is_baseline) and self.dtype not in DTYPES:
            names = "one of " + ", ".join("{file: my.json}" if name == "file" else name for name in DTYPES)
            missing = f"must be given with method={self.method_name}: " if self.dtype is None else ""
            raise SpecError("dtype", self.dtype, missing + names)

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
        optional = [name for name, a in axes_of(QuantSpec).items() if a.optional]
        given = {name: getattr(self, name) for name in optional}
        applies = data_type(str(self.dtype), self.codebook).axes(self.bits, given)
        for name in optional:
            set_(self, name, applies.get(name))
        if not self.outlier_fraction:
            set_(self, "outlier_criterion", "std")
        if self.weighting is not None or self.outlier_criterion == "activation":
            set_(self, "calibrates", True)

    @classmethod
    def offered(cls) -> tuple[str, ...]:
        takes = cls.__dict__.get("takes", frozenset())
        return tuple(name for name in super().offered() if name not in OPTIONS or name in takes)

    @property
    def is_baseline(self) -> bool:
        return self.bits == BASELINE_BITS

    @property
    def calibrating(self) -> tuple[str, str]:
        if self.weighting is not None:
            return "weighting", self.weighting
        if self.outlier_criterion == "activation":
            return "outlier_criterion", self.outlier_criterion
        return super().calibrating

    @property
    def method(self) -> str:
        """'baseline' (16 bits, nothing quantized) or 'blockwise' (a codebook and one absmax per block)."""
        return "baseline" if self.is_baseline else self.method_name

    @property
    def bits_per_param_nominal(self) -> float:
        """The paper's count of the bits of a quantized weight: k + 16/B + p (16 - k) (sections 2.3, 5.2)."""
        if self.is_baseline:
            return float(BASELINE_BITS)
        return self._nominal(None if self.nominal_by_layer else self.blocksize)

    @property
    def nominal_by_layer(self) -> bool:
        return self.blocksize == ROW

    def nominal_bits(self, in_features: int) -> float:
        return self._nominal(in_features) if self.nominal_by_layer else self.bits_per_param_nominal

    def _nominal(self, blocksize: int | None) -> float:
        of_block = BASELINE_BITS + (self.bits if self.zero_point else 0)
        overhead = of_block / blocksize if blocksize else 0.0
        return self.bits + overhead + self.outlier_fraction * (BASELINE_BITS - self.bits)

    @property
    def bits_per_param_held(self) -> float:
        if not self.zero_point or self.blocksize in (None, ROW):
            return self.bits_per_param_nominal
        return self.bits_per_param_nominal + (ZERO_BITS - self.bits) / (self.blocksize or 1)

    @property
    def why_not_packed(self) -> str | None:
        if self.rotation is not None:
            return "a packed layer would have to rotate its inputs, and the weight is rotated back instead (rotation)"
        return super().why_not_packed

    def working_bytes(self, hidden: int, inner: int) -> int:
        """What a codebook is fitted to the largest layer with, by its inputs."""
        return 0 if self.weighting is None else WEIGHTED_FIT_BYTES * hidden * max(inner, 3 * hidden)

    def of_row(self, length: int) -> Self:
        """Return the spec for a tensor with rows of this length: blocks of 'row' have that size."""
        return replace(self, blocksize=length) if self.blocksize == ROW else self

    def axis_values(self) -> dict[str, object]:
        if self.is_baseline:
            return {name: a.baseline for name, a in axes_of(type(self)).items()} | {"bits": self.bits}
        return super().axis_values() | {"codebook": self.codebook_hash}

    def canonical(self) -> dict[str, Any]:
        return {"method": self.method, "bits": self.bits} if self.is_baseline else super().canonical()

    @property
    def codebook_hash(self) -> str | None:
        """12 hexadecimal digits of the SHA-256 of the values of a data type from a file; None for the others."""
        if self.codebook is None:
            return None
        return hashlib.sha256(struct.pack(f"<{len(self.codebook)}f", *self.codebook)).hexdigest()[:12]

    @property
    def label(self) -> str:
        """A short name for people: 'float4 e2 b64', '16-bit'."""
        if self.is_baseline:
            return "16-bit"
        parts = [] if self.method == "blockwise" else [self.method]
        parts.append(f"{self.dtype}{self.bits}")
        if self.exponent_bits is not None:
            parts.append(f"e{self.exponent_bits}")
        block = f"{'g' if self.scheme == 'group' else 'b'}{self.blocksize}"
        parts.append({None: "tensor", ROW: "row"}.get(self.blocksize, block))
        return " ".join([*parts, *self._words("bits", "dtype", "blocksize", "exponent_bits")])


def _integer(key: str, value: object, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(key, value, allowed)


def _choice(key: str, value: object, allowed: tuple[str, ...], *, more: str = "") -> None:
    if value not in allowed:
        raise SpecError(key, value, f"one of {', '.join(allowed)}{more}")
