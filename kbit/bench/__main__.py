"""Measure k-bit kernels and models on this machine against cuBLAS, bitsandbytes and the limit, in one run.

  python -m kbit.bench               quantize and dequantize; on an NVIDIA GPU also the fused product x W^T
  python -m kbit.bench --roofline    the paper's Figure 16, measured: ceilings, batch 1 to 64, 3 to 8 and 16 bits
  python -m kbit.bench --model       a decode step of an OPT-shaped model: latency, memory and size by precision
  python -m kbit.bench --switch      changing the cell of a loaded OPT-shaped model, by data type; bits are compared
  python -m kbit.bench --load DIR    a checkpoint quantized as it is read: memory, and rate beside the disk's
  python -m kbit.bench --layered DIR a checkpoint layer by layer, nine cells in one pass, beside the whole model
  python -m kbit.bench --gptq SHAPE  GPTQ of random weights in an OPT shape: seconds, and memory beside its limit
  python -m kbit.bench --write SHAPE --to DIR   a checkpoint of random weights in an OPT shape, for these two
  python -m kbit.bench --ggml        llama.cpp's formats beside its own quantizer, and recipes over an OPT-shaped model
  python -m kbit.bench --evaluation  zero-shot tasks (--tasks TASK=FILE.jsonl ...), beside lm-eval's HFLM; agreement

Tables go to stdout, progress to stderr; --out DIR keeps every number (JSON, CSV, Markdown) and the figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from kbit.bench import (
    agreement,
    checkpoint,
    evaluation,
    ggml,
    gptq,
    latency,
    layered,
    loading,
    quantizers,
    roofline,
    switch,
)
from kbit.bench.decode import PRESETS
from kbit.bench.figure import write_figure
from kbit.bench.matmul import SHAPES, check_shape, layout_cost, measure
from kbit.bench.matmul import table as matmul_table
from kbit.bench.report import Report, Table, device_name, environment
from kbit.bench.timing import cpu_flops, measure_ceilings
from kbit.data_types import MAX_BITS, MIN_BITS, named_dtypes
from kbit.errors import CheckpointError
from kbit.kernels.availability import IMPLS
from kbit.models.checkpoint import model_files
from kbit.models.streaming.reader import THREADS
from kbit.quantizer.blockwise import quantize
from kbit.spec import QuantSpec

Say = Callable[[str], None]

_KERNEL_ROWS: Final = (1, 16, 32, 64)
_MATMUL_BITS: Final = (3, 4, 5, 6, 8)
_CPU_BITS: Final = (3, 4, 8)
_CPU_DTYPES: Final = ("int", "float", "quantile")
_DEFAULT_MODEL: Final = "opt-6.7b"
_AUTO: Final = "auto"
_SWITCH_BITS: Final = (4,)
_BATCH: Final = 1
_CONTEXT: Final = 128
_DOCUMENTS: Final = 1000
_LAYERED_TOKENS: Final = {"cpu": 512, "cuda": 32768}
_SAMPLES: Final = {"cpu": 4, "cuda": 128}
_BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 16384}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says. Exits with 2 on bad input, before anything is measured."""
    began = time.monotonic()
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(parser, args)

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    torch.set_num_threads(args.threads)
    if args.write:
        checkpoint.write(switch.SHAPES[args.write], args.to, device=args.device, say=say)
        say(f"written: {args.to}")
        return
    name, run = _chosen(args)
    tables = run(args, say)
    report = Report(
        name=name,
        tables=tables,
        options={key: value for key, value in vars(args).items() if key != "out" and value is not None},
        environment=environment(args.device),
        seconds=time.monotonic() - began,
    )
    for table in tables:
        table.print(Console())
    if args.out is not None:
        for path in report.write(args.out):
            say(f"written: {path}")
    say("done")
    if any(record.get("equal") == 0 for table in tables for record in table.records):
        raise SystemExit("the results are not those of a model that was loaded afresh and whole")


def _chosen(args: argparse.Namespace) -> tuple[str, Callable[[argparse.Namespace, Say], list[Table]]]:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kbit.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--roofline", action="store_true", help="the roofline: table and figure (GPU)")
    mode.add_argument(
        "--model",
        nargs="?",
        const=_DEFAULT_MODEL,
        choices=tuple(PRESETS),
        help=f"a decode step of random weights in this shape (GPU; {_DEFAULT_MODEL} where none is named)",
    )
    mode.add_argument(
        "--switch",
        nargs="?",
        const=_AUTO,
        choices=(_AUTO, *switch.SHAPES),
        help=f"change the cell of a model of random weights in this shape ({_AUTO}: {_DEFAULT_MODEL} on a GPU, "
        f"{switch.SMALL.name} on a CPU)",
    )
    mode.add_argument(
        "--evaluation",
        metavar="MODEL",
        help=f"tasks on random weights in a shape ({', '.join(evaluation.SHAPES)}) or on a model's directory",
    )
    mode.add_argument(
        "--ggml",
        nargs="?",
        const=_AUTO,
        choices=(_AUTO, *switch.SHAPES),
        help=f"llama.cpp's formats and recipes, on a model of this shape ({_AUTO}: as of --switch)",
    )
    mode.add_argument("--load", metavar="DIR", help="quantize a checkpoint as it is read, cold and warm")
    mode.add_argument("--layered", metavar="DIR", help="run a checkpoint layer by layer, and whole")
    mode.add_argument("--gptq", choices=tuple(switch.SHAPES), help="GPTQ of random weights in this shape")
    mode.add_argument("--write", choices=tuple(switch.SHAPES), help="write a checkpoint of random weights to --to")
    mode.add_argument("--only", choices=("quantizers", "matmul"), help="one half of the default run")
    every = parser.add_argument_group("any run")
    every.add_argument("--out", type=Path, metavar="DIR", help="write tables, numbers and figures there")
    every.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    every.add_argument("--bits", type=int, nargs="+", metavar="K", help=f"{MIN_BITS} to {MAX_BITS} (default: by run)")
    every.add_argument(
        "--blocksize", type=int, default=64, metavar="B", help="values that share an absmax (default 64)"
    )
    kernels = parser.add_argument_group("products (GPU)")
    kernels.add_argument(
        "--shapes", type=_shape, nargs="+", metavar="NxK", help="rows and columns of W (default: by run)"
    )
    kernels.add_argument("--rows", type=int, nargs="+", metavar="M", help="rows of x (default: by run)")
    codes = parser.add_argument_group("quantizers")
    codes.add_argument("--values", type=int, help="how many (default 2^28 on a GPU, 2^24 on a CPU)")
    codes.add_argument(
        "--dtypes", nargs="+", choices=named_dtypes(), help="data types (default: normal on a GPU, several on a CPU)"
    )
    codes.add_argument("--impl", nargs="+", choices=IMPLS, default=["auto"], help="implementations (default auto)")
    codes.add_argument("--repeats", type=int, default=5, help="timings, of which the median counts (default 5)")
    codes.add_argument("--threads", type=int, default=1, help="torch's on a CPU (default 1: a core's figure)")
    model = parser.add_argument_group("--model")
    model.add_argument("--batch", type=int, help=f"sequences (default {_BATCH})")
    model.add_argument("--context", type=int, help=f"tokens in the cache, the step's included (default {_CONTEXT})")
    model.add_argument(
        "--compile-mode",
        choices=latency.COMPILE_MODES,
        help=f"torch.compile's, for 16 bits and k bits alike (default {latency.COMPILE_MODES[0]})",
    )
    load = parser.add_argument_group("--load and --write")
    load.add_argument("--readers", type=int, help=f"threads that read files (default {THREADS})")
    load.add_argument("--to", type=Path, metavar="DIR", help="where --write writes")
    layers = parser.add_argument_group("--layered")
    layers.add_argument("--tokens", type=int, help="of random text (default 32768 on a GPU, 512 on a CPU)")
    layers.add_argument("--limit-gb", type=float, help="of the GPU's memory for the pass (default: all)")
    calibrating = parser.add_argument_group("--gptq")
    calibrating.add_argument("--samples", type=int, help="calibration windows (default 128 on a GPU, 4 on a CPU)")
    calibrating.add_argument("--layers", type=int, help="measure the first ones, and scale times (default: all)")
    tasks = parser.add_argument_group("--evaluation")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK=FILE",
        help=f"a task ({', '.join(evaluation.TASKS)}, or its YAML file) and its documents, JSONL",
    )
    tasks.add_argument("--documents", type=int, help=f"first ones of each task (default {_DOCUMENTS})")
    tasks.add_argument("--tokenizer", metavar="DIR", help="for a shape: the directory of a tokenizer")
    tasks.add_argument(
        "--batch-tokens", type=int, help="tokens in a batch of ours, also of --layered (default: as in a study)"
    )
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCOLUMNS such as 16384x4096")
    return int(rows), int(columns)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse bad input before anything is measured."""
    if min(args.rows or [1]) < 1:
        parser.error(f"--rows {min(args.rows)}: at least 1 is needed")
    _check_device(parser, args)
    _check_numbers(parser, args)
    _fill_in(args)
    if args.evaluation:
        _check_evaluation(parser, args)
    _check_load(parser, args)
    _check_gptq(parser, args)
    if args.model and args.context > PRESETS[args.model].positions:
        parser.error(f"--context {args.context}: {args.model} has positions for {PRESETS[args.model].positions} tokens")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out}: {error.strerror}; name a directory that can be written")
    try:
        if (
            args.device == "cuda"
            and args.only != "quantizers"
            and not (args.switch or args.load or args.write or args.layered or args.gptq or args.ggml)
        ):
            for shape in args.shapes or SHAPES:
                check_shape(shape, args.blocksize)
        for impl in args.impl:
            quantize(torch.ones(64, device=args.device), QuantSpec(bits=4, dtype="int"), impl=impl)
    except ValueError as error:
        parser.error(str(error))


def _check_evaluation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.tasks:
        parser.error("--evaluation needs --tasks TASK=FILE.jsonl ...")
    if args.evaluation in evaluation.SHAPES and args.tokenizer is None:
        parser.error(f"--evaluation {args.evaluation}: random weights have no tokenizer; --tokenizer DIR names one")
    for name in (args.tokenizer, args.evaluation if args.evaluation not in evaluation.SHAPES else None):
        if name is not None and not Path(name).is_dir():
            parser.error(f"{name!r} is no directory, and none of {', '.join(evaluation.SHAPES)}")
    for text in args.tasks:
        try:
            evaluation.task_spec(text, 1)
        except ValueError as error:
            parser.error(f"--tasks {error}")


def _check_load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.to is None) != (args.write is None):
        parser.error("--write SHAPE and --to DIR belong together: the one says what is written, the other where")
    if args.readers is not None and not args.load:
        parser.error("--readers belongs to --load")
    if args.to is not None and args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        parser.error(f"--to {args.to}: it is there already; name an empty or a new directory")
    for name, directory in (("load", args.load), ("layered", args.layered)):
        if directory is None:
            continue
        try:
            model_files(Path(directory))
        except (OSError, CheckpointError) as error:
            parser.error(f"--{name} {directory}: {error}; --write SHAPE --to DIR makes a checkpoint")
    if args.load and (len(args.bits or [4]) > 1 or len(args.dtypes or ["normal"]) > 1):
        parser.error("--load quantizes a checkpoint once: name one of --bits, and one of --dtypes")


def _check_gptq(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("samples", "layers"):
        if getattr(args, name) is not None and not args.gptq:
            parser.error(f"--{name} belongs to --gptq")
    if args.gptq and (args.layers or 1) > switch.SHAPES[args.gptq].layers:
        parser.error(f"--layers {args.layers}: {args.gptq} has {switch.SHAPES[args.gptq].layers}")
    if args.gptq and len(args.bits or [4]) > 1:
        parser.error("--gptq quantizes to one width: name one of --bits")


def _check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    needs = "--roofline" if args.roofline else f"--model {args.model}" if args.model else ""
    needs = needs or ("--only matmul" if args.only == "matmul" else "--shapes" if args.shapes else "")
    needs = needs or ("--rows" if args.rows else "")
    for name in ("batch", "context", "compile_mode"):
        if getattr(args, name) is not None and not args.model:
            parser.error(f"--{name.replace('_', '-')} belongs to --model")
    for name in ("tasks", "documents", "tokenizer"):
        if getattr(args, name) is not None and not args.evaluation:
            parser.error(f"--{name} belongs to --evaluation")
    for name in ("tokens", "limit_gb"):
        if getattr(args, name) is not None and not args.layered:
            parser.error(f"--{name.replace('_', '-')} belongs to --layered")
    if args.batch_tokens is not None and not (args.evaluation or args.layered):
        parser.error("--batch-tokens belongs to --evaluation and --layered")
    if needs and args.device != "cuda":
        parser.error(f"{needs} needs an NVIDIA GPU: its kernels run nowhere else (--device is {args.device})")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in (
        "blocksize",
        "values",
        "repeats",
        "threads",
        "batch",
        "context",
        "documents",
        "batch_tokens",
        "readers",
        "tokens",
        "samples",
        "layers",
    ):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1 is needed")
    if args.limit_gb is not None and args.limit_gb <= 0:
        parser.error(f"--limit-gb {args.limit_gb}: more than 0 is needed")
    for bits in args.bits or ():
        if not MIN_BITS <= bits <= MAX_BITS:
            parser.error(f"--bits {bits}: {MIN_BITS} to {MAX_BITS} are possible; 16 bits are measured in any case")


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults of options that only --model takes, the shape of --switch, and each width once."""
    args.batch, args.context = args.batch or _BATCH, args.context or _CONTEXT
    args.compile_mode = args.compile_mode or latency.COMPILE_MODES[0]
    for name in ("switch", "ggml"):
        if getattr(args, name) == _AUTO:
            setattr(args, name, _DEFAULT_MODEL if args.device == "cuda" else switch.SMALL.name)
    args.bits = args.bits and list(dict.fromkeys(args.bits))


def _evaluation(args: argparse.Namespace, say: Say) -> list[Table]:
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    say(f"{args.evaluation}: making it")
    model, tokenizer = evaluation.make_model(args.evaluation, args.tokenizer, device=args.device, dtype=dtype)
    tasks = [evaluation.task_spec(text, args.documents or _DOCUMENTS) for text in args.tasks]
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
        found = measure(shapes, bits, rows, args.blocksize, peers=True, say=say)
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
            products=measure([shape], bits, rows, args.blocksize, peers=False, say=say),
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


if __name__ == "__main__":
    main()
