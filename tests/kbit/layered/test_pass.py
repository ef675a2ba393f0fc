"""A pass layer by layer gives the numbers of the whole model, to the bit, for all cells at once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kbit import QuantSpec, quantize_model
from kbit.errors import ArchitectureError, LayeredError, NoRoomError
from kbit.evaluation.agreement import AgreementEval
from kbit.evaluation.perplexity import PerplexityEval
from kbit.evaluation.spec import EvalResult
from kbit.layered.blocks import Blocks, HostBlocks, StreamedBlocks
from kbit.layered.cells import PassCell
from kbit.layered.hollow import Hollow
from kbit.layered.run import LayeredPass, digest_of
from kbit.layered.snapshots import Snapshots
from kbit.layered.states import StatePlace, place_states
from kbit.models.loading import load_model
from kbit.models.places import Room
from kbit.models.quantize import QuantHandle
from kbit.models.streaming.streamed import open_streamed
from kbit.spec import Spec
from kbit.specs.block_float import BlockFloatSpec
from kbit.specs.hqq import HqqSpec
from tests.kbit.architectures import ARCHITECTURES, VOCABULARY, build, write
from tests.kbit.methods.one_shot import ScaledSpec

SPECS: Mapping[str, Spec] = {
    "16": QuantSpec(bits=16),
    "int4": QuantSpec(bits=4, dtype="int", blocksize=32),
    "quantile3": QuantSpec(bits=3, dtype="quantile", blocksize=64),
}
BATCH_TOKENS = 64


def windows(count: int = 5, length: int = 24) -> PerplexityEval:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (count, length))
    return PerplexityEval(
        windows=ids, window_bytes=np.full(count, 4 * length), vocab_size=VOCABULARY, dataset_hash="none"
    )


def whole(model: Any, specs: Mapping[str, Spec]) -> dict[str, tuple[EvalResult, QuantHandle]]:
    found = {}
    for name, spec in specs.items():
        with quantize_model(model, spec, storage_dtype=torch.float16) as handle:
            found[name] = windows().run(model, batch_tokens=BATCH_TOKENS), handle
    return found


def layered(model: Any, specs: Mapping[str, Spec]) -> dict[str, tuple[EvalResult, QuantHandle]]:
    return layered_of(HostBlocks(model, "cpu"), specs)


def layered_of(blocks: Blocks, specs: Mapping[str, Spec]) -> dict[str, tuple[EvalResult, QuantHandle]]:
    model = blocks.model
    hollow = Hollow(blocks)
    calls = hollow.record(lambda: windows().run(model, batch_tokens=BATCH_TOKENS))
    cells = {name: PassCell(key=name, spec=spec, calls=calls) for name, spec in specs.items()}
    one = LayeredPass(blocks=blocks, hollow=hollow, cells=list(cells.values()), storage_dtype=torch.float16)
    assert one.run(lambda done, count: False)
    found = {}
    for name, cell in cells.items():
        with hollow.playing(one.leaving(cell)):
            found[name] = windows().run(model, batch_tokens=BATCH_TOKENS), cell.handle()
    return found


def numbers(handle: QuantHandle) -> tuple[Any, ...]:
    return (
        *(handle.layers, handle.bits_per_param, handle.total_bits, handle.total_bits_nominal),
        handle.codebook_hash,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_bits_are_those_of_the_whole_model(name: str) -> None:
    specs = dict(SPECS)
    if ARCHITECTURES[name].ordered:
        specs["outliers"] = QuantSpec(bits=3, dtype="float", blocksize=32, outlier_fraction=0.04)
    model = build(name).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = whole(model, specs)
    found = layered(model, specs)
    assert len({tuple(result.samples["nats"]) for result, _ in found.values()}) == len(specs)
    for key, (result, handle) in expected.items():
        assert found[key][0].metrics == result.metrics, key
        assert np.array_equal(found[key][0].samples["nats"], result.samples["nats"]), key
        assert numbers(found[key][1]) == numbers(handle), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_methods_that_take_no_data_give_the_same(name: str) -> None:
    specs: dict[str, Spec] = {
        "hqq": HqqSpec(bits=3, blocksize=32),
        "nvfp4": BlockFloatSpec(format="nvfp4"),
        "clipped": QuantSpec(bits=3, dtype="int", blocksize=32, clip=True),
        "rotated": QuantSpec(bits=3, dtype="int", blocksize=32, rotation=1),
    }
    model = build(name).float()
    expected, found = whole(model, specs), layered(model, specs)
    for key, (result, handle) in expected.items():
        assert np.array_equal(found[key][0].samples["nats"], result.samples["nats"]), key
        assert numbers(found[key][1]) == numbers(handle), key


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "gpt2", "bloom", "llama", "mixtral", "jamba"])
def test_blocks_that_are_read_from_files_give_the_same(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    expected = whole(load_model(str(tmp_path), device="cpu", compute_dtype="float32").model, SPECS)
    streamed = open_streamed(str(tmp_path), compute_dtype="float32")
    blocks = StreamedBlocks(streamed, "cpu")
    for _ in range(2):  # a second pass reads again
        found = layered_of(blocks, SPECS)
        for key, (result, handle) in expected.items():
            assert np.array_equal(found[key][0].samples["nats"], result.samples["nats"]), key
            assert numbers(found[key][1]) == numbers(handle), key
    inside = [p for n, p in streamed.model.named_parameters() if n.startswith(f"{ARCHITECTURES[name].blocks}.")]
    assert inside
    assert all(p.is_meta for p in inside)


def test_agreement_is_that_of_the_whole_model_and_nothing_at_16_bits() -> None:
    model = build("llama").float()
    agreement = AgreementEval(text=windows())
    referred = agreement.refer(model, batch_tokens=BATCH_TOKENS)
    with quantize_model(model, SPECS["int4"], storage_dtype=torch.float16):
        expected = referred.run(model, batch_tokens=BATCH_TOKENS)
    blocks = HostBlocks(model, "cpu")
    hollow = Hollow(blocks)
    calls = hollow.record(lambda: agreement.refer(model, batch_tokens=BATCH_TOKENS))
    assert calls == hollow.record(lambda: windows().run(model, batch_tokens=BATCH_TOKENS))
    cells = [PassCell(key=name, spec=SPECS[name], calls=calls) for name in ("int4", "16")]
    one = LayeredPass(blocks=blocks, hollow=hollow, cells=cells, storage_dtype=torch.float16)
    assert one.run(lambda done, count: False)
    with hollow.playing(one.leaving(cells[1])):
        referred = agreement.refer(model, batch_tokens=BATCH_TOKENS)
        same = referred.run(model, batch_tokens=BATCH_TOKENS)
    with hollow.playing(one.leaving(cells[0])):
        found = referred.run(model, batch_tokens=BATCH_TOKENS)
    assert same.metrics["kl"] == 0
    assert found.metrics == expected.metrics
    assert found.metrics["kl"] > 0
    assert found.also["perplexity"].metrics == expected.also["perplexity"].metrics


class Study:
    """Passes over one model with snapshots after each block, each as a process of its own would make it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = build("gpt_neox").float()

    def begin(self, pack: str, names: Sequence[str], of: str = "model") -> tuple[LayeredPass, dict[str, PassCell]]:
        blocks = HostBlocks(self.model, "cpu")
        hollow = Hollow(blocks)
        calls = hollow.record(lambda: windows().run(self.model, batch_tokens=BATCH_TOKENS))
        cells = {name: PassCell(key=name, spec=MANY[name], calls=calls) for name in names}
        one = LayeredPass(
            blocks=blocks,
            hollow=hollow,
            cells=list(cells.values()),
            storage_dtype=torch.float16,
            snapshots=Snapshots(directory=self.directory, of=digest_of(of), pack=pack),
            snapshot_seconds=0.0,
        )
        return one, cells

    def results(self, one: LayeredPass, cells: Mapping[str, PassCell]) -> dict[str, tuple[Any, ...]]:
        found = {}
        for name, cell in cells.items():
            with one.hollow.playing(one.leaving(cell)):
                result = windows().run(self.model, batch_tokens=BATCH_TOKENS)
            found[name] = (tuple(result.samples["nats"]), *numbers(cell.handle()))
        return found


MANY = {**SPECS, "outliers": QuantSpec(bits=3, dtype="float", blocksize=32, outlier_fraction=0.04)}


def stop_after_one(done: int, _count: int) -> bool:
    return done == 1


def test_a_pass_that_is_cut_goes_on_at_a_boundary_with_fewer_cells_too_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    study = Study(tmp_path / "passes")
    whole_pass, cells = study.begin("uncut", list(MANY))
    assert whole_pass.run(lambda done, count: False)
    expected = study.results(whole_pass, cells)
    whole_pass.finish()
    assert not (tmp_path / "passes").exists()

    cut, _ = study.begin("cut", list(MANY))
    assert not cut.run(stop_after_one)
    second, cells = study.begin("second", ["16", "outliers", "quantile3"])
    assert second.run(lambda done, count: False)
    assert second.began_at == 1
    assert study.results(second, cells) == {name: expected[name] for name in cells}
    second.finish()
    assert not (tmp_path / "passes").exists()


@pytest.mark.parametrize("damage", ["states", "short", "json", "other", "more"])
def test_what_is_damaged_or_of_something_else_is_passed_over(damage: str, tmp_path: Path) -> None:
    study = Study(tmp_path)
    cut, _ = study.begin("cut", ["16", "int4"])
    assert not cut.run(stop_after_one)
    (states,), (described,) = tmp_path.rglob("*.states"), tmp_path.rglob("*.json")
    if damage == "states":
        data = bytearray(states.read_bytes())
        data[len(data) // 2] ^= 1
        states.write_bytes(data)
    elif damage == "short":
        states.write_bytes(states.read_bytes()[:-8])
    elif damage == "json":
        described.write_text(described.read_text()[:100])
    again, cells = study.begin(
        "cut",
        ["16", "int4", "quantile3"] if damage == "more" else ["16", "int4"],
        "other" if damage == "other" else "model",
    )
    assert again.run(lambda done, count: False)
    assert again.began_at == 0
    uncut, same = study.begin("uncut", list(cells), "nothing")
    assert uncut.run(lambda done, count: False)
    assert study.results(again, cells) == study.results(uncut, same)


def test_states_that_memory_has_no_room_for_lie_in_a_file_and_change_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    study = Study(tmp_path / "passes")
    one, cells = study.begin("one", list(MANY))
    one.host = Room(needed=0, free=0, total=100)
    assert one.run(lambda done, count: False)
    assert one.states is not None
    assert set(one.states.places) == {StatePlace.FILE}
    other, same = study.begin("other", list(MANY), "other")
    assert other.run(lambda done, count: False)
    assert other.states is not None
    assert set(other.states.places) == {StatePlace.HOST}
    assert study.results(one, cells) == study.results(other, same)


def test_where_states_go_is_decided_by_one_rule(tmp_path: Path) -> None:
    much, none = Room(needed=0, free=10_000, total=10_000), Room(needed=0, free=0, total=10_000)

    def places(device: int, host: Room, disk: Room) -> tuple[StatePlace, ...]:
        return place_states([400, 300, 200], device_free=device, host=host, disk=disk, directory=tmp_path)

    device, host, file = StatePlace.DEVICE, StatePlace.HOST, StatePlace.FILE
    assert places(900, none, none) == (device, device, device)
    assert places(650, much, none) == (device, host, device)
    assert places(0, none, much) == (file, file, file)
    with pytest.raises(NoRoomError, match=rf"need 500 bytes .* {tmp_path} 0\. Make room there, or set TMPDIR"):
        places(400, none, none)


def test_a_cell_that_fails_ends_alone() -> None:
    model = build("phi3").float()
    failed: list[str] = []
    blocks = HostBlocks(model, "cpu")
    hollow = Hollow(blocks)
    calls = hollow.record(lambda: windows().run(model, batch_tokens=BATCH_TOKENS))
    specs = {"outliers": MANY["outliers"], "int4": SPECS["int4"], "calibrated": ScaledSpec(bits=4, dtype="int")}
    cells = {name: PassCell(key=name, spec=spec, calls=calls) for name, spec in specs.items()}
    one = LayeredPass(
        blocks=blocks, hollow=hollow, cells=list(cells.values()), failed=lambda cell: failed.append(cell.key)
    )
    assert one.run(lambda done, count: False)
    assert failed == ["calibrated", "outliers"]
    assert isinstance(cells["outliers"].error, ArchitectureError)
    assert "method='scaled' calibrates" in str(cells["calibrated"].error)
    expected = whole(model, {"int4": SPECS["int4"]})["int4"][0].metrics
    with hollow.playing(one.leaving(cells["int4"])):
        assert windows().run(model, batch_tokens=BATCH_TOKENS).metrics == expected


def test_what_depends_on_answers_is_refused() -> None:
    model = build("gpt_neox").float()
    hollow = Hollow(HostBlocks(model, "cpu"))
    ids = torch.arange(8)[None]
    with pytest.raises(LayeredError, match="generates text, token by token"):
        hollow.record(lambda: model.generate(ids, max_new_tokens=2))
    hollow.record(lambda: model(ids, use_cache=False))
    with hollow.playing(lambda key: hollow.calls[key].entering), pytest.raises(LayeredError, match="other forward"):
        model(ids + 1, use_cache=False)
    # Outside of both it is the model that it was.
    assert torch.equal(model(ids).logits, build("gpt_neox").float()(ids).logits)


def test_blocks_that_share_weights_are_refused() -> None:
    model = build("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ArchitectureError, match=r"block 1 shares mlp\.up_proj\.weight with block 0"):
        HostBlocks(model, "cpu")
