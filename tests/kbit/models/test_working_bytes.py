"""What methods that calibrate say that they need beside the model is what they are seen to need, and not much more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from kbit import QuantSpec
from kbit.methods.protocol import method_of
from kbit.models.sizes import parts_of
from kbit.models.whole import WholeModel
from kbit.spec import Spec
from kbit.specs.awq import AwqSpec
from kbit.specs.base import ROW
from kbit.specs.gptq import GptqSpec
from tests.kbit.models.test_ways import sizes

HIDDEN = 256
ROUNDS = 10
TOKENS = 16
"""So few that activations are nothing beside the weights."""


def opt() -> tuple[Any, int]:
    inner = 4 * HIDDEN
    about: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": inner,
        "max_position_embeddings": 64,
    }
    return OPTForCausalLM(OPTConfig(**about, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)), inner


def llama() -> tuple[Any, int]:
    inner = 704
    about: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**about, vocab_size=64)), inner


def most_bytes(call: Callable[[], None]) -> int:
    """The most bytes of CPU tensors that a call has at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("make", [opt, llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "spec",
    [
        AwqSpec(bits=4, dtype="int", blocksize=64),
        AwqSpec(bits=4, dtype="int", blocksize=ROW),
        AwqSpec(bits=4, dtype="lloyd", blocksize=64),
        AwqSpec(bits=4, dtype="quantile", blocksize=64, clip=False),
        GptqSpec(bits=4, dtype="int", blocksize=64),
        GptqSpec(bits=4, dtype="lloyd", blocksize=64),
        GptqSpec(bits=4, dtype="int", blocksize=64, act_order=True),
        QuantSpec(bits=4, dtype="lloyd", blocksize=64, weighting="activation"),
    ],
    ids=lambda spec: spec.label,
)
def test_the_bytes_that_a_method_says_it_needs_are_those_that_it_needs(
    spec: Spec, make: Callable[[], tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbit.methods.awq.EXPONENTS", (0.0, 0.5))
    # Each round takes as much as the one before.
    for lloyd in ("lloyd", "weighted_lloyd"):
        monkeypatch.setattr(f"kbit.quantizer.{lloyd}.MOST_ROUNDS", ROUNDS)
    model, inner = make()
    windows = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        for _, stored in method_of(spec)(WholeModel(module=model.eval()), spec, windows):
            del stored

    needed = most_bytes(call)
    said = spec.working_bytes(HIDDEN, inner)
    assert 0.5 * said < needed < said
    assert parts_of(sizes(hidden=HIDDEN, inner=inner), spec, compute_bytes=2, device="cuda").working == said


def test_a_codebook_of_equal_weights_is_not_counted() -> None:
    assert QuantSpec(bits=4, dtype="lloyd", blocksize=64).working_bytes(HIDDEN, 4 * HIDDEN) == 0
