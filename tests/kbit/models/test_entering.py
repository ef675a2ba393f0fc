"""What enters the matrices of a stack, in whatever way its module multiplies by them, beside what was given by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kbit.errors import ArchitectureError
from kbit.models.architectures import Layer
from kbit.models.entering import watching
from kbit.models.stacks import Stack

COUNT, OUT, IN = 3, 4, 4  # square: shapes don't tell which way a matrix lies


class Experts(nn.Module):
    def __init__(self, act: Callable[[Tensor, Tensor], object], *, transposed: bool, flat: bool) -> None:
        super().__init__()
        shape = (COUNT, IN, OUT) if transposed else (COUNT, OUT, IN)
        values = torch.randn(COUNT, *shape[1:])
        self.weight = nn.Parameter(values.flatten(0, 1) if flat else values)
        self.act = act
        self.stack = Stack(parameter="weight", count=COUNT, transposed=transposed)

    def forward(self, x: Tensor) -> None:
        self.act(x, self.weight)

    def layers(self) -> list[Layer]:
        return [Layer(name=f"experts.{n}", block=0, module=self, stack=self.stack, number=n) for n in range(COUNT)]


ENDS = torch.tensor([1, 1, 4], dtype=torch.int32)
WAYS: dict[str, tuple[Callable[[Tensor, Tensor], object], bool, bool]] = {
    "linear": (lambda x, w: [nn.functional.linear(x[i], w[i]) for i in (0, 2)], False, False),
    "right of @": (lambda x, w: [x[i] @ w[i] for i in (0, 2)], True, False),
    "flat, turned": (lambda x, w: [x[i].matmul(w.view(COUNT, OUT, IN)[i].T) for i in (0, 2)], False, True),
    "flat": (lambda x, w: [x[i].matmul(w.view(COUNT, IN, OUT)[torch.tensor(i)]) for i in (0, 2)], True, True),
    "bmm": (torch.bmm, True, False),
    "bmm, turned": (lambda x, w: torch.bmm(x, w.transpose(1, 2)), False, False),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(COUNT, 1, OUT), x, w), True, False),
    "left of @": (lambda x, w: w[:, None] @ x[:, None].transpose(-1, -2), False, False),
    "grouped": (lambda x, w: torch._grouped_mm(torch.cat([x[0, :1], x[2]]), w.mT, offs=ENDS), False, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_matrix_is_told_the_rows_that_are_sent_to_it(way: str) -> None:
    act, transposed, flat = WAYS[way]
    module = Experts(act, transposed=transposed, flat=flat)
    x = torch.randn(COUNT, 3, IN)
    x[0, 1:], x[1] = 0, 0  # of one product for all matrices: rows of zeros stand for tokens that are another's
    told: dict[str, Tensor] = {}
    with torch.no_grad(), watching(module.layers(), lambda layer, rows: told.update({layer.name: rows})):
        module(x)
    alone = way in ("linear", "right of @", "flat, turned", "flat")
    assert set(told) == {"experts.0", "experts.2"}
    assert torch.equal(told["experts.0"], x[0] if alone else x[0, :1])
    assert torch.equal(told["experts.2"], x[2])


@pytest.mark.parametrize(
    "act",
    [
        lambda x, w: torch.bmm(x, w[torch.arange(COUNT)].mT),  # copies
        lambda x, w: x @ w,  # the other way round than the stack says
        lambda x, w: x @ w[:, :2].mT,  # a part of each
    ],
)
def test_a_product_that_is_not_seen_is_an_error_and_no_expert_without_tokens(
    act: Callable[[Tensor, Tensor], object],
) -> None:
    module = Experts(act, transposed=False, flat=False)
    with (
        pytest.raises(ArchitectureError, match="what enters the matrices of experts can't be seen: Experts multiplies"),
        torch.no_grad(),
        watching(module.layers(), lambda *_: None),
    ):
        module(torch.randn(COUNT, 2, IN))
    with torch.no_grad(), watching(module.layers(), lambda *_: None):  # it was not called
        pass
