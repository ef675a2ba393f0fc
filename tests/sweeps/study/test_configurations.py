"""The studies, families and evaluations of conf/: they compose, expand to what they say, and count parameters right."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kbit.calibration import Calibration
from kbit.specs.base import ROW
from sweeps.errors import UserError
from sweeps.options import Options
from sweeps.store.rows import cell_row
from sweeps.study import grid, hub
from sweeps.study.cell import ModelRef
from sweeps.study.evals import as_list, resolve_calibrations
from sweeps.study.resolve import Resolver, build_study
from sweeps.tracking.runs import alike_in
from tests import ROOT
from tests.sweeps.studies import composed

CONF = ROOT / "conf"
STUDIES = sorted(p.stem for p in (CONF / "sweep").glob("*.yaml"))
OF_NO_FIGURE = (
    "checkpoint",
    "demo",
    "paper_all",
    "replication",
    "replication_tasks",
    "survey",
    "activation_outliers",
    "learned_codebooks",
    "awq",
    "block_floats",
    "ggml",
    "hqq",
    "llm_int8",
    "mixed",
    "clipping_rotation",
)
FAMILIES = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))

# Published hyperparameters: hidden size, layers, heads, vocabulary (GPT-NeoX only).
NEOX = {
    "70m": (512, 6, 8, 50304),
    "160m": (768, 12, 12, 50304),
    "410m": (1024, 24, 16, 50304),
    "1b": (2048, 16, 8, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "2.8b": (2560, 32, 32, 50304),
    "6.9b": (4096, 32, 32, 50432),
    "12b": (5120, 36, 40, 50688),
    "20b": (6144, 44, 64, 50432),
}
OPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
}
GPT2 = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
BLOOM = {
    "560m": (1024, 24, 16),
    "1b1": (1536, 24, 16),
    "1b7": (2048, 24, 16),
    "3b": (2560, 30, 32),
    "7b1": (4096, 30, 32),
    "176b": (14336, 70, 112),
}


@cache
def expanded(study: str) -> tuple[grid.Grid, int]:
    """A study's grid over its own families, and how many evaluations it has."""
    raw = yaml.safe_load((CONF / "sweep" / f"{study}.yaml").read_text())["sweep"]
    cfg = composed(f"sweep={study}")
    models = [
        ModelRef(family=str(family), name=str(name), params=m.params, hub_id=m.id or m.path, commit="unresolved:main")
        for family, members in cfg.models.items()
        for name, m in members.members.items()
    ]
    evals = [*as_list(list(cfg.eval.perplexity), ""), *as_list(list(cfg.eval.tasks), "")]
    evals += [name for names in (cfg.eval.kinds or {}).values() for name in as_list(list(names), "")]
    calibrated = Calibration(dataset="sha256:" + "c" * 64)
    return grid.expand(raw["quant"], models, raw.get("exclude", ()), lambda _: [calibrated]), len(evals)


@pytest.mark.parametrize(
    ("study", "models", "cells", "measurements"),
    [
        ("demo", 3, 129, 387),
        ("fig2_bit_scaling", 26, 182, 1092),
        ("fig3_data_types", 8, 40, 240),
        ("fig3_block_size", 8, 64, 384),
        ("fig4_proxy", 8, 40, 240),
        ("table1_gptq", 8, 104, 104),
        ("fig5_gptq", 8, 56, 336),
        ("fig12_exponent_bits", 8, 224, 1344),
        ("centering", 26, 442, 2652),
        ("survey", 8, 248, 496),
        ("block_floats", 8, 176, 176),
        ("checkpoint", 3, 6, 6),
        ("ggml", 8, 192, 192),
        ("hqq", 8, 128, 128),
        ("awq", 8, 88, 88),
        ("learned_codebooks", 8, 104, 104),
        ("activation_outliers", 8, 184, 184),
        ("llm_int8", 8, 56, 56),
        ("mixed", 8, 120, 240),
        ("clipping_rotation", 8, 200, 200),
        ("outliers", 26, 26, 52),
        ("replication", 3, 1725, 6900),
        ("replication_tasks", 3, 129, 516),
        ("paper_all", 41, 8118, 48708),
    ],
)
def test_study_expands_to_what_it_says(study: str, models: int, cells: int, measurements: int) -> None:
    expansion, evals = expanded(study)
    assert len({c.model for c in expansion.cells}) == models
    assert (len(expansion.cells), len(expansion.cells) * evals) == (cells, measurements)
    assert set(Counter(Counter(c.model for c in expansion.cells).values())) == {cells // models}
    assert len(alike_in([c.quant.axis_values() for c in expansion.cells])) > 4  # in W&B, each quantization is a run


def test_every_study_is_named_as_its_file_and_tells_its_question() -> None:
    for study in STUDIES:
        text = (CONF / "sweep" / f"{study}.yaml").read_text()
        assert yaml.safe_load(text)["sweep"]["name"] == study
        assert "?" in text.partition("defaults:")[0] or study == "paper_all"


def test_demo_has_the_axes_of_its_description() -> None:
    specs = [c.quant for c in expanded("demo")[0].cells if c.model.name == "neox-s"]
    assert Counter(s.bits for s in specs) == {16: 1, 3: 13, 4: 13, 5: 4, 6: 4, 7: 4, 8: 4}
    assert Counter(s.blocksize for s in specs if s.bits < 16) == {64: 26, 16: 4, 256: 4, 1024: 4, 4096: 4}
    assert {(s.bits, s.exponent_bits) for s in specs if s.dtype == "float"} == {
        (3, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4)
    }  # fmt: skip
    assert [(s.bits, s.dtype) for s in specs if s.outlier_fraction == 0.02] == [(3, "float"), (4, "float")]


def test_gptq_is_compared_as_table_1_and_figure_5_have_it_with_named_data() -> None:
    def cells(study: str) -> set[tuple[object, ...]]:
        axes = [c.quant.axis_values() for c in expanded(study)[0].cells if c.quant.method == "gptq"]
        return {(a["bits"], a["dtype"], a["zero_point"], a["blocksize"]) for a in axes}

    sizes = (1024, 256, 64)
    assert cells("table1_gptq") == {
        (2, dtype, asymmetric, size)
        for dtype, asymmetric in (("int", True), ("int", False), ("quantile", False))
        for size in sizes
    }
    assert cells("fig5_gptq") == {(bits, "int", True, size) for bits in (3, 4) for size in (ROW, 64)}
    for study in ("table1_gptq", "fig5_gptq"):
        cfg = composed(f"sweep={study}")
        assert cfg.calibration.set == "wikitext2_train"
        assert cfg.eval.sets.wikitext2_train.split == "train"


def test_exponent_bits_cover_every_choice() -> None:
    specs = [c.quant for c in expanded("fig12_exponent_bits")[0].cells if c.model.name == "125m"]
    floats = {(s.bits, s.exponent_bits) for s in specs if not s.is_baseline}
    assert floats == {(bits, e) for bits in range(3, 9) for e in range(1, bits)}


def test_single_studies_of_the_paper_are_part_of_the_whole() -> None:
    def cells(study: str) -> set[Any]:
        return {(c.model, c.quant) for c in expanded(study)[0].cells if not c.quant.calibrates}

    whole = cells("paper_all")
    for study in STUDIES:
        if study not in OF_NO_FIGURE:
            assert cells(study) <= whole, study


@pytest.mark.parametrize("name", ["paper", "perplexity", "wikitext2", "survey", "outliers", "demo"])
def test_evaluations_name_sets_that_are_known(name: str) -> None:
    cfg = composed(f"eval={name}").eval
    assert cfg.perplexity
    assert set(cfg.perplexity) <= set(cfg.sets)
    assert {"pile_cc", "wikitext2", "commoncrawl_sample"} <= set(cfg.sets)
    assert {"lambada_openai", "piqa", "hellaswag", "winogrande"} <= set(cfg.task_data)


def test_agreement_is_the_papers_and_follows_the_text_sets_of_perplexity() -> None:
    assert composed("eval=paper").eval.kinds == {"agreement": ["pile_cc"]}
    assert composed("eval=paper", "eval.perplexity=[wikitext2]").eval.kinds == {"agreement": ["wikitext2"]}
    assert composed("eval=paper", "eval.kinds.agreement=[]").eval.kinds == {"agreement": []}
    for name in ("demo", "perplexity", "wikitext2"):
        assert composed(f"eval={name}").eval.kinds is None


def test_families_can_be_chosen_for_any_study() -> None:
    cfg = composed("sweep=fig3_data_types", "model=[gpt2,bloomz]")
    assert list(cfg.models) == ["gpt2", "bloomz"]


def test_every_member_is_on_the_hub_or_in_the_package() -> None:
    ids = []
    for family in FAMILIES:
        for member in composed(f"model=[{family}]").models[family].members.values():
            assert member.params > 0
            assert bool(member.id) != bool(member.path)
            assert member.path is None or (Path(member.path) / "config.json").is_file()
            ids += [member.id] if member.id else []
    assert len(ids) == len(set(ids)) == 41


def test_parameter_counts_are_those_of_the_architectures() -> None:
    """Every member but the demo's, built on torch's meta device from the published hyperparameters."""
    import torch
    import transformers as tf

    def count(cls: Any, cfg: Any) -> int:
        with torch.device("meta"):
            model = cls(cfg)
        model.tie_weights()
        return sum(p.numel() for p in model.parameters())

    def neox(h: int, n: int, a: int, v: int) -> int:
        sizes = {"hidden_size": h, "intermediate_size": 4 * h, "num_hidden_layers": n, "num_attention_heads": a}
        return count(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**sizes, vocab_size=v, tie_word_embeddings=False))

    def opt(h: int, n: int, a: int) -> int:
        sizes = {"hidden_size": h, "ffn_dim": 4 * h, "num_hidden_layers": n, "num_attention_heads": a}
        small = h == 1024  # OPT-350m alone has smaller embeddings, projected, and norms after the layers
        special = {"word_embed_proj_dim": 512 if small else h, "do_layer_norm_before": not small}
        return count(tf.OPTForCausalLM, tf.OPTConfig(**sizes, **special))

    def gpt2(h: int, n: int, a: int) -> int:
        return count(tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=h, n_layer=n, n_head=a))

    def bloom(h: int, n: int, a: int) -> int:
        return count(tf.BloomForCausalLM, tf.BloomConfig(hidden_size=h, n_layer=n, n_head=a, vocab_size=250880))

    pythia = {size: neox(*shape) for size, shape in NEOX.items()}
    blooms = {size: bloom(*shape) for size, shape in BLOOM.items()}
    expected = {
        "pythia": {s: n for s, n in pythia.items() if s != "20b"},
        "pythia_deduped": {s: n for s, n in pythia.items() if s != "20b"},
        "gpt_neox": {"20b": pythia["20b"]},
        "opt": {size: opt(*shape) for size, shape in OPT.items()},
        "gpt2": {size: gpt2(*shape) for size, shape in GPT2.items()},
        "bloom": blooms,
        "bloomz": blooms,
    }
    for family, members in expected.items():
        chosen = composed(f"model=[{family}]").models[family].members
        assert {str(name): m.params for name, m in chosen.items()} == members, family


def test_revisions_are_models_of_their_own_with_the_tokens_they_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(repo: str, revision: str, **_: object) -> str:
        """Stands for the hub, which can't be asked here."""
        return hashlib.sha1(f"{repo}{revision}".encode()).hexdigest()

    monkeypatch.setattr(hub, "resolve_commit", commit)
    arguments = ["model=[pythia]", "sweep.sizes=[70m,160m]", "sweep.revisions=[step1000,step4000]"]
    options = Options.from_config(composed(*arguments), arguments)
    study = build_study(options.study, device="cpu", device_name=str, strict=True, progress=lambda _: None)
    models = list(dict.fromkeys(c.model for c in study.manifest.cells))
    assert [(m.label, m.tokens_seen) for m in models] == [
        ("pythia-70m@step1000", 2_097_152_000),
        ("pythia-70m@step4000", 8_388_608_000),
        ("pythia-160m@step1000", 2_097_152_000),
        ("pythia-160m@step4000", 8_388_608_000),
    ]
    assert len({m.commit for m in models}) == 4
    cell = study.manifest.cells[0]
    row = cell_row(cell)
    assert (row["checkpoint"], row["tokens_seen"]) == ("step1000", 2_097_152_000)
    # A revision's name is not identity: its commit is.
    unnamed = replace(cell.model, checkpoint=None, tokens_seen=None)
    assert replace(cell, model=unnamed).key == cell.key


def test_a_directory_has_no_revisions() -> None:
    arguments = ["sweep.revisions=[step1]"]
    options = Options.from_config(composed(*arguments), arguments)
    with pytest.raises(UserError, match=r"sweep\.revisions='step1' is not valid: .* is a local directory"):
        build_study(options.study, device="cpu", device_name=str, strict=True, progress=lambda _: None)


def test_a_calibration_set_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "wikitext2_raw_test.jsonl").write_text('{"text": "one"}\n')
    arguments = ["sweep=table1_gptq", f"eval.data_dir={tmp_path}"]
    study = Options.from_config(composed(*arguments), arguments).study
    said = r"calibration\.set: .* has no wikitext2_raw_train\.jsonl .* name another \(there are wikitext2, or a file"
    seen = r".*\); on wikitext2, which eval\.perplexity has, losses would be too low"
    with pytest.raises(UserError, match=said + seen):
        resolve_calibrations(study.calibration, study.eval, Resolver(strict=False), "gptq")
    (tmp_path / "c4_train.jsonl").write_text('{"text": "one"}\n')
    sets = {**study.eval["sets"], "own": {**study.eval["sets"]["wikitext2"], "local": "c4_train.jsonl"}}
    unseen = r"\(there are own, wikitext2, or a file of yours\), e\.g\. calibration\.set=own; on wikitext2"
    with pytest.raises(UserError, match=unseen):
        resolve_calibrations(study.calibration, {**study.eval, "sets": sets}, Resolver(strict=False), "gptq")
