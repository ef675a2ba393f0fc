"""GPTQ of whole models: what it is given, what it stores, and that it beats rounding."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kbit import KBitLinear, QuantSpec, SpecError, dequantize, quantize, quantize_model, save_packed
from kbit.errors import HessianError
from kbit.methods.gptq import BlockMoments, CorrectedCodes, quantize_block, quantize_layers
from kbit.models.architectures import Layer, block_layers
from kbit.models.loading import load_model
from kbit.models.originals import Originals
from kbit.models.quantize import Calibrated, QuantHandle
from kbit.models.whole import WholeModel
from kbit.packed.files import load_packed
from kbit.quantizer.gptq import quantize_corrected
from kbit.quantizer.hessian import SecondMoments, correction
from kbit.spec import spec_of
from kbit.specs.gptq import GptqSpec
from sweeps.config import DEMO_DIR
from tests.kbit.methods.test_protocol import inputs_of, tokens
from tests.kbit.tiny_models import NAMES, bits_of, identical, tiny

LENGTH = 128


def gptq(**axes: Any) -> GptqSpec:
    spec = spec_of({"method": "gptq", "bits": 4, "dtype": "int", "blocksize": 32} | axes)
    assert isinstance(spec, GptqSpec)
    return spec


def moments_of(x: Tensor) -> Tensor:
    found = SecondMoments(x.shape[1], x.device)
    found.add(x)
    return found.take()


@cache
def windows() -> tuple[Tensor, Tensor]:
    """Windows of the demo's text for neox-xs: to calibrate on, and others to measure on; int64 [n, LENGTH]."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO_DIR / "models/neox-xs/tokenizer.json"))
    lines = (DEMO_DIR / "text/jargon.jsonl").read_text().splitlines()[:400]
    ids = torch.tensor(tokenizer.encode("\n\n".join(json.loads(line)["text"] for line in lines)))
    cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return cut[:64], cut[64:128]


def neox_xs() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(DEMO_DIR / "models/neox-xs", dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module, held_out: Tensor) -> Tensor:
    """Nats a token, of each window."""
    logits = model(held_out, use_cache=False).logits[:, :-1]
    nats = nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten(), reduction="none")
    return nats.view(len(held_out), -1).mean(1)


@pytest.mark.parametrize("name", NAMES)
def test_each_block_is_quantized_from_the_inputs_that_quantized_blocks_give_it(name: str) -> None:
    model, original = tiny(name, torch.float16).float(), tiny(name, torch.float16).float()
    spec = gptq(act_order=name == "opt", dtype="quantile" if name == "bloom" else "int", bits=3)
    if name == "llama-gqa":
        spec = gptq(rotation=1)
    with quantize_model(model, spec, storage_dtype=torch.float16, calibration=Calibrated(tokens=tokens())) as handle:
        layers = block_layers(model)
        assert list(handle.layers) == [layer.name for layer in layers]
        last = max(layer.block for layer in layers)
        # The first layers of the last block: their inputs depend on quantized blocks alone.
        first = next(layer for layer in layers if layer.block == last)
        x = inputs_of(model, layers, tokens())[first.name]
        mine = next(layer for layer in block_layers(original) if layer.name == first.name).weight
        q, order = quantize_corrected(
            mine,
            spec,
            correction(moments_of(x), act_order=spec.act_order, rotation=spec.rotation),
            storage_dtype=torch.float16,
        )
        wanted = dequantize(q)
        if order is not None:
            wanted = wanted[:, order.argsort()]
        # Batches sum otherwise than all at once, so that a value near a midpoint may go to the other side.
        assert (wanted == first.working).float().mean() > 0.98
        assert handle.codes_hash is not None
    for (key, value), (_, true) in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert torch.equal(value, true), key


def shared(name: str) -> dict[str, str]:
    """By layer of the first block, the layer whose second moments it has; without the block's name."""
    whole = WholeModel(module=tiny(name))
    block, moments = next(whole.blocks()), BlockMoments()
    block.look(whole.start(tokens()), moments.add)
    return {layer.rpartition(".")[2]: first.rpartition(".")[2] for layer, first in moments.shared.items()}


def test_layers_that_are_given_the_same_tensor_share_its_second_moments_and_no_others() -> None:
    opt = shared("opt")
    assert opt["q_proj"] == opt["k_proj"] == opt["v_proj"]
    assert (opt["out_proj"], opt["fc1"], opt["fc2"]) == ("out_proj", "fc1", "fc2")
    llama = shared("llama-gqa")
    assert llama["gate_proj"] == llama["up_proj"]
    assert llama["q_proj"] == llama["v_proj"] != llama["up_proj"]
    assert len(set(shared("neox").values())) == 4  # attention and FFN read different norms


def test_second_moments_are_over_all_batches() -> None:
    model = tiny("opt")
    true = inputs_of(model, block_layers(model), tokens())
    whole = WholeModel(module=model)
    block, moments = next(whole.blocks()), BlockMoments()
    block.look(whole.start(tokens()), moments.add)
    for first in set(moments.shared.values()):
        x = true[first].double()
        assert len(x) == tokens().numel()
        torch.testing.assert_close(moments.take(first).double(), 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "axes",
    [{"blocksize": "row"}, {"zero_point": True}, {"act_order": True}, {"dtype": "quantile", "blocksize": 128}],
    ids=str,
)
def test_bits_are_those_of_the_bytes_that_are_stored(axes: dict[str, Any]) -> None:
    model, spec = tiny("opt"), gptq(**axes)
    stored = 0
    for _, codes in quantize_layers(WholeModel(module=model), spec, tokens()):
        q = codes.tensor
        assert isinstance(q.absmax, Tensor)
        stored += 8 * (q.codes.nbytes + q.absmax.nbytes)
        stored += 0 if q.zero_points is None else 8 * q.zero_points.nbytes
        stored += 0 if codes.order is None else 8 * codes.order.nbytes
        stored += 16 * q.codebook.numel() if spec.dtype == "quantile" else 0
        assert codes.nbits > 0
    with quantize_model(model, spec, calibration=Calibrated(tokens=tokens())) as handle:
        assert handle.bits_per_param == stored / sum(n * k for n, k in handle.layers.values())


@pytest.mark.parametrize("static", [False, True])
def test_it_packs_with_the_weights_that_it_has_unpacked(static: bool, tmp_path: Any) -> None:
    model, dense = (tiny("opt", torch.float16).float() for _ in range(2))
    calibrated = Calibrated(tokens=tokens(), dtype=torch.float16)
    handles: list[QuantHandle] = []
    for target, packed in ((model, True), (dense, False)):
        spec = gptq(act_order=True, static_groups=static, zero_point=not static)
        handles.append(quantize_model(target, spec, storage_dtype=torch.float16, packed=packed, calibration=calibrated))
    assert handles[0].codes_hash == handles[1].codes_hash
    found = {name: m for name, m in model.named_modules() if isinstance(m, KBitLinear)}
    for layer in block_layers(dense):
        assert torch.equal(found[layer.name].dequantize(), layer.working), layer.name
        assert found[layer.name].permuted == (not static and layer.working.shape[1] > 32)  # groups
        assert found[layer.name].dtype == torch.float32
    assert any(layer.permuted for layer in found.values()) is not static
    save_packed(model, tmp_path / "saved")
    again = load_packed(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, dense(tokens()).logits, rtol=1e-4, atol=1e-4)
    handles[0].restore()
    assert all(
        torch.equal(v, tiny("opt", torch.float16).float().state_dict()[k]) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize("keeps", [False, True])
def test_codes_are_the_same_whether_layers_are_packed_or_not(keeps: bool) -> None:
    loaded = load_model(str(DEMO_DIR / "models" / "neox-xs"), device="cpu", compute_dtype="float32")
    before = bits_of(loaded.model)
    originals = Originals(model=loaded.model) if keeps else None
    windows = torch.randint(2048, (8, 64), generator=torch.Generator().manual_seed(1))
    hashes = []
    for packed in (False, True, False, True):
        handle = quantize_model(
            loaded.model,
            gptq(bits=2, dtype="quantile", blocksize=64),
            storage_dtype=loaded.storage_dtype,
            packed=packed,
            calibration=Calibrated(tokens=windows, dtype=torch.float16),
            originals=originals,
        )
        hashes.append((handle.codes_hash, handle.total_bits))
        assert any(isinstance(m, KBitLinear) for m in loaded.model.modules()) is packed
        if not keeps:
            handle.restore()
            assert identical(bits_of(loaded.model), before)
    if originals is not None:
        originals.restore()
        assert identical(bits_of(loaded.model), before)
    assert len(set(hashes)) == 1


def test_what_can_not_be_packed_or_calibrated_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"packed=True is not valid: .*would have to rotate its inputs"):
        quantize_model(tiny("opt"), gptq(rotation=1), packed=True, calibration=Calibrated(tokens=tokens()))
    with pytest.raises(SpecError, match="method='gptq' is not valid: one that does not calibrate, or give calibration"):
        quantize_model(tiny("opt"), gptq())


def test_a_layer_that_fails_is_named_and_the_model_is_as_it_was() -> None:
    model, original = tiny("opt"), tiny("opt")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embedding.weight[tokens()[0, 0]] = torch.inf
    with pytest.raises(HessianError, match="NaN or infinite") as caught:
        quantize_model(model, gptq(), calibration=Calibrated(tokens=tokens()))
    assert "in layer model.decoder.layers.0.self_attn.k_proj" in caught.value.__notes__
    for mine, true in zip(block_layers(model), block_layers(original), strict=True):
        assert torch.equal(mine.working, true.working)


def test_cells_after_one_another_from_kept_originals_are_those_of_a_fresh_model() -> None:
    model = tiny("neox", torch.float16)
    originals = Originals(model=model)
    hashes = []
    for spec in (gptq(), QuantSpec(bits=3, dtype="int"), gptq(bits=3), gptq()):
        calibrated = Calibrated(tokens=tokens()) if spec.calibrates else None
        handle = quantize_model(model, spec, calibration=calibrated, originals=originals)
        hashes.append(handle.codes_hash)
    assert hashes[0] == hashes[3] != hashes[2]
    fresh = quantize_model(tiny("neox", torch.float16), gptq(bits=3), calibration=Calibrated(tokens=tokens()))
    assert (hashes[1], hashes[2]) == (None, fresh.codes_hash)


def output_error(model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Squared error of each layer's outputs on inputs, float64."""
    return {
        layer.name: float(
            (inputs[layer.name].double() @ (layer.working - weights[layer.name]).double().T).square().sum()
        )
        for layer in block_layers(model)
    }


@pytest.mark.parametrize("bits", [2, 3])
def test_a_real_model_loses_less_than_by_rounding(bits: int) -> None:
    calibration, held_out = windows()
    model = neox_xs()
    weights = {layer.name: layer.working.clone() for layer in block_layers(model)}
    plain = QuantSpec(bits=bits, dtype="int", scheme="group", blocksize=32, zero_point=True)
    losses, errors = {}, {}
    for spec in (plain, gptq(bits=bits, zero_point=True)):
        calibrated = Calibrated(tokens=calibration) if spec.calibrates else None
        with quantize_model(model, spec, storage_dtype=torch.float16, calibration=calibrated):
            losses[spec.method] = loss(model, held_out)
            found = inputs_of(model, block_layers(model), calibration)
            errors[spec.method] = sum(output_error(model, weights, found).values())
    change = losses["gptq"] - losses["blockwise"]
    assert change.mean() + 3 * change.std() / len(change) ** 0.5 < 0
    assert errors["gptq"] < errors["blockwise"]


def test_a_layer_that_no_token_reaches_is_rounded() -> None:
    whole, spec = WholeModel(module=tiny("opt")), gptq()
    block = next(whole.blocks())
    missing = block.layers[-1].name

    class Partly(BlockMoments):
        """Moments of all layers but one."""

        def add(self, layer: Layer, x: Tensor) -> None:
            if layer.name != missing:
                super().add(layer, x)

    moments = Partly()
    block.look(whole.start(tokens()), moments.add)
    found: dict[str, CorrectedCodes] = {
        layer.name: codes for layer, codes in quantize_block(whole, block, spec, moments)
    }
    plain = quantize(block.layers[-1].weight, spec.blockwise(block.layers[-1].shape[1]))
    assert torch.equal(found[missing].tensor.codes, plain.codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.02), (3, 0.02), (2, 0.1)])
def test_a_gpu_and_a_cpu_agree_within_the_stated_tolerance_of_the_loss(bits: int, tolerance: float) -> None:
    calibration, held_out = windows()
    losses = []
    for device, act_order in (("cpu", False), ("cuda", False), ("cpu", True), ("cuda", True)):
        model = neox_xs().to(device)
        spec = gptq(bits=bits, zero_point=True, act_order=act_order)
        with quantize_model(model, spec, storage_dtype=torch.float16, calibration=Calibrated(tokens=calibration[:32])):
            losses.append(float(loss(model, held_out.to(device)).mean()))
    assert abs(losses[0] - losses[1]) < tolerance
    assert abs(losses[2] - losses[3]) < tolerance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_16_bit_inputs_are_summed_in_float32_and_activations_lie_on_the_host() -> None:
    x = torch.randn(3000, 96, device="cuda").half()
    found = SecondMoments(96, x.device)
    for batch in torch.split(x, 1000):
        found.add(batch)
    torch.testing.assert_close(found.take().double(), 2 / 3000 * x.double().T @ x.double(), rtol=1e-4, atol=1e-4)
    whole = WholeModel(module=tiny("opt", torch.float16).cuda())
    kept = whole.start(tokens())
    assert {(h.device.type, h.is_pinned()) for h in kept.hidden} == {("cpu", True)}
    after = next(whole.blocks()).run(kept)
    assert {(h.device.type, h.is_pinned()) for h in after.hidden} == {("cpu", True)}
