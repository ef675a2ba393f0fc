"""Sizes of a model from its files' headers, its config.json or its number of parameters: no weight is read.

Needs no torch. What they come to in bytes, for a cell under a dtype, are the ``kbit.models.ways.Parts``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, Final

from kbit.calibration import WINDOWS_PER_BATCH, Calibration
from kbit.models.checkpoint import StoredTensor, is_buffer, layer_of, own_tensors, safetensors_header
from kbit.models.limits import (
    DEPTHS,
    HEADS,
    KV_HEADS,
    WIDTHS,
    as_namespace,
    first_count,
    named_context,
    of_decoder,
)
from kbit.models.prequantized.layouts import as_16_bit
from kbit.models.readings import expert_count, has_experts
from kbit.models.ways import Parts
from kbit.spec import Spec

LOGITS_AT_ONCE: Final = {"cpu": 2**24, "cuda": 2**27}
"""Logits computed at once: 32 or 256 MB of 16 bits. On a CPU their float32 copies should stay small; on a GPU the
head, which is read for each chunk, should meet enough tokens (with a vocabulary of 250,000: 535).
"""
GUESSED: Final = "the number of parameters"
STORED_BYTES: Final = 2
"""Of a weight as it is read: 16 bits."""
_INNER: Final = ("intermediate_size", "ffn_dim", "n_inner")
_POSITIONS: Final = ("max_position_embeddings", "n_positions")
_LEARNED_POSITIONS: Final = frozenset({"opt", "gpt2", "gpt_neo", "gpt_bigcode", "xglm", "biogpt"})
_PLAIN_FFN: Final = frozenset(
    {"opt", "gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "mpt", "falcon", "phi", "xglm", "codegen", "biogpt"}
)
"""Architectures whose FFN has two matrices; others are taken to have a gate too."""
_HEAD: Final = ("lm_head.weight", "embed_out.weight")
_SHAPE_OF_SIZE: Final = 0.12
"""Parameters of the blocks over hidden size cubed, about: 0.09 to 0.16 in the tables of OPT and GPT-3."""
_VOCABULARY: Final = 50_304


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model's sizes, in values.

    Attributes:
        parameters: of all of it, tied ones once.
        quantized: in the matrices of its blocks.
        largest: in its largest tensor.
        block: in its largest block.
        outside: in its largest tensor outside the blocks.
        hidden, inner, vocabulary: widths of the residual stream, the FFN and the logits.
        known_from: 'files', 'config.json', or 'the number of parameters', which is a guess at its shape.
    """

    parameters: int
    quantized: int
    largest: int
    block: int
    outside: int
    hidden: int
    inner: int
    vocabulary: int
    known_from: str


def sizes_of(files: Collection[Path], config: Mapping[str, Any] | None, parameters: int | None) -> Sizes | None:
    """Return a model's sizes by the best that is known of it; None where nothing is.

    Args:
        files: its weights, where they are on this machine; torch's ``.bin`` files say nothing without torch.
        config: its config.json, where that is known.
        parameters: how many, where that is known.

    Raises:
        CheckpointError: a safetensors file is damaged.
    """
    text = of_decoder(config or {})
    hidden = first_count(text, WIDTHS)
    if files and hidden and all(file.suffix == ".safetensors" for file in files):
        tensors = as_16_bit(config, [t for file in files for t in safetensors_header(file)])
        return _of_tensors(tensors, text)
    if hidden and first_count(text, DEPTHS):
        return _of_config(text, parameters)
    return None if parameters is None else _of_parameters(parameters)


def parts_of(
    sizes: Sizes,
    spec: Spec,
    config: Mapping[str, Any] | None = None,
    *,
    compute_bytes: int,
    device: str,
    calibration: Calibration | None = None,
) -> Parts:
    """Return what a model takes in bytes under a quantization.

    Args:
        sizes: the model's.
        spec: the quantization.
        config: its config.json, where known: experts can't be held in k bits, and windows are cut to the context.
        compute_bytes: of a value in the compute dtype.
        device: 'cpu' or 'cuda'.
        calibration: what it calibrates on, where it does.
    """
    calibrating = 0
    if calibration is not None:
        context = None if config is None else named_context(as_namespace(config))
        calibrating = min(WINDOWS_PER_BATCH, calibration.samples) * calibration.length_in(context)
    packs = spec.why_not_packed is None and not (
        spec.is_baseline or spec.calibrates or (config is not None and has_experts(config))
    )
    held = ceil(sizes.quantized * spec.bits_per_param_held / 8)
    apart = device == "cpu" and not spec.is_baseline
    # Residual stream, its norm and the sum; beside them queries, keys, values and what comes of them, or the FFN's
    # activations before and after the nonlinearity.
    width = 4 * sizes.hidden + max(4 * sizes.hidden, 3 * sizes.inner)
    return Parts(
        weights=compute_bytes * sizes.parameters,
        packed=held + compute_bytes * (sizes.parameters - sizes.quantized) if packs else None,
        originals=compute_bytes * sizes.quantized if apart else 0,
        largest=STORED_BYTES * sizes.largest,
        working=spec.working_bytes(sizes.hidden, sizes.inner) + _expert_bytes(sizes, spec, config or {}),
        block=compute_bytes * sizes.block,
        outside=compute_bytes * sizes.outside,
        token=compute_bytes * width,
        calibrating=calibrating,
        # A cell's logits, and those of the 16-bit model that it is compared with.
        token_logits=2 * compute_bytes * sizes.vocabulary,
        logits=2 * compute_bytes * max(LOGITS_AT_ONCE[device], sizes.vocabulary),
        layered=spec.why_not_layered is None,
    )


def _expert_bytes(sizes: Sizes, spec: Spec, config: Mapping[str, Any]) -> int:
    """Return the bytes of what is summed of the inputs of a block's experts, each of its own."""
    if not spec.product_bytes:
        return 0
    inner = first_count(of_decoder(config), ("moe_intermediate_size", "ffn_hidden_size")) or sizes.inner
    return spec.product_bytes * expert_count(config) * (sizes.hidden**2 + inner**2)


def _of_tensors(tensors: Collection[StoredTensor], text: Mapping[str, Any]) -> Sizes:
    own = [t for t in own_tensors(tensors) if t.dtype.startswith(("F", "BF")) and not is_buffer(t.name, t.shape)]
    tied = bool(text.get("tie_word_embeddings", True)) and any(not t.name.endswith(_HEAD) for t in own)
    own = [t for t in own if not (tied and t.name.endswith(_HEAD))]
    blocks: Counter[int] = Counter()
    quantized = 0
    for tensor in own:
        number, count = layer_of(tensor.name), prod(tensor.shape)
        if number is not None:
            blocks[number] += count
            quantized += count if _is_matrix(tensor) else 0
    outside = max((prod(t.shape) for t in own if layer_of(t.name) is None), default=0)
    hidden = first_count(text, WIDTHS) or 0
    return Sizes(
        parameters=sum(prod(t.shape) for t in own),
        quantized=quantized,
        largest=max((prod(t.shape) for t in own), default=0),
        block=max(blocks.values(), default=0),
        outside=outside,
        hidden=hidden,
        inner=first_count(text, _INNER) or 4 * hidden,
        vocabulary=first_count(text, ("vocab_size",)) or (outside // hidden if hidden else 0),
        known_from="files",
    )


def _is_matrix(tensor: StoredTensor) -> bool:
    return len(tensor.shape) > 1 and prod(tensor.shape) > max(tensor.shape) and not tensor.name.endswith("bias")


def _of_config(text: Mapping[str, Any], parameters: int | None) -> Sizes:
    hidden, layers = first_count(text, WIDTHS) or 0, first_count(text, DEPTHS) or 1
    inner = first_count(text, _INNER) or 4 * hidden
    vocabulary = first_count(text, ("vocab_size",)) or 0
    kind = text.get("model_type")
    embedding = vocabulary * hidden
    ends = embedding if text.get("tie_word_embeddings", True) else 2 * embedding
    ends += (first_count(text, _POSITIONS) or 0) * hidden if kind in _LEARNED_POSITIONS else 0
    heads = first_count(text, HEADS) or 1
    shared = (first_count(text, KV_HEADS) or heads) / heads
    block = round(2 * (1 + shared) * hidden**2) + (2 if kind in _PLAIN_FFN else 3) * hidden * inner
    if parameters is not None and parameters > ends:
        block = (parameters - ends) // layers
    return Sizes(
        parameters=ends + layers * block,
        quantized=layers * block,
        largest=max(embedding, hidden * inner),
        block=block,
        outside=embedding,
        hidden=hidden,
        inner=inner,
        vocabulary=vocabulary,
        known_from="config.json",
    )


def _of_parameters(parameters: int) -> Sizes:
    hidden = max(1, round((parameters / _SHAPE_OF_SIZE) ** (1 / 3)))
    embedding = min(_VOCABULARY * hidden, parameters // 3)
    rest = parameters - embedding
    return Sizes(
        parameters=parameters,
        quantized=rest,
        largest=max(embedding, 4 * hidden**2),
        block=min(rest, 12 * hidden**2),
        outside=embedding,
        hidden=hidden,
        inner=4 * hidden,
        vocabulary=_VOCABULARY,
        known_from=GUESSED,
    )
