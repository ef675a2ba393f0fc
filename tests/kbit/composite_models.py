"""Tiny random models with a vision tower that is larger than their language part."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

VOCABULARY, CONTEXT, HIDDEN, TOWER_LAYERS = 96, 64, 64, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
}
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 28, "patch_size": 14}
QWEN_VISION = {
    "depth": TOWER_LAYERS,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
QWEN_TOKENS = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 16},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 95,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 32},
        "image_token_index": 95,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "model_type": "llama4_text",
            "intermediate_size_mlp": 128,
            "moe_layers": [],
            "attention_chunk_size": 32,
            "pad_token_id": 0,
        },
        "vision_config": {
            **VISION,
            "vision_output_dim": HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
        },
    },
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": QWEN_VISION,
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "model_type": "qwen2_5_vl_text",
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4], "rope_type": "default"},
        },
        "vision_config": QWEN_VISION,
        **QWEN_TOKENS,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": HIDDEN},
        "image_token_index": 95,
    },
}
NAMES = list(CONFIGS)


def composite(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **copy.deepcopy(CONFIGS[name]))
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.normal_(0, 0.05).to(dtype)  # buffers, such as complex rotations, stay
    return model
