"""A file of tests in a process of its own, where Triton's kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

from tests import ROOT


def passed_in_the_interpreter(file: str, chosen: str) -> int:
    """Run the tests of a file whose names have some text; return how many passed. All that ran have to."""
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-k", chosen, file, "-p", "no:cacheprovider"]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout.count("PASSED")
