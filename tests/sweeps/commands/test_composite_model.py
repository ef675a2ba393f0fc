"""A model with a vision tower goes through a study like any other: text in, and the tower at 16 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from sweeps import load_results
from tests.conftest import Launch
from tests.kbit.composite_models import composite
from tests.kbit.models.test_loading import write_tokenizer

TEXT = "a b b a b a a a b c " * 40


def test_a_model_with_a_vision_tower_goes_through_a_study(here: Launch, tmp_path: Path) -> None:
    directory = tmp_path / "mistral3-s"
    model = composite("mistral3", torch.bfloat16)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    text = tmp_path / "letters.txt"
    text.write_text(TEXT)
    quant = "sweep.quant=[{bits: 16}, {bits: 4, dtype: int, blocksize: 64}]"
    result = here(
        f"path={directory}",
        quant,
        f"eval.perplexity=[{text}]",
        "eval.tasks=[]",
        "eval.window=32",
        "eval.compute_dtype=float32",
        "executor.device=cpu",
        "report=false",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = load_results(tmp_path / "results").set_index("bits")
    assert set(rows["status"]) == {"done"}
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [m for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    quantized = sum(m.weight.numel() for m in blocks)
    assert set(rows["params"]) == {parameters}
    assert rows["total_bits"][16] == 16 * parameters
    assert rows["total_bits"][4] == 16 * (parameters - quantized) + 4 * quantized + 16 * quantized // 64

    ids = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.inference_mode():
        logits = model.float()(windows).logits[:, :-1]
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))
    assert abs(rows["letters_loss"][16] - float(loss)) < 1e-5
