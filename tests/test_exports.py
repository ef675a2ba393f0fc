"""The public names: each can be imported, and none goes or comes unseen (a change belongs in CHANGELOG.md)."""

from __future__ import annotations

from importlib import import_module

import pytest

EXPORTED = {
    "kbit": [
        *("KBitLinear", "QuantHandle", "QuantSpec", "QuantizedTensor", "SpecError", "codebook", "dequantize"),
        *("ggml_dequantize", "ggml_quantize", "load_packed", "quantize", "quantize_model", "save_packed"),
    ],
    "kbit.evaluation": [
        *("EVALUATORS", "EvalResult", "EvalSpec", "Evaluator", "MetricSpec", "PreparedEval", "prepare"),
    ],
    "sweeps": ["load_results", "load_samples"],
}
FUNCTIONS = {
    "analysis.cells": ["baselines", "measured", "one_exponent", "plain", "points", "with_baseline"],
    "analysis.figures": ["bit_scaling", "block_sizes", "data_types", "write_figures"],
    "analysis.findings": ["findings", "judge", "wanted_samples"],
    "analysis.findings.judging": ["judge_inputs", "wanted_by_claims"],
    "analysis.metrics": ["headline_metrics", "metric_columns", "parse_metric", "primary_loss", "ranked_metrics"],
    "analysis.mixtures": ["mixed", "mixture_warnings", "mixtures", "with_mixed"],
    "analysis.scaling": ["best_precision", "budget_grid", "common_range", "interpolate", "scaling_points"],
    "analysis.significance": [
        "bootstrap",
        "compare",
        "compare_loss",
        "compare_mean_loss",
        "compare_outcomes",
        "mcnemar",
    ],
    "analysis.significance.comparing": ["compare_cells", "pair_cells", "wanted_for"],
    "analysis.tables": [
        *("bits_by_dtype", "other_cells", "pivot", "pivot_markdown", "plot", "render", "select", "show", "to_markdown"),
        *("write_pivot", "write_table"),
    ],
    "kbit.evaluation.lm": ["KbitLM"],
}


@pytest.mark.parametrize("package", EXPORTED)
def test_a_package_exports_these_names_and_each_is_there(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == sorted(EXPORTED[package])
    assert all(getattr(module, name) is not None for name in EXPORTED[package])
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.parametrize("module", FUNCTIONS)
def test_what_documents_name_is_there(module: str) -> None:
    assert all(callable(getattr(import_module(module), name)) for name in FUNCTIONS[module])
