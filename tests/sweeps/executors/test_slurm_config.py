"""What a job asks for: keys are checked, and shapes follow from a model's size."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.errors import UserError
from sweeps.executors.slurm.settings import SlurmSettings, parse_time
from sweeps.study.cell import ModelRef


def model(params: int) -> ModelRef:
    return ModelRef(family="f", name="m", params=params, path="/m", weights_hash="0" * 64)


@pytest.mark.parametrize(
    ("value", "minutes"),
    [(90, 90), ("90", 90), ("02:00:00", 120), ("1-00:00:00", 1440), ("1-12", 2160), ("2-01:30", 2970), ("00:01:01", 2)],
)
def test_a_walltime_is_read_as_slurm_writes_it(value: object, minutes: int) -> None:
    assert parse_time(value) == minutes


@pytest.mark.parametrize("value", ["abc", "", 0, "00:00:30", -5, "1:2:3:4", True, "01:30", 1.5])
def test_a_walltime_that_can_be_misread_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"executor\.time="):
        parse_time(value)


@given(st.integers(0, 6), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_days_hours_minutes_and_seconds_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    text = f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
    if total < 60:
        with pytest.raises(UserError):
            parse_time(text)
    else:
        assert parse_time(text) == -(-total // 60)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("gpus", -1, "auto, or a whole number of at least 0"),
        ("gpus", "many", "auto, or a whole number of at least 0"),
        ("cpus", 0, "a whole number of at least 1"),
        ("mem_gb", 0, "auto, or a number of at least 0.25"),
        ("cells_per_job", 0, "auto, or a whole number of at least 1"),
        ("cells_per_job", True, "auto, or a whole number of at least 1"),
        ("requeues", -1, "a whole number of at least 0"),
        ("max_parallel", 1.5, "a whole number of at least 1"),
        ("code", "live", "one of snapshot, checkout"),
    ],
)
def test_a_bad_key_is_named_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        SlurmSettings.from_config({key: value})
    assert str(error.value) == f"executor.{key}={value!r} is not valid: {allowed}"


def test_gpus_follow_from_the_weights_and_one_may_say_otherwise() -> None:
    config = SlurmSettings()
    needed = {p: config.shape(model(p), "cuda", 0, {}).gpus for p in (70_000_000, 13 * 10**9, 66 * 10**9, 176 * 10**9)}
    assert list(needed.values()) == [1, 1, 2, 5]
    assert config.shape(model(176 * 10**9), "cuda", 0, {"gpus": 8}).gpus == 8
    assert SlurmSettings(gpus=2).shape(model(70_000_000), "cuda", 0, {}).gpus == 2
    assert config.shape(model(70_000_000), "cpu", 0, {}).gpus == 0


def test_memory_follows_from_the_weights_and_one_may_say_otherwise() -> None:
    config = SlurmSettings()
    small, large = (config.shape(model(p), "cuda", 0, {}).mem_gb for p in (10**9, 13 * 10**9))
    # Loading and the originals that are kept: four bytes per parameter besides what any job needs.
    assert large - small == pytest.approx(4 * 12e9 / 2**30, abs=1)
    assert config.shape(model(10**9), "cuda", 0, {"mem_gb": 20}).mem_gb == 20


def test_each_rung_of_the_ladder_doubles_memory_and_gpus() -> None:
    config = SlurmSettings()
    shapes = [config.shape(model(13 * 10**9), "cuda", rung, {}) for rung in range(4)]
    assert [s.mem_gb / shapes[0].mem_gb for s in shapes] == [1, 2, 4, 8]
    assert [s.gpus for s in shapes] == [1, 2, 4, 8]
    assert [s.rung for s in shapes] == [0, 1, 2, 3]
    on_cpu = [config.shape(model(10**9), "cpu", rung, {}) for rung in (0, 1)]
    assert on_cpu[1].mem_gb == 2 * on_cpu[0].mem_gb
    assert on_cpu[1].gpus == 0


@pytest.mark.parametrize("name", ["job-name", "job_name", "dependency", "array", "no-requeue", "time"])
def test_extra_options_can_not_undo_what_makes_a_launch(name: str) -> None:
    with pytest.raises(UserError, match=r"executor\.extra="):
        SlurmSettings.from_config({"extra": {name: 1}})


def test_an_unquoted_time_of_yaml_is_seen_through() -> None:
    with pytest.raises(UserError, match="in quotes"):
        parse_time(36000)
