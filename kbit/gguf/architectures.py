"""The architectures that GGUF has, of those that are measured here: names of tensors, orders of rows, hyperparameters.

A name in the model is a pattern in which ``{}`` stands for a block's number. Rows are put into another order where
llama.cpp keeps them so: a fused QKV by what a row belongs to and not by head, Llama's queries and keys by pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kbit.errors import SpecError

Hyperparameters = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture in GGUF files.

    Attributes:
        name: in files.
        model_type: transformers' name.
        names: of its tensors, in the model to in the file, without '.weight' and '.bias'.
        transposed: names, in the file, of matrices that transformers stores [in, out].
        interleaved: names, in the file, whose rows lie by head in the model, and by queries, keys, values in the file.
        rotated: names whose rows lie by halves of a head in the model and by pairs in the file, to the key of heads.
        describe: a configuration to hyperparameters.
        configure: the inverse: arguments of transformers' configuration.
    """

    name: str
    model_type: str
    names: Mapping[str, str]
    describe: Callable[[Any], dict[str, Any]]
    configure: Callable[[Hyperparameters], dict[str, Any]]
    transposed: tuple[str, ...] = ()
    interleaved: tuple[str, ...] = ()
    rotated: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, parameter: str) -> str | None:
        """Return a parameter's name in the file; None where the file doesn't have it."""
        stem, _, kind = parameter.rpartition(".")
        for pattern, name in self.names.items():
            found = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), stem)
            if found is not None:
                return f"{name.format(*found.groups())}.{kind}"
        return None

    def order(self, name: str, rows: int, about: Hyperparameters) -> Tensor | None:
        """Return which of the model's rows stand where in the file, int64 [rows]; None where they stand alike."""
        part = name.split(".")[-2]
        heads = int(about["attention.head_count"])
        if part in self.interleaved:
            return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).reshape(-1)
        if part in self.rotated:
            heads = int(about.get(self.rotated[part], heads))
            return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
        return None


def _neox(config: Any) -> dict[str, Any]:
    rope = _rope(config)
    _check(config, hidden_act="gelu", attention_bias=True)
    head = config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": int(head * float(rope.get("partial_rotary_factor", 1.0))),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.head_count": config.num_attention_heads,
        "use_parallel_residual": bool(config.use_parallel_residual),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
    }


def _neox_config(about: Hyperparameters) -> dict[str, Any]:
    head = about["embedding_length"] // about["attention.head_count"]
    return {
        "max_position_embeddings": about["context_length"],
        "hidden_size": about["embedding_length"],
        "num_hidden_layers": about["block_count"],
        "intermediate_size": about["feed_forward_length"],
        "num_attention_heads": about["attention.head_count"],
        "use_parallel_residual": about["use_parallel_residual"],
        "layer_norm_eps": about["attention.layer_norm_epsilon"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": about.get("rope.freq_base", 10000.0),
            "partial_rotary_factor": about["rope.dimension_count"] / head,
        },
    }


def _gpt2(config: Any) -> dict[str, Any]:
    _check(config, activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _gpt2_config(about: Hyperparameters) -> dict[str, Any]:
    return {
        "n_positions": about["context_length"],
        "n_embd": about["embedding_length"],
        "n_layer": about["block_count"],
        "n_inner": about["feed_forward_length"],
        "n_head": about["attention.head_count"],
        "layer_norm_epsilon": about["attention.layer_norm_epsilon"],
    }


def _bloom(config: Any) -> dict[str, Any]:
    _check(config, apply_residual_connection_post_layernorm=False)
    return {
        "context_length": int(getattr(config, "seq_length", 0) or 2048),
        "embedding_length": config.hidden_size,
        "block_count": config.n_layer,
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _bloom_config(about: Hyperparameters) -> dict[str, Any]:
    return {
        "hidden_size": about["embedding_length"],
        "n_layer": about["block_count"],
        "n_head": about["attention.head_count"],
        "layer_norm_epsilon": about["attention.layer_norm_epsilon"],
        "seq_length": about["context_length"],
    }


def _llama(config: Any) -> dict[str, Any]:
    rope = _rope(config)
    _check(config, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": head,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _llama_config(about: Hyperparameters) -> dict[str, Any]:
    heads = about["attention.head_count"]
    return {
        "max_position_embeddings": about["context_length"],
        "hidden_size": about["embedding_length"],
        "num_hidden_layers": about["block_count"],
        "intermediate_size": about["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": about.get("attention.head_count_kv", heads),
        "head_dim": about.get("attention.key_length", about["embedding_length"] // heads),
        "rms_norm_eps": about["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": about.get("rope.freq_base", 10000.0)},
    }


def _rope(config: Any) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise _unlike("rope_type", rope["rope_type"], "default")
    return rope


def _check(config: Any, **wanted: Any) -> None:
    """Refuse a configuration that llama.cpp computes otherwise."""
    for name, value in wanted.items():
        found = getattr(config, name, value)
        if found != value:
            raise _unlike(name, found, value)


def _unlike(name: str, found: object, value: object) -> SpecError:
    return SpecError("format", "gguf", f"packed: the model has {name}={found!r}, and llama.cpp computes with {value!r}")


_GPT_BLOCK: Final = {
    "transformer.h.{}.ln_1": "blk.{}.attn_norm",
    "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
    "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
    "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
    "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
_LLAMA_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_ALL: Final = (
    Architecture(
        name="gptneox",
        model_type="gpt_neox",
        names={
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "embed_out": "output",
            "lm_head": "output",
            "gpt_neox.layers.{}.input_layernorm": "blk.{}.attn_norm",
            "gpt_neox.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
            "gpt_neox.layers.{}.attention.query_key_value": "blk.{}.attn_qkv",
            "gpt_neox.layers.{}.attention.dense": "blk.{}.attn_output",
            "gpt_neox.layers.{}.mlp.dense_h_to_4h": "blk.{}.ffn_up",
            "gpt_neox.layers.{}.mlp.dense_4h_to_h": "blk.{}.ffn_down",
        },
        describe=_neox,
        configure=_neox_config,
        interleaved=("attn_qkv",),
    ),
    Architecture(
        name="gpt2",
        model_type="gpt2",
        names={**_GPT_BLOCK, "transformer.wte": "token_embd", "transformer.wpe": "position_embd"},
        describe=_gpt2,
        configure=_gpt2_config,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    Architecture(
        name="bloom",
        model_type="bloom",
        names={
            "transformer.word_embeddings": "token_embd",
            "transformer.word_embeddings_layernorm": "token_embd_norm",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
            "transformer.h.{}.input_layernorm": "blk.{}.attn_norm",
            "transformer.h.{}.self_attention.query_key_value": "blk.{}.attn_qkv",
            "transformer.h.{}.self_attention.dense": "blk.{}.attn_output",
            "transformer.h.{}.post_attention_layernorm": "blk.{}.ffn_norm",
            "transformer.h.{}.mlp.dense_h_to_4h": "blk.{}.ffn_up",
            "transformer.h.{}.mlp.dense_4h_to_h": "blk.{}.ffn_down",
        },
        describe=_bloom,
        configure=_bloom_config,
        interleaved=("attn_qkv",),
    ),
    Architecture(
        name="llama",
        model_type="llama",
        names=_LLAMA_NAMES,
        describe=_llama,
        configure=_llama_config,
        rotated={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
    ),
)
ARCHITECTURES: Final[Mapping[str, Architecture]] = {a.name: a for a in _ALL}
"""By their names in files."""
_OF_TYPE: Final = {**{a.model_type: a for a in _ALL}, "mistral": ARCHITECTURES["llama"]}


def architecture_of(model_type: str | None) -> Architecture:
    """Return what transformers calls by this name.

    Raises:
        SpecError: GGUF has none such, or it isn't written here.
    """
    if model_type not in _OF_TYPE:
        allowed = f"packed for model_type={model_type!r}: gguf is written for {', '.join(_OF_TYPE)}"
        raise SpecError("format", "gguf", allowed + (", and GGUF has no OPT" if model_type == "opt" else ""))
    return _OF_TYPE[model_type]
