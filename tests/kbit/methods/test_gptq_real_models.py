"""GPTQ against rounding on real models of three families, on two texts that it was not calibrated on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.significance import Comparison, compare_loss
from sweeps import load_results, load_samples
from sweeps.config import DEMO_DIR
from tests.conftest import Launch

MODELS = ("neox-s", "opt-s", "bloom-s")
TEXTS = ("commoncrawl_sample", "wikitext2")
INTEGERS = "dtype: int, scheme: group, zero_point: true"
QUANT = (
    "sweep.quant=[{bits: 16}, "
    f"{{method: [blockwise, gptq], bits: [2, 3], blocksize: 64, {INTEGERS}}}, "
    f"{{method: [blockwise, gptq], bits: 4, blocksize: [row, 128, 64, 32], {INTEGERS}}}]"
)


def differences(out: Path) -> dict[tuple[str, str, int, int], Comparison]:
    """GPTQ's loss less rounding's, window by window: by model, text, bits and block size."""
    table = load_results(out, long=True)
    samples = load_samples(out, table["measurement"])
    rows: dict[tuple[str, str, int, int], dict[str, str]] = {}
    for row in table[table["bits"] < 16].to_dict("records"):
        cell = (str(row["model"]), str(row["eval"]), int(row["bits"]), int(row["blocksize"]))
        rows.setdefault(cell, {})[str(row["method"])] = str(row["measurement"])
    return {cell: compare_loss(samples[keys["gptq"]], samples[keys["blockwise"]]) for cell, keys in rows.items()}


@pytest.mark.slow
@pytest.mark.assets
def test_losses_are_lower_than_roundings_at_2_and_3_bits(assets: Path, launch: Launch, tmp_path: Path) -> None:
    done = launch(
        *(QUANT, f"path=[{','.join(str(assets / 'models' / name) for name in MODELS)}]", "sweep.name=gptq"),
        *(f"eval.data_dir={assets / 'eval'}", f"eval.perplexity=[{','.join(TEXTS)}]", "eval.tasks=[]"),
        *("eval.tokens=32768", f"calibration.set={DEMO_DIR / 'text' / 'jargon.jsonl'}", "calibration.samples=128"),
        *("calibration.length=512", "calibration.compute_dtype=float32", "executor.device=cpu"),
        timeout=7200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = differences(tmp_path / "results")
    assert len(found) == len(MODELS) * len(TEXTS) * (2 + 4)
    print(pd.DataFrame({cell: vars(c) for cell, c in found.items()}).T.to_string())
    worse = [cell for cell, c in found.items() if cell[2] < 4 and c.high >= 0]
    assert not worse
