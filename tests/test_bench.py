"""``python -m kbit.bench`` prints its table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec


def test_the_table_has_our_row_and_that_of_bitsandbytes_where_it_is_installed():
    options = ["--rows", "64", "--repeats", "1", "--bits", "4", "--dtypes", "int", "--device", "cpu"]
    env = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "kbit.bench", *options], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "64 x 4096 float16, block 64" in run.stdout
    figures = r"\W+[\d,]+\W+[\d.]+%\W+[\d,]+\W+[\d.]+%"
    assert re.search("int4 b64" + figures, run.stdout)
    peer = re.search("bitsandbytes, 8 bits" + figures, run.stdout)
    assert (peer is not None) == (find_spec("bitsandbytes") is not None)
