"""How a study is divided into W&B runs: bounded in number, with axes to group by, the same whatever came first."""

from __future__ import annotations

import errno
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeps import files
from sweeps.errors import LinkError
from sweeps.tracking import runs as runs_module
from sweeps.tracking.runs import MOST_RUNS, STATUSES, directory_id, divided, summary
from tests.sweeps.tracking.studies import MODELS, THREE, evaluation, planned


def test_a_run_is_a_quantization_with_its_axes_to_group_by() -> None:
    division = divided([planned(models=MODELS, evals=[evaluation("a"), evaluation("b")])], "here")
    assert [run.config["bits"] for run in division.runs] == [16, 3, 4]
    assert {name: division.runs[1].config[name] for name in ("sweep", "method", "dtype", "blocksize")} == {
        **{"sweep": "demo", "method": "blockwise", "dtype": "int", "blocksize": 64}
    }
    assert len({run.name for run in division.runs}) == 3
    assert sorted(division.number.values()) == [0] * 6 + [1] * 6 + [2] * 6


def test_neither_models_nor_what_a_study_tried_first_change_its_runs() -> None:
    """A study that is tried with a model and a quantization, and then grows, keeps its runs and has no others."""
    first, whole = planned(THREE[1]), planned(models=MODELS)
    small, grown = divided([first], "here"), divided([first, whole], "here")
    assert {run.id for run in small.runs} < {run.id for run in grown.runs}
    assert [run.id for run in divided([whole], "here").runs] == [run.id for run in planned_runs(whole)]
    assert {run.id for run in grown.runs} == {run.id for run in planned_runs(whole)}


def planned_runs(manifest: Any) -> Any:
    return divided([manifest], "here").runs


def test_directories_projects_and_studies_share_no_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = directory_id(tmp_path / "a"), directory_id(tmp_path / "b")
    assert first != second
    (tmp_path / "a").rename(tmp_path / "moved")
    assert directory_id(tmp_path / "moved") == first
    (tmp_path / "c").mkdir()
    places = [(planned(), first), (planned(), second), (planned(sweep="other"), first)]
    ids = [run.id for manifest, place in places for run in divided([manifest], place).runs]
    assert len(set(ids)) == len(ids) == 9


@pytest.mark.parametrize(
    ("error", "is_for_good"),
    [
        *((PermissionError(errno.EACCES, "no"), True), (OSError(errno.EROFS, "no"), True)),
        *((LinkError(errno.EPERM, "no"), True), (LinkError(errno.EIO, "no"), False)),
        *((OSError(number, "no"), False) for number in (errno.ESTALE, errno.EIO, errno.ENOSPC)),
    ],
)
def test_only_where_nothing_can_be_kept_a_directory_is_known_by_its_path(
    tmp_path: Path, error: OSError, is_for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one look its runs would be others, and stay in W&B."""
    kept = directory_id(tmp_path)

    def fail(*_: object) -> str:
        raise error

    monkeypatch.setattr(files, "PAUSES", ())
    (tmp_path / "c").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "create_exclusively", fail)
        if is_for_good:
            assert directory_id(tmp_path / "c") == directory_id(tmp_path / "c") != kept
        else:
            with pytest.raises(OSError, match="no"):
                directory_id(tmp_path / "c")
    if not is_for_good:
        monkeypatch.setattr(Path, "read_text", fail)
        with pytest.raises(OSError, match="no"):
            directory_id(tmp_path)


def test_more_quantizations_than_w_and_b_advises_share_runs() -> None:
    sizes = list(range(16, 16 + 2 * MOST_RUNS, 4))
    huge = planned({"bits": [3, 4, 5], "dtype": "int", "blocksize": sizes}, {"bits": 16})
    division = divided([huge], "here")
    assert len(huge.cells) > MOST_RUNS
    assert [(run.config["bits"], run.config["dtype"]) for run in division.runs[:3]] == [
        (3, "int"),
        (4, "int"),
        (5, "int"),
    ]
    assert len(division.runs) == 4
    assert all("blocksize" not in run.config for run in division.runs[:3])
    most = planned({"bits": [3, 4], "dtype": "int", "blocksize": sizes[: MOST_RUNS // 2]})
    assert (
        len(divided([most], "here").runs) == MOST_RUNS == len({r.config["blocksize"] for r in planned_runs(most)}) * 2
    )


def rows(*, count: int = 3, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            **{"row_id": f"r{n}", "measurement": f"m{n}", "key": f"c{n}", "model": f"neox-1.{n}", "eval": "x"},
            **{"status": "done", "metrics": [("loss", float(n))], "stderr": [("loss", 0.5)], "seconds": 2.0},
            **{"bits_per_param": 4.0, "bits_per_param_nominal": None, "total_bits": n * 8.0},
            **more,
        }
        for n in range(count)
    ]


def test_a_summary_has_each_models_values_and_their_median() -> None:
    said = summary(rows(), frozenset())
    assert [said[f"neox_1_{n}/x/loss"] for n in range(3)] == [0.0, 1.0, 2.0]
    assert (said["x/loss"], said["total_bits"], said["neox_1_2/total_bits"]) == (1.0, 8.0, 16.0)
    assert said["neox_1_0/x/loss_stderr"] == 0.5
    assert (said["done"], said["cells"], said["measurements"], said["seconds"]) == (3, 3, 3, 6.0)
    assert "x/loss_stderr" not in said
    assert "neox_1_0/bits_per_param_nominal" not in said


def test_what_counts_no_more_is_counted_apart_and_gives_no_value() -> None:
    said = summary(rows(), frozenset({"m2"}))
    assert (said["done"], said["superseded"], said["cells"], said["x/loss"]) == (2, 1, 2, 0.5)
    assert "neox_1_2/x/loss" not in said
    failed = summary(rows(status="failed", metrics=None, stderr=None), frozenset())
    assert [failed[status] for status in STATUSES] == [0, 0, 3, 0]
    assert "x/loss" not in failed


def test_no_number_and_infinity_are_said_as_json_can() -> None:
    endless = summary(rows(count=1, metrics=[("loss", math.inf), ("gain", -math.inf), ("none", math.nan)]), frozenset())
    assert (endless["neox_1_0/x/loss"], endless["x/gain"]) == ("Infinity", "-Infinity")
    assert "x/none" not in endless


def test_the_median_of_the_two_infinities_is_no_number() -> None:
    two = [row | {"metrics": [("loss", math.inf if n else -math.inf)]} for n, row in enumerate(rows(count=2))]
    assert "x/loss" not in summary(two, frozenset())
    seeds = [row | {"model": "one"} for row in two]
    assert not [name for name in summary(seeds, frozenset()) if name.endswith("/loss")]


def test_the_sizes_of_a_cell_are_those_of_whichever_of_its_rows_has_them() -> None:
    known, failed = rows(count=1)[0], rows(count=1, status="failed", metrics=None, bits_per_param=None)[0]
    for these in ([known, failed], [failed, known]):
        said = summary(these, frozenset())
        assert (said["neox_1_0/bits_per_param"], said["bits_per_param"], said["cells"]) == (4.0, 4.0, 1)


def test_names_are_of_letters_and_digits_and_two_models_never_have_one() -> None:
    alike = [replace(m, name=name) for m, name in zip(MODELS, ("neox-1.4", "neox-1_4", "neox 2"), strict=True)]
    study = planned(models=alike, evals=[evaluation("a.b"), evaluation("c")])
    division = divided([study], "here")
    assert (division.words["neox 2"], division.words["a.b"], division.words["c"]) == ("neox_2", "a_b", "c")
    stored = [row | {"model": m.label, "eval": "a.b"} for row, m in zip(rows(), alike, strict=True)]
    said = summary(stored, division.old, division.words)
    names = [name for name in said if name.endswith("/a_b/loss")]
    assert len(names) == 3 == len({said[name] for name in names})
    assert all(re.fullmatch(r"[A-Za-z0-9_/]+", name) for name in said)
    (alone,) = [name for name in summary(stored[:1], division.old, division.words) if name.endswith("/a_b/loss")]
    assert alone in names  # whatever else is measured
    before = divided([planned(models=alike[1:], evals=[evaluation("a.b"), evaluation("c")])], "here")
    assert before.digest([("r", "m")]) != division.digest([("r", "m")])  # what got another name is written again
