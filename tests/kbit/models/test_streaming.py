"""A model that is read weight by weight is the one that is loaded whole, bit for bit, for every architecture."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kbit.errors import CheckpointError, NotStreamableError, SpecError
from kbit.models.architectures import block_layers, decoder_blocks
from kbit.models.checkpoint import headers_of
from kbit.models.loading import load_model
from kbit.models.streaming import reader
from kbit.models.streaming.extents import extents_of
from kbit.models.streaming.streamed import Streamed, open_streamed
from tests.kbit import composite_models, tiny_models
from tests.kbit.architectures import ARCHITECTURES, write
from tests.kbit.models.test_loading import write_tokenizer
from tests.kbit.tiny_models import identical, tiny

CPU = torch.device("cpu")
Write = Callable[[Path], Path]


def plain(model: nn.Module, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    write_tokenizer(directory)
    return directory


def as_torch_files(directory: Path) -> Path:
    """The same weights in one torch file, tied ones under each of their names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    torch.save(dict(model.state_dict()), directory / "pytorch_model.bin")
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    return directory


CHECKPOINTS: dict[str, Write] = {
    **{name: lambda directory, name=name: write(name, directory) for name in ARCHITECTURES},
    **{
        f"tiny {name}": lambda directory, name=name: plain(tiny(name, torch.float16), directory)
        for name in tiny_models.NAMES
    },
    **{
        f"{name} with a tower": lambda directory, name=name: plain(
            composite_models.composite(name, torch.bfloat16), directory
        )
        for name in composite_models.NAMES
    },
    "in shards": lambda directory: plain(tiny("neox", torch.float16), directory, max_shard_size="20KB"),
    "in float32": lambda directory: plain(tiny("llama-tied"), directory),
    "in a torch file": lambda directory: as_torch_files(plain(tiny("llama-tied", torch.bfloat16), directory)),
    "in a torch file in float32": lambda directory: as_torch_files(plain(tiny("gpt2"), directory)),
}


def opened(directory: Path, compute_dtype: str = "float32") -> Streamed:
    return open_streamed(str(directory), compute_dtype=compute_dtype)


def every_name(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def all_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("compute_dtype", ["storage", "float32"])
def test_a_streamed_model_is_the_loaded_one(name: str, compute_dtype: str, tmp_path: Path) -> None:
    directory = CHECKPOINTS[name](tmp_path / "model")
    loaded = load_model(str(directory), device="cpu", compute_dtype=compute_dtype)
    streamed = opened(directory, compute_dtype)
    model = streamed.model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    streamed.fill(every_name(model), CPU)
    assert type(model) is type(loaded.model)
    assert identical(all_of(model), all_of(loaded.model))
    assert {n: t.dtype for n, t in all_of(model).items()} == {n: t.dtype for n, t in all_of(loaded.model).items()}
    assert {n: t.stride() for n, t in all_of(model).items()} == {n: t.stride() for n, t in all_of(loaded.model).items()}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in loaded.model.named_parameters()]  # ties
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert streamed.loaded.tokenizer_hash == loaded.tokenizer_hash
    assert streamed.loaded.storage_dtype == loaded.storage_dtype
    assert model.config.to_dict() == loaded.model.config.to_dict()
    assert model.generation_config.to_dict() == loaded.model.generation_config.to_dict()
    assert [layer.name for layer in block_layers(model)] == [layer.name for layer in block_layers(loaded.model)]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, loaded.model(ids, use_cache=False).logits)


def blocks_of(model: nn.Module) -> list[list[str]]:
    prefix, blocks = decoder_blocks(model)
    return [[f"{prefix}.{n}.{name}" for name, _ in block.named_parameters()] for n, block in enumerate(blocks)]


@pytest.mark.parametrize("ahead", [0, 10_000, 10**9])
@pytest.mark.parametrize("chunk", [64, 4096])
def test_groups_come_in_order_and_are_dropped(
    ahead: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK", chunk)
    directory = plain(tiny("llama-gqa", torch.float16), tmp_path, max_shard_size="20KB")
    expected = all_of(load_model(str(directory), device="cpu", compute_dtype="storage").model)
    streamed = opened(directory, "storage")
    groups = blocks_of(streamed.model)
    there = []
    for names in streamed.each([(names, CPU) for names in groups], ahead=ahead):
        held = {name for name, p in streamed.model.named_parameters() if not p.is_meta}
        assert held == set(names)
        there.append(names)
        for name in names:
            assert torch.equal(streamed.model.get_parameter(name), expected[name])
        streamed.empty(names)
    assert there == groups
    assert all(p.is_meta for p in streamed.model.parameters())


def test_a_pass_may_be_left_before_its_end(tmp_path: Path) -> None:
    streamed = opened(plain(tiny("neox", torch.float16), tmp_path))
    for names in streamed.each([(names, CPU) for names in blocks_of(streamed.model)]):
        assert names
        break
    streamed.fill(every_name(streamed.model), CPU)
    assert not any(p.is_meta for p in streamed.model.parameters())


def test_bytes_are_those_in_the_compute_dtype_and_tied_weights_count_once(tmp_path: Path) -> None:
    streamed = opened(plain(tiny("llama-tied", torch.float16), tmp_path))
    expected = sum(p.numel() for p in tiny("llama-tied").parameters()) * 4
    assert streamed.nbytes(every_name(streamed.model)) == expected
    streamed.fill(["lm_head.weight"], CPU)
    assert not streamed.model.get_input_embeddings().weight.is_meta


def with_head(directory: Path, change: float) -> Path:
    """A tied checkpoint that holds its head too, with one value changed by this much."""
    plain(tiny("llama-tied", torch.float16), directory)
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[3, 5] += change
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_weights_that_the_files_hold_twice_are_tied_where_they_are_equal(tmp_path: Path) -> None:
    directory = with_head(tmp_path, 0)
    loaded = load_model(str(directory), device="cpu", compute_dtype="storage")
    streamed = opened(directory, "storage")
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert streamed.model.lm_head.weight is streamed.model.get_input_embeddings().weight


def test_weights_that_the_files_hold_twice_are_apart_where_they_differ(tmp_path: Path) -> None:
    directory = with_head(tmp_path, 1)
    loaded = load_model(str(directory), device="cpu", compute_dtype="storage")
    streamed = opened(directory, "storage")
    streamed.fill(every_name(streamed.model), CPU)
    assert streamed.model.lm_head.weight is not streamed.model.get_input_embeddings().weight
    assert identical(all_of(streamed.model), all_of(loaded.model))


def test_a_tensor_that_was_dropped_takes_no_memory_while_threads_wait(tmp_path: Path) -> None:
    save_file({name: torch.full((1000,), n) for n, name in enumerate("abc")}, tmp_path / "x.safetensors")
    extents = extents_of([file := tmp_path / "x.safetensors"], headers_of([file]))
    with reader.Reading([(extents[name], CPU) for name in "abc"], threads=1) as reading:
        first = reading.take()
        memory = weakref.ref(first.untyped_storage())
        assert first.unique().tolist() == [0]
        del first
        deadline = time.monotonic() + 10
        while memory() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert memory() is None
        assert [reading.take().unique().tolist() for _ in range(2)] == [[1], [2]]


def test_tensors_of_a_torch_file_are_found_whatever_their_order_in_memory(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    tensors = {"table": table, "rows": table[1:3], "turned": table.t(), "one": table[2, 3], "none": torch.empty(0, 3)}
    torch.save(tensors, tmp_path / "x.bin")
    extents = extents_of([tmp_path / "x.bin"], {})
    assert extents.keys() == tensors.keys()
    with reader.Reading([(extents[name], CPU) for name in tensors]) as reading:
        for tensor in tensors.values():
            assert torch.equal(reading.take(), tensor)


def test_a_torch_file_that_does_not_say_where_its_tensors_lie_is_to_be_loaded_whole(tmp_path: Path) -> None:
    directory = as_torch_files(plain(tiny("neox", torch.float16), tmp_path))
    file = directory / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    load_model(str(directory), device="cpu", compute_dtype="storage")
    with pytest.raises(NotStreamableError, match=r"before 1\.6"):
        opened(directory)


def test_a_value_beyond_the_16_bit_range_is_named_when_it_comes(tmp_path: Path) -> None:
    directory = plain(tiny("neox"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][2, 3] = 70_000
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    streamed = opened(directory)
    first, second = blocks_of(streamed.model)
    streamed.fill(first, CPU)
    with pytest.raises(SpecError, match=r"dense_h_to_4h.*70000"):
        streamed.fill(second, CPU)


@pytest.mark.parametrize("change", ["missing", "beyond"])
def test_a_checkpoint_of_other_weights_is_refused_before_any_is_read(change: str, tmp_path: Path) -> None:
    directory = plain(tiny("neox", torch.float16), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    if change == "missing":
        del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    else:
        tensors["gpt_neox.layers.1.mlp.gate.weight"] = torch.ones(2, 2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for load in (opened, lambda d: load_model(str(d), device="cpu", compute_dtype="storage")):
        with pytest.raises(SpecError, match=r"layers\.1\.mlp"):
            load(directory)


def test_a_file_that_is_cut_short_later_is_named(tmp_path: Path) -> None:
    streamed = opened(plain(tiny("neox", torch.float16), tmp_path))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before"):
        streamed.fill(every_name(streamed.model), CPU)
