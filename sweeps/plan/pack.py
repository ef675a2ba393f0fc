"""A pack: one model and the cells to run on it, as a launch plans them and a worker reads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kbit.evaluation.spec import EvalSpec
from sweeps.files import JsonObject
from sweeps.plan.cost import CostModel
from sweeps.study.cell import (
    Cell,
    Measurement,
    ModelRef,
    cell_from_dict,
    eval_from_dict,
    eval_to_dict,
    model_to_dict,
    quant_to_dict,
)

Item = tuple[Cell, tuple[EvalSpec, ...]]
"""A cell and the evaluations to run on it; what methods need first of a 16-bit model is an item of its own."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One model and the (cell, evaluations) to run on it, in order.

    Attributes:
        seconds: predicted for all of it, without loading the model.
        item_seconds: predicted for each item; empty where nothing is.
        rung: step of the out-of-memory ladder that it is to run at.
    """

    id: str
    sweep: str
    model: ModelRef
    items: tuple[Item, ...]
    seconds: float
    item_seconds: tuple[float, ...] = ()
    rung: int = 0

    def measurements(self) -> list[Measurement]:
        return [Measurement(cell=cell, eval=e) for cell, evals in self.items for e in evals]

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON values, for a worker in another process."""
        evals = dict.fromkeys(e for _, specs in self.items for e in specs)
        places = {e: place for place, e in enumerate(evals)}
        return {
            "id": self.id,
            "sweep": self.sweep,
            "model": model_to_dict(self.model),
            "evals": [eval_to_dict(e) for e in evals],
            "items": [[quant_to_dict(cell), [places[e] for e in specs]] for cell, specs in self.items],
            "seconds": self.seconds,
            "item_seconds": list(self.item_seconds),
            "rung": self.rung,
        }

    @classmethod
    def from_dict(cls, data: JsonObject) -> Pack:
        model = ModelRef(**data["model"])
        evals = [eval_from_dict(e) for e in data["evals"]]
        items = tuple((cell_from_dict(model, q), tuple(evals[i] for i in indices)) for q, indices in data["items"])
        return cls(
            id=data["id"],
            sweep=data["sweep"],
            model=model,
            items=items,
            seconds=data["seconds"],
            item_seconds=tuple(data["item_seconds"]),
            rung=data["rung"],
        )

    def predicted(self, cost: CostModel, *, warm: bool) -> Pack:
        """Return the pack with what is predicted for it now.

        Args:
            cost: predicts.
            warm: the process that runs it has run a pack of its model before.
        """
        seconds = tuple(cost.cell_seconds(c, evals, first=not (n or warm)) for n, (c, evals) in enumerate(self.items))
        return replace(self, item_seconds=seconds, seconds=sum(seconds))

    def without(self, measurements: Collection[str]) -> Pack | None:
        """Return what is left of it when these are done, under the same id; None when nothing is."""
        predicted = self.item_seconds or (0.0,) * len(self.items)
        kept = [
            (cell, left, seconds)
            for (cell, evals), seconds in zip(self.items, predicted, strict=True)
            if (left := tuple(e for e in evals if Measurement(cell=cell, eval=e).key not in measurements))
        ]
        if not kept:
            return None
        return replace(
            self,
            items=tuple((cell, left) for cell, left, _ in kept),
            item_seconds=tuple(seconds for *_, seconds in kept) if self.item_seconds else (),
            seconds=sum(seconds for *_, seconds in kept),
        )
