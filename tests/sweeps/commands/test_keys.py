"""Which key a mode obeys: one table. What a mode would ignore is refused; chosen cells are the same in every mode."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from sweeps import load_results
from sweeps.commands.keys import CHOOSING, EVERY, OBEYED, check_keys
from sweeps.commands.modes import MODES
from sweeps.config import schema, unknown_keys
from sweeps.errors import UserError
from tests.conftest import ROOT, Launch
from tests.sweeps.commands.test_run import SMALL, all_row_ids
from tests.sweeps.studies import composed, configured

VALUES: Mapping[str, str] = {
    "retry": "[failed]",
    "order": "grid",
    "budget": "12",
    "watch": "true",
    "script": "true",
    "by": "[bits]",
    "columns": "[dtype]",
    "metrics": "[loss]",
    "sort": "[bits]",
    "top": "5",
    "memory": "48GB",
    "context": "512",
    "batch": "2",
    "cell": "3fa9",
    "where": "{bits: 3}",
    "status": "failed",
    "to": "x.csv",
    "a": "3fa9",
    "b": "3fa9",
    "margins": "{loss: 0.02}",
    "format": "gguf",
    "samples": "[nats]",
    "from": "[other]",
    "prefer": "mine",
    "long": "true",
    "yes": "true",
    "undo": "true",
    "report": "false",
}
"""Keys that not every mode obeys, each with a value that asks for something."""
IGNORED = [(mode, key) for key in VALUES for mode in MODES if mode not in OBEYED[key]]


def refused(mode: str, overrides: Sequence[str]) -> str:
    arguments = [f"mode={mode}", *overrides]
    with pytest.raises(UserError) as error:
        check_keys(configured(*arguments), arguments)
    return str(error.value)


def test_values_are_put_in_as_hydra_puts_them() -> None:
    arguments = [f"{key}={value}" for key, value in VALUES.items()]
    assert configured("mode=table", *arguments) == composed("mode=table", *arguments)


def test_every_key_of_a_launch_is_in_the_table() -> None:
    written = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    groups = {name for default in written["defaults"] if isinstance(default, dict) for name in default}
    keys = {*written, *groups, *schema().__dataclass_fields__} - {"defaults", "hydra", "_self_"}
    keys = {key for key in keys if not key.startswith("override ")}
    assert keys == set(OBEYED)
    assert set(EVERY) == set(MODES)
    assert all(set(modes) <= set(MODES) for modes in OBEYED.values())
    assert set(VALUES) == {key for key, modes in OBEYED.items() if set(modes) != set(MODES)}


@pytest.mark.parametrize(("mode", "key"), IGNORED)
def test_a_key_that_a_mode_would_ignore_is_refused_with_the_modes_that_take_it(mode: str, key: str) -> None:
    said = refused(mode, [f"{key}={VALUES[key]}"])
    value = VALUES[key].strip("[]")
    modes = ", ".join(OBEYED[key])
    assert said == f"{key}={value} has no effect with mode={mode}, only with mode={modes}: leave it out"


@pytest.mark.parametrize(("mode", "key"), [(m, k) for k in VALUES for m in OBEYED[k]])
def test_a_key_that_a_mode_obeys_passes_and_so_does_one_that_asks_for_nothing(mode: str, key: str) -> None:
    check_keys(configured(f"mode={mode}", f"{key}={VALUES[key]}"), [f"{key}={VALUES[key]}"])
    nothing = [f"{k}={v}" for k, v in {"by": "null", "long": "false", "where": "null", "retry": "lost"}.items()]
    check_keys(configured(f"mode={mode}", *nothing), nothing)


@pytest.mark.parametrize("mode", MODES)
def test_a_studys_command_works_with_every_mode(mode: str) -> None:
    study = ["sweep=fig3_data_types", "path=/x", "executor=slurm", "executor.partition=gpu", "eval.limit=5", "out=r"]
    check_keys(composed(f"mode={mode}", *study), study)


@pytest.mark.parametrize(
    ("added", "unknown"),
    [
        ("+eval.limt=5", "eval.limt"),
        ("++eval.limt=5", "eval.limt"),
        ("+foo=5", "foo"),
        ("+tracking.projct=x", "tracking.projct"),
        ("+sweep.quant.1.bitz=4", "sweep.quant.1.bitz"),
        ("+models.demo.famly=x", "models.demo.famly"),
        ("+models.demo.members.neox-s.parms=5", "models.demo.members.neox-s.parms"),
        ("+calibration.sample=3", "calibration.sample"),
        ("+eval.sets.jargon.feild=x", "eval.sets.jargon.feild"),
    ],
)
def test_what_a_plus_adds_is_found_where_keys_are_fixed(added: str, unknown: str) -> None:
    assert unknown_keys(composed(added)) == [unknown]


@pytest.mark.parametrize(
    "added", ["+eval.limit=5", "+eval.kinds={task: [a]}", "+where={bits: 3}", "++executor.extra={mail-type: END}"]
)
def test_free_names_and_known_keys_may_be_added(added: str) -> None:
    assert unknown_keys(composed(added)) == []


def test_an_unknown_key_with_a_plus_is_refused_with_the_nearest_known_one(here: Launch) -> None:
    result = here("+eval.limt=5", "mode=plan")
    assert result.returncode == 2
    assert "'eval.limt' is not a key. Did you mean eval.limit" in result.stderr
    assert result.stdout == ""


def test_a_command_is_composed_once_and_hydras_mode_obeyed_where_it_can_be_set(
    here: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed, compose = [], ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", lambda *a, **k: composed.append(a) or compose(*a, **k))
    file = tmp_path / "mine" / "sweep" / "each.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\nhydra: {mode: MULTIRUN}\nsweep: {name: each, quant: [{bits: 16}]}\n")
    assert "'one' holds no study" in here("mode=status", "out=one").stderr.replace(f"{tmp_path}/", "")
    assert len(composed) == 1
    for more in (["-m"], ["hydra.mode=MULTIRUN"], [f"--config-dir={file.parents[1]}", "sweep=each"]):
        said = here("mode=status", "out=one,two", *more).stderr.replace(f"{tmp_path}/", "")
        assert ("'one' holds no study" in said, "'two' holds no study" in said) == (True, True), more


def test_chosen_cells_are_the_same_in_every_mode_that_works_on_cells(small: Path, here: Launch, tmp_path: Path) -> None:
    modes = {
        "run",
        "plan",
        "status",
        "table",
        "best",
        "report",
        "findings",
        "compare",
        "logs",
        "cancel",
        "drop",
        "export",
        "audit",
        "keep",
    }
    assert modes == set(CHOOSING)
    study, where = [*SMALL, f"out={small}"], "where={bits: [3,4], dtype: int}"
    before = load_results(small)
    chosen = before[before["bits"].isin([3, 4]) & (before["dtype"] == "int")]
    assert here(*study, "mode=table", where, "to=t.csv").returncode == 0
    assert set(pd.read_csv(tmp_path / "t.csv")["key"]) == set(chosen["key"])
    assert "2 of 2 cells measured" in here(*study, "mode=report", where, "to=report").stdout
    best = here(*study, "mode=best", where, "memory=2GB").stdout
    assert "Best for 2.00 GB: neox-xs int" in best
    assert "float" not in best
    assert "chooses 2 cells, and one" in here(*study, "mode=export", where, "format=gguf", "to=x.gguf").stderr
    assert "No failed measurement among those chosen (2 done)" in here(*study, "mode=logs", where).stdout
    assert re.search(r"demo +2 +2\n", here(*study, "mode=status", where).stdout)
    assert "to do  0" in here(*study, "mode=plan", where).stdout
    assert here(*study, "mode=audit", where).stdout.startswith("2 of 2 planned measurements there once")
    assert here(*study, "mode=keep", where, "to=k.parquet").stdout.startswith("2 measurements, ")
    assert "Retired 2 measurement" in here(*study, "mode=drop", where, "yes=true").stdout
    again = here(*study, "mode=drop", where, "yes=true")
    assert again.returncode == 2
    assert "where={bits: [3,4], dtype: int} chooses 2 measurements, and none has a result" in again.stderr
    assert (
        "Retired 4 measurement" in here(*study, "mode=drop", "where={dtype: float}", "status=done", "yes=true").stdout
    )
    # 6 cells are to do now; a run of some leaves the others, and says so in the words of the plan.
    plan = here(*study, "mode=plan", "where={bits: 3}").stdout
    assert "3 of 13, chosen by where={bits: 3}" in plan
    assert "to do  2" in plan
    assert "to do  1" in here(*study, "mode=plan", f"cell={chosen['key'].iloc[0]}", "status=missing").stdout
    stored = set(all_row_ids(small).index)
    ran = here(*study, "where={bits: 3}", "report=false")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 cells, 2 measurements" in ran.stdout
    assert len(set(all_row_ids(small).index) - stored) == 2
    states = load_results(small).groupby(["bits", "dtype"], dropna=False)["status"].first()
    assert states[3, "int"] == states[3, "float"] == "done"
    assert (states == "missing").sum() == 4
    assert "nothing to do" in here(*study, "where={bits: 3}", "report=false").stdout
    assert here(*study, "status=missing", "report=false").returncode == 0
    assert set(load_results(small)["status"]) == {"done"}


def test_failed_cells_that_are_chosen_need_retry_which_is_said(small: Path, here: Launch) -> None:
    result = here(*SMALL, f"out={small}", "mode=plan", "status=failed")
    assert result.returncode == 2
    assert "status=failed matches no cell. States there: 13 done" in result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cell=zzzz", ["cell='zzzz' is not valid", "0-9 and a-f", "e.g. cell=3fa9"]),
        ("cell=00000000", ["cell=00000000 matches none of the 13 cells", "mode=table"]),
        ("where={bits: 33}", ["where={bits: 33} matches no cell", "bits is one of 16, 3, 4, 5, 6 there"]),
        ("where={bitz: 3}", ["where: 'bitz' is not an axis", "Did you mean bits"]),
        ("where=3", ["where=3 is not valid", "'where={bits: 3, dtype: int}'"]),
        ("status=faild", ["status='faild' is not valid", "missing, diverged, done", "Did you mean failed"]),
        ("status=oom", ["status=oom matches no cell", "13 done"]),
    ],
)
def test_a_choice_of_nothing_says_what_there_is(given: str, expected: list[str], finished: Path, here: Launch) -> None:
    result = here(*SMALL, f"out={finished}", "mode=logs", given)
    assert result.returncode == 2
    for text in expected:
        assert text in result.stderr
    assert (result.stdout, result.stderr.count("error:")) == ("", 1)
