"""Makes expected.npz: small tensors, and the bytes that llama.cpp's quantizer makes of them.

    python -m tests.kbit.ggml.make_expected

Its libggml-base was built by GCC for x86-64 without fused multiply-add, as llama-cpp-python builds it by default.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kbit.ggml.formats import QUANTIZED
from tests.kbit.ggml.llama import quantized

FILE = Path(__file__).parent / "expected.npz"


def tensors() -> dict[str, Tensor]:
    """Return small tensors by name, float32 [rows, 256]: from a generator, so that only their bytes are stored."""
    made = torch.Generator().manual_seed(16)
    normal = torch.randn(6, 256, generator=made)
    edge = torch.zeros(6, 256)
    edge[1], edge[2] = -3.0, 0.25
    edge[3, ::2], edge[3, 1::2] = 1.0, -1.0  # the first of two largest magnitudes decides a sign
    edge[4, 40] = 7.0
    edge[5] = torch.arange(256) / 256
    return {
        "normal": normal,
        "heavy": torch.randn(6, 256, generator=made) ** 3 * 4,
        "grid": torch.randint(-8, 8, (4, 256), generator=made).float() / 8,
        "tiny": normal[:4].half().float() * 2.0**-20,
        "above": torch.rand(4, 256, generator=made) + 1,
        "edge": edge,
    }


if __name__ == "__main__":
    expected = {f"{name} {t}": quantized(x, t).numpy() for name, x in tensors().items() for t in QUANTIZED}
    np.savez_compressed(FILE, **expected)
