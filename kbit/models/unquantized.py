"""What stays in 16 bits inside a block on purpose: every exception has its reason.

Whatever has two or more dimensions there is quantized, or is one of these, or the model is refused: a matrix that is
left out in silence would make a cell's bits and its loss another model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

VECTOR: Final = "a vector, whatever its dimensions"
ROUTER: Final = "a router: small, and an error in it sends tokens to other experts"
_KINDS: Final[Mapping[type[nn.Module], str]] = {
    _ConvNd: "a convolution, whose kernel is a few values per channel",
    nn.Embedding: "a table that is looked up, not multiplied",
}
_NAMES: Final[Mapping[str, str]] = {
    r"bias$": "a bias: by expert, head or position",
    r"(^|\.)(A_log|D)$": "decay and skip of a state space, a value per channel and state",
    r"(^|\.)rel_pos_[hw]$": "a table of relative positions",
    r"(^|\.)rel_logits_proj\.proj$": "a table of relative positions",
    r"(^|\.)\w+_clip\.scale$": "a scale per head and channel",
    r"(^|\.)(attn|ffn)_hc\.fn$": "mixes a few residual streams",
    r"(^|\.)attention_input\.query$": "mixes a few residual streams",
    r"(^|\.)[kv]_sconv\.static_weight$": "a convolution, whose kernel is a few values per channel",
}
"""Reasons by a pattern of the parameter's name within its block."""
_ROUTERS: Final = frozenset({"gate", "router", "shared_expert_gate"})
"""Names of modules that choose experts, or weigh a shared one. Only where there are experts."""


def why_kept(module: nn.Module, path: str, name: str, parameter: Tensor, *, among_experts: bool) -> str | None:
    """Return why a parameter of two or more dimensions stays in 16 bits; None where it is to be quantized.

    Args:
        module: the parameter's.
        path: the module's name within its block, empty for the block itself.
        name: the parameter's in the module.
        parameter: the parameter.
        among_experts: the model is a mixture of experts.
    """
    if "Router" in type(module).__name__ or (among_experts and not _ROUTERS.isdisjoint(path.split("."))):
        return ROUTER
    if isinstance(module, nn.Linear | Conv1D):
        return None
    kind = next((reason for kind, reason in _KINDS.items() if isinstance(module, kind)), None)
    if kind is not None:
        return kind
    if parameter.numel() == max(parameter.shape):
        return VECTOR
    full = f"{path}.{name}" if path else name
    return next((reason for pattern, reason in _NAMES.items() if re.search(pattern, full)), None)
