"""Thirty-two architectures with random weights, two layers of 64: what tests of whole models run over."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from tests import ROOT

VOCABULARY, HIDDEN, FFN, CONTEXT = 2048, 64, 128, 128
BASE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN = {**BASE, "intermediate_size": FFN, "max_position_embeddings": CONTEXT, **IDS}
LLAMA = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, **IDS}
MIXTURE = {**LLAMA, "num_experts_per_tok": 2}
QWEN = {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True}
ROUTER = r"\.mlp\.gate\.weight"
CONV = r"\.conv1d\.weight|A_log"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        config: name of its configuration's class in transformers.
        values: of its configuration.
        blocks: where its blocks are.
        kept: pattern of the parameters of two or more dimensions in its blocks that stay in 16 bits.
        stacked: pattern of those that hold a matrix per expert.
        ordered: it is known which layer follows which, so that it can have outliers.
    """

    config: str
    values: dict[str, Any]
    blocks: str = "model.layers"
    kept: str = "(?!)"
    stacked: str = r"\.experts\.(gate_up|down)_proj$"
    ordered: bool = True

    def matrices(self, model: nn.Module) -> dict[str, list[torch.Tensor]]:
        """The matrices to quantize by the parameter that holds them, read off a model's parameters."""
        found = {}
        for name, parameter in model.named_parameters():
            if name.startswith(f"{self.blocks}.") and parameter.ndim > 1 and not re.search(self.kept, name):
                found[name] = list(parameter) if re.search(self.stacked, name) else [parameter]
        return found


ARCHITECTURES = {
    "gpt_neox": Architecture(config="GPTNeoXConfig", values=PLAIN, blocks="gpt_neox.layers"),
    "opt": Architecture(
        config="OPTConfig",
        values={**BASE, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": CONTEXT, **IDS},
        blocks="model.decoder.layers",
    ),
    "gpt2": Architecture(config="GPT2Config", values={**GPT, "n_inner": FFN}, blocks="transformer.h"),
    "bloom": Architecture(
        config="BloomConfig",
        values={"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, **IDS},
        blocks="transformer.h",
    ),
    "llama": Architecture(config="LlamaConfig", values=LLAMA),
    "mistral": Architecture(config="MistralConfig", values=LLAMA),
    "qwen2": Architecture(config="Qwen2Config", values=LLAMA),
    "qwen3": Architecture(config="Qwen3Config", values=LLAMA),
    "gemma": Architecture(config="GemmaConfig", values=LLAMA),
    "gemma2": Architecture(config="Gemma2Config", values=LLAMA),
    "gemma3_text": Architecture(config="Gemma3TextConfig", values=LLAMA),
    "olmo2": Architecture(config="Olmo2Config", values=LLAMA),
    "cohere": Architecture(config="CohereConfig", values=LLAMA),
    "granite": Architecture(config="GraniteConfig", values=LLAMA),
    "starcoder2": Architecture(config="Starcoder2Config", values=LLAMA),
    "stablelm": Architecture(config="StableLmConfig", values=LLAMA),
    "phi": Architecture(config="PhiConfig", values=PLAIN),
    "phi3": Architecture(config="Phi3Config", values=LLAMA, ordered=False),
    "glm": Architecture(config="GlmConfig", values=LLAMA, ordered=False),
    "falcon": Architecture(config="FalconConfig", values={**BASE, **IDS}, blocks="transformer.h", ordered=False),
    "gptj": Architecture(
        config="GPTJConfig", values={**GPT, "n_inner": FFN, "rotary_dim": 8}, blocks="transformer.h", ordered=False
    ),
    "gpt_bigcode": Architecture(
        config="GPTBigCodeConfig", values={**GPT, "n_inner": FFN}, blocks="transformer.h", ordered=False
    ),
    "mpt": Architecture(
        config="MptConfig",
        values={
            **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
            "expansion_ratio": 2,
            **IDS,
        },
        blocks="transformer.blocks",
        ordered=False,
    ),
    "mamba": Architecture(
        config="MambaConfig",
        values={"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8, **IDS},
        blocks="backbone.layers",
        kept=CONV,
        ordered=False,
    ),
    "mixtral": Architecture(config="MixtralConfig", values={**MIXTURE, "num_local_experts": 4}, kept=ROUTER),
    "olmoe": Architecture(config="OlmoeConfig", values={**MIXTURE, "num_experts": 4}, kept=ROUTER),
    "granitemoe": Architecture(
        config="GraniteMoeConfig", values={**MIXTURE, "num_local_experts": 4}, kept=r"\.router\.weight"
    ),
    "gpt_oss": Architecture(
        config="GptOssConfig", values={**MIXTURE, "num_local_experts": 4}, kept=r"\.router\.weight|proj_bias"
    ),
    "qwen3_moe": Architecture(config="Qwen3MoeConfig", values=QWEN, kept=ROUTER),
    "qwen2_moe": Architecture(
        config="Qwen2MoeConfig",
        values={**QWEN, "shared_expert_intermediate_size": 64},
        kept=rf"{ROUTER}|\.shared_expert_gate\.",
    ),
    "jamba": Architecture(
        config="JambaConfig",
        values={
            **{**MIXTURE, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
            **{"expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        },
        kept=rf"\.router\.weight|{CONV}",
        ordered=False,
    ),
    "deepseek_v2": Architecture(
        config="DeepseekV2Config",
        values={
            **{**PLAIN, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16},
            **{"q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
            **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1},
            **{"topk_group": 1, "num_key_value_heads": 4},
        },
        kept=ROUTER,
        ordered=False,
    ),
}


def build(name: str) -> Any:
    """A model in float16 whose outputs depend on its weights."""
    torch.manual_seed(0)
    chosen = ARCHITECTURES[name]
    config = getattr(transformers, chosen.config)(**copy.deepcopy(chosen.values))
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not re.search(CONV, parameter_name):
            parameter.data.normal_(0, 0.08)
    return model.half().eval()


def write(name: str, directory: Path) -> Path:
    """A model's directory, with the demo's tokenizer."""
    build(name).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((ROOT / "sweeps" / "demo" / "models" / "neox-xs" / file).read_bytes())
    return directory
