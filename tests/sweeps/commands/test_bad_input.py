"""Bad input ends in one message that names key, value and what is allowed, exit code 2, with nothing run or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.sweeps.commands.conftest import Ask, Said

CASES = {
    "an unknown key": (["foo=1"], ["'foo'", "Allowed", "retry"]),
    "a misspelt key": (["eval.limt=3"], ["'eval.limt'", "Did you mean eval.limit"]),
    "an axis that does not exist": (["sweep.quant.1.bitz=4"], ["sweep.quant.1.bitz", "sweep.quant.1.bits"]),
    "a misspelt data type": (["sweep.quant.1.dtype=flot"], ["sweep.quant.1.dtype='flot'", "int, float, dynamic"]),
    "a mapping in the place of a list": (
        ["sweep.quant.1.dtype={file: a.json}"],
        ["sweep.quant.1.dtype={file: a.json} is not valid", "write 'sweep.quant.1.dtype=[{file: a.json}]'"],
    ),
    "a list in the place of a mapping": (
        ["eval.sets=[mine]"],
        ["eval.sets=[mine] is not valid", "a mapping", "'eval.sets={NAME: VALUE}'"],
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
    "an unknown axis of a block": (
        ["sweep.quant=[{bits: 4, dtype: int, blocksiz: 64}]"],
        ["'sweep.quant.N.blocksiz' is not a key", "Did you mean sweep.quant.N.blocksize"],
    ),
    "an unknown axis of one block": (["sweep.quant.1.blocksiz=64"], ["'sweep.quant.1.blocksiz' is not a key"]),
    "an unknown key of a mapping": (["eval={limt: 3}"], ["'eval.limt' is not a key", "Did you mean eval.limit"]),
    "an axis to count by": (["mode=status", "by=[bit]"], ["'bit' is not an axis", "Did you mean bits"]),
    "no choice to drop": (["mode=drop"], ["cell=", "where="]),
}


AS_A_USER = ("an unknown key", "a bare comma list", "an unknown task", "a table of nothing")
"""Found by Hydra, before it, by planning and by another mode: these through a process of their own."""


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_message(case: str, ask: Ask, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    refused_in_one_message(ask(*arguments), expected, tmp_path)


@pytest.mark.parametrize("case", AS_A_USER)
def test_a_user_sees_the_message_and_the_exit_code(case: str, launch: Launch, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    ended = launch(*arguments)
    refused_in_one_message(Said(ended.returncode, ended.stdout, ended.stderr), expected, tmp_path)


def refused_in_one_message(said: Said, expected: list[str], home: Path) -> None:
    assert said.code == 2, said
    for text in expected:
        assert text in said.error
    assert "Traceback" not in said.error
    assert said.error.count("error:") == 1
    assert said.out == ""
    assert not list(home.glob("**/*.rows"))
    assert not (home / "outputs").exists()


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
