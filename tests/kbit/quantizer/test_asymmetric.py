"""Asymmetric integers and blocks of whole rows: against the definitions in NumPy, value by value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from kbit import KBitLinear, QuantSpec, SpecError, codebook, dequantize, quantize, quantize_model
from kbit.models.whole import WholeModel
from kbit.packed.linear import spec_as_json
from kbit.quantizer.packing import unpack
from kbit.quantizer.storage import divided
from kbit.spec import spec_of
from kbit.specs.base import ROW
from tests.kbit.tiny_models import tiny


def weight(rows: int = 6, columns: int = 40, seed: int = 0) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[0, :8] = 0
    values[1] = values[1].abs()  # nothing below zero: the zero point is 0
    return values.half()


def by_definition(block: np.ndarray, bits: int) -> tuple[np.ndarray, np.float16, int]:
    """Codes, scale and zero point of one block, in float32 as DEFINITIONS has it."""
    x = block.astype(np.float32)
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float16((high - low) / np.float32(2**bits - 1))
    if scale == 0:
        return np.zeros(len(x), np.uint8), scale, 0
    zero = int(np.clip(np.round(-low / np.float32(scale)), 0, 2**bits - 1))
    codes = np.clip(np.round(x / np.float32(scale)) + zero, 0, 2**bits - 1)
    return codes.astype(np.uint8), scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("scheme", "blocksize"), [("block", 16), ("group", 16), ("group", ROW), ("block", None)])
def test_codes_scales_and_zero_points_are_those_of_the_definition(
    bits: int, scheme: str, blocksize: int | None
) -> None:
    w = weight()
    spec = QuantSpec(bits=bits, dtype="int", scheme=scheme, blocksize=blocksize, zero_point=True)
    q = quantize(w, spec)
    rows = w.numpy() if scheme == "group" else w.reshape(1, -1).numpy()
    size = {None: w.numel(), ROW: w.shape[1]}.get(blocksize, blocksize)
    blocks = [row[i : i + size] for row in rows for i in range(0, len(row), cast(int, size))]
    expected = [by_definition(block, bits) for block in blocks]
    assert q.zero_points is not None
    assert isinstance(q.absmax, Tensor)
    np.testing.assert_array_equal(unpack(q.codes, bits, w.numel()).numpy(), np.concatenate([e[0] for e in expected]))
    np.testing.assert_array_equal(q.absmax.numpy(), np.array([e[1] for e in expected]))
    zeros = unpack(q.zero_points, bits, len(blocks)).numpy()
    np.testing.assert_array_equal(zeros, np.array([e[2] for e in expected]))
    values = np.concatenate([(e[0].astype(np.float32) - e[2]) * np.float32(e[1]) for e in expected])
    np.testing.assert_array_equal(dequantize(q).reshape(-1).numpy(), values.astype(np.float16))
    assert q.nbits == 8 * (q.codes.nbytes + q.absmax.nbytes + q.zero_points.nbytes)


def test_zero_stays_zero_and_the_error_is_half_a_step() -> None:
    w = weight(32, 128, seed=3)
    q = quantize(w, QuantSpec(bits=3, dtype="int", blocksize=32, zero_point=True))
    assert isinstance(q.absmax, Tensor)
    error = (dequantize(q).float() - w.float()).abs().view(-1, 32)
    # Half a step; the ends lose what rounding the zero point and the scale takes from them: at most half a step more.
    assert bool((error <= 1.01 * q.absmax.float().unsqueeze(1) + 1e-3).all())
    assert error.mean() < 0.3 * q.absmax.float().mean()
    assert bool((dequantize(q)[w == 0] == 0).all())


def test_values_too_large_for_16_bits_are_saturated() -> None:
    q = quantize(torch.tensor([[65504.0, -65504.0, 0.0, 1.0]]), QuantSpec(bits=2, dtype="int", zero_point=True))
    assert bool(dequantize(q).isfinite().all())


def test_kept_columns_and_the_mean_go_with_zero_points() -> None:
    w = weight() + 1
    q = quantize(w, QuantSpec(bits=8, dtype="int", blocksize=16, zero_point=True, center=True), outlier_columns=[3, 9])
    back = dequantize(q)
    assert torch.equal(back[:, [3, 9]], w[:, [3, 9]])
    torch.testing.assert_close(back, w, rtol=0, atol=0.03)


def test_a_weight_with_nan_is_refused() -> None:
    w = weight()
    w[2, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(w, QuantSpec(bits=4, dtype="int", zero_point=True))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dtype": "float"}, "zero_point=True is not valid: false with dtype=float"),
        ({"absmax_dtype": "nested"}, "zero_point=True is not valid: false with absmax_dtype=nested"),
        ({"zero_point": 1}, "zero_point=1 is not valid: true or false"),
        ({"zero_point": False, "blocksize": "row"}, "blocksize='row' is not valid: with scheme=group"),
        ({"scheme": "group", "blocksize": "rows"}, "blocksize='rows' is not valid: a whole number of at least 1"),
        ({"scheme": "group", "blocksize": -2}, "blocksize=-2 is not valid"),
    ],
)
def test_bad_parameters_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said.replace("(", r"\(")):
        spec_of({"bits": 4, "dtype": "int", "zero_point": True} | values)


def test_zero_points_are_counted_by_the_nominal_count_too() -> None:
    assert QuantSpec(bits=2, dtype="int", blocksize=64, zero_point=True).bits_per_param_nominal == 2 + 18 / 64
    row = QuantSpec(bits=2, dtype="int", scheme="group", blocksize=ROW, zero_point=True)
    assert row.nominal_by_layer
    assert row.nominal_bits(32) == 2 + 18 / 32


def test_layers_with_zero_points_are_held_in_k_bits() -> None:
    spec = QuantSpec(bits=4, dtype="int", zero_point=True)
    assert spec.why_not_packed is None
    assert spec.bits_per_param_held == 4 + (16 + 8) / 64  # a byte each, where kernels read them
    turned = replace(spec, rotation=1)
    with pytest.raises(SpecError, match=r"packed=True is not valid: .*would have to rotate its inputs"):
        quantize_model(tiny("opt"), turned, packed=True)
    with pytest.raises(ValueError, match="impl='triton': its kernels know no zero points"):
        quantize(weight(), spec, impl="triton")
    assert "zero_point" not in spec_as_json(QuantSpec(bits=4, dtype="int"))  # as layers were written before


def test_rows_are_groups_of_each_layers_width() -> None:
    model, original = tiny("opt"), tiny("opt")
    spec = QuantSpec(bits=4, dtype="int", scheme="group", blocksize=ROW)
    with quantize_model(model, spec) as handle:
        for layer, true in zip(WholeModel(module=model).layers, WholeModel(module=original).layers, strict=True):
            groups = QuantSpec(bits=4, dtype="int", scheme="group", blocksize=true.weight.shape[1])
            assert torch.equal(layer.weight, dequantize(quantize(true.weight, groups))), layer.name
        weights = sum(n * k for n, k in handle.layers.values())
        nominal = sum(4 * n * k + 16 * n for n, k in handle.layers.values())
        assert handle.bits_per_param == handle.bits_per_param_nominal == pytest.approx(nominal / weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, original.state_dict()[name]), name


def test_rows_can_be_held_in_k_bits() -> None:
    q = quantize(weight(64, 128), QuantSpec(bits=4, dtype="int", scheme="group", blocksize=ROW))
    assert (q.spec.blocksize, q.absmax.numel() if isinstance(q.absmax, Tensor) else 0) == (128, 64)
    layer = KBitLinear.from_quantized(q)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).half()
    torch.testing.assert_close(layer(x).float(), x.float() @ dequantize(q).float().T, rtol=2e-3, atol=2e-3)
    assert torch.equal(layer.quantized().codes, q.codes)


def test_integers_with_zero_points_are_their_own_codebook() -> None:
    assert codebook(QuantSpec(bits=2, dtype="int", zero_point=True)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_divisions_by_a_number_are_those_of_float32_on_every_device(device: str) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
    for number in (3, 6, 7, 15, 63, 127, 448 * 6):
        expected = values.numpy() / np.float32(number)
        assert (divided(values.to(device), number).cpu().numpy() == expected).all()
