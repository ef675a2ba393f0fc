"""Make do with the memory that there is: the originals off the GPU, then smaller batches, for a model at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from sweeps.events import Event, SmallerBatch
from sweeps.plan.pack import Pack
from sweeps.study.cell import ModelRef
from sweeps.worker.model_cache import Warm, recover

MIN_BATCH_TOKENS: Final = 256
"""A batch is not halved below this when memory runs out: one sequence takes about as much."""

T = TypeVar("T")


@dataclass(kw_only=True)
class Batches:
    """The tokens in a batch of each model; what was made smaller for one stays so.

    Attributes:
        most: where memory allows.
        warm: has the model that is loaded.
        emit: told when a batch is made smaller.
    """

    most: int
    warm: Warm
    emit: Callable[[Event], None]
    _smaller: dict[tuple[ModelRef, str], int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens in a batch of the loaded model."""
        held = self.warm.holds
        return self.most if held is None else self._smaller.get(held, self.most)

    def within_memory(self, pack: Pack, run: Callable[[], T], *, halve: bool = True) -> T:
        """Return what ``run`` does.

        Where memory runs out, try again: first with the model's originals off the GPU, then with half the batch, where
        ``halve`` says that it counts. Either stays so for the model.
        """
        from kbit.memory import is_out_of_memory

        while True:
            try:
                return run()
            except Exception as error:
                held = self.warm.holds
                if held is None or not is_out_of_memory(error):
                    raise
                if self.has_made_room(error):
                    continue
                if not halve or self.tokens <= MIN_BATCH_TOKENS:
                    raise
                recover(error, self.warm.device)
            self.halve(pack)

    def halve(self, pack: Pack) -> bool:
        """Have batches of half as many tokens for the model that is held; tell whether that was possible."""
        held = self.warm.holds
        if held is None or self.tokens <= MIN_BATCH_TOKENS:
            return False
        self._smaller[held] = max(MIN_BATCH_TOKENS, self.tokens // 2)
        self.emit(SmallerBatch(pack=pack.id, batch_tokens=self.tokens))
        return True

    def has_made_room(self, error: Exception) -> bool:
        """Where GPU memory ran out, move the model's originals off it; tell whether there were any."""
        if self.warm.device != "cuda":
            return False
        recover(error, self.warm.device)
        return self.warm.make_room()
