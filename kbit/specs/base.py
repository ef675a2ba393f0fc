"""The base of every method's spec, and numbers that all share. Imports no torch: planning stays light."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Self

from kbit.axes import axes_of, axis

BASELINE_BITS: Final = 16
LARGEST_NUMBER: Final = 2**40
"""No block or text has as many values, and twice of it still is a 64-bit number."""
ROW: Final = -1
"""The block size 'row', each whole row, as keys and columns hold it."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """One way to quantize a model: the base of every method's spec.

    A subclass is a frozen dataclass whose fields are declared by ``kbit.axes.axis``. It validates itself, and
    normalises away what can't matter, so that two specs that quantize alike are equal and hash alike.

    Attributes:
        method_name: the name under which ``METHODS`` has the class.
        runs: "module:function" of the method itself (``kbit.methods``).
        calibrates: the method reads calibration data, which then belong to a cell's identity. A spec whose axes decide
            it has a value of its own.
        packs: layers that it quantizes can be held in k bits (``quantize_model(..., packed=True)``).
        calibrates_on: what enters a block on the calibration data: the 'original' model's states, or those of the
            'quantized' blocks before it. Each class says it of its own method, which then runs layer by layer too; None
            is for methods that need more than that.
        passes: forward passes that calibrating comes to, for predictions of cost: for what blocks are given, for their
            layers' inputs, for the next block's inputs, and what a method sums of the inputs.
        measures: a kind of evaluation (``Evaluator.of_methods``) of the 16-bit model on the calibration data, which is
            run before the method is and then known to it; None for most methods.
        replaces_layers: a layer's module gets another in its place, whether its weights are held in k bits or not, as
            more than its weights is quantized.
        measures_stored: it takes a model as its files have it: one that others quantized, and no other.
        refuses: inherited axes of which the method takes the neutral value alone, each with the reason: no list for
            people has them.
        effort: how many times as long as rounding to a codebook its work on a weight takes, for predictions of cost.
        product_bytes: per pair of an expert's input dimensions, what is summed of its inputs until its block is done.
    """

    method_name: ClassVar[str]
    runs: ClassVar[str]
    calibrates: ClassVar[bool] = False
    calibrates_on: ClassVar[Literal["original", "quantized"] | None] = None
    packs: ClassVar[bool] = False
    replaces_layers: ClassVar[bool] = False
    effort: ClassVar[float] = 1.0
    product_bytes: ClassVar[int] = 0
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType({})
    measures_stored: ClassVar[bool] = False
    passes: ClassVar[float] = 4.0
    measures: ClassVar[str | None] = None

    bits: int = axis(type="int64", doc="bits per code", unit="bit")

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "calibrates_on" not in vars(cls):
            cls.calibrates_on = None  # a method that builds on another's spec runs another function

    @classmethod
    def offered(cls) -> tuple[str, ...]:
        """Return the axes that the method obeys, in the order of their fields."""
        return tuple(name for name in axes_of(cls) if name not in cls.refuses)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.method_name

    @property
    def calibrating(self) -> tuple[str, str]:
        """The axis, or the method, that decides whether it calibrates, and its value, as users write them."""
        return "method", self.method

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is quantized: the 16-bit model."""
        return False

    @property
    @abstractmethod
    def bits_per_param_nominal(self) -> float:
        """Bits of a quantized weight as the paper would count them; of its least where layers differ."""

    @property
    def nominal_by_layer(self) -> bool:
        """Whether the nominal count depends on a layer's shape: then ``nominal_bits`` has it."""
        return False

    def nominal_bits(self, in_features: int) -> float:  # noqa: ARG002  # of the methods whose layers are alike
        """Return bits of a quantized weight in a layer, as the paper would count them."""
        return self.bits_per_param_nominal

    @property
    def bits_per_param_held(self) -> float:
        """Bits of a quantized weight where layers are held in k bits, for predictions of memory."""
        return self.bits_per_param_nominal

    @property
    def why_not_packed(self) -> str | None:
        """Why its layers can't be held in k bits, in words; None where they can."""
        return None if self.packs else f"those of method={self.method} have no form in k bits"

    @property
    def why_not_layered(self) -> str | None:
        """Why a model can't be quantized layer by layer so, in words; None where it can."""
        name, value = self.calibrating
        if not self.calibrates or self.calibrates_on is not None:
            return None
        return f"{name}={value!r} calibrates on more than what enters a block's layers"

    def working_bytes(self, hidden: int, inner: int) -> int:  # noqa: ARG002  # of methods that need nothing to speak of
        """Return the bytes on the device that the method needs beside the model, but for activations.

        Args:
            hidden: inputs of most of a block's layers, the width of the residual stream.
            inner: inputs of the others, the width of the FFN.
        """
        return 0

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name for people, which tells specs apart that differ."""

    def axis_values(self) -> dict[str, object]:
        """Return each axis of the spec with its value, as columns and filters have it."""
        return {name: getattr(self, name) for name in axes_of(type(self))}

    def canonical(self) -> dict[str, Any]:
        """Return the axes that matter for this spec, as plain JSON values: what a cell's key is made of."""
        values = {name: (a, getattr(self, name)) for name, a in axes_of(type(self)).items()}
        identity = {name: value for name, (a, value) in values.items() if a.is_identity(value)}
        return {"method": self.method, **{k: list(v) if isinstance(v, tuple) else v for k, v in identity.items()}}

    @cached_property
    def canonical_text(self) -> str:
        """The same as sorted, compact JSON, made once: the cells of all models share a spec."""
        return json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_canonical(cls, values: Mapping[str, Any]) -> Self:
        """Return the inverse of ``canonical``, without the method."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)

    def _words(self, *said: str) -> list[str]:
        """Words of a label for each axis that isn't neutral, in their order, but for those that were said."""
        axes = axes_of(type(self))
        own = [name for name, a in axes.items() if name not in said and not a.is_neutral(getattr(self, name))]
        values = self.axis_values() if own else {}
        return [w for name in own if (w := axes[name].words(values[name]))]
