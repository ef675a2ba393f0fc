"""Evaluations: perplexity of text sets, zero-shot tasks of lm-eval, agreement with 16 bits. One evaluation a file.

Names are loaded when first used, so that ``import kbit.evaluation.spec`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.evaluation.evaluators import EVALUATORS, Evaluator, MetricSpec
    from kbit.evaluation.prepared import PreparedEval, prepare
    from kbit.evaluation.spec import EvalResult, EvalSpec

_HOME = {
    "EVALUATORS": "kbit.evaluation.evaluators",
    "Evaluator": "kbit.evaluation.evaluators",
    "MetricSpec": "kbit.evaluation.evaluators",
    "EvalSpec": "kbit.evaluation.spec",
    "EvalResult": "kbit.evaluation.spec",
    "PreparedEval": "kbit.evaluation.prepared",
    "prepare": "kbit.evaluation.prepared",
}

__all__ = ["EVALUATORS", "EvalResult", "EvalSpec", "Evaluator", "MetricSpec", "PreparedEval", "prepare"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kbit.evaluation' has no attribute {name!r}")
