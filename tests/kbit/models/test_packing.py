"""A model quantized as it is read is the one that is loaded whole and then packed, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kbit import QuantSpec, quantize_model
from kbit.bench import checkpoint
from kbit.bench.decode import Architecture
from kbit.errors import ArchitectureError, SpecError, WeightError
from kbit.models.architectures import Layer, block_layers
from kbit.models.loading import load_model
from kbit.models.streaming.packing import Packing
from kbit.models.streaming.streamed import open_streamed
from kbit.packed.base import PackedLinear
from kbit.specs.block_float import BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests.kbit.architectures import write
from tests.kbit.models.test_streaming import plain
from tests.kbit.tiny_models import NAMES, identical, tiny

SPECS = {
    "int": QuantSpec(bits=4, dtype="int"),
    "float in blocks": QuantSpec(bits=4, dtype="float", blocksize=64),
    "float of other exponents": QuantSpec(bits=6, dtype="float", exponent_bits=2, blocksize=128),
    "quantile": QuantSpec(bits=3, dtype="quantile", blocksize=64),
    "dynamic, centered": QuantSpec(bits=5, dtype="dynamic", blocksize=128, center=True),
    "normal, nested": QuantSpec(bits=4, dtype="normal", blocksize=64, absmax_dtype="nested"),
    "by rows": QuantSpec(bits=8, dtype="int", scheme="group", blocksize=16),
    "lloyd": QuantSpec(bits=2, dtype="lloyd", blocksize=64),
    "outliers": QuantSpec(bits=4, dtype="float", outlier_fraction=0.05),
    "outliers of a fitted codebook": QuantSpec(bits=3, dtype="quantile", outlier_fraction=0.1),
    "float zero points": HqqSpec(bits=3, blocksize=32),
    "block-scaled floats": BlockFloatSpec(format="nvfp4"),
}


def packing(directory: Path, compute_dtype: str = "storage") -> Packing:
    return Packing(open_streamed(str(directory), compute_dtype=compute_dtype), device="cpu")


def buffers(model: nn.Module) -> dict[str, Tensor]:
    both = (*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in both}


def assert_equal(ours: Any, ours_model: nn.Module, theirs: Any, theirs_model: nn.Module) -> None:
    assert (ours.layers, ours.codebook_hash) == (theirs.layers, theirs.codebook_hash)
    assert (ours.bits_per_param, ours.total_bits) == (theirs.bits_per_param, theirs.total_bits)
    assert ours.total_bits_nominal == theirs.total_bits_nominal
    assert identical(buffers(ours_model), buffers(theirs_model))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours_model(ids, use_cache=False).logits, theirs_model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SPECS)
def test_codes_bits_and_hashes_are_those_of_the_whole_model(name: str, kind: str, tmp_path: Path) -> None:
    directory = plain(tiny(name, torch.float16), tmp_path)
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    whole = quantize_model(loaded.model, SPECS[kind], storage_dtype=loaded.storage_dtype, packed=True)
    ours = packing(directory, "float32")
    assert_equal(ours.quantize(SPECS[kind]), ours.model, whole, loaded.model)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "cohere", "starcoder2"])
def test_other_architectures_are_packed_as_they_are_read(name: str, tmp_path: Path) -> None:
    directory = write(name, tmp_path / name)
    loaded = load_model(str(directory), device="cpu", compute_dtype="storage")
    whole = quantize_model(loaded.model, SPECS["float in blocks"], storage_dtype=loaded.storage_dtype, packed=True)
    ours = packing(directory)
    assert_equal(ours.quantize(SPECS["float in blocks"]), ours.model, whole, loaded.model)


def test_cells_follow_one_another_and_the_last_one_counts(tmp_path: Path) -> None:
    directory = plain(tiny("llama-tied", torch.float16), tmp_path)
    loaded = load_model(str(directory), device="cpu", compute_dtype="storage")
    ours = packing(directory)
    handle = None
    for spec in SPECS.values():
        earlier, handle = handle, ours.quantize(spec)
        if earlier is not None:
            earlier.restore()  # a later cell was begun: nothing happens
        with quantize_model(loaded.model, spec, storage_dtype=loaded.storage_dtype, packed=True) as whole:
            assert_equal(handle, ours.model, whole, loaded.model)
    assert handle is not None
    handle.restore()
    assert not any(isinstance(module, PackedLinear) for module in ours.model.modules())
    assert all(layer.parameter.is_meta for layer in block_layers(ours.model))
    assert not ours.model.get_input_embeddings().weight.is_meta


class _Watching(QuantSpec):
    """Block-wise, told how many layers have 16-bit weights."""

    runs: ClassVar[str] = f"{__name__}:watched"
    seen: ClassVar[list[int]] = []
    skipped: ClassVar[str] = ""


def watched(model: Any, spec: QuantSpec, calibration: Tensor | None) -> Iterator[tuple[Layer, Any]]:
    from kbit.methods.blockwise import quantize_layers

    for layer, stored in quantize_layers(model, spec, calibration):
        linear = [m for m in model.module.modules() if isinstance(m, nn.Linear) and m is not model.module.lm_head]
        _Watching.seen.append(sum(not m.weight.is_meta for m in linear))
        if not _Watching.skipped or _Watching.skipped not in layer.name:
            yield layer, stored


def test_one_layer_at_a_time_has_its_16_bit_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Watching, "seen", [])
    ours = packing(plain(tiny("opt", torch.float16), tmp_path))
    handle = ours.quantize(_Watching(bits=4, dtype="int"))
    assert _Watching.seen == [1] * len(handle.layers)
    assert not any(p.is_meta for p in ours.model.parameters())


def test_a_layer_that_the_method_leaves_alone_stays_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Watching, "skipped", "fc1")
    directory = plain(tiny("opt", torch.float16), tmp_path)
    ours = packing(directory)
    handle = ours.quantize(_Watching(bits=4, dtype="int"))
    loaded = load_model(str(directory), device="cpu", compute_dtype="storage")
    whole = quantize_model(loaded.model, _Watching(bits=4, dtype="int"), storage_dtype=torch.float16, packed=True)
    assert len(handle.layers) == 10
    assert_equal(handle, ours.model, whole, loaded.model)


def test_the_baseline_and_what_can_not_be_packed_are_refused(tmp_path: Path) -> None:
    ours = packing(plain(tiny("neox", torch.float16), tmp_path / "neox"))
    with pytest.raises(SpecError, match="bits=16"):
        ours.quantize(QuantSpec(bits=16))
    with pytest.raises(ArchitectureError, match="packed=True can't replace"):
        packing(write("mixtral", tmp_path / "mixtral")).quantize(SPECS["int"])


def test_a_weight_that_is_not_finite_leaves_a_model_that_other_cells_can_have(tmp_path: Path) -> None:
    model = tiny("neox", torch.float16)
    block_layers(model)[-1].parameter.data[0, 0] = torch.nan
    ours = packing(plain(model, tmp_path))
    for _ in range(2):
        with pytest.raises(WeightError):
            ours.quantize(SPECS["int"])
        assert all(layer.parameter.is_meta for layer in block_layers(ours.model))


def test_over_several_gpus_a_model_is_cut_by_what_its_layers_take_in_k_bits(tmp_path: Path) -> None:
    ours = packing(plain(tiny("llama-gqa", torch.float16), tmp_path))
    ours._gpus = 2
    by_bits = {bits: ours._devices(QuantSpec(bits=bits, dtype="int")) for bits in (2, 8)}
    assert all(set(devices.values()) == {0, 1} for devices in by_bits.values())
    assert {ours.device_of("lm_head.weight", by_bits[2]).index, by_bits[2]["lm_head"]} == {1}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
WIDE = Architecture(name="wide", hidden=1024, ffn=4096, layers=12, heads=16, vocab=2048, positions=64)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide")
    checkpoint.write(WIDE, directory, device="cuda", say=lambda _: None)
    return directory


@needs_gpu
@pytest.mark.parametrize("kind", ["float in blocks", "normal, nested", "quantile", "outliers"])
def test_on_a_gpu_the_codes_are_those_of_the_whole_model(kind: str, wide: Path) -> None:
    loaded = load_model(str(wide), device="cuda", compute_dtype="storage")
    whole = quantize_model(loaded.model, SPECS[kind], storage_dtype=loaded.storage_dtype, packed=True)
    ours = Packing(open_streamed(str(wide), compute_dtype="storage"), device="cuda")
    for _ in range(2):  # the second time from the page cache, while the first cell's memory is used again
        handle = ours.quantize(SPECS[kind])
        assert (handle.codebook_hash, handle.total_bits) == (whole.codebook_hash, whole.total_bits)
        assert identical(buffers(ours.model), buffers(loaded.model))


@needs_gpu
def test_a_gpu_holds_the_k_bits_and_two_tensors_at_most(wide: Path) -> None:
    ours = Packing(open_streamed(str(wide), compute_dtype="storage"), device="cuda")
    ours.quantize(SPECS["float in blocks"]).restore()  # kernels and their buffers
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(p.nbytes for p in ours.model.parameters() if not p.is_meta)
    torch.cuda.reset_peak_memory_stats()
    ours.quantize(SPECS["float in blocks"])
    held = sum({t.data_ptr(): t.nbytes for t in buffers(ours.model).values()}.values())
    largest = 2 * WIDE.hidden * WIDE.ffn
    assert torch.cuda.max_memory_allocated() - before < held + 3.5 * largest
    assert held < 0.4 * sum(file.stat().st_size for file in wide.glob("*.safetensors"))


@needs_gpus
def test_over_two_gpus_a_packed_model_gives_the_logits_of_one(wide: Path) -> None:
    ids = torch.arange(24, device="cuda")[None]
    one = Packing(open_streamed(str(wide), compute_dtype="storage"), device="cuda")
    both = Packing(open_streamed(str(wide), compute_dtype="storage"), device="cuda", gpus=2)
    for spec in (SPECS["float in blocks"], SPECS["outliers"]):
        one.quantize(spec)
        both.quantize(spec)
        assert {buffer.device.index for buffer in buffers(both.model).values()} == {0, 1}
        with torch.no_grad():
            assert torch.equal(one.model(ids).logits, both.model(ids).logits.to(ids.device))
