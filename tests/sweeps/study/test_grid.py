"""A sweep is a union of products; what is left out keeps its reason; what can't be meant is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.errors import SpecError
from sweeps.errors import UserError
from sweeps.study.cell import ModelRef
from sweeps.study.grid import expand

MODELS = [
    ModelRef(family="neox", name=f"neox-{s}", params=n, path=f"/{s}", weights_hash=s * 64)
    for s, n in (("a", 1), ("b", 2))
]


def test_lists_are_axes_and_scalars_constants() -> None:
    grid = expand([{"bits": [3, 4], "dtype": ["int", "float"], "blocksize": 64}], MODELS)
    assert len(grid.cells) == 2 * 2 * 2
    assert {c.quant.blocksize for c in grid.cells} == {64}


def test_a_union_has_every_cell_once() -> None:
    grid = expand([{"bits": [3, 4], "dtype": "int"}, {"bits": [4, 5], "dtype": "int"}, {"bits": 16}], MODELS)
    assert len(grid.cells) == 2 * 4
    assert grid.duplicates == 2


def test_linked_axes_go_together() -> None:
    grid = expand([{"dtype": "float", "linked": {"bits": [3, 4], "exponent_bits": [2, 1]}}], MODELS[:1])
    assert [(c.quant.bits, c.quant.exponent_bits) for c in grid.cells] == [(3, 2), (4, 1)]


def test_an_impossible_combination_is_excluded_with_its_reason() -> None:
    grid = expand([{"bits": [3, 4], "dtype": "float", "exponent_bits": [2, 3]}], MODELS)
    assert len(grid.cells) == 2 * 3
    assert grid.excluded_counts() == {"exponent_bits=3 can't be combined with bits=3": 2}


def test_rules_exclude_with_the_users_reason() -> None:
    rule = {"when": {"dtype": "dynamic", "bits": [3, "4"], "model": "neox-a"}, "reason": "known to be bad"}
    grid = expand([{"bits": [3, 4, 5], "dtype": ["dynamic", "int"]}], MODELS, [rule])
    assert len(grid.cells) == 12 - 2
    assert grid.excluded_counts() == {"known to be bad": 2}


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [
        ({"bits": 9, "dtype": "int"}, "bits", "9"),
        ({"bits": [3, 9], "dtype": "int"}, "bits", "9"),
        ({"bits": 4, "dtype": "itn"}, "dtype", "itn"),
        ({"bits": 4, "dtype": "int", "blocksize": 0}, "blocksize", "0"),
        ({"bits": [3, 4], "dtype": "float", "exponent_bits": [2, 5]}, "exponent_bits", "5"),
        ({"bits": 4, "dtype": ["int", "float"], "exponent_bits": 4}, "exponent_bits", "4"),
        ({"bits": 4, "dtype": "int", "outlier_fraction": 1.5}, "outlier_fraction", "1.5"),
        ({"bits": 4, "dtype": "int", "method": "bockwise"}, "method", "bockwise"),
        ({"bits": True, "dtype": "int"}, "bits", "True"),
        ({"bits": 4}, "dtype", "None"),
    ],
)
def test_a_wrong_value_is_refused_by_key_and_value(block: dict[str, Any], key: str, value: str) -> None:
    with pytest.raises(SpecError, match=f"sweep.quant.0.{key}=.*{value}"):
        expand([block], MODELS)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"bitz": 4}, "Did you mean bits"),
        ({"bits": []}, "at least one value"),
        ({"bits": [3], "linked": {"bits": [3]}}, "both alone and in `linked`"),
        ({"linked": {"bits": [3, 4], "exponent_bits": [2]}}, "equal length"),
    ],
)
def test_a_malformed_block_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand([block], MODELS)


def test_a_rule_of_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UserError, match="blocksize"):
        expand([{"bits": 16}], MODELS, [{"when": {"blocksiz": 64}, "reason": "x"}])


axis = st.fixed_dictionaries(
    {
        "bits": st.lists(st.integers(2, 8), min_size=1, max_size=4),
        "dtype": st.lists(st.sampled_from(["int", "float", "dynamic", "quantile", "normal"]), min_size=1, max_size=3),
        "blocksize": st.lists(st.sampled_from([32, 64, None]), min_size=1, max_size=3),
        "center": st.booleans(),
    }
)


@given(st.lists(axis, min_size=1, max_size=4))
def test_expansion_is_a_set_of_cells_whatever_the_order(blocks: list[dict[str, Any]]) -> None:
    grid = expand(blocks, MODELS)
    keys = [c.key for c in grid.cells]
    assert len(keys) == len(set(keys))
    product = sum(len(b["bits"]) * len(b["dtype"]) * len(b["blocksize"]) for b in blocks) * len(MODELS)
    assert len(keys) + grid.duplicates == product
    assert set(keys) == {c.key for c in expand(blocks[::-1], MODELS[::-1]).cells}


def test_a_data_type_from_a_file_is_a_value_like_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "codebooks": {"3": [-1, 0, 1], "4": [-1, -0.5, 0, 1]}}')
    file = {"file": str(path)}
    found = expand([{"bits": [3, 4, 5], "dtype": ["int", file]}, {"bits": 3, "dtype": file}], MODELS[:1])
    assert [c.quant.label.split(" codebook ")[0] for c in found.cells] == [
        *("int3 b64", "mine3 b64", "int4 b64", "mine4 b64", "int5 b64"),
    ]
    # The file has no values for 5 bits, which is a reason; none for any bits of a block is a mistake.
    assert [e.reason for e in found.excluded] == [f"dtype={file} can't be combined with bits=5"]
    assert found.duplicates == 1
    with pytest.raises(SpecError, match="with bits=7 the file needs values for them; it has them for 3, 4"):
        expand([{"bits": 7, "dtype": file}], MODELS[:1])
