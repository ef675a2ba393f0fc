"""The token windows that a method calibrates on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kbit.calibration import Calibration
from kbit.errors import SpecError
from kbit.evaluation.texts import encode_text, read_documents


def calibration_windows(calibration: Calibration, tokenizer: Any, *, context: int, vocab_size: int) -> Tensor:
    """Draw a calibration's windows from its text set.

    Documents are joined and encoded as for perplexity, and cut into disjoint windows; `samples` of them are drawn by
    NumPy's ``default_rng(seed).choice`` without replacement, in ascending order.

    Args:
        calibration: the data.
        tokenizer: a transformers tokenizer.
        context: the model's context length in tokens.
        vocab_size: entries of the model's vocabulary.

    Returns:
        int64 [samples, min(length, context)].

    Raises:
        SpecError: the text set has fewer windows.
        ValueError: the text set can't be read, or a token is not in the model's vocabulary.
    """
    import numpy as np

    if calibration.source is None:
        raise ValueError(f"calibration.set={calibration.name!r} has no place to read from")
    length = min(context, calibration.length)
    tokens = encode_text(read_documents(calibration.source), tokenizer, limit=None).tokens
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    if len(windows) < calibration.samples:
        has = f"at most {len(windows)}: {calibration.name} has so many windows of {length} tokens"
        raise SpecError("calibration.samples", calibration.samples, has)
    drawn = np.random.default_rng(calibration.seed).choice(len(windows), calibration.samples, replace=False)
    chosen = windows[np.sort(drawn)]
    if chosen.max() >= vocab_size:
        raise ValueError(
            f"calibration.set={calibration.name!r}: the tokenizer gives token {chosen.max()}, and the model's "
            f"vocabulary has {vocab_size} entries: they don't match"
        )
    return torch.from_numpy(chosen.astype(np.int64))
