"""Bad input ends in one message that names key, value and what is allowed, exit code 2, with nothing run or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch

CASES = {
    "an unknown key": (["foo=1"], ["'foo'", "Allowed", "retry"]),
    "a misspelt key": (["eval.limt=3"], ["'eval.limt'", "Did you mean eval.limit"]),
    "an axis that does not exist": (["sweep.quant.1.bitz=4"], ["sweep.quant.1.bitz", "sweep.quant.1.bits"]),
    "a misspelt data type": (["sweep.quant.1.dtype=flot"], ["sweep.quant.1.dtype='flot'", "int, float, dynamic"]),
    "a mapping in the place of a list": (
        ["sweep.quant.1.dtype={file: a.json}"],
        ["sweep.quant.1.dtype={file: a.json} is not valid", "write 'sweep.quant.1.dtype=[{file: a.json}]'"],
    ),
    "a file that is not there": (["sweep.quant.1.dtype=[{file: a.json}]"], ["dtype.file='a.json'", "can be read"]),
    "revisions of directories": (["sweep.revisions=[step1]"], ["sweep.revisions='step1'", "is a local directory"]),
    "bits": (["sweep.quant.1.bits=9"], ["sweep.quant.1.bits=9", "from 2 to 8"]),
    "blocksize": (["sweep.quant.1.blocksize=0"], ["blocksize=0", "at least 1", "null"]),
    "exponent bits": (
        ["sweep.quant.1.dtype=float", "sweep.quant.1.bits=4", "sweep.quant.1.exponent_bits=4"],
        ["exponent_bits=4", "from 1 to bits - 1 = 3"],
    ),
    "outlier fraction": (["sweep.quant.3.outlier_fraction=1.5"], ["outlier_fraction=1.5", "below 1"]),
    "a missing model directory": (["path=/no/such/model"], ["/no/such/model", "director"]),
    "a bare comma list": (["out=a,b"], ["out=a,b", "[value1,value2]"]),
    "an unquoted odd value": (["out=/tmp/x(1)=2"], ["'out=\"/tmp/x(1)=2\"'"]),
    "an unknown study": (["sweep=fig9"], ["sweep=fig9", "fig2_bit_scaling"]),
    "an unknown tracking": (["tracking=onlin"], ["tracking=onlin", "online", "offline", "disabled"]),
    "an unknown mode": (["mode=pln"], ["mode='pln'", "Did you mean plan"]),
    "a number that is none": (["eval.limit=many"], ["eval.limit", "many"]),
    "a limit of nothing": (["eval.limit=0"], ["eval.limit=0", "at least 1"]),
    "an unknown task": (["eval.tasks=[lambada_opnai]"], ["lambada_opnai", "lambada_openai"]),
    "an unknown text set": (["eval.perplexity=[jargn]"], ["jargn", "jargon"]),
    "an unknown dtype of the arithmetic": (["eval.compute_dtype=float64"], ["float64", "bfloat16"]),
    "an unknown retry": (["retry=everything"], ["retry='everything'", "failed"]),
    "an unknown device": (["executor.device=tpu"], ["executor.device='tpu'", "cuda"]),
    "no workers": (["executor.workers=0"], ["executor.workers=0", "auto"]),
    "no threads": (["executor.threads=none"], ["executor.threads='none'", "auto"]),
    "an unknown size": (["sweep.sizes=[neox-xl]"], ["sweep.sizes='neox-xl'", "neox-m"]),
    "a table of nothing": (["mode=table"], ["holds no study"]),
    "an axis to count by": (["mode=status", "by=[bit]"], ["'bit' is not an axis", "Did you mean bits"]),
    "no choice to drop": (["mode=drop"], ["cell=", "where="]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_message(case: str, launch: Launch, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    result = launch(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    for text in expected:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert result.stdout == ""
    assert not list(tmp_path.glob("**/*.rows"))
    assert not (tmp_path / "outputs").exists()


def test_a_text_file_without_text_is_refused(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "not fine"}\n')
    result = launch(f"eval.perplexity=[{file}]")
    assert result.returncode == 2
    for expected in ("bad.jsonl", "2", "text", "txt"):
        assert expected in result.stderr


def test_a_results_directory_that_cannot_be_written_is_refused(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = launch(f"out={tmp_path}/file/results")
    assert result.returncode == 2
    assert "can't be written" in result.stderr


def test_a_hub_model_without_a_known_commit_is_refused_not_invented(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = launch("sweep=fig3_data_types")
    assert result.returncode == 2
    assert "EleutherAI/pythia-70m" in result.stderr
    assert "mode=fetch" in result.stderr


def test_help_names_modes_groups_and_keys(launch: Launch) -> None:
    result = launch("--help")
    assert result.returncode == 0
    for expected in ("mode=", "plan", "retry", "fig2_bit_scaling", "path=", "Exit codes"):
        assert expected in result.stdout
