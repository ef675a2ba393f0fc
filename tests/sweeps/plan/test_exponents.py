"""What a plan says of floats: their exponent bits, and where the paper's main setting is not what it recommends."""

from __future__ import annotations

import pytest

from kbit.spec import QuantSpec
from sweeps.plan.exponents import exponent_rows
from sweeps.study.cell import Cell, ModelRef

MODEL = ModelRef(family="opt", name="125m", hub_id="facebook/opt-125m", commit="0" * 40, path=None, weights_hash=None)


def said(*specs: QuantSpec) -> str:
    return " ".join(text for _, text in exponent_rows(Cell(model=MODEL, quant=spec) for spec in specs))


@pytest.mark.parametrize(("rule", "advice"), [("paper", True), ("heuristic", False)])
def test_the_papers_main_setting_is_said_to_be_that_at_four_bits(rule: str, advice: bool) -> None:
    text = said(*(QuantSpec(bits=bits, dtype="float", exponent_bits=rule) for bits in (3, 4, 5)))
    assert text.startswith(
        "exponent bits 2 at 3, 4 bits; 3 at 5 bits" if not advice else "exponent bits 2 at 3 bits; 3 at 4, 5"
    )
    assert ("at 4 bits that is the paper's main setting" in text) == advice
    assert ("exponent_bits=heuristic (Appendix C.4) has 2 at 4" in text) == advice


def test_a_study_of_both_needs_no_advice_and_one_of_none_says_nothing() -> None:
    both = [QuantSpec(bits=4, dtype="float", exponent_bits=e) for e in (2, 3)]
    assert said(*both) == "exponent bits 2 and 3 at 4 bits"
    assert said(QuantSpec(bits=16), QuantSpec(bits=4, dtype="int")) == ""
