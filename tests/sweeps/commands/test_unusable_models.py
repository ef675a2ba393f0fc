"""A model that can't be measured is refused by ``mode=plan`` and ``mode=run`` alike, with nothing run or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import Launch

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "quantized": (
        {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
        "model.layers.0.w",
        ["quantization_config", "'fp8'", "float16, bfloat16 or float32"],
    ),
    "quantized without a word": (
        LLAMA,
        "model.layers.0.w.weight_scale_inv",
        ["model.layers.0.w.weight_scale_inv", "16-bit"],
    ),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, "decoder.w", ["'t5'", "encoder-decoder", "decoder-only"]),
    "BERT": ({"model_type": "bert"}, "bert.w", ["'bert'", "encoder", "is_decoder: true"]),
    "more layers": (LLAMA, "model.layers.2.w", ["num_hidden_layers=2", "model.layers.2.w", "num_hidden_layers=3"]),
}


@pytest.mark.parametrize("mode", ["plan", "run"])
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_be_measured_is_refused_before_anything_runs(
    case: str, mode: str, here: Launch, tmp_path: Path
) -> None:
    config, tensor, expected = CASES[case]
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({tensor: np.ones((2, 2), np.float32)}, directory / "model.safetensors")
    result = here(f"mode={mode}", f"path={directory}")
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"path='{directory}' is not a usable model" in result.stderr
    assert all(text in result.stderr for text in expected), result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("**/*.rows"))
