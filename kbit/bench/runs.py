"""The runs of ``python -m kbit.bench``: from checked options to tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from kbit.bench import agreement, evaluation, ggml, gptq, latency, layered, loading, quantizers, roofline, switch
from kbit.bench.arguments import DOCUMENTS
from kbit.bench.decode import PRESETS
from kbit.bench.figure import write_figure
from kbit.bench.matmul import FLOATS, PEERS, SHAPES, ZEROS, layout_cost, measure
from kbit.bench.matmul import table as matmul_table
from kbit.bench.report import Table, device_name
from kbit.bench.timing import cpu_flops, measure_ceilings
from kbit.data_types import MAX_BITS, MIN_BITS
from kbit.models.streaming.reader import THREADS
from kbit.spec import QuantSpec

Say = Callable[[str], None]

_KERNEL_ROWS: Final = (1, 16, 32, 64)
_MATMUL_BITS: Final = (3, 4, 5, 6, 8)
_CPU_BITS: Final = (3, 4, 8)
_CPU_DTYPES: Final = ("int", "float", "quantile")
_SWITCH_BITS: Final = (4,)
_LAYERED_TOKENS: Final = {"cpu": 512, "cuda": 32768}
_SAMPLES: Final = {"cpu": 4, "cuda": 128}
_BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}


def chosen_run(args: argparse.Namespace) -> tuple[str, Callable[[argparse.Namespace, Say], list[Table]]]:
    """Return the run's name and function."""
    if args.roofline:
        return "roofline", _roofline
    if args.model:
        return "decode", _decode
    if args.evaluation:
        return "evaluation", _evaluation
    if args.load:
        return "loading", _load
    if args.layered:
        return "layered", _layered
    if args.gptq:
        return "gptq", _gptq
    if args.ggml:
        return "ggml", _ggml
    return ("switch", _switch) if args.switch else ("kernels", _kernels)


def _evaluation(args: argparse.Namespace, say: Say) -> list[Table]:
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    say(f"{args.evaluation}: making it")
    model, tokenizer = evaluation.make_model(args.evaluation, args.tokenizer, device=args.device, dtype=dtype)
    tasks = [evaluation.task_spec(text, args.documents or DOCUMENTS) for text in args.tasks]
    tokens = args.batch_tokens or _BATCH_TOKENS[args.device]
    found = evaluation.measure(model, tokenizer, tasks=tasks, batch_tokens=tokens, say=say)
    device = f"{device_name(args.device)}, {str(dtype).removeprefix('torch.')}"
    ceiling = measure_ceilings().flops if args.device == "cuda" else cpu_flops()
    return [
        evaluation.table(found, shape=args.evaluation, device=device, ceiling=ceiling, batch_tokens=tokens),
        agreement.measure(model, shape=args.evaluation, device=args.device, batch_tokens=tokens, say=say),
    ]


def _ggml(args: argparse.Namespace, say: Say) -> list[Table]:
    values = args.values or (2**26 if args.device == "cuda" else 2**20)
    return [
        ggml.measure_formats(values, device=args.device, repeats=args.repeats, say=say),
        ggml.measure_recipes(switch.SHAPES[args.ggml], device=args.device, say=say),
    ]


def _kernels(args: argparse.Namespace, say: Say) -> list[Table]:
    tables, gpu = [], args.device == "cuda"
    if args.only != "matmul":
        bits = args.bits or (range(MIN_BITS, MAX_BITS + 1) if gpu else _CPU_BITS)
        dtypes = args.dtypes or (("normal",) if gpu else _CPU_DTYPES)
        table = quantizers.measure(
            args.values or (2**28 if gpu else 2**24),
            [QuantSpec(bits=b, dtype=dtype, blocksize=args.blocksize) for dtype in dtypes for b in bits],
            impls=args.impl,
            device=args.device,
            repeats=args.repeats,
            say=say,
        )
        tables.append(table)
    if gpu and args.only != "quantizers":
        bits, rows = args.bits or _MATMUL_BITS, args.rows or _KERNEL_ROWS
        shapes = args.shapes or SHAPES
        also = [*PEERS, *(ZEROS if args.zero_points else ()), *(FLOATS if args.block_floats else ())]
        found = measure(shapes, bits, rows, args.blocksize, also=also, say=say)
        notes = [layout_cost(shapes[0], b, args.blocksize) for b in bits]
        tables.append(matmul_table(found, args.blocksize, device_name("cuda"), notes))
    return tables


def _roofline(args: argparse.Namespace, say: Say) -> list[Table]:
    say("ceilings")
    ceilings, tables = measure_ceilings(), []
    for shape in args.shapes or roofline.SHAPES:
        bits, rows = args.bits or roofline.BITS, args.rows or roofline.ROWS
        found = roofline.Roofline(
            ceilings=ceilings,
            products=measure([shape], bits, rows, args.blocksize, say=say),
            blocksize=args.blocksize,
            device=device_name("cuda"),
        )
        tables.append(found.table())
        if args.out is not None:
            for path in write_figure(found, args.out):
                say(f"written: {path}")
    return tables


def _decode(args: argparse.Namespace, say: Say) -> list[Table]:
    say("ceilings")
    ceilings, model = measure_ceilings(), PRESETS[args.model]
    setting = latency.Setting(model=model, blocksize=args.blocksize, batch=args.batch, context=args.context)
    steps = latency.measure(setting, args.bits or latency.BITS, compile_mode=args.compile_mode, say=say)
    if not steps:
        raise SystemExit(f"{args.model}: no precision fits this GPU's free memory")
    return [latency.table(steps, setting, ceilings, device=device_name("cuda"))]


def _switch(args: argparse.Namespace, say: Say) -> list[Table]:
    specs = [
        QuantSpec(bits=bits, dtype=dtype, blocksize=args.blocksize)
        for dtype in args.dtypes or switch.DTYPES
        for bits in args.bits or _SWITCH_BITS
    ]
    setting = switch.Setting(
        model=switch.SHAPES[args.switch], blocksize=args.blocksize, device=args.device, repeats=args.repeats
    )
    return [switch.measure(setting, specs, say=say)]


def _load(args: argparse.Namespace, say: Say) -> list[Table]:
    spec = QuantSpec(
        bits=(args.bits or _SWITCH_BITS)[0], dtype=(args.dtypes or ["normal"])[0], blocksize=args.blocksize
    )
    setting = loading.Setting(directory=Path(args.load), spec=spec, device=args.device, threads=args.readers or THREADS)
    return [loading.measure(setting, say=say)]


def _layered(args: argparse.Namespace, say: Say) -> list[Table]:
    setting = layered.Setting(
        directory=Path(args.layered),
        device=args.device,
        blocksize=args.blocksize,
        tokens=args.tokens or _LAYERED_TOKENS[args.device],
        batch_tokens=args.batch_tokens or _BATCH_TOKENS[args.device],
        limit=None if args.limit_gb is None or args.device == "cpu" else round(args.limit_gb * 1e9),
    )
    return [layered.measure(setting, say=say)]


def _gptq(args: argparse.Namespace, say: Say) -> list[Table]:
    model = switch.SHAPES[args.gptq]
    setting = gptq.Setting(
        model=model,
        layers=args.layers or model.layers,
        device=args.device,
        bits=(args.bits or _SWITCH_BITS)[0],
        blocksize=args.blocksize,
        samples=args.samples or _SAMPLES[args.device],
        length=model.positions,
    )
    return [gptq.measure(setting, say=say)]
