"""Beginnings that requests share go through the model once: equal scores, or scored apart and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    Qwen2MoeConfig,
    RwkvConfig,
)

from kbit.evaluation import prepare
from kbit.evaluation.forests import ROW, common_prefix, fill_rows, forest_mask, grow_trees, size_of
from kbit.evaluation.requests import RequestEncoder, ScoringPlan, cut_batches
from kbit.evaluation.scoring import TokenScorer
from kbit.evaluation.sharing import NOTHING, SHARED, sharing
from kbit.evaluation.zeroshot import TaskEval
from kbit.models.quantize import quantize_model
from kbit.spec import QuantSpec
from tests import ROOT
from tests.kbit.evaluation.test_zeroshot import CONTEXT, REAL, VOCAB, demo_spec, hflm, real_spec

DEMO = ROOT / "sweeps" / "demo"
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
TAKES_A_MASK = {
    "neox": GPTNeoXConfig(**TINY),
    "opt": OPTConfig(**{k: v for k, v in TINY.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "llama": LlamaConfig(**TINY, num_key_value_heads=2),
    "falcon": FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "qwen2-moe": Qwen2MoeConfig(
        **TINY, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}
TAKES_NONE = {
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
    "rwkv": RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "mpt": MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "a short sliding window": MistralConfig(**TINY, num_key_value_heads=2, sliding_window=8),
}

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=40).map(
    lambda lists: [list(ids) for ids in dict.fromkeys(map(tuple, lists))]
)


def tiny(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # far from uniform, so that a wrong mask shows
        parameter.data.mul_(3)
    return model


def branching() -> ScoringPlan:
    """Forty contexts, most with four continuations; two of them long; some that share nothing."""
    random = np.random.default_rng(0)
    pairs = []
    for length in [*random.integers(5, 30, 38), 70, 90]:
        context = random.integers(2, 64, length).tolist()
        pairs += [(context, random.integers(2, 64, random.integers(1, 9)).tolist()) for _ in range(4)]
    pairs += [([i], [i + 1, i]) for i in range(2, 12)]
    return RequestEncoder.plan_tokens(_of_context(120), pairs)


def _of_context(context: int) -> RequestEncoder:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    return RequestEncoder(tokenizer, context=context)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 400), st.booleans())
def test_batches_hold_all_rows_within_their_tokens_and_pad_no_more_than_full_ones(
    lengths: list[int], batch_tokens: int, even: bool
) -> None:
    lengths.sort(reverse=True)
    batches = list(cut_batches(lengths, batch_tokens, even=even))
    starts = np.cumsum([0, *(count for count, _ in batches)])
    assert starts[-1] == len(lengths)
    for start, (count, longest) in zip(starts[:-1], batches, strict=True):
        assert count >= 1
        assert longest == lengths[start]
        assert count == 1 or count * longest <= batch_tokens
        assert not even or lengths[start + count - 1] == longest
        # What would have come with it is padded with a sixteenth of a batch at most.
        assert all((count - cut) * (longest - lengths[start + cut]) <= batch_tokens / 16 for cut in range(count))


def test_a_batch_ends_where_the_rest_is_much_shorter() -> None:
    assert list(cut_batches([400, 100, 100, 100, 100], 1600)) == [(1, 400), (4, 100)]
    assert list(cut_batches([110, 100, 100, 100, 100], 1600)) == [(5, 110)]
    assert list(cut_batches([400, 400, 100, 100], 1600, even=True)) == [(2, 400), (2, 100)]


@given(sequences, st.integers(8, 40))
@settings(deadline=None)
def test_a_forest_holds_each_sequence_once_with_its_positions_and_mask(lists: list[list[int]], row: int) -> None:
    rows = fill_rows(list(grow_trees(lists, row=row)), row=row)
    members = [member for trees in rows for tree in trees for member in tree.members]
    assert sorted(members) == list(range(len(lists)))
    for trees in rows:
        assert size_of(trees) <= row or (len(trees) == 1 and size_of(trees) <= 2 * len(lists[trees[0].members[0]]))
        for tree in trees:
            seen = forest_mask(torch.tensor([tree.ends]), torch.float32)[0, 0] == 0
            for member, path in zip(tree.members, tree.paths, strict=True):
                assert [tree.tokens[i] for i in path] == lists[member]
                assert [tree.positions[i] for i in path] == list(range(len(path)))
                for depth, place in enumerate(path):
                    assert seen[place].nonzero().flatten().tolist() == path[: depth + 1]


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_a_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert a[length : length + 1] != b[length : length + 1] or min(len(a), len(b)) == length


@pytest.mark.parametrize("name", list(TAKES_A_MASK))
def test_shared_beginnings_score_as_each_request_alone(name: str) -> None:
    scorer, plan = TokenScorer(tiny(TAKES_A_MASK[name])), branching()
    assert sharing(scorer, plan, batch_tokens=512) == SHARED
    shared = plan.run(scorer, batch_tokens=512, share=True)
    alone = plan.run(scorer, batch_tokens=1, share=False)
    np.testing.assert_allclose([v for v, _ in shared], [v for v, _ in alone], rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in alone]
    assert plan.count_tokens(share=True) < 0.5 * plan.count_tokens(share=False)


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_rows_of_a_mask_begin_where_attention_takes_them_as_they_lie(length: int) -> None:
    ends = torch.arange(1, length + 1, dtype=torch.int32)[None]
    ends[0, 0] = length
    mask = forest_mask(ends, torch.float32)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert mask.shape == (1, 1, length, length)
    seen = torch.eye(length, dtype=torch.bool)
    seen[:, 0] = True
    assert torch.equal(mask[0, 0] == 0, seen)


@pytest.mark.parametrize("name", list(TAKES_NONE))
def test_a_model_that_takes_no_mask_is_scored_apart_and_says_so(name: str) -> None:
    scorer, plan = TokenScorer(tiny(TAKES_NONE[name])), branching()
    says = sharing(scorer, plan, batch_tokens=512)
    assert says.startswith("not shared: ")


def test_a_longer_request_than_was_tried_is_tried_too() -> None:
    """A sliding window shows only in requests that are longer than it is."""
    scorer = TokenScorer(tiny(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=32)))
    encoder = _of_context(120)
    short = encoder.plan_tokens([([2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [i, i + 1]) for i in range(12, 16)])
    assert sharing(scorer, short, batch_tokens=512) == SHARED
    assert sharing(scorer, branching(), batch_tokens=512).startswith("not shared: ")


def test_where_nothing_is_saved_nothing_is_shared() -> None:
    plan = _of_context(120).plan_tokens([([i, 5, 6, 7, 8], [9, i]) for i in range(2, 40)])
    assert sharing(TokenScorer(tiny(TAKES_A_MASK["neox"])), plan, batch_tokens=512) == NOTHING


def test_a_model_that_gives_no_numbers_is_not_tried() -> None:
    model = tiny(TAKES_A_MASK["neox"])
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    assert "not finite" in sharing(TokenScorer(model), branching(), batch_tokens=512)


def test_an_input_longer_than_a_row_has_its_own() -> None:
    plan = ScoringPlan(inputs=[[2] * (ROW + 9), [3] * 5], owners=[[(0, [2])], [(1, [3])]], count=2)
    assert [size_of(row) for row in plan.shared] == [ROW + 9, 5]


def test_inputs_longer_than_a_row_share_their_beginnings_too() -> None:
    inputs = [[2] * 2 * ROW + [i] * 9 for i in range(3, 7)]
    plan = ScoringPlan(inputs=inputs, owners=[[(i, [5])] for i in range(4)], count=4)
    assert plan.count_tokens(share=True) == 2 * ROW + 4 * 9


def test_a_result_says_whether_beginnings_were_shared() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "neox-xs")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "models" / "neox-xs", dtype=torch.float32).eval()
    said = {
        name: prepare(demo_spec(name, limit=12), tokenizer, context=CONTEXT, vocab_size=VOCAB)
        .run(model, batch_tokens=2048)
        .prefixes
        for name in ("jargon_choice", "jargon_lastword")
    }
    assert said == {"jargon_choice": SHARED, "jargon_lastword": NOTHING}


@pytest.fixture(scope="module")
def real_tasks(assets: Path) -> dict[str, TaskEval]:
    """The first fifty documents of the paper's tasks, for the tokenizer that all models of the assets have."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "neox-s")
    specs = {name: real_spec(name, assets, limit=50) for name in REAL}
    return {n: prepare(s, tokenizer, context=CONTEXT, vocab_size=VOCAB) for n, s in specs.items()}  # type: ignore[misc]


@pytest.mark.assets
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["neox-s", "opt-s", "gpt2-s", "bloom-s", "neox-xs", "opt-xs", "bloom-xs"])
def test_scores_are_those_of_hflm_with_beginnings_shared_and_apart(
    name: str, bits: int, assets: Path, real_tasks: dict[str, TaskEval]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / name, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # an hour per model on two cores
    spec = QuantSpec(bits=bits) if bits == 16 else QuantSpec(bits=bits, dtype="float", blocksize=64)
    with quantize_model(model, spec):
        for task, prepared in real_tasks.items():
            assert_as_hflm(model, task, prepared)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", ["neox-s", "opt-s", "gpt2-s", "bloom-s"])
def test_scores_of_whole_tasks_are_those_of_hflm(name: str, bits: int, assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    model = AutoModelForCausalLM.from_pretrained(assets / "models" / name, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # an hour per model on two cores
    spec = QuantSpec(bits=bits) if bits == 16 else QuantSpec(bits=bits, dtype="float", blocksize=64)
    with quantize_model(model, spec):
        for task in REAL:
            prepared = prepare(real_spec(task, assets), tokenizer, context=CONTEXT, vocab_size=VOCAB)
            assert isinstance(prepared, TaskEval)
            assert_as_hflm(model, task, prepared)


def assert_as_hflm(model: Any, task: str, prepared: TaskEval) -> None:
    """Every log-likelihood and greedy flag is HFLM's, but for flags where two tokens tie within float noise."""
    instances = prepared.requests["loglikelihood"]
    theirs = hflm(model, prepared.encoder.tokenizer).loglikelihood(instances, disable_tqdm=True)
    plan, _ = prepared.plans["loglikelihood"]
    scorer = TokenScorer(model)
    assert sharing(scorer, plan, batch_tokens=2048) == (
        NOTHING if task == "lambada_openai" and model.config.model_type != "bloom" else SHARED
    )
    for share in (False, True):
        ours = plan.run(scorer, batch_tokens=2048, share=share)
        np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=1e-4, atol=1e-3)
        moved = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a[1] != b[1]]
        assert len(moved) <= len(ours) // 5000, f"{task}: the greedy flags of {moved} differ"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", list(TAKES_A_MASK))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_shared_beginnings_differ_by_float_noise(name: str, dtype: torch.dtype) -> None:
    plan = branching()
    exact = TokenScorer(tiny(TAKES_A_MASK[name]).cuda())
    truth = np.array([v for v, _ in plan.run(exact, batch_tokens=1, share=False)])
    scorer = TokenScorer(tiny(TAKES_A_MASK[name]).to(dtype).cuda())
    assert sharing(scorer, plan, batch_tokens=4096) == SHARED
    errors = {
        share: np.array([v for v, _ in plan.run(scorer, batch_tokens=4096, share=share)]) - truth
        for share in (True, False)
    }
    rms = {share: float(np.sqrt(np.mean(error**2))) for share, error in errors.items()}
    assert rms[True] < 1.5 * rms[False]
