"""Every exception of kbit.

ValueError
├── SpecError           a specification can't exist
├── WeightError         a tensor can't be quantized
├── ActivationError     inputs of layers on calibration data can't be used
├── ArchitectureError   the layers to quantize can't be told
│   └── OrderError      nor which layer follows which
├── HessianError        a layer's calibration inputs have no usable second moments
└── LayeredError        a model that runs layer by layer can't be measured so
Exception
├── CheckpointError     weights are missing, of an unknown format, or damaged
├── NotStreamableError  a checkpoint has to be loaded whole
└── SeenError           a forward pass has shown what it was run for
OSError
└── NoRoomError         activations fit neither memory nor disk
RuntimeError
└── CudaError           a kernel can't be compiled, loaded or launched
"""

from __future__ import annotations


class SpecError(ValueError):
    """A specification that can't exist: the key, its value, what is allowed.

    Attributes:
        key: the key whose value is wrong, as a user writes it.
        value: its value.
        allowed: what would be allowed, in words.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={value!r} is not valid: {allowed}")
        self.key, self.value, self.allowed = key, value, allowed


class WeightError(ValueError):
    """A tensor that can't be quantized. Says what it is and what is needed."""


class ActivationError(ValueError):
    """Inputs of a layer on calibration data that can't be used. Says which layer's, and why."""


class ArchitectureError(ValueError):
    """A model in which the layers to quantize, or their order, can't be told."""


class OrderError(ArchitectureError):
    """A model in which it isn't known which layer follows which.

    Attributes:
        why: what isn't known, in words.
    """

    def __init__(self, model: object, why: str) -> None:
        super().__init__(
            f"outlier_fraction needs to know which layer follows which, and in {type(model).__name__} that isn't "
            f"known: {why}. Use outlier_fraction=0 with this model"
        )
        self.why = why


class HessianError(ValueError):
    """Second moments of a layer's inputs on calibration data that can't be used. Says why, and what to do."""


class LayeredError(ValueError):
    """An evaluation or a method that can't be had of a model that runs layer by layer. Says why."""


class CheckpointError(Exception):
    """Weights that are missing, of an unknown format, or damaged."""


class NotStreamableError(Exception):
    """A checkpoint whose weights can't be read one by one, so that it has to be loaded whole; says why."""


class SeenError(Exception):
    """A forward pass that is ended since it has shown what it was run for: its argument. Always caught."""


class NoRoomError(OSError):
    """Activations that fit neither memory nor the temporary directory. Says how much is needed, and what to do."""


class CudaError(RuntimeError):
    """A kernel can't be compiled, loaded or launched; says what NVRTC or the driver said."""
