"""``mode=best``: the best model and quantization for a memory, with what comes behind and how sure that is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.markup import escape

from kbit.models.kv_cache import kv_values_per_token
from kbit.models.limits import as_namespace, named_context
from sweeps.commands.selection import chosen_inputs
from sweeps.errors import EXIT_FAILED, UserError, did_you_mean
from sweeps.options import Options
from sweeps.study.hub import ModelConfig
from sweeps.study.manifest import load_manifests
from sweeps.study.reading import config_of
from sweeps.text import counted

if TYPE_CHECKING:
    import pandas as pd

    from analysis.inputs import Inputs
    from analysis.metrics import Metric
    from analysis.scaling.memory import Best, Cache, Use
    from analysis.significance import SampleKey

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])i?B", re.IGNORECASE)
_UNITS: Final = {"M": 2**20, "G": 2**30, "T": 2**40}
_CONTEXT: Final = 2048
_SHOWN: Final = 5


def best(options: Options, console: Console) -> int:
    """Choose the best cell that fits into ``memory=``.

    Raises:
        UserError: a key is not valid, or nothing there can be compared.
    """
    from analysis.scaling.memory import best_for_memory

    use = _use(options)
    inputs = chosen_inputs(options)
    results = inputs.df
    metric, caches = _metric(options, results), _caches(options, use, results)
    try:
        found = best_for_memory(
            results, metric, use, caches, load=lambda keys: _samples(inputs, metric, keys), top=_SHOWN
        )
    except ValueError as error:
        raise UserError(
            f"{error}: choose one with 'where={{family: NAME}}', or another metric, e.g. metrics=zero_shot_mean"
        ) from error
    if found.ranked.empty and found.larger.empty and not found.unknown:
        raise UserError(
            f"out={str(options.out)!r}: no cell that was chosen has {metric.column}: nothing to compare yet"
        )
    say(found, console)
    return EXIT_FAILED if found.ranked.empty else 0


def _use(options: Options) -> Use:
    from analysis.scaling.memory import RESERVE, Use

    asked = options.best
    memory = _bytes(asked["memory"])
    if memory <= RESERVE:
        raise UserError(
            f"memory={asked['memory']} is not valid: {size(RESERVE)} of it are kept free, so more than that"
        )
    context, batch = (_count(name, asked[name]) for name in ("context", "batch"))
    return Use(memory=memory, context=context or _CONTEXT, batch=batch or 1)


def _bytes(value: object) -> int:
    match = _SIZE.fullmatch(str(value).strip())
    if value is None or match is None or float(match[1]) == 0:
        raise UserError(
            ("mode=best needs memory=" if value is None else f"memory={value} is not valid")
            + ": a size with its unit, MB, GB or TB of 2^20, 2^30 or 2^40 bytes, e.g. memory=48GB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value} is not valid: a whole number from 1, e.g. {name}={_EXAMPLES[name]}")
    return value


_EXAMPLES: Final = {"context": "2048", "batch": "1"}


def _metric(options: Options, results: pd.DataFrame) -> Metric:
    """Return the metric that ``metrics=`` names, or the one by which the models compare."""
    from analysis.metrics import metric_columns
    from analysis.scaling.memory import comparable_metric

    ranked = {m.column: m for m in metric_columns(results) if m.higher_is_better is not None}
    if len(options.metrics) > 1:
        raise UserError(f"metrics=[{','.join(options.metrics)}] is not valid with mode=best: one of them")
    for name in options.metrics:
        if name not in ranked:
            hint = did_you_mean(name, ranked)
            raise UserError(f"metrics={name} is not valid: one of {', '.join(ranked) or 'none there'}.{hint}")
        return ranked[name]
    found = comparable_metric(results)
    if found is None:
        families = ", ".join(map(str, results["family"].unique()))
        raise UserError(
            f"out={str(options.out)!r}: nothing measured compares the models of {families}: losses per token do only "
            "within a family ('where={family: NAME}'); zero-shot tasks and bits per byte do across them"
        )
    return found


def _caches(options: Options, use: Use, results: pd.DataFrame) -> dict[str, Cache]:
    """Return the caches of the models by label: as rows have them, else as config.json on this machine tells."""
    import pandas as pd

    stored = results.dropna(subset=["kv_values"]).drop_duplicates("model").set_index("model")[["kv_values", "context"]]
    of_rows = {str(m): (int(v), None if pd.isna(c) else int(c)) for m, v, c in stored.itertuples()}
    found = {model: _cache(options, use, values, context) for model, (values, context) in of_rows.items()}
    models = (c.model for m in load_manifests(options.out, options.asked_sweep) for c in m.cells)
    for model in dict.fromkeys(m for m in models if m.label not in found):
        found[model.label] = _from_config(options, use, config_of(model, ask=False))
    return found


def _from_config(options: Options, use: Use, config: ModelConfig | None) -> Cache:
    from analysis.scaling.memory import Cache

    if config is None:
        why = "the size of its cache is unknown: it was measured by an earlier version, and its config.json is not here"
        return Cache(values=None, why=f"{why} (mode=fetch gets it)")
    return _cache(options, use, kv_values_per_token(config), named_context(as_namespace(config)))


def _cache(options: Options, use: Use, values: int | None, context: int | None) -> Cache:
    from analysis.scaling.memory import Cache

    if values is None:
        return Cache(values=None, why="its config.json doesn't tell the size of its cache")
    if options.best["context"] is not None and context is not None and context < use.context:
        why = f"its context of {context:,} tokens is shorter than context={use.context}"
        return Cache(values=None, why=why)
    return Cache(values=values, context=context)


def _samples(inputs: Inputs, metric: Metric, keys: Sequence[str]) -> Mapping[SampleKey, Any]:
    from analysis.metrics import ZERO_SHOT_TASKS
    from analysis.significance import sample_keys

    evals = [metric.eval] if metric.eval else list(ZERO_SHOT_TASKS)
    long = inputs.long
    own = long[long["key"].isin(list(keys)) & long["eval"].isin(evals)]
    return inputs.samples(sample_keys(own))


def say(found: Best, console: Console) -> None:
    """Print the answer, what comes behind it, what would be better and is too large, and what was not considered."""
    metric, use = found.metric, found.use

    def line(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    if found.ranked.empty:
        line(f"Nothing that was measured fits into {size(use.memory)}, of which {size(use.reserve)} are kept free.")
    else:
        first = found.ranked.iloc[0]
        line(f"Best for {size(use.memory)}: {_name(first)}, {metric.phrase} {_value(first['value'], metric)}")
        line(f"  {_sum(first, use)}")
        _behind(found, line)
    if len(found.larger):
        better = "Better, but too large" if len(found.ranked) else "What needs least"
        line(f"{better} ({counted(len(found.larger), 'cell')}):")
        for _, row in found.larger.head(_SHOWN).iterrows():
            line(f"  {_name(row)}, {metric.phrase} {_value(row['value'], metric)}: {_sum(row, use)}")
    for why in dict.fromkeys(found.unknown.values()):
        models = ", ".join(model for model, own in found.unknown.items() if own == why)
        line(f"Not considered: {models}: {why}")


def _behind(found: Best, line: Callable[[str], None]) -> None:
    rows = found.ranked[found.ranked["behind"].notna()]
    if rows.empty:
        return
    metric = found.metric
    line("Behind it, with 95 % intervals:")
    for _, row in rows.iterrows():
        how = "paired on the same samples" if row["paired"] else "not paired"
        verdict = "interval unknown"
        if row["low"] == row["low"]:
            interval = f"{_value(row['low'], metric)} to {_value(row['high'], metric)}, {how}"
            verdict = f"{interval}: {'significant' if row['significant'] else 'not significant'}"
        line(
            f"  {_name(row)}, {_value(row['value'], metric)}, behind by {_value(row['behind'], metric)} ({verdict}); "
            f"needs {size(row['needed'])}"
        )
    if len(found.ranked) > len(rows) + 1:
        line(f"  {counted(len(found.ranked) - len(rows) - 1, 'more cell')} that fit")


def _name(row: pd.Series[Any]) -> str:
    return f"{row['model']} {row['label']}"


def _value(value: float, metric: Metric) -> str:
    return f"{value:.{metric.decimals + 1}f}"


def _sum(row: pd.Series[Any], use: Use) -> str:
    cache = f"cache ({row['context']:,} tokens x {use.batch})"
    return (
        f"{size(row['needed'])} = {size(row['weights'])} weights + {size(row['cache'])} {cache} + "
        f"{size(row['reserve'])} kept free"
    )


def size(count: float) -> str:
    """Return bytes in words: GB of 2^30 bytes, or MB of 2^20 below a tenth of one."""
    if count < 0.1 * 2**30:
        return f"{count / 2**20:,.1f} MB"
    return f"{count / 2**30:,.1f} GB" if count >= 10 * 2**30 else f"{count / 2**30:,.2f} GB"
