"""What config.json and the headers of the weights rule out is refused by name, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto import modeling_auto as auto

from kbit.errors import CheckpointError, SpecError
from kbit.models.checkpoint import model_files
from kbit.models.refusals import ENCODER_DECODERS, ENCODERS, NOT_CAUSAL, check_checkpoint, check_config
from kbit.models.verification import check_causal
from tests.kbit.composite_models import NAMES as COMPOSITE
from tests.kbit.composite_models import composite
from tests.kbit.tiny_models import NAMES, tiny

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
REFUSED = {
    "fp8": ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantization_config .quant_method='fp8'"),
    "bitsandbytes": (
        {**LLAMA, "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        "quant_method='bitsandbytes'.* 16-bit weights: name the checkpoint that was quantized",
    ),
    "an older key": ({**LLAMA, "compression_config": {"format": "pack"}}, "has compression_config"),
    "nested": (
        {"model_type": "mistral3", "text_config": {**LLAMA, "quantization_config": {"quant_method": "fp8"}}},
        "has text_config.quantization_config",
    ),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, "model_type='t5'.*is an encoder-decoder.*decoder-only"),
    "T5 that doesn't say": ({"model_type": "t5"}, "model_type='t5'.*is an encoder-decoder"),
    "BART": ({"model_type": "bart", "is_encoder_decoder": True}, "model_type='bart'.*is an encoder-decoder"),
    "a new one": ({"model_type": "t7", "is_encoder_decoder": True}, "model_type='t7'.*is an encoder-decoder"),
    "BERT": ({"model_type": "bert"}, "model_type='bert'.*is an encoder.*is_decoder: true"),
    "BERT that says so": ({"model_type": "bert", "is_decoder": False}, "model_type='bert'.*is an encoder"),
    "XLNet": (
        {"model_type": "xlnet", "is_decoder": True},
        "model_type='xlnet'.*no causal language.*decoder-only",
    ),
    "CPM-Ant": ({"model_type": "cpmant"}, "model_type='cpmant'.*no causal language model"),
    "RoBERTa": ({"model_type": "roberta"}, "model_type='roberta'.*is an encoder"),
}
ALLOWED: dict[str, dict[str, Any]] = {
    "no quantization": {**LLAMA, "quantization_config": None},
    "BART's decoder alone": {"model_type": "bart", "is_encoder_decoder": False, "is_decoder": True},
    "BERT as a decoder": {"model_type": "bert", "is_decoder": True},
    "XLM as a decoder": {"model_type": "xlm", "causal": True},
    "a decoder that doesn't say": {"model_type": "gpt_neox", "is_decoder": False},
    "code of its own": {"model_type": "bert", "auto_map": {"AutoModelForCausalLM": "own.Model"}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_be_measured_is_refused(case: str) -> None:
    config, says = REFUSED[case]
    with pytest.raises(CheckpointError, match=says):
        check_config(config)


@pytest.mark.parametrize("case", ALLOWED)
def test_a_configuration_that_can_be_measured_passes(case: str) -> None:
    check_config(ALLOWED[case])


def test_the_types_are_those_of_transformers() -> None:
    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    language = (
        masked | set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )
    language |= set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    both = {t for t in language if getattr(CONFIG_MAPPING[t], "is_encoder_decoder", None) is True}
    assert both == ENCODER_DECODERS
    assert (masked | {"bert-generation"}) - both == ENCODERS


SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "dim_ff", "inner_dim", "n_inner"), 128),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **{"vocab_size": 512, "num_key_value_heads": 2, "moe_intermediate_size": 32},
}
"""What architectures call their sizes, and small ones."""


def is_causal(model_type: str) -> bool | None:
    """Whether a small model of a type is causal, by trying; None where it can't be made so small."""
    try:
        config = CONFIG_MAPPING[model_type]()
        for part in filter(None, (config, getattr(config, "text_config", None))):
            for name, value in SMALL.items():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, value)
            for name in ("layer_types", "layers_block_type"):
                if isinstance(getattr(part, name, None), list):
                    setattr(part, name, getattr(part, name)[:2])
        with torch.device("meta"):
            if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 50e6:
                return None
        torch.manual_seed(0)
        check_causal(AutoModelForCausalLM.from_config(config).eval(), name=model_type)
    except SpecError:
        return False
    except Exception:
        return None
    return True


def is_refused(model_type: str) -> bool:
    try:
        check_config({"model_type": model_type})
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize("model_type", [*sorted(NOT_CAUSAL), "gpt2", "llama"])
def test_planning_refuses_what_loading_refuses(model_type: str) -> None:
    assert is_causal(model_type) is not is_refused(model_type)


@pytest.mark.slow
def test_every_causal_class_of_transformers_that_is_not_causal_is_refused_when_planning() -> None:
    found = {t: is_causal(t) for t in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not is_refused(t)}
    assert sum(causal is True for causal in found.values()) > 80
    assert [t for t, causal in found.items() if causal is False] == []


def check(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    check_checkpoint(directory, ["model.safetensors", "config.json"])


QUANTIZED = {
    "FP8 of DeepSeek": ("weight_scale_inv", torch.float32),
    "FP8 and compressed tensors": ("weight_scale", torch.bfloat16),
    "compressed tensors": ("weight_packed", torch.int32),
    "int8 of bitsandbytes": ("SCB", torch.float32),
    "4 bits of bitsandbytes": ("weight.quant_state.bitsandbytes__nf4", torch.uint8),
    "absmax of bitsandbytes": ("weight.absmax", torch.float32),
    "GPTQ": ("qweight", torch.int32),
    "AWQ": ("qzeros", torch.int32),
    "quanto": ("weight._scale", torch.float32),
    "weights in 8 bits": ("weight", torch.int8),
    "floats in 8 bits": ("weight", torch.float8_e4m3fn),
    "MXFP4": ("gate_up_proj_blocks", torch.uint8),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_refused_by_name_without_a_word_in_the_configuration(case: str, tmp_path: Path) -> None:
    suffix, dtype = QUANTIZED[case]
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    with pytest.raises(CheckpointError, match=rf"'{name}' belongs to quantized weights.*16-bit"):
        check(tmp_path, LLAMA, {name: torch.zeros(4, 4).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_in_floats_of_16_bits_and_more_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    check(tmp_path, LLAMA, {"model.layers.0.w.weight": torch.zeros(4, 4, dtype=dtype)})


def layers(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
@pytest.mark.parametrize("path", ["model.layers", "transformer.h", "transformer.blocks", "model.decoder.layers"])
def test_more_layers_than_the_configuration_says_are_refused(key: str, path: str, tmp_path: Path) -> None:
    tensors = layers(f"{path}.1.w", f"{path}.2.w", f"{path}.10.w")
    with pytest.raises(CheckpointError, match=rf"says {key}=2, .* have layer 10 \('{path}\.10\.w'\).*{key}=11"):
        check(tmp_path, {"model_type": "llama", key: 2}, tensors)
    check(tmp_path, {"model_type": "llama", key: 11}, tensors)


def test_layers_that_predict_further_tokens_are_not_the_models_own(tmp_path: Path) -> None:
    own = ("model.layers.0.mlp.w", "model.layers.1.mlp.experts.7.w")
    further = ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.w", "mtp.layers.5.w")
    check(tmp_path, LLAMA, layers(*own, *further))


@pytest.mark.parametrize("name", [*NAMES, *COMPOSITE])
def test_what_transformers_saves_of_a_causal_model_passes(name: str, tmp_path: Path) -> None:
    (composite(name) if name in COMPOSITE else tiny(name)).save_pretrained(tmp_path)
    check_checkpoint(tmp_path, model_files(tmp_path))
