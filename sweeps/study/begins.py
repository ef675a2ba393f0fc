"""Refuse ``eval.bos=each`` for a tokenizer without a beginning-of-sequence token, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from kbit.evaluation.spec import EvalSpec
from sweeps.errors import UserError
from sweeps.study.cell import ModelRef
from sweeps.study.hub import ModelConfig
from sweeps.study.windows import model_file

GENERIC: Final = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that bring no tokens of their own: what their files don't name, they don't have."""


def check_begins(models: Iterable[ModelRef], evals: Iterable[EvalSpec]) -> None:
    """Refuse evaluations whose windows all begin with a token that a model's tokenizer doesn't have.

    What its files leave open is left to the worker, whose tokenizer knows.

    Raises:
        UserError: names the evaluation and the model.
    """
    each = [spec.name for spec in evals if spec.bos == "each"]
    without = [model.label for model in dict.fromkeys(models) if each and lacks_bos(model)]
    if without:
        raise UserError(
            f"eval.bos=each is not valid with {', '.join(without)}: no token of the tokenizer begins a text "
            f"({each[0]}). eval.bos=first and none measure such models; or leave them out (sweep.sizes)"
        )


def lacks_bos(model: ModelRef) -> bool:
    """Tell whether a tokenizer's files, here or on the hub, say that it has no beginning-of-sequence token."""
    config = _read(model, "tokenizer_config.json")
    if config is None:
        return False
    if "bos_token" in config:
        return config["bos_token"] is None
    is_generic = config.get("tokenizer_class") in GENERIC
    return is_generic and "bos_token" not in (_read(model, "special_tokens_map.json") or {})


def _read(model: ModelRef, name: str) -> ModelConfig | None:
    path = model_file(model, name)
    if path is None:
        return None
    try:
        read = json.loads(path.read_bytes())
    except ValueError:
        return None  # the worker says what is wrong with it
    return read if isinstance(read, dict) else None
