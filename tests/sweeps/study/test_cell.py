"""Identity: equal contents have equal keys, forever."""

from __future__ import annotations

import pytest

from kbit.evaluation.spec import EvalSpec
from kbit.sources import LocalFile
from kbit.spec import QuantSpec, spec_from_canonical
from sweeps.study.cell import Cell, Measurement, ModelRef, canonical_json

HUB = ModelRef(family="pythia", name="70m", params=70_426_624, hub_id="EleutherAI/pythia-70m", commit="a" * 40)
LOCAL = ModelRef(family="neox", name="neox-s", params=1_892_800, path="/models/neox-s", weights_hash="b" * 64)
EVAL = EvalSpec(kind="perplexity", name="jargon", window=512, dataset="sha256:" + "c" * 64, compute_dtype="float32")

# Pinned: a change here makes every finished study run again, so it comes with KEY_VERSION and a migration.
GOLDEN = {
    "baseline": "d24eb2272bd2ca50599aec047389149c8d277c5025042f6c5ef8f598b044ae23",
    "int4": "7c403d64d59911c9b49a74fcb6e0b2018341b00c2bf9894f67cea47292de74f2",
    "float3": "7488ccb496deef4fcc0ce9491f9d05a8ff640e29127e06c1d0ebb74df11108d9",
    "measurement": "ba11fc4d3c7b2da30aa2b5a83d68bc58ab7093525a5e045ff2fc10732c56df51",
}


def test_keys_are_what_they_always_were() -> None:
    float3 = QuantSpec(bits=3, dtype="float", outlier_fraction=0.02, center=True, absmax_dtype="nested")
    int4 = Cell(model=HUB, quant=QuantSpec(bits=4, dtype="int"))
    keys = {
        "baseline": Cell(model=HUB, quant=QuantSpec(bits=16)).key,
        "int4": int4.key,
        "float3": Cell(model=LOCAL, quant=float3).key,
        "measurement": Measurement(cell=int4, eval=EVAL).key,
    }
    assert keys == GOLDEN


def test_what_does_not_matter_is_not_in_the_key() -> None:
    renamed = ModelRef(family="x", name="y", hub_id=HUB.hub_id, commit=HUB.commit)
    baseline = QuantSpec(bits=16, dtype="int", blocksize=128, outlier_fraction=0.5)
    assert Cell(model=renamed, quant=baseline).key == Cell(model=HUB, quant=QuantSpec(bits=16)).key
    with_exponent = QuantSpec(bits=4, dtype="int", exponent_bits=2)
    assert Cell(model=HUB, quant=with_exponent).key == Cell(model=HUB, quant=QuantSpec(bits=4, dtype="int")).key


@pytest.mark.parametrize(
    "other",
    [
        QuantSpec(bits=3, dtype="float"),
        QuantSpec(bits=4, dtype="float", exponent_bits=2),
        QuantSpec(bits=4, dtype="float", blocksize=128),
        QuantSpec(bits=4, dtype="float", blocksize=None),
        QuantSpec(bits=4, dtype="float", scheme="group"),
        QuantSpec(bits=4, dtype="float", absmax_dtype="float32"),
        QuantSpec(bits=4, dtype="float", center=True),
        QuantSpec(bits=4, dtype="float", outlier_fraction=0.02),
        QuantSpec(bits=4, dtype="normal"),
    ],
)
def test_what_matters_is_in_the_key(other: QuantSpec) -> None:
    spec = QuantSpec(bits=4, dtype="float")
    assert Cell(model=HUB, quant=other).key != Cell(model=HUB, quant=spec).key


@pytest.mark.parametrize(
    "change", [{"limit": 7}, {"window": 256}, {"compute_dtype": "float16"}, {"version": "2"}, {"num_fewshot": 1}]
)
def test_what_decides_a_number_is_in_the_measurement(change: dict[str, object]) -> None:
    cell = Cell(model=HUB, quant=QuantSpec(bits=16))
    other = EvalSpec(**{**EVAL.canonical(), **change})
    assert Measurement(cell=cell, eval=other).key != Measurement(cell=cell, eval=EVAL).key


def test_where_the_data_lie_is_not_in_the_measurement() -> None:
    cell = Cell(model=HUB, quant=QuantSpec(bits=16))
    moved = EvalSpec(**EVAL.canonical(), source=LocalFile(path="/elsewhere.jsonl"))
    assert Measurement(cell=cell, eval=moved).key == Measurement(cell=cell, eval=EVAL).key


def test_a_paper_rule_is_its_number() -> None:
    assert QuantSpec(bits=4, dtype="float", exponent_bits="paper") == QuantSpec(bits=4, dtype="float", exponent_bits=3)
    assert QuantSpec(bits=4, dtype="float", exponent_bits="heuristic").exponent_bits == 2


def test_a_spec_comes_back_from_its_canonical_form() -> None:
    spec = QuantSpec(bits=5, dtype="dynamic", blocksize=None, dynamic_interval="paper", center=True)
    assert spec_from_canonical(spec.canonical()) == spec


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
