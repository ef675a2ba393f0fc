"""How much the loss rises with the error of each layer's weight: a table of slopes that a method chooses bits by.

A measurement of the 16-bit model on the data that the method calibrates on (``kbit.methods.noise``): it is made once
and stored, and every cell of the method reads it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kbit.evaluation.calibration import calibration_windows
from kbit.evaluation.spec import SLOPES, EvalResult, EvalSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TENTH: Final = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityEval:
    """Token windows, int64 [samples, length], on which the loss is measured."""

    windows: Tensor

    def run(self, model: PreTrainedModel, *, batch_tokens: int) -> EvalResult:  # noqa: ARG002  # batches are calibration's
        """Measure the slopes: sample 'slopes', one a layer; 'noise_rise' is their sum at errors of a tenth.

        Raises:
            ActivationError: a loss is not finite.
        """
        from kbit.methods.noise import loss_slopes, noise_passes
        from kbit.models.whole import WholeModel

        slopes = loss_slopes(WholeModel(module=model), self.windows)
        table = np.array(list(slopes.values()), dtype=np.float32)
        tokens = self.windows.numpy().astype("<i4")
        return EvalResult(
            metrics={"noise_rise": float(TENTH**2 * table.sum(dtype=np.float64))},
            stderr={},
            samples={SLOPES: table},
            diverged=False,
            n_samples=len(self.windows),
            n_tokens=round(noise_passes(model) * self.windows.numel()),
            dataset_hash=hashlib.sha256(tokens.tobytes() + str(tokens.shape[1]).encode()).hexdigest(),
        )


def prepare_sensitivity(spec: EvalSpec, tokenizer: Any, *, context: int, vocab_size: int) -> SensitivityEval:
    """Draw the windows that the method calibrates on.

    Raises:
        SpecError, ValueError: as ``kbit.evaluation.calibration.calibration_windows``.
    """
    return SensitivityEval(
        windows=calibration_windows(spec.calibration, tokenizer, context=context, vocab_size=vocab_size)
    )
