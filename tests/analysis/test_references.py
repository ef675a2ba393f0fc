"""Published scores: each is cited, each cell of one can exist; ours agree, are off, or unknown for a stated reason."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.references import Agreement, check_references, references, references_text
from analysis.report.sections import references_section
from kbit.spec import axes, spec_of
from tests import ROOT
from tests.analysis.studies import Study

RTN4 = {"method": "blockwise", "bits": 4, "dtype": "int", "scheme": "group", "blocksize": "row", "zero_point": True}


def measurement(cell: dict[str, Any], value: float, **more: Any) -> pd.DataFrame:
    """One measured row of OPT-125M on WikiText-2, under the protocol of GPTQ's paper."""
    spec = spec_of(cell)
    about = {"key": spec.label, "label": spec.label, "status": "done", "family": "opt", "model": "opt-125m"}
    about |= {"model_id": "facebook/opt-125m", "params": 125239296, "eval": "wikitext2", "window": 2048, "limit": None}
    about |= {"dataset": "hub:Salesforce/wikitext@abc", "num_fewshot": 0, "calibration": None, "eval_bos": None}
    row = {**dict.fromkeys(axes()), **spec.axis_values(), "method": spec.method, **about, **more}
    return pd.DataFrame([{"metrics": {"perplexity": value, "loss": np.log(value)}, **row}])


def test_each_score_is_cited_with_a_tolerance_and_a_cell_that_can_exist() -> None:
    known = references()
    assert len(known) > 300
    for column in ("paper", "table", "address", "read"):
        assert (known[column].str.len() > 3).all()
    assert known["address"].str.startswith("https://").all()
    assert ((known["tolerance"] > 0) & (known["tolerance"] <= known["reference"] * 0.51)).all()
    for cell in known["cell"].dropna():
        assert spec_of(cell).axis_values()["bits"] == cell["bits"]
    assert (known["cell"].notna() <= known["params"].notna()).mean() > 0.95
    assert 'references.json"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("cell", "value", "verdict"),
    [
        ({"bits": 16}, 27.66, Agreement.AGREES),
        ({"bits": 16}, 28.5, Agreement.OFF),
        ({"bits": 16}, float("inf"), Agreement.OFF),
        (RTN4, 37.9, Agreement.AGREES),
        (RTN4, 31.1, Agreement.OFF),
        ({**RTN4, "bits": 3}, 1000.0, Agreement.AGREES),
        ({**RTN4, "bits": 3}, 400.0, Agreement.OFF),
    ],
)
def test_a_score_agrees_within_the_stated_tolerance(cell: dict[str, Any], value: float, verdict: Agreement) -> None:
    found = check_references(measurement(cell, value))
    assert set(found["verdict"]) == {verdict}
    assert set(found["paper"]) >= {"Frantar et al., GPTQ (ICLR 2023)"}
    assert found["difference"].tolist() == pytest.approx((value - found["reference"]).tolist())
    assert f"{verdict}: published" in references_text(found)[0]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"window": 512}, "window 512 rather than 2048"),
        ({"limit": 4096}, "limit 4096 rather than none"),
        ({"dataset": "hub:other/text@abc"}, "data hub:other/text@abc rather than hub:Salesforce/wikitext"),
        ({"eval_bos": "each"}, "beginning-of-sequence token each"),
    ],
)
def test_what_was_measured_otherwise_is_unknown_and_says_why(odd: dict[str, Any], said: str) -> None:
    found = check_references(measurement({"bits": 16}, 27.65, **odd))
    assert set(found["verdict"]) == {Agreement.UNKNOWN}
    assert said in found["reason"].iloc[0]


def test_only_the_same_model_and_quantization_are_compared() -> None:
    def known(**more: Any) -> int:
        return len(check_references(measurement({"bits": 16}, 27.65, **more), known_only=True))

    assert known() == known(model_id="/models/opt-125m/") == 2
    assert known(model_id="/models/opt-125m", params=99) == 0
    assert known(model_id="/models/my-opt") == 0
    other = measurement({**RTN4, "clip": False, "blocksize": 64}, 30.0)
    assert check_references(other)["verdict"].tolist() == [Agreement.UNKNOWN]
    assert "no published score" in check_references(other)["reason"].iloc[0]


def test_calibrated_methods_are_compared_if_they_calibrated_on_as_much() -> None:
    gptq = {**RTN4, "method": "gptq"}
    as_much = json.dumps({"samples": 128, "length": 2048, "dataset": "sha256:0"})
    assert set(check_references(measurement(gptq, 31.3, calibration=as_much))["verdict"]) == {Agreement.AGREES}
    less = check_references(measurement(gptq, 31.3, calibration=as_much.replace("128", "8")))
    assert set(less["verdict"]) == {Agreement.UNKNOWN}
    assert "calibrated on samples 8 rather than 128" in less["reason"].iloc[0]


def test_a_study_without_published_scores_is_unknown_as_a_whole(study: Study) -> None:
    found = check_references(study.long)
    assert len(found) == len(study.long)
    assert references_text(found) == [
        f"{len(found)} unknown: no published score of this model and method is known here"
    ]
    assert check_references(study.long, known_only=True).empty
    assert check_references(study.long.iloc[:0]).empty
    assert check_references(pd.DataFrame()).empty


def test_the_command_says_what_is_known_and_tables_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out = str(ROOT / "tests" / "data" / "earlier_results")
    assert main(["references", out]) == 0
    assert "unknown: no published score" in capsys.readouterr().out
    assert main(["table", out, "--by", "model,label", "--columns", "", "--metrics", "loss", "--top", "2"]) == 0
    assert "The first 2 of" in capsys.readouterr().out
    assert main(["table", out, "--where", "{bits"]) == 2
    assert "where='{bits' is not valid" in capsys.readouterr().err


def test_a_report_has_a_section_of_what_was_published_and_none_without(study: Study) -> None:
    found = references_section(pd.concat([measurement({"bits": 16}, 27.66), measurement(RTN4, 31.1)]))
    assert found is not None
    assert found.intro.startswith("2 agree, 2 off.")
    assert set(found.tables[0].frame["verdict"]) == {Agreement.AGREES, Agreement.OFF}
    assert found.tables[0].frame["address"].str.startswith("https://").all()
    assert references_section(study.long) is None
