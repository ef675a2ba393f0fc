"""A model that fits in k bits alone is quantized as it is read, by itself, with the numbers of the packed model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kbit.evaluation import prepare
from kbit.models.loading import load_model
from kbit.models.quantize import quantize_model
from kbit.models.sizes import parts_of
from kbit.models.ways import LEAST_BATCH_TOKENS, SHARE, Way, needs
from kbit.spec import QuantSpec, Spec
from kbit.specs.block_float import BlockFloatSpec
from sweeps.study.cell import Cell
from sweeps.worker import ways
from tests.sweeps.worker.test_layered import NEOX_M, ways_of
from tests.sweeps.worker.test_worker import INT3, INT4, Bench, evaluation, pack_of

OUTLIERS = QuantSpec(bits=4, dtype="float", blocksize=64, outlier_fraction=0.02)
FLOATS = BlockFloatSpec(format="mxfp6_e2m3")
CELLS = (INT4, INT3, OUTLIERS, FLOATS)


def cell_of(spec: Spec) -> Cell:
    return pack_of(spec, model=NEOX_M).items[0][0]


def memory_for(spec: Spec) -> int:
    """Bytes of memory that hold neox-m packed with a batch, and not a byte more."""
    sizes, _ = ways.sizes_of_model(cell_of(spec).model)
    assert sizes is not None
    parts = parts_of(sizes, spec, compute_bytes=4, device="cpu")
    return int(sum(needs(parts, Way.PACKED, batch_tokens=LEAST_BATCH_TOKENS).values()) / SHARE) + 1


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = max(memory_for(spec) for spec in CELLS)
    monkeypatch.setattr(ways, "device_memory", lambda _: memory)


def by_bits(bench: Bench) -> dict[tuple[int, float | None], dict[str, Any]]:
    return {(row["bits"], row["outlier_fraction"]): row for row in bench.rows()}


@pytest.mark.usefixtures("small_machine")
def test_cells_run_packed_where_the_16_bit_model_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of(*CELLS, model=NEOX_M)
    bench = Bench(tmp_path / "packed")
    bench.worker.run_pack(pack)
    monkeypatch.undo()
    whole = Bench(tmp_path / "whole")
    whole.worker.run_pack(pack)
    assert bench.names().count("loaded") == 1
    ours, theirs = by_bits(bench), by_bits(whole)
    assert ours.keys() == theirs.keys()
    loaded = load_model(str(NEOX_M), device="cpu", compute_dtype="float32")
    prepared = prepare(evaluation(), loaded.tokenizer, context=loaded.context, vocab_size=loaded.vocab_size)
    for spec in CELLS:
        row, other = (rows[spec.bits, getattr(spec, "outlier_fraction", None)] for rows in (ours, theirs))
        assert (row["status"], row["held"], other["held"]) == ("done", "packed", "whole")
        same = ("measurement", "bits_per_param", "total_bits", "codebook_hash", "compute_dtype", "weights_hash")
        assert [row[name] for name in same] == [other[name] for name in same]
        torch.manual_seed(0)
        with quantize_model(loaded.model, spec, storage_dtype=loaded.storage_dtype, packed=True):
            expected = prepared.run(loaded.model, batch_tokens=2048)
        assert dict(row["metrics"]) == expected.metrics
        assert dict(row["metrics"])["loss"] == pytest.approx(dict(other["metrics"])["loss"], abs=1e-3)


@pytest.mark.usefixtures("small_machine")
def test_what_can_not_be_read_tensor_by_tensor_is_loaded_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    model = tmp_path / "neox-m"
    shutil.copytree(NEOX_M, model)
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (model / "model.safetensors").unlink()
    bench = Bench(tmp_path / "out")
    bench.worker.run_pack(pack_of(INT4, INT3, model=model))
    assert [(row["status"], row["held"]) for row in bench.rows()] == [("done", "whole")] * 2
    assert capfd.readouterr().err.count("has to be loaded whole: pytorch_model.bin is of torch's format") == 1


@pytest.mark.usefixtures("small_machine")
def test_cells_that_are_compared_with_a_16_bit_model_that_does_not_fit_run_layer_by_layer() -> None:
    assert ways_of(INT4, kinds=["perplexity"]) == ([(4, "perplexity")], [])
    assert ways_of(INT4, kinds=["agreement"]) == ([], [(4, "agreement")])


def test_a_model_that_fits_in_16_bits_is_loaded_whole() -> None:
    assert ways.way_of(cell_of(INT4), "float32", device="cpu", gpus=0, batch_tokens=2048) is Way.WHOLE
