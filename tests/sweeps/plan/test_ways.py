"""A plan says how each model will run in the memory that there is, and what can't fit is refused before any job."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from kbit.evaluation.spec import EvalSpec
from kbit.models.ways import SHARE
from sweeps.config import DEMO_DIR
from sweeps.errors import UserError
from sweeps.executors.slurm.settings import SlurmSettings
from sweeps.options import Options
from sweeps.plan.ways import DeviceMemory, check_ways, planned_ways, ways_rows
from sweeps.study.cell import ModelRef
from sweeps.study.grid import expand
from sweeps.study.manifest import Manifest
from sweeps.text import hours
from tests.conftest import Launch
from tests.sweeps.studies import composed

HERE = ModelRef(family="neox", name="neox-m", path=str(DEMO_DIR / "models" / "neox-m"), weights_hash="0" * 64)
FAR = ModelRef(family="opt", name="66b", params=65_717_907_456, hub_id="facebook/opt-66b", commit="unresolved:main")
EVAL = EvalSpec(kind="perplexity", name="x", dataset="sha256:x", compute_dtype="storage")
BLOCKS = [{"bits": 16}, {"bits": [3, 4, 8], "dtype": ["int", "float"], "exponent_bits": 2}]
# What neox-m takes: 11.6 MB of weights, 16,384 tokens of activations at 8 kB, logits of 2,048 entries twice.
WHOLE = 11_575_296 + 1_048_576 + 2048 * 8192 + 2048 * 2048 * 4


def study(*models: ModelRef, dtype: str = "storage") -> Manifest:
    grid = expand(BLOCKS, list(models))
    return Manifest(sweep="s", cells=grid.cells, evals=(replace(EVAL, compute_dtype=dtype),), excluded=(), config={})


def memory(count: float | None, *, gpus: int = 1) -> DeviceMemory:
    found = None if count is None else int(count)
    return DeviceMemory(
        device="cuda", words="a GPU of x", bytes_of=lambda _: found, gpus_of=lambda _: gpus, batch_tokens=16384
    )


def ways(count: float | None, *models: ModelRef, gpus: int = 1) -> dict[str, str]:
    rows = ways_rows(planned_ways(study(*(models or (HERE,))), memory(count, gpus=gpus))[0], {})
    return {f"{model} {bits}": way for model, bits, way, *_ in rows}


def test_each_model_and_bits_has_its_way() -> None:
    assert ways(10**9) == {"neox-m 16, 8, 4, 3": "whole"}
    assert ways(10**9, gpus=2) == {"neox-m 16, 8, 4, 3": "spread over 2 GPUs"}
    less = ways((WHOLE - 10**6) / SHARE)
    assert less == {"neox-m 16": "layer by layer", "neox-m 8": "packed", "neox-m 4": "packed", "neox-m 3": "packed"}
    assert set(ways(10**6).values()) == {"does not fit"}


def test_where_memory_is_unknown_nothing_is_refused() -> None:
    assert ways(None) == {"neox-m 16, 8, 4, 3": "unknown, whole if it fits"}
    found, unsized = planned_ways(study(HERE), memory(None))
    check_ways(found, memory(None))
    assert not unsized


def test_the_sum_is_shown_and_says_where_it_is_a_guess() -> None:
    rows = ways_rows(planned_ways(study(HERE, FAR), memory(80 * 2**30))[0], {})
    text = {(row[0], row[2]): row[4] for row in rows}
    here = text["neox-m", "whole"]
    parts = [float(n) for n in re.findall(r"([\d.]+) [MG]B ", here.partition("= ")[2])]
    assert here.startswith("0.3 GB = 11.6 MB weights + 1.0 MB largest tensor + ")
    assert len(parts) == 4
    assert all(sum_.startswith("≈ ") for (model, _), sum_ in text.items() if model == "opt-66b")
    assert ("opt-66b", "packed") in text
    assert ("opt-66b", "layer by layer") in text


def test_float32_takes_twice_the_weights() -> None:
    widths = {"storage": "11.6 MB weights", "float32": "23.2 MB weights"}
    for dtype, weights in widths.items():
        (row,) = ways_rows(planned_ways(study(HERE, dtype=dtype), memory(10**9))[0], {})
        assert weights in row[4]


def test_the_time_of_a_row_is_that_of_its_quantizations() -> None:
    found, _ = planned_ways(study(HERE), memory((WHOLE - 10**6) / SHARE))
    seconds = {(planned.model, spec): 3600.0 * spec.bits for planned in found for spec in planned.specs}
    # Two data types at each of the k bits.
    assert {row[1]: row[3] for row in ways_rows(found, seconds)} == {
        str(bits): hours(3600.0 * bits * (1 if bits == 16 else 2)) for bits in (16, 8, 4, 3)
    }
    (whole,) = ways_rows(planned_ways(study(HERE), memory(10**9))[0], seconds)
    assert (whole[1], whole[3]) == ("16, 8, 4, 3", hours((16 + 2 * 15) * 3600.0))


def test_what_cannot_fit_is_refused_by_name_with_its_sum() -> None:
    found, _ = planned_ways(study(HERE, FAR), memory(10**6))
    said = r"neox-m at 16 bits, neox-m at 3 bits.* can't run on a GPU of x, of which 90% are counted on: even layer by"
    with pytest.raises(UserError, match=said) as error:
        check_ways(found, memory(10**6))
    # A guess at a size refuses nothing: the files may say otherwise.
    assert "66b" not in str(error.value)
    check_ways(planned_ways(study(FAR), memory(10**6))[0], memory(10**6))


def test_what_looks_inside_of_a_model_that_runs_layer_by_layer_is_refused() -> None:
    inside = replace(EVAL, kind="outliers", name="x_outliers")
    room = memory((WHOLE - 10**6) / SHARE)
    found, _ = planned_ways(study(HERE, FAR), room)
    said = r"eval 'x_outliers' watches .*, and neox-m runs layer by layer on a GPU of x: leave the evaluation"
    with pytest.raises(UserError, match=said):
        check_ways(found, room, [EVAL, inside])
    check_ways(found, room, [EVAL])
    for enough in (memory(10**9), memory(None)):
        check_ways(planned_ways(study(HERE), enough)[0], enough, [inside])
    # A guess at a size refuses nothing.
    check_ways(planned_ways(study(FAR), room)[0], room, [inside])


def test_a_recipe_that_quantizes_the_embedding_is_not_planned_layer_by_layer() -> None:
    blocks = [
        {"bits": 3, "dtype": "int"},
        {"method": "ggml", "ggml_type": "q4_0"},
        {"method": "ggml", "recipe": "Q4_0"},
    ]
    cells = expand(blocks, [HERE]).cells
    manifest = Manifest(sweep="s", cells=cells, evals=(EVAL,), excluded=(), config={})
    found, _ = planned_ways(manifest, memory((WHOLE - 10**6) / SHARE))
    assert {w.specs[0].label: w.way for w in found} == {
        "int3 b64": "packed",
        "ggml q4_0": "layer by layer",
        "ggml Q4_0": "does not fit",
    }
    said = (
        r"neox-m at 4 bits can't run on a GPU of x, .*: 'ggml Q4_0', which can't run layer by layer \(recipe=Q4_0 quan"
    )
    with pytest.raises(UserError, match=said) as error:
        check_ways(found, memory((WHOLE - 10**6) / SHARE))
    assert f"takes {WHOLE / 1e6:.1f} MB = 11.6 MB weights" in str(error.value)


def test_a_model_of_unknown_size_is_named() -> None:
    found, unsized = planned_ways(study(replace(FAR, params=None)), memory(10**9))
    assert (found, [m.label for m in unsized]) == ([], ["opt-66b"])


@pytest.mark.parametrize(
    ("keys", "gb"),
    [
        ({}, None),
        ({"gpu_type": "h200"}, 139),
        ({"gpu_type": "a100"}, None),
        ({"gpu_type": "a100_80gb"}, 80),
        ({"gpu_type": "A100-SXM4-40GB"}, 40),
        ({"gpu_type": "h100", "gpu_memory_gb": 20}, 20),
    ],
)
def test_the_memory_of_jobs_is_given_or_known_by_the_type(keys: dict[str, object], gb: float | None) -> None:
    assert SlurmSettings.from_config(keys).known_gpu_gb == gb
    # Without either, as many GPUs are asked for as ever.
    big = ModelRef(family="f", name="m", params=70 * 10**9, path="/m", weights_hash="0" * 64)
    if gb is None:
        assert SlurmSettings.from_config(keys).shape(big, "cuda", 0, {}).gpus == 2


def test_plan_shows_ways(here: Launch) -> None:
    small = ["sweep.sizes=[neox-xs]", "sweep.quant=[{bits: 16}, {bits: 4, dtype: int}]"]
    said = here("mode=plan", *small, "executor.device=cpu")
    assert said.returncode == 0, said.stderr
    assert re.search(r"how models run on .* of this machine's memory for each of \d+ worker", said.stdout)
    assert re.search(r"neox-xs +16 +whole +\d+ s +\S+ MB = \S+ MB weights", said.stdout)
    on_slurm = here("mode=plan", *small, "executor=slurm")
    assert "unknown, whole if it fits" in on_slurm.stdout


@pytest.mark.parametrize("mode", ["plan", "run"])
def test_plan_and_run_refuse_what_no_way_fits_and_write_nothing(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.worker.devices.usable_memory", lambda: 10**6)
    arguments = [f"mode={mode}", f"out={tmp_path}/r", "executor.device=cpu", "sweep.sizes=[neox-xs]"]
    options = Options.from_config(composed(*arguments), arguments)
    command = import_module(f"sweeps.commands.{mode}")
    with pytest.raises(UserError, match=r"neox-xs at 16 bits.* can't run on 1 MB of this machine's memory"):
        getattr(command, mode)(options, Console(quiet=True))
    assert not list((tmp_path / "r").rglob("*.rows"))
    assert not (tmp_path / "r" / "claims").exists()
