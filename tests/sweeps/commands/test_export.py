"""mode=export: a cell is written, loaded again and compared; what can't be written is refused at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kbit import load_packed
from kbit.gguf.file import read_file
from sweeps import load_results
from sweeps.commands.export import TOLERANCE
from tests.conftest import Launch
from tests.sweeps.commands.conftest import Ask, Said

STUDY = (
    *(
        "sweep.sizes=[neox-xs]",
        "eval.tasks=[]",
        "eval.tokens=1024",
        "executor.device=cpu",
        "executor.workers=1",
        "out=r",
        "report=false",
    ),
    "sweep.quant=[{bits: 16}, {bits: 4, dtype: int}, {method: ggml, recipe: Q4_K_M}, "
    "{method: gptq, bits: 3, dtype: int, blocksize: row}, {method: block_float, format: nvfp4}]",
    "calibration={set: jargon, samples: 4, length: 64, compute_dtype: float32}",
)


@pytest.fixture
def keys(tmp_path: Path, here: Launch) -> dict[str, str]:
    """Keys of the cells of a study that was run, by label."""
    done = here(*STUDY)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = load_results(tmp_path / "r")
    return dict(zip(rows["label"], rows["key"], strict=True))


def losses(done: Said) -> tuple[float, float]:
    assert done.code == 0, done
    found = re.search(r"Loss on jargon: ([\d.]+) of the cell, ([\d.]+) of what was written", done.out)
    assert found is not None, done.out
    return float(found[1]), float(found[2])


def test_cells_are_written_loaded_again_and_compared(keys: dict[str, str], tmp_path: Path, ask: Ask) -> None:
    stored = load_results(tmp_path / "r").set_index("label")["jargon_loss"]
    recipe, integers = (f"cell={keys[label][:12]}" for label in ("ggml Q4_K_M", "int4 b64"))

    done = ask("mode=export", "out=r", recipe, "format=gguf", "to=new/m.gguf")
    assert losses(done) == pytest.approx([stored["ggml Q4_K_M"]] * 2, abs=1e-6)
    assert "Wrote neox-xs ggml Q4_K_M in llama.cpp's own formats: new/m.gguf, 0.7 MB." in done.out
    written = read_file(tmp_path / "new" / "m.gguf")
    assert written.tensors["blk.0.attn_qkv.weight"].format.name == "q5_0"  # rows of 96 fit no q4_K

    done = ask("mode=export", "out=r", integers, "format=gguf", "to=dense.gguf")
    assert losses(done) == pytest.approx([stored["int4 b64"]] * 2, abs=1e-6)
    assert "int4 b64 in float16, dequantized: GGUF has no such codes: dense.gguf" in done.out

    for label, to in (("int4 b64", "dir"), ("nvfp4", "nv")):
        done = ask("mode=export", "out=r", f"cell={keys[label]}", "format=packed", f"to={to}")
        assert losses(done) == pytest.approx([stored[label]] * 2, abs=TOLERANCE)
        load_packed(tmp_path / to)
        assert (tmp_path / to / "tokenizer.json").is_file()

    gptq = "gptq int3 row, jargon 4x64 seed 0 float32"
    rows = f"cell={keys[gptq]}"
    done = ask("mode=export", "out=r", rows, "format=compressed-tensors", "to=ct")
    assert losses(done) == pytest.approx([stored[gptq]] * 2, abs=TOLERANCE)
    assert "Wrote neox-xs gptq int3 row, pack-quantized: ct, " in done.out

    cells = {"one": recipe, "all": "where={bits: [4, 16]}"}
    for asked, said in (
        ([cells["all"], "format=gguf", "to=x.gguf"], "chooses 4 cells, and one is written"),
        ([cells["one"], "format=gguf", "to=dense.gguf"], "to=dense.gguf is there already: name another, or remove it"),
        ([cells["one"], "format=packed", "to=x"], "format='packed' is not valid: gguf for 'ggml Q4_K_M': llama.cpp's"),
        ([cells["one"], "format=gguf", "to=x"], "is not valid: a file for format=gguf: NAME.gguf"),
        ([cells["one"], "format=onnx", "to=x"], "format='onnx' is not valid: one of gguf, packed"),
        (
            [cells["one"], "to=x.gguf"],
            "mode=export needs format=: cell=KEY_PREFIX format=(gguf, packed, compressed-tensors) to=",
        ),
        (["format=gguf", "to=x.gguf"], "mode=export needs cell=KEY_PREFIX"),
        (
            [integers, "format=compressed-tensors", "to=x"],
            "for 'int4 b64': its blocks are groups of a row; it holds a cell",
        ),
    ):
        refused = ask("mode=export", "out=r", *asked)
        assert refused.code == 2, refused.out
        assert said in " ".join(refused.error.split())
        assert not (tmp_path / "x").exists()
        assert not (tmp_path / "x.gguf").exists()
