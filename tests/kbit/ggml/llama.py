"""llama.cpp itself, where the package llama-cpp-python is installed: its quantizer, called from Python.

It builds from source in about ten minutes, and is too much for every test environment. ``KBIT_LLAMA_CPP`` names the
directory ``llama_cpp`` of an installation elsewhere; without it the package is looked for here.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kbit.ggml.formats import FORMATS

WHY = "llama.cpp isn't here: pip install llama-cpp-python, or have KBIT_LLAMA_CPP name its directory llama_cpp"


@cache
def package() -> Path | None:
    """Return the package's directory."""
    given = os.environ.get("KBIT_LLAMA_CPP")
    found = find_spec("llama_cpp")
    directory = Path(given) if given else Path(found.origin).parent if found and found.origin else None
    return directory if directory and (directory / "lib" / "libggml-base.so").is_file() else None


needs_llama = pytest.mark.skipif(package() is None, reason=WHY)


@cache
def _library() -> ctypes.CDLL:
    directory = package()
    assert directory is not None
    library = ctypes.CDLL(str(directory / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return library


def quantized(x: Tensor, name: str) -> Tensor:
    """Return what llama.cpp makes of float32 [rows, columns], without an importance matrix: uint8 [rows, bytes]."""
    layout = FORMATS[name]
    values = np.ascontiguousarray(x.numpy(), dtype=np.float32)
    out = np.empty((len(values), layout.row_bytes(values.shape[1])), np.uint8)
    written = _library().ggml_quantize_chunk(layout.number, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    assert written == out.nbytes
    return torch.from_numpy(out)


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
