"""Checkpoints that can't be measured, told from config.json and the headers of the weights. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from kbit.errors import CheckpointError
from kbit.models.checkpoint import (
    Headers,
    StoredTensor,
    headers_of,
    layer_of,
    own_tensors,
    read_config,
    tensors_in,
    weights_among,
)
from kbit.models.limits import DEPTHS
from kbit.models.prequantized.layouts import KEY, as_16_bit, stored_as

ENCODER_DECODERS: Final = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "florence2", "fsmt", "led"),
        *("longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "pix2struct"),
        *("plbart", "pp_formulanet", "prophetnet", "seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5"),
        *("t5gemma", "t5gemma2", "udop", "umt5", "vision-encoder-decoder", "whisper"),
    }
)
"""Types of transformers (5.23) that are encoder-decoders unless config.json says otherwise. Asking transformers takes
seconds, and planning loads none of it; a test compares.
"""
ENCODERS: Final = frozenset(
    {
        *("albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text", "deberta"),
        *("deberta-v2", "distilbert", "electra", "ernie", "esm", "esmc", "eurobert", "flaubert", "fnet", "funnel"),
        *("gte", "ibert", "jina_embeddings_v3", "layoutlm", "longformer", "luke", "megatron-bert", "mobilebert"),
        *("modernbert", "modernvbert", "mpnet", "mra", "neomme", "nomic_bert", "nystromformer", "perceiver"),
        *("reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "tapas"),
        *("ultrabert", "ultravbert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"),
    }
)
"""Types of transformers (5.23) that see all tokens of a text unless config.json says otherwise."""
NOT_CAUSAL: Final = frozenset({"cpmant", "xlnet"})
"""Other types among transformers' causal language models (5.23) in which a token changes what is predicted before it,
whatever config.json says: CPM-Ant reads its prompt both ways, and XLNet predicts tokens in any order.
"""
_CAUSAL: Final = ("is_decoder", "causal")
"""By which an encoder's architecture is a decoder (XLM says ``causal``)."""
_QUANTIZED: Final = re.compile(
    r"(?:^|[._])(?:qweight|qzeros|g_idx|SCB|W_q|weight_packed|weight_scales?|weight_scale_inv|weight_zero_point"
    r"|weight\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+|_data|_scale)"
    r"|proj_blocks|proj_scales)$"
)
"""What libraries of quantization call what they store beside or instead of a weight: GPTQ, AWQ, bitsandbytes, HQQ, FP8,
compressed-tensors, quanto, MXFP4.
"""
_NARROW: Final = re.compile(r"F(4$|6_|8_)")


def check_checkpoint(directory: Path, names: Iterable[str]) -> Headers:
    """Refuse a checkpoint that can't be measured; return what the headers of its safetensors files say.

    Args:
        directory: has config.json.
        names: the model's files in it (``kbit.models.checkpoint.model_files``). Of weights that are no safetensors
            nothing is known without torch.

    Raises:
        CheckpointError: says why, and what to do.
    """
    config = read_config(directory)
    check_config(config)
    weights = weights_among(directory, names)
    others = [file.name for file in weights if file.suffix != ".safetensors"]
    if others and config.get(KEY):
        raise CheckpointError(f"quantized weights are read from safetensors alone, and {others[0]} is none")
    headers = headers_of(weights)
    tensors = as_16_bit(config, tensors_in(headers))
    _check_not_quantized(tensors)
    _check_layers(config, tensors)
    return headers


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what config.json says can't be measured: quantized weights, encoder-decoders, encoders, others that
    are not causal.

    Raises:
        CheckpointError: names the key and its value, and says what to do.
    """
    text = config.get("text_config")
    for part, prefix in ((config, ""), (text if isinstance(text, Mapping) else {}, "text_config.")):
        for key in (KEY, "compression_config"):
            if part.get(key):
                _check_layout(config, key, prefix, part[key])
    kind = config["model_type"]
    both = config.get("is_encoder_decoder", kind in ENCODER_DECODERS and not _has_own_code(config))
    if both:
        raise CheckpointError(
            f"model_type={kind!r} in config.json is an encoder-decoder (is_encoder_decoder): it predicts one text from "
            f"another, so that a text alone has no perplexity. {_NEEDS_DECODER}"
        )
    if kind in ENCODERS and not _has_own_code(config) and not any(config.get(key) for key in _CAUSAL):
        raise CheckpointError(
            f"model_type={kind!r} in config.json is an encoder: it sees the tokens after the one that it predicts, so "
            f"that a text has no perplexity. {_NEEDS_DECODER}; one that was trained as a decoder says is_decoder: true"
        )
    if kind in NOT_CAUSAL and not _has_own_code(config):
        raise CheckpointError(
            f"model_type={kind!r} in config.json is no causal language model: its predictions "
            f"depend on later tokens, so that a text has no perplexity. {_NEEDS_DECODER}"
        )


def _check_layout(config: Mapping[str, Any], key: str, prefix: str, found: Any) -> None:
    """Refuse quantized weights that are not read: no file of ``kbit.models.prequantized`` knows how they lie."""
    method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
    why = ""
    if key == KEY and not prefix:
        try:
            stored_as(config)
        except CheckpointError as error:
            why = f", and {error}"
        else:
            return
    raise CheckpointError(
        f"config.json has {prefix}{key} (quant_method={method!r}): its weights are quantized already{why}. "
        + _NEEDS_16_BITS
    )


_NEEDS_16_BITS: Final = (
    "Every cell starts from 16-bit weights: name the checkpoint that was quantized, with weights in float16, bfloat16 "
    "or float32, or save these dequantized, without that key (transformers: model.dequantize(), save_pretrained)"
)
_NEEDS_DECODER: Final = "Name a causal (decoder-only) language model"


def _has_own_code(config: Mapping[str, Any]) -> bool:
    return "AutoModelForCausalLM" in (config.get("auto_map") or {})


def _check_not_quantized(tensors: Iterable[StoredTensor]) -> None:
    names = [t.name for t in tensors if _QUANTIZED.search(t.name) or _NARROW.match(t.dtype) or _is_integer_weight(t)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(f"the tensor {names[0]!r}{more} belongs to quantized weights. {_NEEDS_16_BITS}")


def _is_integer_weight(tensor: StoredTensor) -> bool:
    return tensor.name.endswith(".weight") and tensor.dtype.startswith(("I", "U"))


def _check_layers(config: Mapping[str, Any], tensors: Collection[StoredTensor]) -> None:
    """Refuse a configuration of fewer layers than the weights have: it would be another model."""
    if any(isinstance(part, Mapping) and key.endswith("_config") for key, part in config.items()):
        return  # of composite models each part has layers of its own
    key = next((key for key in DEPTHS if isinstance(config.get(key), int)), None)
    numbered = {number: t.name for t in own_tensors(tensors) if (number := layer_of(t.name)) is not None}
    if key is None or not numbered:
        return
    last = max(numbered)
    if last >= config[key]:
        raise CheckpointError(
            f"config.json says {key}={config[key]}, but the weights have layer {last} ({numbered[last]!r}): the layers "
            f"beyond would be left out, and it would be another model. Give the config.json of these weights "
            f"({key}={last + 1}), or save the smaller model alone"
        )
