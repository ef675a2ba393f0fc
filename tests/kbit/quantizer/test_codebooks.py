"""Codebooks against formulas in float64 (plain Python, NumPy, SciPy) and against bitsandbytes' own maps."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from kbit import QuantSpec, codebook, dequantize, quantize
from kbit.data_types import DTYPES, named_dtypes
from kbit.errors import SpecError, WeightError
from kbit.spec import spec_from_canonical, spec_of

BITS = range(2, 9)
FIXED = [
    *(QuantSpec(bits=k, dtype=dtype) for k in BITS for dtype in ("int", "dynamic", "normal")),
    *(QuantSpec(bits=k, dtype="dynamic", dynamic_interval="paper") for k in BITS),
    *(
        QuantSpec(bits=k, dtype="float", exponent_bits=e, subnormals=s)
        for k in BITS
        for e in range(1, k)
        for s in ("ieee", "bnb")
    ),
]
ULP = 2.0**-23


def float32(values) -> list[float]:
    """Sorted distinct float32 values of float64 ones."""
    return sorted({float(np.float32(v)) for v in values})


def assert_is_codebook(values: torch.Tensor, bits: int) -> None:
    assert values.dtype == torch.float32
    assert values.ndim == 1
    assert 2 <= values.numel() <= 2**bits
    assert bool((values[1:] > values[:-1]).all())
    assert float(values.abs().max()) == 1.0
    assert 0.0 in values.tolist()


@pytest.mark.parametrize("spec", FIXED, ids=lambda s: s.label)
def test_every_codebook_is_sorted_distinct_and_reaches_one(spec):
    assert_is_codebook(codebook(spec), spec.bits)


@pytest.mark.parametrize("bits", BITS)
def test_int_is_symmetric_integers(bits):
    top = 2 ** (bits - 1) - 1
    assert codebook(QuantSpec(bits=bits, dtype="int")).tolist() == float32(i / top for i in range(-top, top + 1))


@pytest.mark.parametrize("bits", range(3, 9))
def test_int_is_bitsandbytes_linear_map_but_for_rounding(bits):
    """bitsandbytes counts up in float32 steps, so its values are off in the last bits, and its middle one isn't exactly
    0."""
    ours = codebook(QuantSpec(bits=bits, dtype="int"))
    linspace = bnb.create_linear_map(total_bits=bits, add_zero=True)
    theirs = torch.cat([linspace[: ours.numel() // 2], linspace[-(ours.numel() // 2 + 1) :]])
    assert torch.allclose(ours, theirs, rtol=0, atol=ULP)


def floats_by_bit_patterns(bits: int, exponent_bits: int, bias: int) -> list[float]:
    """Every bit pattern read as IEEE 754 reads it, without infinities and NaN."""
    fraction_bits = bits - 1 - exponent_bits
    values = []
    for pattern in range(2**bits):
        sign = -1.0 if pattern >> (bits - 1) else 1.0
        exponent = (pattern >> fraction_bits) & (2**exponent_bits - 1)
        fraction = (pattern & (2**fraction_bits - 1)) / 2**fraction_bits
        values.append(
            sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
        )
    return values


@pytest.mark.parametrize(("bits", "exponent_bits"), [(k, e) for k in BITS for e in range(1, k)])
def test_float_is_ieee_bit_patterns_whatever_the_bias(bits, exponent_bits):
    ours = codebook(QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits)).tolist()
    for bias in (0, 2 ** (exponent_bits - 1) - 1, 2 ** (exponent_bits - 1) + 1):
        values = floats_by_bit_patterns(bits, exponent_bits, bias)
        assert ours == float32(v / max(values) for v in values)


@pytest.mark.parametrize(("bits", "exponent_bits"), [(k, e) for k in BITS for e in range(1, k)])
def test_float_with_bnb_subnormals_is_create_fp8_map(bits, exponent_bits):
    theirs = torch.unique(bnb.create_fp8_map(True, exponent_bits, bits - 1 - exponent_bits, bits) + 0.0)
    spec = QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits, subnormals="bnb")
    if spec.subnormals == "bnb":
        assert codebook(spec).tolist() == theirs.tolist()
    else:
        # No fraction bits: bitsandbytes has no other numbers either, so the axis is normalised away.
        assert codebook(spec).tolist() == theirs.tolist()
        assert spec == QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits)


@pytest.mark.parametrize(("bits", "exponent_bits"), [(k, e) for k in range(4, 9) for e in range(1, k - 1)])
def test_float_subnormals_are_four_times_bitsandbytes(bits, exponent_bits):
    """bitsandbytes 0.50 scales subnormals by a quarter of the smallest normal number: the only difference."""
    ours = codebook(QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits))
    theirs = codebook(QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits, subnormals="bnb"))
    subnormals = 2 ** (bits - 1 - exponent_bits) - 1
    zero = ours.numel() // 2
    low, high = zero - subnormals, zero + subnormals + 1
    assert torch.allclose(ours[low:high], 4 * theirs[low:high], rtol=ULP, atol=0)
    assert torch.equal(ours[:low], theirs[:low])
    assert torch.equal(ours[high:], theirs[high:])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("interval", "upper"), [("bnb", 1.0), ("paper", 0.9)])
def test_dynamic_is_bisected_decades(bits, interval, upper):
    values = [0.0, 1.0]
    for e in range(bits - 1):
        edges = np.linspace(0.1, upper, 2**e + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - (bits - 2))
        values += [*middles, *-middles]
    ours = codebook(QuantSpec(bits=bits, dtype="dynamic", dynamic_interval=interval)).numpy()
    assert len(ours) == 2**bits
    np.testing.assert_allclose(ours, sorted(values), rtol=ULP)
    assert -1.0 not in ours


@pytest.mark.parametrize("bits", BITS)
def test_dynamic_is_create_dynamic_map_but_for_the_last_bit(bits):
    """bitsandbytes computes in float32: up to two in five of its values differ from ours in the last bit, none by
    more."""
    ours = codebook(QuantSpec(bits=bits, dtype="dynamic"))
    theirs = torch.unique(bnb.create_dynamic_map(signed=True, max_exponent_bits=bits - 1, total_bits=bits))
    assert ours.numel() == theirs.numel() == 2**bits
    assert torch.allclose(ours, theirs, rtol=ULP, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_normal_is_qloras_quantiles(bits):
    offset = 1 - (1 / 2 ** (bits + 1) + 1 / (2 * (2**bits - 1))) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 2 ** (bits - 1))[:-1])
    expected = np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()
    ours = codebook(QuantSpec(bits=bits, dtype="normal")).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert len(ours) == 2**bits
    assert -1.0 in ours


def test_normal_at_four_bits_is_nf4():
    """bitsandbytes' table was made from float32 probabilities: equal to 2e-7."""
    ours = codebook(QuantSpec(bits=4, dtype="normal"))
    assert torch.allclose(ours, bnb.get_4bit_type("nf4", device="cpu"), rtol=0, atol=2e-7)
    assert torch.allclose(ours, torch.unique(bnb.create_normal_map()), rtol=0, atol=2e-7)


def quantiles_by_sorting(weight: torch.Tensor, bits: int, mean: float = 0.0) -> list[float]:
    """Eq. 6 with NumPy's quantile (linear interpolation, float64) of all values."""
    values = weight.float().numpy().ravel() - np.float32(mean)
    at = np.quantile(values.astype(np.float64), np.arange(1, 2**bits + 1) / (2**bits + 1), method="linear")
    middles = np.append((at[:-1] + at[1:]) / 2, 0.0)
    if not middles.any():
        return [0.0, 1.0]
    return [float(v) for v in middles / np.abs(middles).max()]


def assert_values_close(ours: torch.Tensor, expected: list[float], atol: float = ULP) -> None:
    """As sets, with room for float64 roundings: values that differ by one may be merged on one side."""
    ours64, theirs = ours.double().numpy(), np.array(expected)
    for a, b in ((ours64, theirs), (theirs, ours64)):
        assert np.abs(a[:, None] - b[None, :]).min(1).max() <= atol


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    center=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantile_is_exact_eq_6(bits, shape, dtype, center, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.05).add(0.02).to(dtype)
    stored = weight.to(torch.float16) if dtype == torch.float32 else weight
    ours = codebook(QuantSpec(bits=bits, dtype="quantile", center=center), weight)
    assert_is_codebook(ours, bits)
    mean = float(stored.double().mean().to(torch.float16)) if center else 0.0
    assert_values_close(ours, quantiles_by_sorting(stored, bits, mean))


def test_quantile_reads_more_values_than_torch_quantile_can():
    """torch.quantile refuses more than 2^24. Every value is there 17 times, so rank r of all is rank r // 17 of one
    copy."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).half()
    weight = values.repeat(17).view(17, -1)
    at = torch.arange(1, 17, dtype=torch.float64) / 17 * (weight.numel() - 1)
    in_order = values.sort().values.double()
    low = in_order[(at.long() // 17)]
    high = in_order[((at.long() + 1) // 17)]
    quantiles = low + (at - at.floor()) * (high - low)
    middles = torch.cat([(quantiles[:-1] + quantiles[1:]) / 2, torch.zeros(1)])
    ours = codebook(QuantSpec(bits=4, dtype="quantile"), weight)
    assert_values_close(ours, (middles / middles.abs().max()).tolist())


def test_quantile_of_normal_weights_lies_near_the_papers_table():
    weight = torch.randn(1000, 500)
    at = norm.ppf(np.arange(1, 17) / 17)
    expected = np.sort(np.append((at[:-1] + at[1:]) / 2, 0))
    ours = codebook(QuantSpec(bits=4, dtype="quantile"), weight).numpy()
    # The middle quantile is next to the exact zero, or is zero itself.
    assert len(ours) in (15, 16)
    assert_values_close(torch.from_numpy(ours), (expected / np.abs(expected).max()).tolist(), atol=0.01)


def test_quantile_leaves_kept_columns_out():
    weight = torch.randn(64, 32).half()
    kept = [3, 17]
    rest = [c for c in range(32) if c not in kept]
    huge = weight.clone()
    huge[:, kept] = 1000.0
    spec = QuantSpec(bits=4, dtype="quantile")
    assert torch.equal(codebook(spec, huge, outlier_columns=kept), codebook(spec, weight[:, rest]))
    assert not torch.equal(codebook(spec, huge), codebook(spec, weight[:, rest]))


@pytest.mark.parametrize("kept", [None, list(range(8))])
def test_quantile_of_nothing_but_zeros_is_zero_and_one(kept):
    weight = torch.zeros(8, 8) if kept is None else torch.randn(8, 8)
    assert codebook(QuantSpec(bits=4, dtype="quantile"), weight, outlier_columns=kept).tolist() == [0.0, 1.0]


def test_quantile_is_the_same_for_any_layout():
    weight = torch.randn(33, 65).half()
    spec = QuantSpec(bits=5, dtype="quantile")
    assert torch.equal(codebook(spec, weight), codebook(spec, weight.t()))
    assert torch.equal(codebook(spec, weight), codebook(spec, weight.clone().view(-1)))


def test_codebook_refuses_what_has_none():
    with pytest.raises(ValueError, match="made from the weight"):
        codebook(QuantSpec(bits=4, dtype="quantile"))
    with pytest.raises(SpecError, match="baseline has none"):
        codebook(QuantSpec(bits=16))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(WeightError, match="NaN or infinite"):
            codebook(QuantSpec(bits=4, dtype="quantile"), torch.tensor([[1.0, bad]]))


def test_changing_a_returned_codebook_changes_no_other():
    spec = QuantSpec(bits=4, dtype="int")
    codebook(spec).zero_()
    assert float(codebook(spec).abs().max()) == 1.0


def test_data_types_differ_but_for_one_exponent_bit_which_is_int():
    specs = {s for s in FIXED if s.bits == 8}
    alike = [{a, b} for a, b in itertools.combinations(specs, 2) if torch.equal(codebook(a), codebook(b))]
    assert alike == [{QuantSpec(bits=8, dtype="int"), QuantSpec(bits=8, dtype="float", exponent_bits=1)}]


def lloyd_in_numpy(values: np.ndarray, bits: int) -> list[float]:
    """Lloyd-Max as it is defined, every value looked at in every round."""
    levels = np.quantile(values, [(2 * i + 1) / 2 ** (bits + 1) for i in range(2**bits)])
    before = None
    for _ in range(100):
        cell = np.searchsorted((levels[:-1] + levels[1:]) / 2, values, side="left")
        error = ((values - levels[cell]) ** 2).sum()
        if before is not None and before - error <= 1e-6 * before:
            break
        before = error
        levels = np.array([values[cell == i].mean() if (cell == i).any() else v for i, v in enumerate(levels)])
    return float32(levels)


def scaled(weight: torch.Tensor, size: int) -> np.ndarray:
    """x / absmax of blocks of the flattened tensor, blocks of zeros left out: float64."""
    blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % size)).view(-1, size)
    absmax = blocks.abs().amax(1, keepdim=True).half().float()
    wanted = (absmax != 0).expand_as(blocks).flatten()[: weight.numel()]
    return (blocks / absmax).flatten()[: weight.numel()][wanted].double().numpy()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(67, 130), (3, 8)])
def test_lloyd_is_the_iteration_over_all_values(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).half()
    spec = QuantSpec(bits=bits, dtype="lloyd", blocksize=32)
    ours = codebook(spec, weight)
    assert ours.tolist() == pytest.approx(lloyd_in_numpy(scaled(weight, 32), bits), abs=1e-7)
    assert bool((ours[1:] > ours[:-1]).all())
    assert float(ours.abs().max()) <= 1


def test_lloyd_has_less_error_than_the_types_that_no_data_decide():
    """At few bits: with more, a hundred rounds from the quantiles end before the best fit."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).half()
    for bits in range(2, 6):
        errors = {}
        for dtype in ("lloyd", "int", "float", "dynamic", "normal"):
            q = quantize(weight, QuantSpec(bits=bits, dtype=dtype))
            errors[dtype] = float((dequantize(q).double() - weight.double()).square().mean())
        assert min(errors, key=errors.__getitem__) == "lloyd"


def test_lloyd_leaves_out_kept_columns_and_blocks_of_zeros():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    spec = QuantSpec(bits=3, dtype="lloyd", blocksize=64)
    kept = weight.clone()
    kept[:, 5] = 100.0
    others = weight.clone()
    others[:, 5] = 0
    values = scaled(others, 64)
    assert codebook(spec, kept, outlier_columns=[5]).tolist() == pytest.approx(
        lloyd_in_numpy(values[values != 0], 3), abs=1e-6
    )
    zeros = torch.cat([weight, torch.zeros(64, 64).half()])
    assert torch.equal(codebook(spec, zeros), codebook(spec, weight))


def test_lloyd_of_nothing_and_of_one_value():
    spec = QuantSpec(bits=4, dtype="lloyd")
    assert codebook(spec, torch.zeros(8, 8)).tolist() == [0.0, 1.0]
    assert codebook(spec, torch.full((8, 8), 0.5)).tolist() == [0.0, 1.0]


def test_the_bits_of_a_fitted_codebook_count():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    fixed = quantize(weight, QuantSpec(bits=4, dtype="int"))
    assert quantize(weight, QuantSpec(bits=4, dtype="lloyd")).nbits == fixed.nbits + 16 * 16


def test_each_data_type_has_its_own_values():
    """No type is a default: a type without a function of its own would have another's values."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    for bits in BITS[1:]:
        books = {name: tuple(codebook(QuantSpec(bits=bits, dtype=name), weight).tolist()) for name in named_dtypes()}
        assert len(set(books.values())) == len(books)
    functions = {str(DTYPES[name].values) for name in DTYPES}
    assert len(functions) == len(DTYPES)


def test_a_codebook_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "posit", "codebooks": {"2": [-1, 0, 0.5, 1], "3": [-1, -0.25, 0, 0.1, 1]}}))
    spec = spec_of({"bits": 3, "dtype": {"file": str(path)}})
    assert codebook(spec).tolist() == float32([-1, -0.25, 0, 0.1, 1])
    assert spec.label.startswith("posit3 b64 codebook ")
    assert spec_from_canonical(json.loads(json.dumps(spec.canonical()))) == spec
    other = QuantSpec(bits=3, dtype="posit", codebook=(-1, -0.25, 0, 0.2, 1))
    assert (other.label != spec.label, other.canonical() != spec.canonical()) == (True, True)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
    q = quantize(weight, spec)
    assert set(q.codebook.tolist()) == set(codebook(spec).tolist())
    with pytest.raises(SpecError, match="with bits=5 the file needs values for them; it has them for 2, 3"):
        spec_of({"bits": 5, "dtype": {"file": str(path)}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "2 to 4 distinct numbers from -1 to 1 in ascending order"),
        ("[0.5, 0]", "in ascending order"),
        ("[0, 0.1, 0.1]", "distinct"),
        ('{"name": "int", "codebooks": {"2": [0, 1]}}', "another name than the data types int, float"),
        ('{"name": "x y", "codebooks": {"2": [0, 1]}}', "a letter, then letters"),
        ('{"codebooks": {"9": [0, 1]}}', "bits from 2 to 8"),
        ('{"codebook": []}', "a list of values"),
        ("nonsense", "a JSON file that can be read"),
    ],
)
def test_a_file_that_is_no_codebook_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        spec_of({"bits": 2, "dtype": {"file": str(path)}})
