"""llama.cpp itself, where the package llama-cpp-python is installed: its quantizer, and programs in its environment.

It builds from source in about ten minutes, and is too much for every test environment. ``KBIT_LLAMA_CPP`` names the
directory ``llama_cpp`` of an installation elsewhere; without it the package is looked for here.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kbit.bench.llama_cpp import package, quantized

__all__ = ["needs_llama", "quantized", "run"]

WHY = "llama.cpp isn't here: pip install llama-cpp-python, or have KBIT_LLAMA_CPP name its directory llama_cpp"
needs_llama = pytest.mark.skipif(package() is None, reason=WHY)


def run(code: str, *arguments: str) -> str:
    """Run a program where llama_cpp can be imported: in the environment that it is installed in. Returns its output."""
    directory = package()
    assert directory is not None
    own = directory.parents[3] / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(own) if own.is_file() else sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
