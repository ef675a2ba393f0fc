"""How a model is run follows from its sizes and the memory: one rule, the same sum for people and for the worker."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from kbit.calibration import WINDOWS_PER_BATCH, Calibration
from kbit.models.architectures import block_layers
from kbit.models.quantize import quantize_model
from kbit.models.sizes import Sizes, parts_of, sizes_of
from kbit.models.ways import LEAST_BATCH_TOKENS, SHARE, Parts, Way, choose_way, needs
from kbit.spec import QuantSpec, Spec, spec_of
from tests.kbit.tiny_models import FFN, HIDDEN, LAYERS, NAMES, VOCABULARY, tiny

GB = 10**9
# An OPT of 13 billion parameters in float16, and its 4-bit form at block 64.
PARTS = Parts(
    weights=26 * GB,
    packed=7 * GB,
    largest=GB // 2,
    block=GB // 2,
    outside=GB // 2,
    token=160_000,
    token_logits=200_000,
    logits=GB // 2,
)


def chosen(memory: int | None, *, parts: Parts = PARTS, gpus: int = 1, batch_tokens: int = 16384) -> str | None:
    choice = choose_way(parts, memory, gpus=gpus, batch_tokens=batch_tokens)
    return None if choice is None else str(choice.way)


@pytest.mark.parametrize(
    ("memory", "gpus", "way"),
    [
        (80 * GB, 1, "whole"),
        (24 * GB, 1, "packed"),
        (24 * GB, 2, "spread"),
        (8 * GB, 1, "layer by layer"),
        (8 * GB, 2, "packed"),
        (1 * GB, 1, None),
        (1 * GB, 8, None),
        (None, 1, "whole"),
        (None, 4, "spread"),
    ],
)
def test_the_first_way_that_fits_is_taken(memory: int | None, gpus: int, way: str | None) -> None:
    assert chosen(memory, gpus=gpus) == way


def test_what_cannot_be_held_in_k_bits_runs_layer_by_layer() -> None:
    baseline = replace(PARTS, packed=None)
    assert chosen(24 * GB, parts=baseline) == "layer by layer"
    with pytest.raises(ValueError, match="packed=None"):
        needs(baseline, Way.PACKED, batch_tokens=1)


def test_a_batch_is_halved_before_the_model_is_run_otherwise() -> None:
    for batch in (16384, 3000, 512):
        full = needs(PARTS, Way.WHOLE, batch_tokens=batch)
        enough = int(sum(full.values()) / SHARE) + 1
        assert choose_way(PARTS, enough, batch_tokens=batch).batch_tokens == batch  # type: ignore[union-attr]
        less = choose_way(PARTS, enough - 10**8, batch_tokens=batch)
        assert less is not None
        if batch >= 2 * LEAST_BATCH_TOKENS:
            assert (less.way, less.batch_tokens) == (Way.WHOLE, batch // 2)
        else:
            assert (less.way, less.batch_tokens) == (Way.PACKED, batch)


def test_more_memory_never_gives_a_later_way() -> None:
    order = [None, "layer by layer", "packed", "whole"]
    ranks = [order.index(chosen(gb * GB // 2)) for gb in range(1, 80)]
    assert all(before <= after for before, after in pairwise(ranks))
    assert set(ranks) == set(range(4))


def test_the_sum_is_of_what_is_named() -> None:
    choice = choose_way(PARTS, 80 * GB, batch_tokens=16384)
    assert choice is not None
    assert choice.needed == 26 * GB + GB // 2 + 16384 * 160_000 + GB // 2
    assert list(choice.terms) == ["weights", "largest tensor", "activations", "logits"]


def saved(model: Any, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The model's files: its weights, each once, and config.json's contents."""
    file = directory / "model.safetensors"
    tensors = {name: t.half().contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, file)
    return file, json.loads(model.config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", NAMES)
def test_headers_tell_what_the_model_in_memory_has(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    file, config = saved(model, tmp_path)
    found = sizes_of([file], config, None)
    assert found is not None
    assert found.known_from == "files"
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.quantized == sum(layer.working.numel() for layer in block_layers(model))
    assert found.largest == max(p.numel() for p in model.parameters())
    assert (found.vocabulary, found.hidden, found.inner) == (VOCABULARY, HIDDEN, 4 * HIDDEN if name == "bloom" else FFN)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "opt-350m"])
def test_a_configuration_tells_the_same_but_for_norms_and_biases(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    file, config = saved(model, tmp_path)
    found, guessed = sizes_of([file], config, None), sizes_of([], config, None)
    assert found is not None
    assert guessed is not None
    assert guessed.known_from == "config.json"
    assert guessed.quantized == found.quantized
    assert guessed.parameters == pytest.approx(found.parameters, rel=0.06)
    # A count that is known stands.
    counted = sizes_of([], config, found.parameters)
    assert counted is not None
    assert counted.parameters == pytest.approx(found.parameters, abs=LAYERS)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_bytes_of_a_packed_model_are_those_that_it_holds(bits: int, tmp_path: Path) -> None:
    # Of a width that fills the kernels' tiles.
    config = GPTNeoXConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    model: Any = GPTNeoXForCausalLM(config).half().eval()
    file, contents = saved(model, tmp_path)
    sizes = sizes_of([file], contents, None)
    assert sizes is not None
    spec = QuantSpec(bits=bits, dtype="int", blocksize=64)
    parts = parts_of(sizes, spec, contents, compute_bytes=2, device="cuda")
    quantize_model(model, spec, packed=True)
    held = sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    assert parts.packed == pytest.approx(held, rel=0.03)
    assert parts.weights == 2 * sizes.parameters


def test_a_models_size_alone_gives_a_shape_near_the_published_ones() -> None:
    for parameters, hidden in ((1_315_758_080, 2048), (6_658_473_984, 4096), (65_717_907_456, 9216), (175 * GB, 12288)):
        found = sizes_of([], None, parameters)
        assert found is not None
        assert found.hidden == pytest.approx(hidden, rel=0.25)
        assert found.parameters == parameters
        assert found.known_from == "the number of parameters"
    assert sizes_of([], None, None) is None


def sizes(**changes: int) -> Sizes:
    values = {"parameters": 1000, "quantized": 800, "largest": 100, "block": 100, "outside": 100, "hidden": 8}
    return Sizes(**{**values, "inner": 32, "vocabulary": 50, **changes}, known_from="files")


@pytest.mark.parametrize(
    ("spec", "config", "packs"),
    [
        (QuantSpec(bits=4, dtype="int"), {}, True),
        (QuantSpec(bits=16), {}, False),
        (QuantSpec(bits=4, dtype="int"), {"num_local_experts": 8}, False),
    ],
)
def test_what_is_packed_is_what_can_be(spec: Spec, config: dict[str, Any], packs: bool) -> None:
    parts = parts_of(sizes(), spec, config, compute_bytes=2, device="cuda")
    assert (parts.packed is not None) == packs


def test_what_is_summed_of_each_experts_inputs_is_counted() -> None:
    four = spec_of({"method": "gptq", "bits": 4, "dtype": "int"})
    dense, mixture = (
        parts_of(sizes(), four, config, compute_bytes=2, device="cuda").working
        for config in ({}, {"num_experts": 6, "moe_intermediate_size": 16})
    )
    assert mixture - dense == 6 * 4 * (8**2 + 16**2)


def test_originals_lie_beside_the_weights_of_a_cpu_alone() -> None:
    four = QuantSpec(bits=4, dtype="int")
    assert parts_of(sizes(), four, compute_bytes=4, device="cpu").originals == 3200
    assert parts_of(sizes(), four, compute_bytes=2, device="cuda").originals == 0
    assert parts_of(sizes(), QuantSpec(bits=16), compute_bytes=4, device="cpu").originals == 0


@pytest.mark.parametrize(
    ("samples", "length", "config", "tokens"),
    [
        (128, 2048, None, WINDOWS_PER_BATCH * 2048),
        (128, 4096, {"max_position_embeddings": 1024}, WINDOWS_PER_BATCH * 1024),
        (128, 512, {"max_position_embeddings": 1024}, WINDOWS_PER_BATCH * 512),
        (3, 512, {}, 3 * 512),
    ],
)
def test_windows_that_are_calibrated_on_run_at_once_whatever_the_batch(
    samples: int, length: int, config: dict[str, Any] | None, tokens: int
) -> None:
    data = Calibration(dataset="a", samples=samples, length=length)
    four = spec_of({"method": "gptq", "bits": 4, "dtype": "int"})
    parts = parts_of(sizes(), four, config, compute_bytes=2, device="cuda", calibration=data)
    assert needs(parts, Way.WHOLE, batch_tokens=1024)["activations"] == max(1024, tokens) * parts.token
    assert needs(parts, Way.LAYERED, batch_tokens=10**6)["activations"] == 10**6 * parts.token


def test_a_batch_that_is_halved_does_not_make_calibration_fit() -> None:
    full = replace(PARTS, calibrating=16384)
    memory = int(sum(needs(full, Way.WHOLE, batch_tokens=16384).values()) / SHARE) - GB
    assert chosen(memory, parts=PARTS) == "whole"
    assert chosen(memory, parts=full) == "packed"
