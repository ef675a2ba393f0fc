"""The run that measures llama.cpp's formats: a row a format and a recipe, and the peer where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbit.bench import __main__ as bench
from kbit.bench import llama_cpp, timing
from kbit.bench.decode import Architecture
from kbit.bench.ggml import RECIPES, measure_recipes
from kbit.ggml.formats import QUANTIZED


def test_a_run_has_each_format_and_recipe_with_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_WARM_SECONDS", 0.0)
    tiny = Architecture(name="small", hidden=256, ffn=512, layers=2, heads=4, vocab=512)
    monkeypatch.setattr(bench.switch, "SHAPES", {"small": tiny})
    bench.main(["--ggml", "small", "--device", "cpu", "--values", "8192", "--repeats", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    tables = json.loads(file.read_text())
    formats, recipes = tables["ggml_formats"], tables["ggml_recipes"]
    assert [r["format"] for r in formats] == list(QUANTIZED)
    assert all(r["quantize"] > 0 and r["dequantize"] > 0 for r in formats)
    installed = llama_cpp.package() is not None
    assert {r["llama_cpp"] is not None for r in formats} == {installed}
    assert all(r["same_bytes"] in (None, True) for r in formats)
    assert ("llama.cpp isn't here" in said) != installed
    assert [r["recipe"] for r in recipes] == list(RECIPES)
    # Embedding and head are tied: 256 · 512 of 1,179,648 weights, at 6.5625 bits; the rest at 4.5.
    assert recipes[0]["bits"] == pytest.approx(4.5 + (6.5625 - 4.5) / 9)


def test_recipes_are_timed_on_the_shape_that_is_named() -> None:
    said: list[str] = []
    shape = Architecture(name="two", hidden=64, ffn=128, layers=1, heads=2, vocab=128)
    table = measure_recipes(shape, device="cpu", say=said.append)
    assert said == [f"two {recipe}" for recipe in RECIPES for _ in range(2)]
    assert all(float(str(r["later"])) > 0 for r in table.records)
