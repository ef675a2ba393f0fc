"""Weights kept once for all cells of a model: whatever came before, a cell is what it is on a freshly loaded model."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kbit import KBitLinear, QuantSpec, quantize_model
from kbit.errors import ArchitectureError, SpecError, WeightError
from kbit.methods.blockwise import StoredCodes, quantize_layers
from kbit.models.architectures import block_layers
from kbit.models.originals import Originals
from kbit.models.places import Place, Room, host_like, lock_pages, place_for
from kbit.models.quantize import Calibrated, QuantHandle
from kbit.models.whole import WholeModel
from kbit.quantizer.blockwise import quantize
from kbit.spec import Spec, spec_of
from kbit.specs.block_float import BlockFloatSpec
from tests.kbit.architectures import build
from tests.kbit.methods.one_shot import ScaledSpec
from tests.kbit.models.test_quantize_model import Unknown
from tests.kbit.tiny_models import NAMES, VOCABULARY, bits_of, identical, tiny

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
PLACES = [None, pytest.param(Place.LOCKED, marks=needs_gpu), pytest.param(Place.HOST, marks=needs_gpu)]


@dataclass(frozen=True, kw_only=True)
class WithEmbedding(QuantSpec):
    """Block-wise, and the input embedding too, as recipes have it that quantize all of a model."""

    method_name: ClassVar[str] = "with-embedding"
    runs: ClassVar[str] = f"{__name__}:with_embedding"
    packs: ClassVar[bool] = False


def with_embedding(model: WholeModel, spec: WithEmbedding, _: Tensor | None) -> Iterator[tuple[Any, StoredCodes]]:
    assert model.embedding is not None
    yield model.embedding, StoredCodes(tensor=quantize(model.embedding.weight, spec))
    yield from quantize_layers(model, spec)


@dataclass(frozen=True, kw_only=True)
class Stopped(QuantSpec):
    """Block-wise until the sixth layer, where ``ERROR`` is raised."""

    method_name: ClassVar[str] = "stopped"
    runs: ClassVar[str] = f"{__name__}:stopped"
    error: ClassVar[BaseException] = KeyboardInterrupt()


def stopped(model: WholeModel, spec: Stopped, _: Tensor | None) -> Iterator[tuple[Any, StoredCodes]]:
    for number, found in enumerate(quantize_layers(model, spec)):
        if number == 5:
            raise Stopped.error
        yield found


@dataclass(frozen=True, kw_only=True)
class Half(QuantSpec):
    """Block-wise, every second layer."""

    method_name: ClassVar[str] = "half"
    runs: ClassVar[str] = f"{__name__}:half"


def half(model: WholeModel, spec: Half, _: Tensor | None) -> Iterator[tuple[Any, StoredCodes]]:
    for number, found in enumerate(quantize_layers(model, spec)):
        if number % 2:
            yield found


INT4 = QuantSpec(bits=4, dtype="int")
PLAIN: list[Spec] = [
    QuantSpec(bits=16),
    INT4,
    QuantSpec(bits=3, dtype="quantile"),
    QuantSpec(bits=3, dtype="quantile", blocksize=24, scheme="group", absmax_dtype="float32"),
    QuantSpec(bits=3, dtype="quantile", center=True),
    QuantSpec(bits=2, dtype="lloyd", blocksize=32),
    QuantSpec(bits=2, dtype="lloyd", blocksize=1000),
    QuantSpec(bits=5, dtype="float", blocksize=24, scheme="group"),
    QuantSpec(bits=8, dtype="dynamic", absmax_dtype="nested", center=True),
    Half(bits=3, dtype="normal"),
]
OUTLIERS: list[Spec] = [
    QuantSpec(bits=4, dtype="int", outlier_fraction=0.1),
    QuantSpec(bits=3, dtype="quantile", outlier_fraction=0.1),
    QuantSpec(bits=3, dtype="lloyd", center=True, outlier_fraction=0.05),
]
OTHER: list[Spec] = [
    ScaledSpec(bits=4, dtype="int", blocksize=32),
    WithEmbedding(bits=4, dtype="int", blocksize=32),
    BlockFloatSpec(format="nvfp4"),
]


def tokens(model: nn.Module) -> Calibrated:
    device = next(model.parameters()).device
    return Calibrated(
        tokens=torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0)).to(device)
    )


def cell(model: nn.Module, spec: Spec, originals: Originals | None = None, *, packed: bool = False) -> QuantHandle:
    calibration = tokens(model) if spec.calibrates else None
    return quantize_model(model, spec, packed=packed, calibration=calibration, originals=originals)


def numbers(handle: QuantHandle) -> tuple[Any, ...]:
    return (
        handle.spec,
        handle.layers,
        handle.bits_per_param,
        handle.total_bits,
        handle.total_bits_nominal,
        handle.codebook_hash,
    )


def check_sequence(
    model: nn.Module, fresh: nn.Module, cells: list[tuple[Spec, bool]], place: Place | None = None
) -> None:
    """Cells one after another through kept originals equal each cell alone, and the model comes back."""
    before, originals = bits_of(model), Originals(model=model, place=place)
    for spec, packed in cells:
        handle = cell(model, spec, originals, packed=packed)
        with cell(fresh, spec, packed=packed) as alone:
            assert numbers(handle) == numbers(alone)
            assert identical(bits_of(model), bits_of(fresh)), spec.label
    originals.restore()
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_cells_is_each_cell_on_a_fresh_model(
    name: str, place: Place | None, data: st.DataObject
) -> None:
    device = "cpu" if place is None else "cuda"
    specs = st.sampled_from(PLAIN + OUTLIERS + OTHER)
    cells = st.tuples(specs, st.booleans()).map(lambda c: (c[0], c[1] and (c[0].packs or c[0].is_baseline)))
    model, fresh = tiny(name).to(device), tiny(name).to(device)
    check_sequence(model, fresh, data.draw(st.lists(cells, min_size=2, max_size=6)), place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "gpt2", "mamba", "falcon"])
def test_stacks_of_experts_and_other_architectures(name: str, place: Place | None) -> None:
    device = "cpu" if place is None else "cuda"
    specs = [*PLAIN, PLAIN[1]]
    check_sequence(build(name).to(device), build(name).to(device), [(spec, False) for spec in specs], place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_each_kind_of_cell_after_each_other(name: str, place: Place | None) -> None:
    device = "cpu" if place is None else "cuda"
    kinds = [(INT4, False), (INT4, True), (OTHER[0], False), (OTHER[1], False), (PLAIN[0], False), (OUTLIERS[1], False)]
    cells = [both for first in kinds for second in kinds for both in (first, second)]
    check_sequence(tiny(name).to(device), tiny(name).to(device), cells, place)


def test_a_weight_tied_within_the_blocks_stays_tied() -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = Unknown()
        model.stack[2].mixing.weight = model.stack[0].mixing.weight
        # The same memory in another parameter.
        model.stack[1].mixing.weight = nn.Parameter(model.stack[0].mixing.weight.data)
        return model

    check_sequence(tied(), tied(), [(spec, False) for spec in PLAIN])


@pytest.mark.parametrize("device", DEVICES)
def test_originals_are_copied_once_and_working_weights_stay_where_they_are(device: str) -> None:
    model = tiny("opt").to(device)
    originals = Originals(model=model, place=Place.GPU)
    working = [layer.parameter.data_ptr() for layer in block_layers(model)]
    kept = None
    for spec in [INT4, PLAIN[2], OTHER[0], PLAIN[0], INT4]:
        cell(model, spec, originals)
        found = [layer.original.data_ptr() for layer in originals.layers if layer.original is not None]
        assert len(found) == len(working)
        assert kept in (None, found)
        kept = found
        assert [layer.parameter.data_ptr() for layer in block_layers(model)] == working
    assert not set(found) & set(working)


def test_between_two_cells_no_weight_is_written_but_by_the_second() -> None:
    model = tiny("neox")
    originals = Originals(model=model)

    def writes(spec: Spec) -> list[int]:
        before = [layer.parameter._version for layer in block_layers(model)]
        cell(model, spec, originals)
        return [layer.parameter._version - version for layer, version in zip(block_layers(model), before, strict=True)]

    alone = writes(INT4)  # nothing was there to restore
    assert min(alone) >= 1
    assert writes(QuantSpec(bits=3, dtype="int")) == alone
    # The half that a cell leaves alone gets its originals back.
    assert writes(Half(bits=4, dtype="int")) == alone
    assert writes(INT4) == alone
    assert sum(writes(QuantSpec(bits=16))) == len(alone)
    assert sum(writes(QuantSpec(bits=16))) == 0


def test_a_first_packed_cell_keeps_the_weights_own_memory_without_a_copy() -> None:
    model = tiny("opt")
    originals = Originals(model=model)
    before = {layer.name: layer.parameter.data_ptr() for layer in block_layers(model)}
    cell(model, INT4, originals, packed=True)
    assert sum(isinstance(module, KBitLinear) for module in model.modules()) == len(before)
    originals.restore()
    assert {layer.name: layer.parameter.data_ptr() for layer in block_layers(model)} == before
    cell(model, INT4, originals)
    after = {layer.name: layer.parameter.data_ptr() for layer in block_layers(model)}
    assert not set(after.values()) & set(before.values())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), WeightError("no"), torch.OutOfMemoryError("no")], ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_after_a_cell_that_ends_in_the_middle_the_next_is_right(
    error: BaseException, packed: bool, place: Place | None
) -> None:
    device = "cpu" if place is None else "cuda"
    model, fresh = tiny("gpt2").to(device), tiny("gpt2").to(device)
    before, originals = bits_of(model), Originals(model=model, place=place)
    for first in (None, PLAIN[2], OTHER[1]):
        if first is not None:
            cell(model, first, originals)
        Stopped.error = error
        with pytest.raises(type(error)):
            cell(model, Stopped(bits=4, dtype="int"), originals, packed=packed)
        assert identical(bits_of(model), before)
        handle = cell(model, PLAIN[7], originals)
        with cell(fresh, PLAIN[7]) as alone:
            assert numbers(handle) == numbers(alone)
            assert identical(bits_of(model), bits_of(fresh))


def test_a_refused_cell_leaves_the_original_model() -> None:
    model = build("mixtral")
    before, originals = bits_of(model), Originals(model=model)
    cell(model, INT4, originals)
    with pytest.raises(SpecError, match="one that quantizes weights alone"):
        cell(model, spec_of({"method": "llm_int8"}), originals)
    assert identical(bits_of(model), before)
    cell(model, INT4, originals)
    with pytest.raises(ArchitectureError, match="one of the matrices of a stack"):
        cell(model, INT4, originals, packed=True)
    assert identical(bits_of(model), before)
    with pytest.raises(ValueError, match="another model's"):
        quantize_model(build("mixtral"), INT4, originals=originals)


def test_experts_are_calibrated_on_after_a_cell_that_was_refused_before_anything_was_copied() -> None:
    model, fresh = build("mixtral"), build("mixtral")
    before, originals = bits_of(model), Originals(model=model)
    with pytest.raises(ArchitectureError, match="one of the matrices of a stack"):
        cell(model, INT4, originals, packed=True)
    for spec in (OTHER[0], spec_of({"method": "gptq", "bits": 3, "dtype": "int"}), INT4):
        handle = cell(model, spec, originals)
        with cell(fresh, spec) as alone:
            assert (numbers(handle), handle.codes_hash) == (numbers(alone), alone.codes_hash)
            assert identical(bits_of(model), bits_of(fresh))
    handle.restore()
    assert identical(bits_of(model), before)


def test_a_handle_restores_its_own_cell_and_no_later_one() -> None:
    model = tiny("llama-gqa")
    before, originals = bits_of(model), Originals(model=model)
    first = cell(model, INT4, originals)
    second = cell(model, PLAIN[2], originals)
    quantized = bits_of(model)
    first.restore()
    assert identical(bits_of(model), quantized)
    second.restore()
    assert identical(bits_of(model), before)
    with cell(model, INT4, originals):
        assert not identical(bits_of(model), before)
    assert identical(bits_of(model), before)


def test_what_depends_on_the_weights_alone_is_found_once() -> None:
    model = tiny("neox")
    originals = Originals(model=model)
    layers = len(block_layers(model))
    for blocksize in (16, 64, None):
        for bits in (3, 4):
            cell(model, QuantSpec(bits=bits, dtype="quantile", blocksize=blocksize), originals)
    assert len(originals.fitted) == 2 * layers  # whatever the block size
    for blocksize in (16, 64):
        cell(model, QuantSpec(bits=3, dtype="lloyd", blocksize=blocksize), originals)
    assert len(originals.fitted) == 4 * layers
    assert all(codebook.nbytes <= 4 << key[1].bits for key, codebook in originals.fitted.items())
    columns = [originals.outlier_columns(fraction, None) for fraction in (0.1, 0.1, 0.2)]
    assert columns[0] is columns[1]
    cell(model, OUTLIERS[0], originals)
    assert originals.outlier_columns(0.1, None) is columns[0]
    with cell(tiny("neox"), OUTLIERS[0]) as alone:
        assert numbers(cell(model, OUTLIERS[0], originals)) == numbers(alone)


def test_the_rule_of_where_originals_lie() -> None:
    plenty, short = Room(needed=20, free=65, total=80), Room(needed=20, free=39, total=80)
    host, small = Room(needed=40, free=100, total=128), Room(needed=40, free=50, total=128)
    assert plenty.free - plenty.needed >= 0.25 * plenty.total > short.free - short.needed
    assert place_for([plenty, plenty], small) is Place.GPU
    assert place_for([plenty, short], host) is Place.LOCKED
    assert place_for([short], small) is Place.HOST


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_to_be_locked_has_pages_of_its_own_and_the_order_of_the_weight(dtype: torch.dtype) -> None:
    values = [torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype).t(), torch.randn(3, 40, 50, dtype=dtype)]
    hosts = [host_like(v) for v in values]
    for host, v in zip(hosts, values, strict=True):
        assert (host.shape, host.stride(), host.dtype) == (v.shape, v.stride(), v.dtype)
        assert host.data_ptr() % resource.getpagesize() == 0
        assert host.untyped_storage().nbytes() >= host.storage_offset() * host.itemsize + resource.getpagesize()
        assert torch.equal(host.copy_(v), v)


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_originals_on_a_gpu_give_up_its_memory(packed: bool) -> None:
    model, fresh = tiny("gpt2").cuda(), tiny("gpt2").cuda()
    before, originals = bits_of(model), Originals(model=model, place=Place.GPU)
    handle = cell(model, INT4, originals, packed=packed)
    quantized, kept = bits_of(model), originals.gpu_bytes
    assert kept == sum(layer.parameter.nbytes for layer in originals.layers)
    assert originals.make_room()
    assert not originals.make_room()
    assert originals.gpu_bytes == 0
    assert identical(bits_of(model), quantized)
    handle.restore()
    assert identical(bits_of(model), before)
    check_sequence(model, fresh, [(INT4, packed), (PLAIN[2], False), (INT4, not packed)])


class Owner:
    """What page-locked memory belongs to."""


@needs_gpu
def test_page_locked_memory_is_given_back_with_its_owner() -> None:
    model = tiny("opt").cuda()
    originals = Originals(model=model, place=Place.LOCKED)
    cell(model, INT4, originals)
    hosts = [layer.original for layer in originals.layers if layer.original is not None]
    assert originals.lock_seconds > 0
    other, gpu = Owner(), torch.device("cuda")
    # What is locked can't be locked again. Tensor.is_pinned asks about the storage's first page, which is not.
    assert not any(lock_pages(host, owner=other, gpu=gpu) for host in hosts)
    del originals
    assert all(lock_pages(host, owner=other, gpu=gpu) for host in hosts)


def test_the_demo_models_cells_in_the_order_of_a_study() -> None:
    from kbit.models.loading import load_model
    from sweeps.config import DEMO_DIR

    path = str(DEMO_DIR / "models" / "neox-xs")
    models = [load_model(path, device="cpu", compute_dtype="float32") for _ in range(2)]
    storage = models[0].storage_dtype
    originals = Originals(model=models[0].model)
    rows: list[tuple[Any, ...]] = []
    for spec in [PLAIN[0], INT4, PLAIN[2], OUTLIERS[1], PLAIN[2]]:
        handle = quantize_model(models[0].model, spec, storage_dtype=storage, originals=originals)
        with quantize_model(models[1].model, spec, storage_dtype=storage) as alone:
            assert numbers(handle) == numbers(alone)
            assert identical(bits_of(models[0].model), bits_of(models[1].model))
        rows.append(numbers(handle))
    assert rows[2] == rows[4]
    assert all(a != b for a, b in pairwise(rows))
