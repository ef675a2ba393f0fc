"""Time zero-shot tasks on a model: ours beside lm-eval's HFLM, and the limit of the arithmetic, in one process."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kbit.bench.report import Record, Table
from kbit.evaluation.spec import EvalSpec
from kbit.sources import source_from_dict

if TYPE_CHECKING:
    from kbit.evaluation.requests import ScoringPlan

SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "pythia-160m": {
        "model_type": "gpt_neox",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 50304,
    },
    "bloom-1b1": {"model_type": "bloom", "hidden_size": 1536, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "vocab_size": 50272,
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "ffn_dim": 16384,
        "vocab_size": 50272,
    },
}
"""Shapes of random weights, as transformers' configurations."""
TASKS: Final[Mapping[str, str]] = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""lm-eval's definition of each task of the paper."""
HFLM_BATCH: Final = 64
"""Sequences in a batch of HFLM's."""
_CONTEXT: Final = 512
"""Tokens of the models' context; longer requests are cut."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One task's figures.

    Attributes:
        peer: seconds of HFLM, which encodes with each call.
        ours: seconds of scoring encoded requests on a model that was seen before.
        encoding: seconds of encoding and laying out, once for all cells of a tokenizer.
        first: seconds of the first scoring, with the trial of sharing.
        tokens_apart, tokens: that go through the model without and with sharing.
        flops: of the matrix products for the latter, head included, attention's scores not.
        sharing: as the rows of a study say it.
        rms: nats between HFLM's log-likelihoods and ours, root mean square.
        moved: requests whose greedy flag differs.
    """

    task: str
    documents: int
    peer: float
    ours: float
    encoding: float
    first: float
    tokens_apart: int
    tokens: int
    flops: float
    sharing: str
    rms: float
    moved: int


def make_model(shape: str, tokenizer: str | None, *, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a model, in eval mode, and its tokenizer.

    Args:
        shape: of ``SHAPES``, with random weights; or a model's directory.
        tokenizer: a directory; None is the model's own.
        device: where it runs.
        dtype: what it computes in.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer or shape)
    if shape not in SHAPES:
        loaded: Any = AutoModelForCausalLM.from_pretrained(shape, dtype=dtype)
        return loaded.to(device).eval(), words
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval(), words


def measure(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[EvalSpec],
    batch_tokens: int,
    say: Callable[[str], None],
) -> list[Timed]:
    """Time tasks."""
    # Late, as the other benchmarks need no lm-eval.
    from lm_eval.models.huggingface import HFLM

    from kbit.evaluation.tasks import build_task

    with contextlib.redirect_stderr(io.StringIO()):
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=HFLM_BATCH, max_length=_CONTEXT)
    found = []
    for spec in tasks:
        with contextlib.redirect_stderr(io.StringIO()):
            task = build_task(spec)
            task.build_all_requests(limit=spec.limit)
        instances = task.instances
        say(f"{spec.name}: {len(instances)} requests, HFLM")
        peer.loglikelihood(instances[:HFLM_BATCH], disable_tqdm=True)
        theirs, seconds = timed(partial(peer.loglikelihood, instances, disable_tqdm=True))
        say(f"{spec.name}: ours")
        found.append(_ours(model, tokenizer, instances, (theirs, seconds), spec.name, batch_tokens))
    return found


def _ours(
    model: Any,
    tokenizer: Any,
    instances: Sequence[Any],
    peer: tuple[list[tuple[float, bool]], float],
    name: str,
    batch_tokens: int,
) -> Timed:
    from kbit.evaluation.requests import RequestEncoder
    from kbit.evaluation.scoring import TokenScorer
    from kbit.evaluation.sharing import SHARED, sharing

    theirs, seconds = peer

    def encode() -> ScoringPlan:
        plan = RequestEncoder(tokenizer, context=_CONTEXT).plan([i.args for i in instances])
        plan.count_tokens(share=True)
        return plan

    def score() -> list[tuple[float, bool]]:
        scorer = TokenScorer(model)
        share = sharing(scorer, plan, batch_tokens=batch_tokens) == SHARED
        return plan.run(scorer, batch_tokens=batch_tokens, share=share)

    plan: ScoringPlan
    plan, encoding = timed(encode)
    scored, first = timed(score)
    ours = median(timed(score)[1] for _ in range(3))
    scorer = TokenScorer(model)
    says = sharing(scorer, plan, batch_tokens=batch_tokens)
    share = says == SHARED
    changes = np.array([mine - value for (mine, _), (value, _) in zip(scored, theirs, strict=True)])
    places = sum(len(target) for owners in plan.owners for _, target in owners)
    head = scorer.head.weight.numel()
    embeddings = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters())
    tied = scorer.head.weight is model.get_input_embeddings().weight
    linear = sum(p.numel() for p in model.parameters()) - embeddings - (0 if tied else head)
    return Timed(
        task=name,
        documents=len({i.doc_id for i in instances}),
        peer=seconds,
        ours=ours,
        encoding=encoding,
        first=first,
        tokens_apart=plan.count_tokens(share=False),
        tokens=plan.count_tokens(share=share),
        flops=2.0 * (linear * plan.count_tokens(share=share) + head * places),
        sharing=says,
        rms=float(np.sqrt(np.mean(changes**2))),
        moved=sum(a != b for (_, a), (_, b) in zip(scored, theirs, strict=True)),
    )


def table(found: Sequence[Timed], *, shape: str, device: str, ceiling: float, batch_tokens: int) -> Table:
    """Return the table; ``ceiling`` are the floating-point operations a second of a large product here."""
    total = {name: sum(getattr(t, name) for t in found) for name in ("peer", "ours", "encoding", "tokens", "flops")}
    body = [[t.task, *_cells(t.__dict__, ceiling), t.sharing, f"{t.rms:.2g}", str(t.moved)] for t in found]
    if len(found) > 1:
        apart = sum(t.tokens_apart for t in found)
        body.append(["together", *_cells({**total, "tokens_apart": apart}, ceiling), "", "", ""])
    return Table(
        name="evaluation",
        title=f"Zero-shot tasks, {shape}, {device}",
        header=(
            "task",
            "HFLM s",
            "ours s",
            "times",
            "with encoding",
            "tokens apart",
            "tokens",
            "TFLOP/s",
            "of ceiling",
            "beginnings",
            "rms nats",
            "greedy moved",
        ),
        body=body,
        notes=(
            f"HFLM: batches of {HFLM_BATCH} sequences, encoding included, as it always is; ours: {batch_tokens} tokens "
            "a batch, encoded once for all cells, median of 3.",
            f"Ceiling: {ceiling / 1e12:.3g} TFLOP/s, a large matrix product here; attention's scores don't count.",
            f"First scoring, with the trial of sharing: {', '.join(f'{t.task} {t.first:.2f} s' for t in found)}.",
        ),
        records=[_record(t, ceiling) for t in found],
    )


def _cells(of: Mapping[str, Any], ceiling: float) -> list[str]:
    rate = of["flops"] / of["ours"]
    return [
        f"{of['peer']:.2f}",
        f"{of['ours']:.3f}",
        f"{of['peer'] / of['ours']:.2f}",
        f"{of['peer'] / (of['ours'] + of['encoding']):.2f}",
        f"{of['tokens_apart']:,}",
        f"{of['tokens']:,}",
        f"{rate / 1e12:.3g}",
        f"{rate / ceiling:.0%}",
    ]


def _record(timed: Timed, ceiling: float) -> Record:
    return {**timed.__dict__, "ceiling_flops": ceiling}


def task_spec(text: str, documents: int) -> EvalSpec:
    """Return the evaluation that TASK=FILE names: a task of ``TASKS`` or a YAML file, and its documents (JSONL).

    Raises:
        ValueError: neither, or a file that isn't there.
    """
    name, _, file = text.partition("=")
    yaml = _lm_eval_tasks() / TASKS[name] if name in TASKS else Path(name)
    if yaml.suffix != ".yaml" or not yaml.is_file():
        raise ValueError(f"{text!r}: {name!r} is none of {', '.join(TASKS)}, and no YAML file of a task")
    if not Path(file).is_file():
        raise ValueError(f"{text!r}: {file!r} is no file; write TASK=FILE.jsonl")
    return EvalSpec(
        kind="task",
        name=name if name in TASKS else yaml.stem,
        limit=documents,
        dataset="sha256:benchmark",
        compute_dtype="float32",
        source=source_from_dict({"task_file": yaml, "path": file}),
    )


def _lm_eval_tasks() -> Path:
    package = find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "tasks"


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``run`` returns, and the seconds until GPUs were done too."""
    began = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
