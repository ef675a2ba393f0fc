"""``mode=compare`` and ``mode=findings`` on a study that ran: real samples, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.significance import bootstrap, compare_loss, compare_mean_loss
from analysis.significance.comparing import compare_cells, pair_cells, wanted_for
from sweeps import load_results, load_samples
from tests.conftest import Launch


def cell(df: pd.DataFrame, bits: int, dtype: str) -> pd.Series:
    return df[(df["bits"] == bits) & (df["dtype"] == dtype)].iloc[0]


def outcomes(out: Path, keys: list[str]) -> list[dict]:
    long = load_results(out, long=True)
    wanted = long[long["key"].isin(keys)].set_index("key")["measurement"]
    samples = load_samples(out, list(wanted))
    return [samples[wanted[key]] for key in keys]


def test_two_cells_are_compared_on_their_samples(finished: Path, here: Launch) -> None:
    df = load_results(finished)
    a, b = cell(df, 3, "int"), cell(df, 6, "float")
    result = here(f"out={finished}", "mode=compare", f"a={a['key'][:12]}", f"b={b['key'][:12]}")
    assert result.returncode == 0, result.stderr
    found = bootstrap(*outcomes(finished, [a["key"], b["key"]]), "loss")
    assert f"a  neox-xs {a['label']}" in result.stdout
    assert f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})" in result.stdout
    assert f"{found.n} windows" in result.stdout
    assert "b is better" in result.stdout


def test_two_sets_are_paired_in_all_that_they_do_not_name(finished: Path, here: Launch, tmp_path: Path) -> None:
    sides = ["a={dtype: int}", "b={dtype: float}", "where={bits: [3, 4]}"]
    assert here(f"out={finished}", "mode=compare", *sides, "to=c.csv").returncode == 0
    table = pd.read_csv(tmp_path / "c.csv").iloc[0]
    # What both sides name alike tells them not apart: 3 bits go with 3, and 4 with 4.
    both = ["a={dtype: int, bits: [3, 4]}", "b={dtype: float, bits: [3, 4]}"]
    said = here(f"out={finished}", "mode=compare", *both)
    assert f"{table['difference']:+.4f} (" in said.stdout
    assert "a  {dtype: int, bits: [3,4]}: 2 cells" in said.stdout
    df = load_results(finished)
    keys = [cell(df, bits, dtype)["key"] for bits in (3, 4) for dtype in ("int", "float")]
    samples = outcomes(finished, keys)
    expected = compare_mean_loss([(samples[0], samples[1]), (samples[2], samples[3])], ["x", "x"])
    assert table["difference"] == pytest.approx(expected.difference, abs=1e-6)
    assert table["a"] - table["b"] == pytest.approx(expected.difference, abs=1e-6)
    assert table["n"] == expected.n


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=3fa9"], ["b= is missing", "'a={dtype: int, bits: 4}'"]),
        (["a=zzz", "b=3fa9"], ["a=zzz is not valid", "0-9, a-f"]),
        (["a=00000000", "b={bits: 3}"], ["a: cell=00000000 matches none of the 13 cells"]),
        (["a={bitz: 3}", "b={bits: 3}"], ["a: 'bitz' is not an axis", "Did you mean bits"]),
        (["a={dtype: int}", "b={scheme: group}"], ["b: where={scheme: group} matches no cell"]),
        (["a={bits: 3}", "b={bits: 4}", "margins={los: 1}"], ["margins: 'los'", "Did you mean loss"]),
        (["a={bits: 3}", "b={bits: 4}", "margins={loss: 0}"], ["margins={loss: 0} is not valid", "nats per token"]),
        (["a={bits: 3}", "b={bits: 4}", "to=x.docx"], ["to='x.docx' is not valid", ".csv"]),
    ],
)
def test_what_can_not_be_compared_is_refused_by_name(
    given: list[str], expected: list[str], finished: Path, here: Launch
) -> None:
    result = here(f"out={finished}", "mode=compare", *given)
    assert result.returncode == 2
    assert all(text in result.stderr for text in expected), result.stderr
    assert (result.stdout, result.stderr.count("error:")) == ("", 1)


def test_a_against_a_finds_nothing_in_real_samples(finished: Path) -> None:
    """A cell against itself; and two cells whose windows are swapped at random, so that nothing tells them apart."""
    df, long = load_results(finished), load_results(finished, long=True)
    key = cell(df, 4, "int")["key"]
    pairing = pair_cells(df, [key], [key], ())
    wanted = wanted_for(long, pairing)
    samples = {wanted[m]: s for m, s in load_samples(finished, list(wanted)).items()}
    same = compare_cells(df, pairing, samples).iloc[0]
    assert (same["difference"], same["low"], same["high"], same["p"], same["verdict"]) == (0, 0, 0, 1, "alike")
    a, b = outcomes(finished, [cell(df, 3, "int")["key"], cell(df, 3, "float")["key"]])
    rng, found, rounds = np.random.default_rng(0), 0, 300
    for _ in range(rounds):
        swapped = rng.integers(0, 2, len(a["nats"])).astype(bool)
        first = np.where(swapped, b["nats"], a["nats"])
        second = np.where(swapped, a["nats"], b["nats"])
        compared = compare_loss({**a, "nats": first}, {**b, "nats": second})
        found += compared.significant
    assert found <= rounds * (0.05 + 2.6 * math.sqrt(0.05 * 0.95 / rounds))


def test_findings_say_each_claims_verdict_and_are_written_as_json(
    finished: Path, here: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = here(f"out={finished}", "mode=findings", "margins={loss: 0.02}")
    assert result.returncode == 0, result.stderr
    assert "claims of the paper" in result.stdout
    assert "less than 0.02 nats or 0.5 points is no effect" in result.stdout
    assert "a family needs two sizes or more" in result.stdout
    written = here(f"out={finished}", "mode=findings", "where={bits: [3, 16]}", "to=f/findings.json")
    assert written.returncode == 0, written.stderr
    given = json.loads((tmp_path / "f" / "findings.json").read_text())
    assert {f["verdict"] for f in given["findings"]} <= {"holds", "fails", "can't tell"}
    assert given["margins"] == {"loss": 0.01, "points": 0.5}
    assert main(["findings", str(finished), "--loss", "0.02"]) == 0
    assert "less than 0.02 nats" in " ".join(capsys.readouterr().out.split())
    assert main(["findings", str(finished), "--to", "g/findings.json"]) == 0
    assert json.loads((tmp_path / "g" / "findings.json").read_text())["level"] == 0.95
    sides = ["--a", "dtype=int", "bits=3,4", "--b", "dtype=float", "bits=3,4"]
    assert main(["compare", str(finished), *sides, "--to", "d.csv"]) == 0
    assert pd.read_csv(tmp_path / "d.csv")["verdict"].iloc[0] in ("a is better", "b is better", "alike", "can't tell")
    assert main(["compare", str(finished), "--a", "bits=33", "--b", "bits=3"]) == 2
    assert "--a chooses 0 cells" in capsys.readouterr().out
    refused = here(f"out={finished}", "mode=findings", "to=f.html")
    assert refused.returncode == 2
    assert "ends in .json" in refused.stderr


def test_directories_without_results_have_a_message(here: Launch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for mode in (["mode=findings"], ["mode=compare", "a={bits: 3}", "b={bits: 4}"]):
        result = here("out=empty", *mode)
        assert result.returncode == 2
        assert "holds no study" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_study_of_which_nothing_is_measured_has_a_message(small: Path, here: Launch) -> None:
    assert here(f"out={small}", "mode=drop", "status=done", "yes=true").returncode == 0
    assert "nothing to judge" in here(f"out={small}", "mode=findings").stdout
    said = here(f"out={small}", "mode=compare", "a={bits: 3}", "b={bits: 4}")
    assert said.returncode == 2
    assert "has a partner" in said.stderr


def test_a_report_of_chosen_cells_has_all_of_their_measurements(finished: Path, here: Launch, tmp_path: Path) -> None:
    long = load_results(finished, long=True)
    kept = set(long.loc[long["status"] == "done", "key"])
    result = here("mode=report", f"out={finished}", "status=[done]", f"to={tmp_path / 'r'}")
    assert result.returncode == 0, result.stderr
    written = pd.read_csv(tmp_path / "r" / "tables" / f"{next((tmp_path / 'r' / 'tables').glob('*.csv')).name}")
    assert set(written["key"]) == kept
