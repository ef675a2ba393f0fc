"""QuantSpec: what is allowed, what is normalised away, what it counts; EvalSpec: what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.data_types import EXPONENT_RULES, named_dtypes
from kbit.errors import SpecError
from kbit.evaluation.spec import EvalSpec
from kbit.spec import QuantSpec, spec_of


@pytest.mark.parametrize(("method", "takes"), [("awq", "clip"), ("gptq", "rotation"), ("blockwise", "clip")])
def test_axes_that_a_method_refuses_are_not_offered(method: str, takes: str) -> None:
    with pytest.raises(SpecError, match="has no such axis; it has ") as caught:
        spec_of({"method": method, "bits": 4, "dtype": "int", "threshold": 3})
    has = str(caught.value).rpartition("it has ")[2].split(", ")
    assert {"bits", "dtype", "blocksize", "zero_point", takes} <= set(has)
    different = {"center": True, "outlier_fraction": 0.1, "rotation": 1, "clip": True}
    different |= {"weighting": "activation", "outlier_criterion": "activation"}
    for name, value in different.items():
        given = {"method": method, "bits": 4, "dtype": "lloyd" if name == "weighting" else "int", name: value}
        if name in has:
            spec_of(given)
        else:
            with pytest.raises(SpecError):
                spec_of(given)


@pytest.mark.parametrize("method", ["blockwise", "gptq", "awq"])
def test_a_data_type_that_is_not_given_is_said_to_be_missing(method: str) -> None:
    with pytest.raises(SpecError, match=rf"must be given with method={method}: one of int, .*\{{file: my\.json\}}"):
        spec_of({"method": method, "bits": 4})
    with pytest.raises(SpecError, match=r"dtype='flaot' is not valid: one of int, .*\{file: my\.json\}"):
        spec_of({"method": method, "bits": 4, "dtype": "flaot"})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bits", {"bits": 9}),
        ("bits", {"bits": 1}),
        ("bits", {"bits": 4.0}),
        ("bits", {"bits": True}),
        ("dtype", {"bits": 4}),
        ("dtype", {"bits": 4, "dtype": "flaot"}),
        ("bits", {"bits": 9, "dtype": None, "scheme": "row"}),
        ("dtype", {"bits": 16, "dtype": "bogus"}),
        ("blocksize", {"bits": 4, "dtype": "int", "blocksize": 0}),
        ("blocksize", {"bits": 4, "dtype": "int", "blocksize": 2**40 + 1}),
        ("blocksize", {"bits": 16, "blocksize": -3}),
        ("blocksize", {"bits": 4, "dtype": "int", "blocksize": 64.0}),
        ("scheme", {"bits": 4, "dtype": "int", "scheme": "row"}),
        ("exponent_bits", {"bits": 4, "dtype": "float", "exponent_bits": 4}),
        ("exponent_bits", {"bits": 4, "dtype": "float", "exponent_bits": 0}),
        ("exponent_bits", {"bits": 4, "dtype": "float", "exponent_bits": "best"}),
        ("exponent_bits", {"bits": 4, "dtype": "float", "exponent_bits": True}),
        ("exponent_bits", {"bits": 4, "dtype": "int", "exponent_bits": 9}),
        ("exponent_bits", {"bits": 4, "dtype": "int", "exponent_bits": 0}),
        ("exponent_bits", {"bits": 16, "exponent_bits": "best"}),
        ("subnormals", {"bits": 6, "dtype": "float", "subnormals": "none"}),
        ("subnormals", {"bits": 4, "dtype": "int", "subnormals": "zzz"}),
        ("subnormals", {"bits": 4, "dtype": "float", "exponent_bits": 3, "subnormals": ""}),
        ("dynamic_interval", {"bits": 4, "dtype": "int", "dynamic_interval": "wide"}),
        ("scheme", {"bits": 4, "dtype": "int", "blocksize": None, "scheme": "row"}),
        ("absmax_dtype", {"bits": 16, "absmax_dtype": "bfloat16"}),
        ("center", {"bits": 16, "center": 1}),
        ("outlier_fraction", {"bits": 16, "outlier_fraction": 2}),
        ("dynamic_interval", {"bits": 4, "dtype": "dynamic", "dynamic_interval": "wide"}),
        ("absmax_dtype", {"bits": 4, "dtype": "int", "absmax_dtype": "bfloat16"}),
        ("center", {"bits": 4, "dtype": "int", "center": "yes"}),
        ("outlier_fraction", {"bits": 4, "dtype": "int", "outlier_fraction": 1.5}),
        ("outlier_fraction", {"bits": 4, "dtype": "int", "outlier_fraction": -0.1}),
        ("outlier_fraction", {"bits": 4, "dtype": "int", "outlier_fraction": float("nan")}),
    ],
)
def test_bad_value_is_named_with_its_key_and_what_is_allowed(key, values):
    with pytest.raises(SpecError) as caught:
        QuantSpec(**values)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}={values.get(key)!r} is not valid: ")
    assert caught.value.allowed in str(caught.value)


def test_exponent_bits_of_other_data_types_are_any_that_a_float_can_have():
    for bits, dtype in ((4, "int"), (16, "float"), (16, None)):
        spec = QuantSpec(bits=bits, dtype=dtype, exponent_bits=7)
        assert spec == QuantSpec(bits=bits, dtype=dtype, exponent_bits="heuristic") == QuantSpec(bits=bits, dtype=dtype)


def test_minus_zero_is_zero_in_the_canonical_form():
    canonical = [QuantSpec(bits=4, dtype="int", outlier_fraction=p).canonical() for p in (0, 0.0, -0.0)]
    assert {json.dumps(c) for c in canonical} == {json.dumps(canonical[0])}
    assert "-0" not in json.dumps(canonical)


@pytest.mark.parametrize(
    ("key", "kind", "field", "value"),
    [
        ("eval.tokens", "perplexity", "limit", 0),
        ("eval.tokens", "perplexity", "limit", 2**40 + 1),
        ("eval.limit", "task", "limit", 0),
        ("eval.limit", "task", "limit", 2**63),
        ("eval.limit", "task", "limit", True),
        ("eval.window", "perplexity", "window", 1),
        ("eval.window", "perplexity", "window", 2**40 + 1),
        ("eval.num_fewshot", "task", "num_fewshot", -1),
        ("eval.num_fewshot", "task", "num_fewshot", 2**40 + 1),
        ("eval.compute_dtype", "task", "compute_dtype", "float64"),
    ],
)
def test_a_bad_value_of_an_evaluation_is_named_by_the_setting_it_comes_from(key, kind, field, value):
    good = {"kind": kind, "name": "x", "dataset": "sha256:x", "compute_dtype": "float32"}
    with pytest.raises(SpecError) as caught:
        EvalSpec(**{**good, field: value})
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}={value!r} is not valid: ")
    if field != "compute_dtype":
        assert getattr(EvalSpec(**{**good, field: 2**40}), field) == 2**40


def test_exponent_bits_rules_resolve_to_their_number():
    for rule, by_bits in EXPONENT_RULES.items():
        for bits, exponent_bits in by_bits.items():
            named = QuantSpec(bits=bits, dtype="float", exponent_bits=rule)
            assert named == QuantSpec(bits=bits, dtype="float", exponent_bits=exponent_bits)
    assert [QuantSpec(bits=k, dtype="float").exponent_bits for k in range(2, 9)] == [1, 2, 3, 3, 3, 3, 3]
    heuristic = [QuantSpec(bits=k, dtype="float", exponent_bits="heuristic").exponent_bits for k in range(2, 9)]
    assert heuristic == [1, 2, 2, 3, 3, 4, 4]


def test_axes_that_cannot_matter_are_normalised_away():
    plain = QuantSpec(bits=4, dtype="int")
    assert QuantSpec(bits=4, dtype="int", exponent_bits=2, subnormals="bnb", dynamic_interval="paper") == plain
    assert QuantSpec(bits=16, dtype="float", blocksize=32, center=True, outlier_fraction=0.1) == QuantSpec(bits=16)
    whole = QuantSpec(bits=4, dtype="int", blocksize=None, scheme="group")
    assert whole == QuantSpec(bits=4, dtype="int", blocksize=None)
    # Without fraction bits there are no subnormal numbers for a rule to place.
    e3m0 = QuantSpec(bits=4, dtype="float", exponent_bits=3, subnormals="bnb")
    assert e3m0 == QuantSpec(bits=4, dtype="float", exponent_bits=3)
    assert QuantSpec(bits=4, dtype="float", exponent_bits=2, subnormals="bnb").subnormals == "bnb"


@given(
    bits=st.integers(2, 8),
    dtype=st.sampled_from(named_dtypes()),
    blocksize=st.none() | st.integers(1, 5000),
    scheme=st.sampled_from(["block", "group"]),
    absmax_dtype=st.sampled_from(["float16", "float32", "nested"]),
    center=st.booleans(),
    outlier_fraction=st.floats(0, 1, exclude_max=True),
)
def test_canonical_values_are_json_and_make_the_same_spec_again(**values):
    spec = QuantSpec(**values)
    canonical = json.loads(json.dumps(spec.canonical()))
    assert canonical.pop("method") == "blockwise"
    assert QuantSpec(**canonical) == spec
    assert hash(QuantSpec(**canonical)) == hash(spec)


def test_nominal_bits_are_the_papers_count():
    assert QuantSpec(bits=16).bits_per_param_nominal == 16
    assert QuantSpec(bits=4, dtype="int", blocksize=64).bits_per_param_nominal == 4.25
    assert QuantSpec(bits=4, dtype="int", blocksize=None).bits_per_param_nominal == 4
    # Section 5.2: p = 0.02 and k = 4 cost 0.02 (16 - 4) = 0.24 bits more.
    proxy = QuantSpec(bits=4, dtype="float", blocksize=None, outlier_fraction=0.02)
    assert proxy.bits_per_param_nominal == pytest.approx(4.24)


def test_label_tells_apart_specs_that_differ():
    specs = [
        QuantSpec(bits=16),
        QuantSpec(bits=4, dtype="int"),
        QuantSpec(bits=4, dtype="int", scheme="group"),
        QuantSpec(bits=4, dtype="int", blocksize=None),
        QuantSpec(bits=4, dtype="int", absmax_dtype="nested"),
        QuantSpec(bits=4, dtype="int", center=True),
        QuantSpec(bits=4, dtype="int", outlier_fraction=0.02),
        QuantSpec(bits=5, dtype="float"),
        QuantSpec(bits=5, dtype="float", exponent_bits=2),
        QuantSpec(bits=5, dtype="float", subnormals="bnb"),
        QuantSpec(bits=4, dtype="dynamic"),
        QuantSpec(bits=4, dtype="dynamic", dynamic_interval="paper"),
    ]
    assert len({spec.label for spec in specs}) == len(specs)
    assert QuantSpec(bits=4, dtype="float", exponent_bits=2).label == "float4 e2 b64"


def test_the_spec_is_imported_without_torch():
    code = "import sys, kbit, kbit.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
