"""Time agreement with the 16-bit model, perplexity's of the same windows included, beside perplexity alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np

from kbit.bench.evaluation import timed
from kbit.bench.report import Table
from kbit.evaluation.agreement import AgreementEval
from kbit.evaluation.perplexity import PerplexityEval

TOKENS: Final = {"cuda": 2**17, "cpu": 2**11}
WINDOW: Final = 512
_REPEATS: Final = 3


def measure(model: Any, *, shape: str, device: str, batch_tokens: int, say: Callable[[str], None]) -> Table:
    """Time both on random tokens.

    Args:
        model: in its 16-bit form, which is compared with itself: that costs what any cell costs.
        shape: its name.
        device: 'cpu' or 'cuda'.
        batch_tokens: tokens in a batch.
        say: told what is being measured.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    windows = np.random.default_rng(0).integers(0, vocabulary, (TOKENS[device] // WINDOW, WINDOW))
    text = PerplexityEval(
        windows=windows,
        window_bytes=np.full(len(windows), 4 * WINDOW, dtype=np.int64),
        vocab_size=vocabulary,
        dataset_hash="random tokens",
    )
    say("agreement: keeping the 16-bit model's states")
    compared, refer = timed(partial(AgreementEval(text=text).refer, model, batch_tokens=batch_tokens))
    seconds = {}
    for name, run in (("perplexity alone", text.run), ("agreement with perplexity", compared.run)):
        say(name)
        runs = [timed(partial(run, model, batch_tokens=batch_tokens))[1] for _ in range(1 + _REPEATS)]
        seconds[name] = median(runs[1:])  # the first one compiles kernels
    alone = seconds["perplexity alone"]
    return Table(
        name="agreement",
        title=f"Agreement with the 16-bit model, {shape}, {windows.size:,} tokens in windows of {WINDOW}",
        header=("evaluation", "s", "tokens/s", "times perplexity"),
        body=[[name, f"{s:.3f}", f"{windows.size / s:,.0f}", f"{s / alone:.2f}"] for name, s in seconds.items()],
        notes=(f"Once a pack, to keep the 16-bit model's states: {refer:.2f} s. Median of {_REPEATS}.",),
        records=[
            {"evaluation": name, "seconds": s, "tokens": windows.size, "refer_seconds": refer}
            for name, s in seconds.items()
        ],
    )
