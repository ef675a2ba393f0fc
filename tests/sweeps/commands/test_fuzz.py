"""Whatever is asked: exit code 0, or 2 with one line that says what is wrong; never a traceback, never work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import launch
from tests import ROOT
from tests.sweeps.commands.fuzzing import Fuzzer
from tests.sweeps.studies import store_study, study


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A results directory with a study, for modes that read."""
    store = store_study(tmp_path / "stored", study(bits=(16, 4)))
    store.close()
    store.fold()  # or who reads would
    return tmp_path / "stored"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What the command sets for its process is put back: logging, and where Hydra has been."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    handlers, level, of_analysis = logging.root.handlers[:], logging.root.level, logging.getLogger("analysis").level
    yield
    GlobalHydra.instance().clear()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("analysis").setLevel(of_analysis)


def files(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def wrong(code: int, said: str, arguments: Sequence[str]) -> str:
    """What an answer should not be; '' for one that is as it should."""
    # An audit, or a choice of the best, that finds something amiss ends with 1 and says it on standard output.
    is_finding = code == 1 and {"mode=audit", "mode=best", "mode=merge"} & set(arguments)
    lines = [line for line in said.splitlines() if not line.startswith("WARNING")]
    if code == 2 and not (len(lines) == 1 and lines[0].startswith("error: ")):
        return f"2 with {len(lines)} lines"
    if code == 0 and lines:
        return "0 and an error"
    return "" if code in (0, 2) or is_finding else f"exit code {code}"


def run_all(
    count: int, seed: int, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Counter[int]:
    """Run so many command lines in this process; return how often each exit code came."""
    fuzzer, codes, before = Fuzzer(seed, stored), Counter[int](), files(stored.parent)
    problems = []
    for _ in range(count):
        arguments = fuzzer.arguments()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
        began = time.monotonic()
        try:
            code = launch._main()
        except Exception as error:
            capsys.readouterr()
            problems.append(f"{arguments}\n    {type(error).__name__}: {error}")
            continue
        said = capsys.readouterr().err
        codes[code] += 1
        if why := wrong(code, said, arguments):
            problems.append(f"{arguments}\n    {why}: {said}")
        if (took := time.monotonic() - began) > 60:
            problems.append(f"{arguments}\n    took {took:.0f} s")
    assert not problems, f"{len(problems)} of {count}:\n" + "\n".join(problems)
    assert files(stored.parent) == before
    return codes


def test_a_few_command_lines_made_by_chance(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = run_all(10, 18, stored, monkeypatch, capsys)
    assert codes[0]
    assert codes[2]


FOUND = {
    'status="${missing}"': "status: the configuration can't be resolved: Interpolation key 'missing' not found",
    'a={bits:"${missing}"}': "a.bits: the configuration can't be resolved",
    'sweep.quant.1.bits="${missing}"': "sweep.quant.1.bits: the configuration can't be resolved",
    'trust_remote_code="${oc.env:HOME}"': "trust_remote_code: the configuration can't be resolved",
    "+sweep.quant.1.bits=3": "sweep.quant.1.bits has a value already, which '+' doesn't change",
    "out=a,b": "Ambiguous value for 'out=a,b'",
}


@pytest.mark.parametrize("argument", FOUND)
def test_what_was_found_so_is_said_in_one_line(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", argument, "mode=table"])
    code, said = launch._main(), capsys.readouterr().err
    assert wrong(code, said, []) == ""
    assert FOUND[argument] in said


def test_an_interpolation_that_a_later_argument_replaces_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced = ['sweep.quant.0.bits="${missing}"', "sweep.quant=[{bits:3}]"]
    monkeypatch.setattr(sys, "argv", ["launch.py", "sweep=demo", *replaced, "mode=plan"])
    code, said = launch._main(), capsys.readouterr().err
    assert wrong(code, said, []) == ""
    assert "sweep.quant.0.dtype=None is not valid: must be given" in said


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_500_command_lines_made_by_chance(
    seed: int, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = run_all(100, seed, stored, monkeypatch, capsys)
    assert min(codes[0], codes[2]) >= 5


@pytest.mark.slow
def test_20_of_them_through_the_command(stored: Path) -> None:
    fuzzer, before = Fuzzer(1000, stored), files(stored.parent)
    for _ in range(20):
        arguments = fuzzer.arguments()
        ran = subprocess.run(
            [sys.executable, str(ROOT / "launch.py"), *arguments],
            cwd=stored.parent,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert wrong(ran.returncode, ran.stderr, arguments) == "", (arguments, ran.stdout, ran.stderr)
    assert files(stored.parent) == before
