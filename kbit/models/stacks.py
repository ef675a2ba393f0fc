"""Stacks: parameters that hold the matrices of many experts, or heads, along their first dimension.

Each matrix is quantized by itself, as if it were a layer of its own. transformers' own quantizers do the same for
experts; what is ours is to know which way each architecture stores them, since blocks of values follow the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

FUSED, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"

_BY_CLASS: Final[Mapping[str, Mapping[str, bool]]] = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},  # two dimensions: [experts · FFN, hidden]
    "InklingSharedExperts": {GATE: False, UP: False, DOWN: False},
    "JetMoeParallelExperts": {"weight": False},
    "RecurrentGemmaRglru": {"input_gate_weight": True, "recurrent_gate_weight": True},
    "ZambaMambaMixer": {"x_proj_weight": False, "dt_proj_weight": False},
}
"""Stacks of modules that the rules below don't cover; whether each is stored transposed."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A parameter that holds several matrices.

    Attributes:
        parameter: its name in the module.
        count: matrices.
        transposed: each is stored [in_features, out_features].
    """

    parameter: str
    count: int
    transposed: bool

    def matrix(self, values: Tensor, number: int) -> Tensor:
        """Return one of the matrices as [out_features, in_features]: a view of the parameter's values."""
        stacked = values if values.ndim == 3 else values.view(self.count, -1, values.shape[-1])
        return stacked[number].t() if self.transposed else stacked[number]


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """Return the stacks among a module's own parameters, by their names; empty for most modules."""
    own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim >= 2}
    if not own or isinstance(module, nn.Linear):
        return {}
    named = _BY_CLASS.get(type(module).__name__)
    if named is None:
        transposed = _orientation(module, own)
        named = {} if transposed is None else dict.fromkeys((FUSED, GATE, UP, DOWN), transposed)
    # Only DBRX has to be asked how many matrices a parameter holds.
    in_one: Any = getattr(module, "moe_num_experts", None)
    return {
        name: Stack(parameter=name, count=p.shape[0] if p.ndim == 3 else int(in_one), transposed=named[name])
        for name, p in own.items()
        if name in named and (p.ndim == 3 or (p.ndim == 2 and in_one))
    }


def has_stacks(module: nn.Module) -> bool:
    """Tell whether a module holds stacks, or experts that are modules of their own, at any depth."""
    return any(stacks_of(m) or name.rpartition(".")[2] == "experts" for name, m in module.named_modules())


def _orientation(module: nn.Module, own: Mapping[str, Tensor]) -> bool | None:
    """Tell whether experts are stored transposed; None for a module that holds none.

    The shapes of a gated expert's two parameters fit one orientation only: [2 FFN, hidden] with [hidden, FFN], or
    [hidden, 2 FFN] with [FFN, hidden]. Without a gate they fit both, and transformers' own mark decides.
    """
    down = own.get(DOWN)
    if down is None or down.ndim != 3:
        return None
    fused, (rows, columns) = own.get(FUSED), down.shape[1:]
    if fused is None or fused.ndim != 3:
        marked = getattr(module, "is_transposed", None)
        return marked if isinstance(marked, bool) else None
    if tuple(fused.shape[1:]) == (2 * columns, rows):
        return False
    return True if tuple(fused.shape[1:]) == (columns, 2 * rows) else None
