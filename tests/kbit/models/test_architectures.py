"""Thirty-two architectures: their 16-bit loss, the share of their matrices that is quantized, bits, and outliers.

And all of transformers' causal language models, for lists that are made by hand.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kbit import QuantSpec, dequantize, quantize, quantize_model
from kbit.errors import ArchitectureError
from kbit.evaluation import EvalSpec, prepare
from kbit.models.architectures import block_layers, decoder_blocks
from kbit.models.loading import load_model
from kbit.models.orders import why_unordered
from kbit.models.outliers import outlier_columns
from kbit.models.readings import has_experts, has_larger_tower, reading_of
from kbit.models.stacks import has_stacks
from kbit.sources import LocalFile
from tests import ROOT
from tests.kbit.architectures import ARCHITECTURES, LLAMA, build, write
from tests.kbit.tiny_models import bits_of, identical

JARGON = ROOT / "sweeps" / "demo" / "text" / "jargon.jsonl"
INT4 = QuantSpec(bits=4, dtype="int")
NAMES = list(ARCHITECTURES)
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def test_there_are_thirty_two() -> None:
    assert len(ARCHITECTURES) == 32


@pytest.mark.parametrize("name", NAMES)
def test_the_16_bit_loss_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    directory = write(name, tmp_path / name)
    loaded = load_model(str(directory), device="cpu", compute_dtype="float32")
    source = LocalFile(path=JARGON)
    spec = EvalSpec(
        **{"kind": "perplexity", "name": "t", "limit": 192, "window": 64, "dataset": "x", "compute_dtype": "float32"},
        source=source,
    )
    prepared = prepare(spec, loaded.tokenizer, context=loaded.context, vocab_size=loaded.vocab_size)
    ours = prepared.run(loaded.model, batch_tokens=128).metrics["loss"]
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    nats = []
    for window in torch.from_numpy(prepared.windows):
        with torch.no_grad():
            log_p = functional.log_softmax(plain(window[None], use_cache=False).logits[0, :-1].double(), -1)
        nats.append(-log_p.gather(1, window[1:, None]).mean().item())
    assert len(nats) == 3
    assert ours == pytest.approx(sum(nats) / 3, rel=2e-6)
    assert len(AutoTokenizer.from_pretrained(directory)) <= loaded.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_of_the_blocks_is_quantized_and_counted(name: str) -> None:
    model, chosen = build(name), ARCHITECTURES[name]
    before = bits_of(model)
    matrices = {key: [m.detach().clone() for m in held] for key, held in chosen.matrices(model).items()}
    sizes = [m.numel() for held in matrices.values() for m in held]
    with quantize_model(model, INT4) as handle:
        after = dict(model.named_parameters())
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert changed == set(matrices)
        assert sorted(n * k for n, k in handle.layers.values()) == sorted(sizes)
        rest = sum(p.numel() for p in set(model.parameters())) - sum(sizes)
        assert handle.total_bits == sum(4 * n + 16 * -(-n // 64) for n in sizes) + 16 * rest
        inside = sum(p.numel() for key, p in after.items() if key.startswith(chosen.blocks) and p.ndim > 1)
        assert sum(sizes) / inside > 0.9
        shapes = {shape for key, shape in handle.layers.items() if ".experts." in key}
        for key, held in matrices.items():
            for number, matrix in enumerate(held):
                value = after[key][number] if len(held) > 1 else after[key]
                transposed = tuple(matrix.shape) not in shapes if len(held) > 1 else name == "gpt2"
                original = matrix.t().contiguous() if transposed else matrix
                expected = dequantize(quantize(original, INT4))
                assert torch.equal(value, expected.t() if transposed else expected), key
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_outliers_are_kept_or_refused_as_planning_says(name: str) -> None:
    model, chosen = build(name), ARCHITECTURES[name]
    spec = QuantSpec(bits=4, dtype="int", outlier_fraction=0.05)
    why = why_unordered(model.config.to_dict())
    assert (why is None) == chosen.ordered
    before = bits_of(model)
    if why is not None:
        with pytest.raises(ArchitectureError, match="outlier_fraction needs to know which layer follows which"):
            quantize_model(model, spec)
    else:
        with quantize_model(model, INT4) as handle:
            plain = handle.total_bits
        with quantize_model(model, spec) as handle:
            assert handle.total_bits > plain
    assert identical(bits_of(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_reading_that_planning_sees_is_the_models(name: str) -> None:
    model = build(name)
    assert (reading_of(model.config.to_dict())[0] == 2) == has_stacks(model)


@pytest.mark.parametrize(
    ("name", "values", "dense"),
    [
        ("JambaConfig", {"num_experts": 1, "mamba_d_state": 8}, True),
        ("JambaConfig", {"num_experts": 2, "mamba_d_state": 8}, False),
        ("NemotronHConfig", {"hybrid_override_pattern": "M-*-"}, True),
        ("NemotronHConfig", {"hybrid_override_pattern": "M-*E"}, False),
        ("GraniteMoeHybridConfig", {"num_local_experts": 0}, True),
    ],
)
def test_a_mixture_of_experts_without_any_is_read_as_it_always_was(
    name: str, values: dict[str, Any], dense: bool
) -> None:
    """The file as it is saved, and as people write it."""
    config = getattr(transformers, name)(**{**LLAMA, "num_hidden_layers": 4, **values})
    model = AutoModelForCausalLM.from_config(config)
    assert has_stacks(model) is not dense
    for said in (config.to_dict(), {"model_type": config.model_type, **values}):
        assert reading_of(said)[0] == (1 if dense else 2)


def default_config(model_type: str) -> Any:
    """The configuration of a model type as transformers has it, cut to five layers; None where it has none."""
    # Some can't be made without values, or by the installed version.
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:
        return None
    for part in (config, getattr(config, "text_config", None)):
        for names, most in ((LAYERS, 5), (EXPERTS, 8)):
            for name in names:
                if isinstance(getattr(part, name, None), int):
                    with suppress(Exception):
                        setattr(part, name, min(most, getattr(part, name)))
    return config


def test_a_configuration_that_names_no_experts_is_read_as_transformers_completes_it() -> None:
    completed = {t: default_config(t) for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert sum(config is not None for config in completed.values()) > 150
    wrong = [
        t
        for t, config in completed.items()
        if config is not None and has_experts({"model_type": t}) != has_experts(config.to_dict())
    ]
    assert not wrong


@pytest.mark.slow
def test_lists_made_by_hand_are_true_of_every_architecture_that_transformers_has() -> None:
    wrong, made = [], 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = default_config(model_type)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        made += 1
        # The causal class of a composite architecture may leave out all but the text; we read it whole.
        text_alone = type(model.config) is not type(config)
        touched = has_stacks(decoder_blocks(model)[1]) or has_larger_tower(config.to_dict()) or text_alone
        if (reading_of(config.to_dict())[0] == 2) != touched:
            wrong.append(f"{model_type}: its reading")
        try:
            block_layers(model)
        except ArchitectureError as error:
            if model_type != "xlnet":  # not causal, and its attention is in 3-D parameters
                wrong.append(f"{model_type}: {error}")
        try:
            outlier_columns(model, 0.02, storage_dtype=torch.float16)
            is_known = True
        except ArchitectureError:
            is_known = False
        if is_known != (why_unordered(config.to_dict()) is None):
            wrong.append(f"{model_type}: its order")
    assert made > 150
    assert not wrong
