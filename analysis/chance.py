"""What guessing gives on a task: the level that a figure of its accuracy shows."""

from __future__ import annotations

from typing import Final

from analysis.metrics import ZERO_SHOT_MEAN, ZERO_SHOT_TASKS, Metric

CHOICES: Final = {
    **{"arc_easy": 4, "arc_challenge": 4, "boolq": 2, "cb": 3, "commonsense_qa": 5, "copa": 2, "hellaswag": 4},
    **{"jargon_choice": 4, "mathqa": 5, "mmlu": 4, "openbookqa": 4, "piqa": 2, "race": 4, "rte": 2, "sciq": 4},
    **{"social_iqa": 3, "winogrande": 2, "wic": 2, "wsc": 2, "wsc273": 2, "xstorycloze_en": 2},
}
"""Answers that a task offers for each document, by its lm-eval name (of ARC almost always this many)."""
OPEN: Final = ("jargon_lastword", "lambada_openai", "lambada_standard")
"""Tasks that offer none: any word may follow."""
_ACCURACIES: Final = ("acc", "acc_norm")


def chance_level(metric: Metric) -> float | None:
    """Return the accuracy of guessing evenly among the answers offered; None where it isn't known.

    Of the mean of the paper's four tasks it is the mean of theirs: 0.3125 (the paper says 'close to random (35%)',
    section 5.1).
    """
    if metric.column == ZERO_SHOT_MEAN:
        return sum(_of_task(task) or 0.0 for task in ZERO_SHOT_TASKS) / len(ZERO_SHOT_TASKS)
    return _of_task(metric.eval) if metric.metric in _ACCURACIES else None


def _of_task(task: str) -> float | None:
    if task in OPEN:
        return 0.0
    name = "mmlu" if task.startswith("mmlu_") else task
    return 1 / CHOICES[name] if name in CHOICES else None
