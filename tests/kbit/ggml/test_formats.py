"""ggml's formats, by three oracles: PyPI gguf, bytes of llama.cpp's quantizer kept here, and llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kbit
from kbit import SpecError
from kbit.errors import WeightError
from kbit.ggml import quantize as module
from kbit.ggml.formats import FORMATS, QUANTIZED
from tests.kbit.ggml.llama import needs_llama, quantized
from tests.kbit.ggml.make_expected import FILE, tensors

SIMPLE = tuple(name for name in QUANTIZED if not name.endswith("K"))
EXPECTED = dict(np.load(FILE))


def codes_of(stored: Tensor, name: str) -> Tensor:
    """Return the codes of a K-quant, by bit arithmetic on each block's bytes (not the way that the package goes)."""
    layout = FORMATS[name]
    b = stored.reshape(-1, layout.nbytes).numpy()
    i = np.arange(256)
    if name == "q6_K":
        half, within = i // 128, i % 128
        nibble = b[:, 64 * half + within % 64] >> (4 * (within // 64)) & 15
        upper = b[:, 128 + 32 * half + within % 32] >> (2 * (within // 32)) & 3
    else:
        nibble = b[:, layout.nbytes - 128 + 32 * (i // 64) + i % 32] >> (4 * (i // 32 % 2)) & 15
        upper = b[:, 16 + i % 32] >> (i // 32) & 1 if name == "q5_K" else np.zeros_like(nibble)
    return torch.from_numpy((nibble | upper << 4).astype(np.int16))


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_of_llama_cpp(name: str) -> None:
    for kind, x in tensors().items():
        assert np.array_equal(kbit.ggml_quantize(x, name).numpy(), EXPECTED[f"{kind} {name}"]), kind


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_are_those_of_the_python_package(name: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="pip install gguf")
    kind = quants.GGMLQuantizationType[name.upper()]
    for x in tensors().values():
        stored = kbit.ggml_quantize(x, name)
        if name in SIMPLE:
            assert np.array_equal(quants.quantize(x.numpy(), kind), stored.numpy())
        values = quants.dequantize(stored.numpy(), kind)
        assert np.array_equal(kbit.ggml_dequantize(stored, name).numpy(), values)


@needs_llama
@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_those_of_llama_cpp_on_random_rows(name: str) -> None:
    made = torch.Generator().manual_seed(3)
    compare(torch.randn(96, 512, generator=made), name)
    compare(torch.randn(96, 512, generator=made) ** 3, name)


@needs_llama
@pytest.mark.assets
@pytest.mark.parametrize("model", ["neox-m", "opt-l", "gpt2-m"])
def test_codes_are_those_of_llama_cpp_on_weights_of_real_models(model: str, assets: Path) -> None:
    stored = load_file(assets / "models" / model / "model.safetensors")
    weights = [w.float() for w in stored.values() if w.ndim == 2 and w.shape[1] % 256 == 0]
    assert len(weights) > 3
    for name in QUANTIZED:
        for weight in weights[1:12:3]:
            compare(weight[:256], name)


def compare(x: Tensor, name: str) -> None:
    """At least 99.9 % of the codes are llama.cpp's, and none is more than a step away: its sums may be fused."""
    ours, theirs = kbit.ggml_quantize(x, name), quantized(x, name)
    if name in SIMPLE:
        assert (ours != theirs).float().mean() <= 1e-3
        return
    difference = (codes_of(ours, name) - codes_of(theirs, name)).abs()
    assert (difference > 0).float().mean() <= 1e-3
    assert int(difference.max()) <= 1


@pytest.mark.parametrize("name", QUANTIZED)
def test_chunks_and_dtypes_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(1)).half()
    whole = kbit.ggml_quantize(x.float(), name)
    monkeypatch.setitem(module.CHUNK, "cpu", 600)
    assert torch.equal(kbit.ggml_quantize(x, name), whole)
    assert torch.equal(kbit.ggml_quantize(x.t().contiguous().t(), name), whole)
    values = kbit.ggml_dequantize(whole, name)
    out = torch.empty(512, 7, dtype=torch.float16).t()
    assert kbit.ggml_dequantize(whole, name, out=out) is out
    assert torch.equal(out, values.half())


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_error_is_below_what_the_bits_allow(name: str) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    error = (kbit.ggml_dequantize(kbit.ggml_quantize(x, name), name) - x).norm() / x.norm()
    assert 0.1 < float(error) * 2 ** FORMATS[name].bits < 1.6


def test_what_has_no_format_is_refused() -> None:
    with pytest.raises(SpecError, match=r"type='q3_K' is not valid: one of q4_0, q4_1"):
        kbit.ggml_quantize(torch.zeros(1, 256), "q3_K")
    with pytest.raises(SpecError, match=r"columns=96 is not valid: q4_K takes rows of a multiple of 256 values"):
        kbit.ggml_quantize(torch.zeros(1, 96), "q4_K")
    with pytest.raises(WeightError, match=r"shape \(32,\)"):
        kbit.ggml_quantize(torch.zeros(32), "q4_0")
    with pytest.raises(SpecError, match=r"a multiple of 18\], the bytes of q4_0"):
        kbit.ggml_dequantize(torch.zeros(1, 20, dtype=torch.uint8), "q4_0")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(name: str, value: float) -> None:
    for place in (0, 77, 511):
        x = torch.randn(2, 256, generator=torch.Generator().manual_seed(4))
        x.view(-1)[place] = value
        with pytest.raises(WeightError, match="NaN or infinite"):
            kbit.ggml_quantize(x, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_gpu_gives_the_same_bytes(name: str) -> None:
    for x in tensors().values():
        stored = kbit.ggml_quantize(x.cuda(), name)
        assert torch.equal(stored.cpu(), kbit.ggml_quantize(x, name))
        assert torch.equal(kbit.ggml_dequantize(stored, name).cpu(), kbit.ggml_dequantize(stored.cpu(), name))
