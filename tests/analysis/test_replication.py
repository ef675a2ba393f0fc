"""docs/replication says what its results say."""

from __future__ import annotations

import json

import pytest

from analysis.__main__ import main
from analysis.findings.judging import judge_inputs
from analysis.findings.text import to_markdown
from sweeps.results.inputs import read_inputs
from tests import ROOT

KEPT = ROOT / "docs" / "replication"


def test_the_findings_are_those_of_the_kept_results() -> None:
    found = judge_inputs(read_inputs([KEPT / "results.parquet"]))
    said = json.loads((KEPT / "findings.json").read_text())["findings"]
    assert len(found) == len(said) > 50
    for finding, one in zip(found, said, strict=True):
        now = finding.as_dict()
        assert {k: v for k, v in now.items() if not isinstance(v, float)} == {
            k: v for k, v in one.items() if not isinstance(v, float)
        }
        numbers = {k: v for k, v in one.items() if isinstance(v, float)}
        assert {k: v for k, v in now.items() if isinstance(v, float)} == pytest.approx(numbers, rel=1e-6, abs=1e-9)
    table = to_markdown(found)
    for page in (KEPT / "findings.md", KEPT / "README.md", ROOT / "README.md"):
        assert table in page.read_text(), page


def test_the_figures_of_the_pages_are_there_and_one_is_made_again(tmp_path: object) -> None:
    name = "fig13_bit_scaling-commoncrawl_sample_loss.svg"
    made = ["figures", str(KEPT / "results.parquet"), "--columns", "2", "--formats", "svg", "--to", str(tmp_path)]
    assert main([*made, "--names", "fig13_bit_scaling"]) == 0
    again = (ROOT / str(tmp_path) / name).read_text()
    assert again == (KEPT / "figures" / name).read_text()
