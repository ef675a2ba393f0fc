"""Verdicts: each by its adjusted p-value, none more often wrong than it says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from analysis.findings.finding import Finding, Verdict, settled
from analysis.findings.text import effect_text


def finding(holds: float, fails: float, *, headline: bool = True) -> Finding:
    return Finding(
        claim="c",
        statement="s",
        source="5.1",
        scope="all",
        metric="x_loss",
        p_holds=holds,
        p_fails=fails,
        headline=headline,
        needs="more",
    )


def test_headline_findings_are_adjusted_by_holm_and_the_others_by_benjamini_and_hochberg() -> None:
    p = (0.01, 0.02, 0.03)
    heads, rest = (settled([finding(x, 1, headline=h) for x in p]) for h in (True, False))
    assert [f.p_adjusted for f in heads] == pytest.approx([0.03, 0.04, 0.04])
    assert [f.p_adjusted for f in rest] == pytest.approx([0.03, 0.03, 0.03])
    both = settled([finding(0.03, 1), finding(0.03, 1, headline=False)])
    assert [f.p_adjusted for f in both] == [0.03, 0.03]  # two families


def test_a_verdict_is_that_of_the_small_p_value_and_says_what_it_needs_only_where_it_can_not_tell() -> None:
    said = settled([finding(0.001, 1), finding(1, 0.001), finding(0.04, 1), finding(0.3, 0.9)])
    assert [f.verdict for f in said] == [Verdict.HOLDS, Verdict.FAILS, Verdict.UNKNOWN, Verdict.UNKNOWN]
    assert [bool(f.needs) for f in said] == [False, False, True, True]
    better_by_less_than_the_margin, never_measured = finding(0.01, 1e-9), finding(np.nan, np.nan)
    assert settled([better_by_less_than_the_margin])[0].verdict is Verdict.HOLDS
    assert settled([finding(0.0, 0.04), never_measured])[0].verdict is Verdict.HOLDS
    found = settled([never_measured])[0]
    assert found.verdict is Verdict.UNKNOWN
    assert found.needs == "more"


def test_a_finding_is_json() -> None:
    given = json.loads(json.dumps(finding(0.001, np.inf).as_dict(), allow_nan=False))
    assert (given["verdict"], given["effect"], given["p_fails"]) == ("can't tell", None, "inf")


def test_no_p_value_is_said_to_be_zero() -> None:
    (found,) = settled([replace(finding(0.0, 1), effect=0.5, models=3, unit="nats/token better")])
    assert effect_text(found) == "+0.5000 nats/token better, 3 models, p < 0.0001"
    assert effect_text(replace(found, p_adjusted=0.0431)).endswith(", p = 0.043")
