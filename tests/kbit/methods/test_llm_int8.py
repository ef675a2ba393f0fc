"""LLM.int8(): against float64 and bitsandbytes, whatever the batch, in whole models, with scores of tasks and bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kbit import quantize_model
from kbit.errors import SpecError
from kbit.evaluation.requests import ScoringPlan
from kbit.evaluation.scoring import TokenScorer
from kbit.evaluation.sharing import WHOLE_SEQUENCES, sharing
from kbit.packed.int8 import Int8Linear, Sequences, int8_product
from kbit.quantizer.int8 import dequantize_rows, quantize_rows
from kbit.specs.llm_int8 import LlmInt8Spec
from tests.kbit.tiny_models import NAMES, VOCABULARY, bits_of, identical, tiny

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def inputs(sequences: int, length: int, columns: int) -> Tensor:
    """Activations of which some dimensions reach 6, other ones in each sequence."""
    x = torch.randn(sequences, length, columns, generator=torch.Generator().manual_seed(7))
    for sequence in range(sequences):
        x[sequence, sequence % length, (3 * sequence + 1) % columns] = -6.0
        x[sequence, :, (5 * sequence + 2) % columns] *= 20
    return x.half().float()


def layer(out: int, columns: int, *, bias: bool = True) -> tuple[Int8Linear, Tensor]:
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, columns, generator=generator) * 0.05).half()
    added = torch.randn(out, generator=generator) if bias else None
    rows = quantize_rows(weight)
    return Int8Linear(rows, bias=added, dtype=torch.float32, threshold=6.0, sequences=Sequences()), weight


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, int]:
    """One sequence in float64, and how many outlier dimensions it has."""
    tokens, w = x.double().numpy(), weight.double().numpy()
    absmax = np.abs(w).max(1).astype(np.float16).astype(np.float64)[:, None]
    codes = np.clip(np.round(w / absmax * 127), -127, 127)
    outlier = (np.abs(tokens) >= 6).any(0)
    plain = np.where(outlier, 0, tokens)
    scale = np.abs(plain).max(1, keepdims=True)
    y = (np.round(plain / scale * 127) @ codes.T) * scale / 127 * absmax.T / 127
    in_16_bits = (codes / 127 * absmax).astype(np.float16).astype(np.float64)
    y += tokens[:, outlier] @ in_16_bits[:, outlier].T
    return y + (0 if bias is None else bias.double().numpy()), int(outlier.sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("out", "columns", "bias"), [(24, 64, True), (7, 33, False)])
def test_each_sequence_of_a_batch_is_what_it_is_alone_in_float64(
    out: int, columns: int, bias: bool, device: str
) -> None:
    ours, weight = layer(out, columns, bias=bias)
    ours.to(device)
    x = inputs(4, 6, columns)
    together = ours(x.to(device)).cpu()
    found, seen = ours.take_share()
    counts = []
    for one, y in zip(x, together, strict=True):
        expected, count = by_hand(one, weight, ours.bias.cpu() if bias else None)
        counts.append(count)
        np.testing.assert_allclose(y.double().numpy(), expected, atol=2e-5, rtol=2e-5)
    assert min(counts) >= 1
    assert (found, seen) == (sum(counts), 4 * columns)
    flat = ours(x.reshape(-1, columns).to(device)).cpu()  # as OPT's FFN gives them
    assert torch.equal(flat.view_as(together), together)


def test_tokens_of_unknown_sequences_are_refused() -> None:
    ours, _ = layer(24, 64)
    with pytest.raises(ValueError, match=r"which tokens are a sequence's, and this layer got \[5, 64\]"):
        ours(torch.zeros(5, 64))


@pytest.mark.parametrize("device", DEVICES)
def test_one_sequence_is_bitsandbytes(device: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    ours, weight = layer(48, 64, bias=False)
    theirs = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs.to(device)
    x = inputs(1, 32, 64).half().to(device)
    expected = theirs(x).float()
    found, exact = ours.to(device)(x).float(), (x.cpu().double() @ weight.double().t()).float().to(device)
    # Codes of the weights are equal; of activations some differ by rounding.
    assert torch.equal(theirs.state.CB.cpu(), ours.codes.cpu())
    assert float((found - expected).norm()) < 0.5 * float((expected - exact).norm())
    assert float((found - exact).norm()) < 1.1 * float((expected - exact).norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 64, 16), (40, 256, 64), (3, 33, 7)])
def test_products_of_int8_are_exact(shape: tuple[int, int, int], device: str) -> None:
    m, k, n = shape
    x, w = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((m, k), (n, k)))
    found = int8_product(x.to(device), w.to(device)).cpu()
    assert torch.equal(found, (x.long() @ w.long().t()).int())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gives_each_sequence_its_own_and_comes_back_bit_for_bit(name: str) -> None:
    model = tiny(name)
    before = bits_of(model)
    tokens = torch.arange(18).view(3, 6) % VOCABULARY
    plain = model(tokens).logits.detach()
    with quantize_model(model, LlmInt8Spec(threshold=0.05)) as handle:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
        assert set(layers) == set(handle.layers)
        stored = sum(m.codes.nbytes + m.absmax.nbytes for m in layers.values())
        weights = sum(m.codes.numel() for m in layers.values())
        assert handle.bits_per_param == 8 * stored / weights
        found = model(tokens).logits
        alone = torch.cat([model(row[None]).logits for row in tokens])
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
        assert 0 < float((found - plain).norm() / plain.norm()) < 0.1
        share = handle.outlier_share()
        assert share is not None
        assert 0 < share < 1
        assert handle.outlier_share() == share
    assert identical(bits_of(model), before)
    assert torch.equal(model(tokens).logits, plain)


def test_cells_of_a_pack_follow_each_other_in_any_order() -> None:
    from kbit.models.originals import Originals
    from kbit.spec import QuantSpec

    model = tiny(NAMES[0])
    tokens = torch.arange(12).view(2, 6)
    specs = [LlmInt8Spec(), QuantSpec(bits=4, dtype="int"), QuantSpec(bits=16), LlmInt8Spec(threshold=1.0)]
    alone = []
    for spec in specs:
        with quantize_model(model, spec):
            alone.append(model(tokens).logits)
    originals = Originals(model=model)
    for number in (0, 1, 3, 0, 2, 3):
        quantize_model(model, specs[number], originals=originals)
        assert torch.equal(model(tokens).logits, alone[number])


def test_requests_share_nothing_and_are_not_padded() -> None:
    model = tiny(NAMES[0])
    inputs_ = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 2], [4, 5, 6], [7, 8]]
    plan = ScoringPlan(inputs=inputs_, owners=[[(n, [3])] for n in range(4)], count=4)
    with quantize_model(model, LlmInt8Spec(threshold=0.5)):
        scorer = TokenScorer(model)
        assert sharing(scorer, plan, batch_tokens=64) == WHOLE_SEQUENCES
        together = plan.run(scorer, batch_tokens=64, share=False)
        alone = plan.run(scorer, batch_tokens=1, share=False)
        np.testing.assert_allclose([v for v, _ in together], [v for v, _ in alone], atol=1e-5)
    assert not TokenScorer(model).of_sequences


def test_rows_are_at_most_half_a_step_off() -> None:
    weight = torch.randn(9, 40).half()
    weight[3] = 0
    q = quantize_rows(weight)
    error = (dequantize_rows(q).float() - weight.float()).abs().amax(1)
    assert bool((error <= q.absmax.float() / 127 * 0.51 + 1e-4).all())
    assert not dequantize_rows(q)[3].any()


@pytest.mark.parametrize(
    ("values", "said"),
    [({"bits": 4}, "8 with method=llm_int8"), ({"threshold": 0}, "a number above 0"), ({"threshold": "6"}, "number")],
)
def test_bad_axes_are_refused_by_name(values: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        LlmInt8Spec(**values)  # type: ignore[arg-type]


def test_a_row_scale_of_sixteen_bits_is_counted() -> None:
    spec = LlmInt8Spec()
    assert (spec.bits_per_param_nominal, spec.nominal_bits(64), spec.label) == (8.0, 8.25, "llm_int8")
    assert LlmInt8Spec(threshold=5).label == "llm_int8 threshold 5"
    assert LlmInt8Spec(threshold=1e6).label == "llm_int8 threshold 1000000"
