"""Identity: equal contents have equal keys, forever."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.data_types import DTYPES
from kbit.evaluation.evaluators import EVALUATORS
from kbit.evaluation.spec import BOS, EvalSpec
from kbit.sources import LocalFile, source_from_dict
from kbit.spec import METHODS, QuantSpec, Spec, axes, spec_from_canonical, spec_of
from kbit.specs.blockwise import AbsmaxDType, DynamicInterval, Scheme, Subnormals
from sweeps.study.cell import Cell, Measurement, ModelRef, canonical_json
from tests import ROOT

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

PINNED: list[dict[str, Any]] = json.loads((ROOT / "tests" / "data" / "golden_keys.json").read_text())
"""Cells and measurements of every data type, scheme, method and kind that there was before doors; never edited."""

# What came with version 2 of the keys (axes with `since=2`, new entries of doors): pinned since, and every key above
# stayed as it was. An entry that joins a door joins this list.
LATER: list[dict[str, Any]] = [
    {
        "quant": {"bits": 3, "dtype": "lloyd"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "blockwise", "bits": 3, "dtype": "lloyd", "blocksize": 64, "scheme": "block"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
        },
        "label": "lloyd3 b64",
        "key": "8db0d75fb1dccddb7666137a7620a80bea476bdf558216d2c244855cd3585156",
    },
    {
        "quant": {"bits": 3, "dtype": "mine", "codebook": [-1.0, -0.25, 0.0, 0.25, 1.0], "blocksize": 128},
        "model": vars(LOCAL),
        "eval": None,
        "canonical": {
            **{"method": "blockwise", "bits": 3, "dtype": "mine", "blocksize": 128, "scheme": "block"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
            "codebook": [-1.0, -0.25, 0.0, 0.25, 1.0],
        },
        "label": "mine3 b128 codebook 7926bf886663",
        "key": "dc2c1d1576bb0a04555125031b278f0bb32bf82267041d897241cced57620935",
    },
    {
        "quant": {"bits": 2, "dtype": "int", "zero_point": True, "blocksize": 256},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "blockwise", "bits": 2, "dtype": "int", "blocksize": 256, "scheme": "block"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0, "zero_point": True},
        },
        "label": "int2 b256 asymmetric",
        "key": "a9f8c1def63b997e5834b6e7c5951482da262ce71a70cf26f05e9fb45289c22d",
    },
    {
        "quant": {"bits": 4, "dtype": "int", "scheme": "group", "blocksize": "row"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "blockwise", "bits": 4, "dtype": "int", "blocksize": -1, "scheme": "group"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
        },
        "label": "int4 row",
        "key": "00cb4bc011b2fb5e14a0e49ec8121a5f269ef48fdc5529e16f50fbe57e4c2abf",
    },
    {
        "quant": {"bits": 3, "dtype": "int", "clip": True},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "blockwise",
            "bits": 3,
            "dtype": "int",
            "blocksize": 64,
            "scheme": "block",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.0,
            "clip": True,
        },
        "label": "int3 b64 clipped",
        "key": "1c066725a2649eaacbe85db9f54edd87e38ed7da5cfb3b20878eb91ea9096afa",
    },
    {
        "quant": {"bits": 4, "dtype": "normal", "rotation": 0},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "blockwise",
            "bits": 4,
            "dtype": "normal",
            "blocksize": 64,
            "scheme": "block",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.0,
            "rotation": 0,
        },
        "label": "normal4 b64 rotation=0",
        "key": "12d99a8409f7a89c8454076f6c23e42ba4444a198f284c30591b1556234f2824",
    },
    {
        "quant": {"method": "checkpoint", "bits": 4},
        "model": vars(LOCAL),
        "eval": None,
        "canonical": {"method": "checkpoint", "bits": 4},
        "label": "as stored, 4-bit",
        "key": "530833f2cc0bfdf32cd07ea2a0e156c4bd7ec67d19aa302e14a4f90eea713a80",
    },
    {
        "quant": {"method": "ggml", "ggml_type": "q4_K"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "ggml", "bits": 4, "ggml_type": "q4_K"},
        "label": "ggml q4_K",
        "key": "a4c9318527b3a588e55a8df0e5f010cd44ffcc4db309fbec7a1b427bfaa8ac9d",
    },
    {
        "quant": {"method": "ggml", "recipe": "Q5_K_M"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "ggml", "bits": 5, "recipe": "Q5_K_M"},
        "label": "ggml Q5_K_M",
        "key": "06f63e9bc4909702cfef1d85d34b47d76d67baf1f7ab4b7533dbd14cc6b5de3a",
    },
    {
        "quant": {"method": "awq", "bits": 4, "dtype": "int", "blocksize": 128, "zero_point": True},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "awq",
            "bits": 4,
            "dtype": "int",
            "blocksize": 128,
            "scheme": "group",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.0,
            "zero_point": True,
            "clip": True,
        },
        "label": "awq int4 g128 asymmetric clipped",
        "key": "e15a45871c90196530b5eb92f5d69f9b205ad88f10cbeada0c2427c2b3c8c470",
    },
    {
        "quant": {"method": "awq", "bits": 3, "dtype": "normal", "clip": False},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "awq",
            "bits": 3,
            "dtype": "normal",
            "blocksize": 64,
            "scheme": "group",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.0,
        },
        "label": "awq normal3 g64",
        "key": "4a0b7e239d2060601294b4e5231090aaf4bc71e234cf6633e10704daf90bc4c5",
    },
    {
        "quant": {"bits": 3, "dtype": "lloyd", "weighting": "activation"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "blockwise",
            "bits": 3,
            "dtype": "lloyd",
            "blocksize": 64,
            "scheme": "block",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.0,
            "weighting": "activation",
        },
        "label": "lloyd3 b64 activation-weighted",
        "key": "5b0665327e7cb84c34a1c5b274c97291bca703752eb44a3833e72ce3ba361360",
    },
    {
        "quant": {"bits": 4, "dtype": "int", "outlier_fraction": 0.02, "outlier_criterion": "activation"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "blockwise",
            "bits": 4,
            "dtype": "int",
            "blocksize": 64,
            "scheme": "block",
            "absmax_dtype": "float16",
            "center": False,
            "outlier_fraction": 0.02,
            "outlier_criterion": "activation",
        },
        "label": "int4 b64 outliers 0.02 by activation",
        "key": "73e8997709d742dbafed11ef596a14e1c3d10b51724bb919b1c6989ceb318f4b",
    },
    {
        "quant": {"method": "llm_int8"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "llm_int8", "bits": 8},
        "label": "llm_int8",
        "key": "c9b0b752ec472144e2bac70199bfd6361e350b5b798c40e212c0e659bf9cf31e",
    },
    {
        "quant": {"method": "llm_int8", "threshold": 5},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "llm_int8", "bits": 8, "threshold": 5.0},
        "label": "llm_int8 threshold 5",
        "key": "636ee296941e0c72223d8ad7bba3299aa514a696b2c23a394214f780e5488b7e",
    },
    {
        "quant": {"method": "mixed", "budget": 4.25, "dtype": "int"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "mixed",
            "bits": 4,
            "budget": 4.25,
            "dtype": "int",
            "blocksize": 64,
            "scheme": "block",
            "absmax_dtype": "float16",
            "center": False,
            "recipe_version": "1",
        },
        "label": "mixed int 4.25 b64",
        "key": "87d77c2cca45a399477bf939d63a7c8aa571af74247a527e7e79661a3a872a27",
    },
    {
        "quant": {
            **{"method": "mixed", "budget": 3.6, "dtype": "normal", "candidates": "2+3+8"},
            **{"scheme": "group", "blocksize": 32},
        },
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            "method": "mixed",
            "bits": 3,
            "budget": 3.6,
            "candidates": "2+3+8",
            "dtype": "normal",
            "blocksize": 32,
            "scheme": "group",
            "absmax_dtype": "float16",
            "center": False,
            "recipe_version": "1",
        },
        "label": "mixed normal 3.6 g32 candidates=2+3+8",
        "key": "2dd99620457a2e253151d20d969c98b15ea65f948fbd1d5bf4a55635b85b3aee",
    },
    {
        "quant": {"method": "hqq", "bits": 4},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "hqq", "bits": 4, "blocksize": 64},
        "label": "hqq4 g64",
        "key": "b5b297926ae69f7d903c994e7c90571ce1113e39dfd305a921e3eb9e419a3b06",
    },
    {
        "quant": {"method": "hqq", "bits": 2, "blocksize": "row"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "hqq", "bits": 2, "blocksize": -1},
        "label": "hqq2 row",
        "key": "e2befabb58f47c91a2fcc23b3a20a96dbe97c0ae07f962da1960915536c9640a",
    },
    {
        "quant": {"method": "block_float", "format": "nvfp4"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "block_float", "bits": 4, "format": "nvfp4"},
        "label": "nvfp4",
        "key": "191497e91dd1bb56997b24c44d48d46842911af66a299cdf0be7f0c627f21b96",
    },
    {
        "quant": {"method": "block_float", "format": "mxfp8_e5m2", "scale_rounding": "ceil"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {"method": "block_float", "bits": 8, "format": "mxfp8_e5m2", "scale_rounding": "ceil"},
        "label": "mxfp8_e5m2 scale-ceil",
        "key": "68cae8a0f5a57bfd24f69699a893b95ea5dd9f6a54deda323ce235dd0b90a6d2",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "perplexity", "name": "jargon", "window": 512, "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32", "bos": "each"},
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "88629057c94ba344ed79a6e628899ef979ae4ee92851b7fe22000c7be2a6bd0a",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "perplexity", "name": "jargon", "window": 512, "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32", "bos": "none"},
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "91916f4b0866d198983dcd329ffa2aa2413352b2436a5e49830a5932c16321e2",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "task", "name": "own", "version": "1.0", "limit": 4, "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32", "definition": "d" * 64},
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "ef5555604420daad160843f7593c5ca8745920b62da6b6b863e4f27bb7b3082c",
    },
    {
        "quant": {"bits": 3, "dtype": "int"},
        "model": vars(HUB),
        "eval": {
            **{"kind": "agreement", "name": "jargon_agreement", "window": 512, "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32"},
        },
        "canonical": {
            **{"method": "blockwise", "bits": 3, "dtype": "int", "blocksize": 64, "scheme": "block"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
        },
        "label": "int3 b64",
        "key": "0eecdbfa58727ffbdc8c29f6aa6de7244232129526ff5d23f64be4e1a7c29f87",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "outliers", "name": "jargon_outliers", "window": 512, "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32"},
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "de629ba5acb25978e6380e19ce26d7fb21a205a613ec965b7ea88f392ad13e01",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "latency", "name": "jargon_latency", "dataset": "sha256:" + "c" * 64},
            **{
                "compute_dtype": "storage",
                "device": "NVIDIA H100 80GB HBM3",
                "attention": "sdpa",
                "execution": "graph",
            },
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "1d5ae16c88ee82744e37a8fca3977d1dc107a89331838de33883d2a9b45ed1b7",
    },
    {
        "quant": {"bits": 3, "dtype": "int"},
        "model": vars(HUB),
        "eval": {
            **{"kind": "latency", "name": "jargon_latency", "dataset": "sha256:" + "c" * 64},
            **{"compute_dtype": "float32", "device": "cpu (AMD EPYC 7B13)", "attention": "eager"},
        },
        "canonical": {
            **{"method": "blockwise", "bits": 3, "dtype": "int", "blocksize": 64, "scheme": "block"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
        },
        "label": "int3 b64",
        "key": "b7d3794d8283edd226467319beeced734c8e2a9a4bb743760fb5073c6dc29b02",
    },
    {
        "quant": {"bits": 16},
        "model": vars(HUB),
        "eval": {
            **{"kind": "sensitivity", "name": "wikitext2_train_16x2048_seed1_sensitivity", "version": "1.1"},
            **{"window": 2048, "limit": 32768, "dataset": "sha256:" + "c" * 64, "compute_dtype": "storage", "seed": 1},
        },
        "canonical": {"method": "baseline", "bits": 16},
        "label": "16-bit",
        "key": "d589fd682b478a276304d338407de6fa84589ec75cc2327dc5883d4445fc9fda",
    },
    {
        "quant": {"method": "gptq", "bits": 2, "dtype": "int", "zero_point": True, "blocksize": "row"},
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "gptq", "bits": 2, "dtype": "int", "blocksize": -1, "scheme": "group"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
            **{"zero_point": True},
        },
        "label": "gptq int2 row asymmetric",
        "key": "04bfc5edd08db3b0eb6d589a347e0a97b957dd2ebff041c036585ed859e812be",
    },
    {
        "quant": {
            "method": "gptq",
            "bits": 3,
            "dtype": "quantile",
            "blocksize": 64,
            "act_order": True,
            "group_scales": "reference",
        },
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "gptq", "bits": 3, "dtype": "quantile", "blocksize": 64, "scheme": "group"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
            **{"act_order": True, "group_scales": "reference"},
        },
        "label": "gptq quantile3 g64 act_order reference-scales",
        "key": "fc9e929e25f2b63c882a5a761d90ba25df730f4ff6c6a4b51b1415419604ab55",
    },
    {
        "quant": {
            "method": "gptq",
            "bits": 4,
            "dtype": "int",
            "blocksize": 128,
            "act_order": True,
            "static_groups": True,
        },
        "model": vars(HUB),
        "eval": None,
        "canonical": {
            **{"method": "gptq", "bits": 4, "dtype": "int", "blocksize": 128, "scheme": "group"},
            **{"absmax_dtype": "float16", "center": False, "outlier_fraction": 0.0},
            **{"act_order": True, "static_groups": True},
        },
        "label": "gptq int4 g128 act_order static_groups",
        "key": "353f0b38b71ef070984482092229c7e9aaa68a66fb50115b133ce6bd48a5c3e0",
    },
]


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


def spec_of_entry(quant: Mapping[str, Any]) -> Spec:
    """The spec of an entry's axis values (JSON has lists where a spec has tuples)."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in quant.items()}
    if "method" in values:
        return spec_of(values)
    return QuantSpec(**values)


def measured_by(entry: Mapping[str, Any]) -> Cell | Measurement:
    cell = Cell(model=ModelRef(**entry["model"]), quant=spec_of_entry(entry["quant"]))
    if entry["eval"] is None:
        return cell
    values = dict(entry["eval"])
    return Measurement(cell=cell, eval=EvalSpec(**values | {"source": source_from_dict(values.get("source", {}))}))


@pytest.mark.parametrize("entry", PINNED + LATER, ids=lambda e: f"{e['label']}-{e['key'][:6]}")
def test_a_pinned_entry_is_what_it_always_was(entry: Mapping[str, Any]) -> None:
    spec = spec_of_entry(entry["quant"])
    found = {"canonical": spec.canonical(), "label": spec.label, "key": measured_by(entry).key}
    assert found == {name: entry[name] for name in found}
    assert spec_from_canonical(entry["canonical"]) == spec


def test_every_entry_of_a_door_and_every_axis_has_a_pinned_key() -> None:
    specs = [spec_of_entry(entry["quant"]) for entry in PINNED + LATER]
    evals = [m.eval for m in map(measured_by, PINNED + LATER) if isinstance(m, Measurement)]
    blockwise = [spec for spec in specs if isinstance(spec, QuantSpec) and not spec.is_baseline]
    assert {spec.method for spec in specs} == set(METHODS)
    assert {"file" if spec.codebook else spec.dtype for spec in blockwise} == set(DTYPES)
    assert {spec.scheme for spec in blockwise} == set(get_args(Scheme))
    assert {spec.absmax_dtype for spec in blockwise} == set(get_args(AbsmaxDType))
    assert {spec.subnormals for spec in blockwise} - {None} == set(get_args(Subnormals))
    assert {spec.dynamic_interval for spec in blockwise} - {None} == set(get_args(DynamicInterval))
    assert {spec.kind for spec in evals} == set(EVALUATORS)
    assert {spec.compute_dtype for spec in evals} == set(COMPUTE_DTYPES)
    assert {spec.bos or "first" for spec in evals} == set(BOS)
    assert {spec.definition is None for spec in evals} == {True, False}
    values = {name: {canonical_json({name: spec.axis_values().get(name)}) for spec in specs} for name in axes()}
    assert [name for name, found in values.items() if len(found) < 2] == []  # an axis that no entry moves


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
