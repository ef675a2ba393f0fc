"""Readings: which of a checkpoint's matrices a version of this program takes, as part of a model's identity.

Where a repair changes the numbers of some architectures, they get a higher reading and so other keys; what was measured
under the earlier one counts as superseded. Every other model has reading 1, which is left out of its identity. What
decides is config.json alone, so that planning can tell. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Config = Mapping[str, Any]

_NESTED: Final = ("text_config", "ffn_config")
"""Parts of a configuration that may say what its language model is made of (composite models, DBRX)."""
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What architectures call their number of experts."""
_MIXTURES: Final = frozenset(
    {
        *("afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_v2"),
        *("deepseek_v3", "deepseek_v32", "deepseek_v4", "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe"),
        *("flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa"),
        *("granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text"),
        *("jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text"),
        *("longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral"),
        *("nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"),
        *("qwen4_exp", "qwen4_exp_text", "solar_open", "zaya"),
    }
)
"""Architectures that have experts where config.json doesn't say how many."""
_TOWERS: Final = ("vision_config", "audio_config")
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd")
_DEPTHS: Final = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "depth")
_WITHOUT_STACKS: Final = frozenset({"doge"})
"""Architectures that keep their experts in embeddings, which are looked up."""
_SPARSE: Final[Mapping[str, tuple[str, ...]]] = {
    "nemotron_h": ("hybrid_override_pattern", "layers_block_type", "layer_types"),
}
"""Architectures whose layers have experts only where one of these keys says so: by an 'E', or by 'moe'."""
_ONE_IS_DENSE: Final = frozenset({"jamba"})
"""Architectures in which a single expert is an ordinary FFN (Jamba Reasoning)."""
_STACKED_HEADS: Final = frozenset({"recurrent_gemma", "zamba"})
_WHOLE: Final = frozenset({"emu3", "mllama", "qwen3_5"})
"""Composite architectures of which transformers' causal classes read the text alone, without experts."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A change of what is quantized, or how.

    Attributes:
        reading: the reading of the models that it touches.
        reason: why what was measured before doesn't count, for people.
        touches: tells from config.json whether it changed a model's numbers.
    """

    reading: int
    reason: str
    touches: Callable[[Config], bool]


def has_experts(config: Config) -> bool:
    """Tell whether a model is a mixture of experts that keeps them as matrices."""
    parts = list(_parts(config))
    kind = config.get("model_type")
    if kind in _WITHOUT_STACKS or not all(
        _may_be_sparse(layers) for layers in map(config.get, _SPARSE.get(str(kind), ()))
    ):
        return False
    said = [part[name] for part in parts for name in _EXPERTS if name in part]
    least = 2 if kind in _ONE_IS_DENSE else 1
    return any(_count(n) >= least for n in said) if said else any(part.get("model_type") in _MIXTURES for part in parts)


def expert_count(config: Config) -> int:
    """Return how many experts a layer of a mixture has at most; 0 where config.json doesn't say, or there are none."""
    said = [_count(part[name]) for part in _parts(config) for name in _EXPERTS if name in part]
    return max(said, default=0) if has_experts(config) else 0


def has_larger_tower(config: Config) -> bool:
    """Tell whether a part that reads images or sounds may be larger than the text decoder; yes where it isn't said."""
    text = config.get("text_config")
    decoder = _size(text if isinstance(text, Mapping) else config)
    towers = [part for name in _TOWERS if isinstance(part := config.get(name), Mapping)]
    return any((_size(tower) or decoder) >= decoder for tower in towers)


REPAIRS: Final = (
    Repair(
        reading=2,
        reason="its experts (3-D parameters) were left in 16 bits, and some of its routers were quantized",
        touches=has_experts,
    ),
    Repair(
        reading=2,
        reason="matrices that it keeps by head in 3-D parameters were left in 16 bits",
        touches=lambda config: any(part.get("model_type") in _STACKED_HEADS for part in _parts(config)),
    ),
    Repair(
        reading=2,
        reason="the part of it that reads images or sounds was quantized in place of its text decoder",
        touches=has_larger_tower,
    ),
    Repair(
        reading=2,
        reason="it was read without its vision tower, whose bits total_bits now counts",
        touches=lambda config: config.get("model_type") in _WHOLE,
    ),
)
"""Every repair that changed numbers. A later one of a model that has reading 2 has reading 3."""


def reading_of(config: Config) -> tuple[int, str | None]:
    """Return a model's reading, with the reason that supersedes the earlier ones; (1, None) for most.

    Args:
        config: the contents of config.json.
    """
    touching = [repair for repair in REPAIRS if repair.touches(config)]
    if not touching:
        return 1, None
    return max(repair.reading for repair in touching), "; ".join(repair.reason for repair in touching)


def _parts(config: Config) -> Iterator[Config]:
    yield config
    yield from (part for name in _NESTED if isinstance(part := config.get(name), Mapping))


def _size(part: Config) -> int:
    """Return about how large a part is, in layers times width squared; 0 where that isn't said."""
    width, depth = (
        next((n for name in names if isinstance(n := part.get(name), int)), 0) for names in (_WIDTHS, _DEPTHS)
    )
    return depth * width**2


def _may_be_sparse(layers: object) -> bool:
    """Tell whether a list, or a pattern, of layers has one with experts; yes where there is none."""
    if isinstance(layers, str):
        return "E" in layers
    return not isinstance(layers, list | tuple) or any("moe" in str(layer) for layer in layers)


def _count(value: object) -> int:
    """Return a number of experts, which a few architectures give by layer; 0 where there are none."""
    values = value if isinstance(value, list | tuple) else [value]
    return max((n for n in values if isinstance(n, int)), default=0)
