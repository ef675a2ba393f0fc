"""A family of models from a directory of the user's: a file, with a line for each member."""

from __future__ import annotations

from pathlib import Path

from sweeps.config import DEMO_DIR
from tests.conftest import Launch

FAMILY = f"""# @package models.mine
members:
  mine-small: {{path: {DEMO_DIR}/models/neox-xs}}
  mine-large: {{path: {DEMO_DIR}/models/neox-s, params: 1892800}}
"""


def test_a_familys_file_adds_models_a_line_each(tmp_path: Path, here: Launch) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(FAMILY)
    quant = "sweep.quant=[{bits: [3, 4], dtype: int}]"
    args = ["--config-dir", str(tmp_path / "conf"), "mode=plan", "model=[mine]", quant]
    planned = here(*args)
    assert planned.returncode == 0, planned.stderr
    assert "models  2" in planned.stdout
    assert "cells  4" in planned.stdout
    one = here(*args, "sweep.sizes=[mine-large]")
    assert one.returncode == 0, one.stderr
    assert "models  1" in one.stdout
