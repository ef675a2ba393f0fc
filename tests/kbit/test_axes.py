"""Axes are declared once: every list of axes follows from the declarations, and a later axis changes no key."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest

from kbit.axes import VARIED, Axis, axes_of, axis
from kbit.spec import METHODS, QuantSpec, Spec, axes, spec_of
from sweeps.config import BlockConfig
from sweeps.store.schema import arrow_schema, columns
from sweeps.study.cell import Cell, ModelRef, axis_names
from sweeps.study.grid import block_axes
from sweeps.tracking.runs import alike_in

MODEL = ModelRef(family="pythia", name="70m", hub_id="EleutherAI/pythia-70m", commit="a" * 40)


@dataclass(frozen=True, kw_only=True)
class Later(QuantSpec):
    """A spec with axes that came later."""

    act_order: bool = axis(False, type="bool", doc="columns in another order", neutral=False, since=2)
    damping: float = axis(0.01, type="float64", doc="of the diagonal", neutral=0.01, since=3)
    samples: int = axis(128, type="int64", doc="varied by figures", since=2)


def test_a_later_axis_at_its_neutral_value_changes_no_key() -> None:
    known = QuantSpec(bits=4, dtype="int").canonical()
    later = Later(bits=4, dtype="int").canonical()
    assert later == {**known, "samples": 128}
    assert Later(bits=4, dtype="int", act_order=True).canonical() == {**later, "act_order": True}


def test_specs_that_differ_in_a_later_axis_have_other_labels() -> None:
    given: list[dict[str, Any]] = [{}, {"act_order": True}, {"damping": 0.1}]
    assert [Later(bits=4, dtype="int", **more).label for more in given] == [
        "int4 b64 samples=128",
        "int4 b64 act_order samples=128",
        "int4 b64 damping=0.1 samples=128",
    ]


@pytest.mark.parametrize("name", axes())
def test_each_axis_is_wherever_axes_are_listed(name: str) -> None:
    assert name in axis_names()
    assert name in Cell(model=MODEL, quant=QuantSpec(bits=4, dtype="int")).axes()
    assert name in alike_in([Cell(model=MODEL, quant=QuantSpec(bits=4, dtype="int")).axes()])
    assert name in arrow_schema().names
    assert name in block_axes() or name == "codebook"  # a file brings its codebook itself
    if name in block_axes():
        assert name in BlockConfig.__dataclass_fields__  # type: ignore[attr-defined]
    column = next(c for c in columns() if c.name == name)
    assert (column.type, column.doc, column.unit) == (axes()[name].type, axes()[name].doc, axes()[name].unit)
    assert column.doc


MXFP4 = {"method": "block_float", "format": "mxfp4"}
GGML = {"method": "ggml"}
MIXED = {"method": "mixed", "budget": 4.25, "dtype": "int"}
GPTQ = {"method": "gptq", "bits": 4, "dtype": "int", "blocksize": 32}


@pytest.mark.parametrize("name", list(axes()))
def test_each_axis_tells_specs_apart_or_is_varied(name: str) -> None:
    """Two specs that differ in one axis alone have different labels."""
    e2 = {"dtype": "float", "exponent_bits": 2}
    values: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "bits": ({}, {"bits": 5}),
        "dtype": ({}, {"dtype": "normal"}),
        "blocksize": ({}, {"blocksize": None}),
        "scheme": ({}, {"scheme": "group"}),
        "exponent_bits": ({"dtype": "float"}, e2),
        "subnormals": (e2, {**e2, "subnormals": "bnb"}),
        "dynamic_interval": ({"dtype": "dynamic"}, {"dtype": "dynamic", "dynamic_interval": "paper"}),
        "absmax_dtype": ({}, {"absmax_dtype": "nested"}),
        "center": ({}, {"center": True}),
        "outlier_fraction": ({}, {"outlier_fraction": 0.02}),
        "codebook": ({"dtype": "mine", "codebook": (-1.0, 1.0)}, {"dtype": "mine", "codebook": (-1.0, 0.5)}),
        "zero_point": ({}, {"zero_point": True}),
        "clip": ({}, {"clip": True}),
        "rotation": ({}, {"rotation": 0}),
        "weighting": ({"dtype": "lloyd"}, {"dtype": "lloyd", "weighting": "activation"}),
        "outlier_criterion": (
            {"outlier_fraction": 0.1},
            {"outlier_fraction": 0.1, "outlier_criterion": "activation"},
        ),
        "act_order": ({**GPTQ}, {**GPTQ, "act_order": True}),
        "static_groups": ({**GPTQ}, {**GPTQ, "static_groups": True}),
        "group_scales": ({**GPTQ}, {**GPTQ, "group_scales": "reference"}),
        "format": ({**MXFP4}, {**MXFP4, "format": "nvfp4"}),
        "ggml_type": ({**GGML, "ggml_type": "q4_0"}, {**GGML, "ggml_type": "q4_K"}),
        "recipe": ({**GGML, "recipe": "Q4_K_S"}, {**GGML, "recipe": "Q4_K_M"}),
        "threshold": ({"method": "llm_int8"}, {"method": "llm_int8", "threshold": 3.0}),
        "budget": (MIXED, {**MIXED, "budget": 3.25}),
        "candidates": (MIXED, {**MIXED, "candidates": "3-5"}),
        "scale_rounding": ({**MXFP4}, {**MXFP4, "scale_rounding": "ceil"}),
    }
    first, second = (spec_of(v if "method" in v else {"bits": 4, "dtype": "int", **v}) for v in values[name])
    assert first.label != second.label
    assert first.canonical() != second.canonical()


def test_a_field_that_declares_no_axis_is_refused() -> None:
    undeclared = make_dataclass("undeclared", [("forgotten", int, 0)], bases=(Spec,), frozen=True, kw_only=True)
    with pytest.raises(TypeError, match=r"'forgotten' declares no axis: write forgotten"):
        axes_of(undeclared)


def test_each_method_has_a_spec_that_names_what_runs_it() -> None:
    for name in METHODS:
        spec = METHODS[name]
        assert issubclass(spec, Spec)
        module, _, function = spec.runs.partition(":")
        assert module.startswith("kbit.methods.")
        assert function


def test_what_is_neutral() -> None:
    flag = Axis(name="flag", type="bool", doc="", neutral=False)
    assert [flag.is_neutral(v) for v in (None, False, True)] == [True, True, False]
    varied = Axis(name="varied", type="int64", doc="")
    assert varied.neutral is VARIED
    assert [varied.is_neutral(v) for v in (None, 0)] == [True, False]
