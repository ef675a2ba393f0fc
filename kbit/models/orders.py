"""Architectures in which it isn't known which layer follows which, so that they have no proxy outliers (section 3).

``kbit.models.outliers`` finds the order by the layers' names once a model is there; this list says the same from
config.json, so that a study hears of it when it is planned. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_WHY: Final[Mapping[str, tuple[str, ...]]] = {
    "latent attention, whose keys and values come from a smaller projection": (
        "axk1",
        "axk2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note",
        "dots3_note_text",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "hy_v4",
        "longcat_flash",
        "minicpm3",
        "youtu",
    ),
    "state spaces, linear attention or convolutions beside, or in place of, attention": (
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
    ),
    "fused projections of another layout than GPT-NeoX's and GPT-2's": (
        "codegen",
        "dbrx",
        "glm",
        "glm4",
        "gpt_bigcode",
        "minimax_m3_vl_text",
        "modernbert-decoder",
        "mpt",
        "phi3",
        "phi4_multimodal",
    ),
    "attention to an encoder in its blocks": (
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "trocr",
        "whisper",
    ),
    "further projections in its attention or beside its FFN": (
        "afmoe",
        "beam",
        "doge",
        "hrm_text",
        "inkling2_text",
        "inkling_text",
        "jetmoe",
        "laguna",
        "moshi",
        "zaya",
    ),
    "layers of other names": (
        "bert",
        "bert-generation",
        "big_bird",
        "blt",
        "camembert",
        "cpmant",
        "ctrl",
        "data2vec-text",
        "electra",
        "ernie",
        "git",
        "gptj",
        "megatron-bert",
        "prophetnet",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    ),
}
"""Model types by what stands in the way."""
_REASONS: Final = {model_type: why for why, types in _WHY.items() for model_type in types}


def why_unordered(config: Mapping[str, Any]) -> str | None:
    """Return why a model's layers have no known order; None where they have one, or where only the model can tell.

    Args:
        config: the contents of config.json.
    """
    model_type = str(config.get("model_type"))
    if model_type == "falcon" and (config.get("multi_query", True) or config.get("new_decoder_architecture", False)):
        why: str | None = "fused projections of another layout than GPT-NeoX's and GPT-2's"
    elif model_type in ("gemma4", "gemma4_text") and _text(config).get("hidden_size_per_layer_input", 256):
        why = "further projections in its attention or beside its FFN"
    else:
        why = _REASONS.get(model_type)
    return why and f"{model_type} has {why}, and which layer follows which isn't known"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config
