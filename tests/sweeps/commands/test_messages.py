"""Messages about mistakes: each names the key, its value, and what is allowed or what to do. Nothing runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kbit.spec import METHODS
from tests.sweeps.commands.conftest import Ask, Said
from tests.sweeps.commands.test_run import SMALL


def test_a_command_leaves_the_loggers_of_its_process_as_they_are(ask: Ask) -> None:
    before = logging.getLogger("sweeps.a_module_that_was_imported_before")
    assert ask("mode=plan", *SMALL).code == 0
    assert not before.disabled


CASES: dict[str, tuple[list[str], list[str]]] = {
    "one of several families": (["model=[pythia,llama]"], ["model=llama", "one of bloom,", "pythia"]),
    "a family": (["model=pythi"], ["model=pythi", "one of bloom,", "Did you mean pythia"]),
    "a block that isn't there": (
        ["sweep.quant.9.bits=4"],
        ["sweep.quant.9.bits=4", "sweep.quant.0 to sweep.quant.3", "'sweep.quant=[{bits: 16}, {bits: 4}]'"],
    ),
    "a block without a number": (["sweep.quant.x.bits=4"], ["sweep.quant.x.bits=4", "sweep.quant.0 to sweep.quant.3"]),
    "a block from the end": (["sweep.quant.-1.bits=4"], ["sweep.quant.-1", "sweep.quant.0 to sweep.quant.3"]),
    "a removed block": (["~sweep.quant.0"], ["~sweep.quant.0", "sweep.quant.0 to sweep.quant.3"]),
    "a new member": (
        ["+models.demo.members.q.path=/x"],
        ["+models.demo.members.q.path=/x", "members of demo are neox-xs", "path=DIR", "--config-dir DIR"],
    ),
    "a new member without the plus": (
        ["models.demo.members.q.path=/x"],
        ["models.demo.members.q.path", "members of demo are neox-xs", "path=DIR", "--config-dir DIR"],
    ),
    "a member of a family that isn't chosen": (
        ["models.opt.members.q.gpus=2"],
        ["models.opt.members.q.gpus", "families of this study are demo", "model= chooses others"],
    ),
    "a member whose name is a number": (
        ["models.pythia.members.70m.gpus=2"],
        ["'models.pythia.members.70m.gpus=2'", "write 'models.pythia.members={70m: {gpus: 2}}'"],
    ),
    "a key of a member": (
        ["models.demo.members.neox-s.pth=/x"],
        ["models.demo.members.neox-s.pth", "id, revision, path"],
    ),
    "letters for a number": (["eval.limit=abc"], ["eval.limit=abc", "a whole number or null"]),
    "a fraction of tokens": (["eval.tokens=1.5"], ["eval.tokens=1.5", "a whole number or null"]),
    "a list for a number": (["eval.window=[3]"], ["eval.window=[3]", "a whole number is needed"]),
    "neither true nor false": (["mode=table", "long=maybe"], ["long=maybe", "true or false"]),
    "a number for a list": (["sweep.quant=4"], ["sweep.quant=4", "a list is needed"]),
    "a number for a study": (["sweep=4"], ["sweep=4", "sweep is one of ", " centering, "]),
    "a list for a group of one": (["eval=[3]"], ["eval=[3]", "one of base, demo"]),
    "a mode alone": (["plan"], ["'plan'", "mode=plan"]),
    "help alone": (["help"], ["'help'", "--help"]),
    "a study alone": (["fig3_data_types", "mode=plan"], ["'fig3_data_types'", "sweep=fig3_data_types"]),
    "a misspelt mode alone": (["statsu"], ["'statsu'", "key=value", "Did you mean status"]),
    "a configuration of another directory": (["--config-path", "conf"], ["--config-path=conf", "--config-dir DIR"]),
    "a configuration of another name": (["--config-name=x"], ["--config-name=x", "--config-dir DIR"]),
    "a study in the wrong place": (
        ["--config-dir", "mine", "sweep=misplaced"],
        ["sweep=misplaced", "mine/misplaced.yaml is there", "mine/sweep: move it"],
    ),
    "a method": (["sweep.quant.1.method=quip"], ["sweep.quant.1.method='quip'", *METHODS]),
    "no format": (
        ["sweep.quant=[{method: block_float}]"],
        ["sweep.quant.0.format=None", "must be given with method=block_float"],
    ),
    "another format": (
        ["sweep.quant=[{method: block_float, format: mxfp5}]"],
        ["sweep.quant.0.format='mxfp5'", "one of mxfp4, nvfp4"],
    ),
    "neither a type nor a recipe": (
        ["sweep.quant=[{method: ggml}]"],
        ["sweep.quant.0.recipe=None", "Q4_K_M", "or ggml_type for the blocks alone"],
    ),
    "another recipe": (
        ["sweep.quant=[{method: ggml, recipe: q4_k_m}]"],
        ["sweep.quant.0.recipe='q4_k_m'", "one of Q4_0, Q4_1"],
    ),
    "an axis as a key": (["method=awq"], ["'method'", "sweep.quant.N.method", "'where={method: VALUE}'"]),
    "another axis as a key": (["bits=4"], ["'bits'", "sweep.quant.N.bits", "'where={bits: VALUE}'"]),
    "an axis of where": (["mode=status", "where.bits=3"], ["'where.bits'", "'where={bits: VALUE}'"]),
    "a range that holds nothing": (
        ["sweep.quant.1.bits=range(9,3)"],
        ["sweep.quant.1.bits=range(9,3)", "multirun", "[a,b]"],
    ),
    "a range of what can't be": (["sweep.quant.1.bits=range(8,10)"], ["sweep.quant.1.bits=9", "from 2 to 8"]),
    "a truncated configured model": (
        ["models.demo.members.neox-s.path=cut"],
        ["models.demo.members.neox-s.path='cut'", "not a usable model", "model.safetensors"],
    ),
    "a truncated model": (["path=cut"], ["path='cut'", "not a usable model", "model.safetensors"]),
    "a missing text set": (
        ["eval.data_dir=data", "eval=perplexity", "eval.perplexity=[wikitext2,pile_cc]"],
        ["eval.perplexity", "data' has no pile_cc_test.jsonl", "put it there", "'eval.perplexity=[wikitext2]'"],
    ),
    "a table for a text": (
        ["eval.perplexity=[table.csv]"],
        ["eval.perplexity='table.csv'", ".jsonl or .txt", '{"text": "..."}'],
    ),
    "another kind of text": (["eval.perplexity=[table.json]"], ["'table.json'", ".jsonl or .txt", '{"text": "..."}']),
    "a configured text set of another kind": (
        ["eval.sets.jargon.path=table.csv"],
        ["eval.sets.jargon.path='table.csv'", ".jsonl or .txt"],
    ),
    "a path with spaces": (
        ["path=/my", "models/a", "b", "mode=plan"],
        ["'models/a'", "key=value", "'path=\"/my models/a b\"'"],
    ),
    "umlauts": (["path=/mödel"], ["'path=/mödel'", "'ö' must be in quotes", "'path=\"/mödel\"'"]),
    "Chinese": (["path=/模型"], ["'path=/模型'", "'模' and '型' must be in quotes", "'path=\"/模型\"'"]),
    "a list with umlauts": (["path=[/a,/mödel]"], ["'ö' must be in quotes", '\'path=["/a","/mödel"]\'']),
    "quotes that don't match": (["path='/a'b'"], ["quotes or brackets don't match"]),
    "a short key": (["mode=logs", "cell=zzzz"], ["cell='zzzz'", "0-9 and a-f", "cell=3fa9"]),
    "a mode of tracking": (["tracking.mode=onlin"], ["tracking.mode='onlin'", "online, offline, disabled"]),
    "no project": (["tracking=online", "tracking.project="], ["tracking.project=''", "1 to 128 characters"]),
    "a blank project": (["tracking.project=' '"], ["tracking.project=' '", "1 to 128 characters"]),
    "a project with a slash": (["tracking.project=a/b"], ["tracking.project='a/b'", "without /"]),
    "a server that is none": (["tracking.base_url=wandb"], ["tracking.base_url='wandb'", "https://"]),
    "too many workers": (["executor.workers=500"], ["executor.workers=500", "auto, or from 1 to"]),
    "too many threads": (["executor.threads=500"], ["executor.threads=500", "auto, or from 1 to"]),
    "batches of nothing": (["executor.batch_tokens=0"], ["executor.batch_tokens=0", "at least 1"]),
    "results in a file": (["out=file"], ["out='file' is a file", "name a directory"]),
    "results under a file": (["out=file/results"], ["file/results' can't be written", "Give a directory"]),
    "two names in one": (["eval.perplexity=[jargon,jargon]"], ["jargon", "named more than once"]),
    "a group that changes its tasks": (["eval.tasks=[openllm]"], ["'openllm'", "num_fewshot", "name tasks instead"]),
    "no group and no task": (["eval.tasks=[mmluu]"], ["'mmluu'", "Did you mean mmlu", "eval.task_dirs"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_explained_in_one_message(case: str, ask: Ask, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    said = ask(*arguments)
    assert (said.code, said.out) == (2, ""), said
    assert said.error.startswith("error: ")
    assert said.error.count("error:") == 1
    for text in expected:
        assert text in said.error
    assert not any(words in said.error for words in ("Traceback", "Exception", "DictConfig", "hydra.cc"))
    assert not [p for p in tmp_path.rglob("*") if p.name in ("manifests", "claims", "results", "outputs")]


FOR_RUN = [case for case, (arguments, _) in CASES.items() if not any("mode=" in a for a in arguments)]


@pytest.mark.parametrize("case", FOR_RUN)
def test_a_plan_refuses_what_a_run_refuses_in_the_same_words(case: str, ask: Ask) -> None:
    arguments = CASES[case][0]
    assert ask(*arguments, "mode=plan") == ask(*arguments)


def planned(said: Said, row: str) -> str:
    assert said.code == 0, said
    (line,) = [line for line in said.out.splitlines() if line.split("  ")[0].strip() == row or f" {row}  " in line]
    return line.split(f"{row}  ")[1].strip()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sweep.quant.1.bits=range(3,9)", "sweep.quant.1.bits=[3,4,5,6,7,8]"),
        ("sweep.quant.1.bits=range(3, 9, 2)", "sweep.quant.1.bits=[3,5,7]"),
        ("sweep.quant.1.bits=choice(3,5)", "sweep.quant.1.bits=[3,5]"),
        ("sweep.quant.1.bits=[range(3,5),8]", "sweep.quant.1.bits=[3,4,8]"),
        ("sweep.quant=[{bits: 16},{bits:range(3,6),dtype:int}]", "sweep.quant=[{bits: 16},{bits:[3,4,5],dtype: int}]"),
        ("sweep.quant.1={bits: range(3,6), dtype: int}", "sweep.quant.1={bits: [3,4,5], dtype: int}"),
    ],
)
def test_a_range_or_choice_is_the_list_that_it_stands_for(written: str, meant: str, ask: Ask) -> None:
    range_, list_ = ask("mode=plan", written), ask("mode=plan", meant)
    if meant.startswith("sweep.quant.1={"):
        assert "write 'sweep.quant" in range_.error or range_.code == 0
    assert (range_.code, range_.out) == (list_.code, list_.out)


def test_a_quoted_range_stays_text(ask: Ask) -> None:
    assert "'range(3,9)'" in ask("mode=plan", "sweep.quant.1.dtype='range(3,9)'").error


def test_a_group_of_tasks_runs_as_its_tasks(ask: Ask, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("one", "two", "three"):
        (tasks / f"{name}.yaml").write_text(f"task: {name}\ntag: numbers\ndataset_path: json\n")
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "x"}\n')
    (tasks / "group.yaml").write_text("group: mine\ntask: [one, {group: inner, task: [three]}]\n")
    plan = ["mode=plan", "eval.task_dirs=[tasks]", "eval.data_dir=data", "eval.perplexity=[]"]
    assert planned(ask(*plan, "eval.tasks=[mine]"), "measurements").endswith("(one, three)")
    assert planned(ask(*plan, "eval.tasks=[numbers]"), "measurements").endswith("(one, three, two)")
    # One that is named and in a group counts once.
    assert planned(ask(*plan, "eval.tasks=[two,one,mine]"), "measurements").endswith("(two, one, three)")
