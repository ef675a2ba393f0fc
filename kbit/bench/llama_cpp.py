"""llama.cpp's own quantizer, where the package llama-cpp-python is installed: one thread of C beside one of torch."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbit.ggml.formats import FORMATS

DIRECTORY = "KBIT_LLAMA_CPP"
"""Names the directory ``llama_cpp`` of an installation elsewhere: building it takes ten minutes."""


@cache
def package() -> Path | None:
    """Return the package's directory; None where it isn't installed."""
    given = os.environ.get(DIRECTORY)
    found = find_spec("llama_cpp")
    directory = Path(given) if given else Path(found.origin).parent if found and found.origin else None
    return directory if directory and (directory / "lib" / "libggml-base.so").is_file() else None


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
    if written != out.nbytes:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {name}, not {out.nbytes}: it is of another version")
    return torch.from_numpy(out)
