"""Refuse bad options of ``python -m kbit.bench`` before anything is measured, and fill in what depends on others."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kbit.bench import evaluation, latency, switch
from kbit.bench.arguments import AUTO, BATCH, CONTEXT, DEFAULT_MODEL
from kbit.bench.decode import PRESETS
from kbit.bench.matmul import SHAPES, check_shape
from kbit.data_types import MAX_BITS, MIN_BITS
from kbit.errors import CheckpointError
from kbit.models.checkpoint import model_files
from kbit.quantizer.blockwise import quantize
from kbit.spec import QuantSpec
from kbit.specs.block_float import FORMATS


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse bad input before anything is measured; exits with 2."""
    if min(args.rows or [1]) < 1:
        parser.error(f"--rows {min(args.rows)}: at least 1 is needed")
    _check_products(parser, args)
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


def _check_products(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    others = ("roofline", "model", "switch", "evaluation", "ggml", "load", "layered", "gptq", "write")
    for name in ("zero_points", "block_floats"):
        if getattr(args, name) and (args.only == "quantizers" or any(getattr(args, other) for other in others)):
            parser.error(f"--{name.replace('_', '-')} belongs to the products of the default run, --only matmul alone")
    widths = sorted({element.bits for element in FORMATS.values()})
    if args.block_floats and args.bits and not set(args.bits) & set(widths):
        parser.error(f"--block-floats: these have {', '.join(map(str, widths))} bits, and --bits names none of them")


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
    needs = needs or ("--rows" if args.rows else "--zero-points" if args.zero_points else "")
    needs = needs or ("--block-floats" if args.block_floats else "")
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
    args.batch, args.context = args.batch or BATCH, args.context or CONTEXT
    args.compile_mode = args.compile_mode or latency.COMPILE_MODES[0]
    for name in ("switch", "ggml"):
        if getattr(args, name) == AUTO:
            setattr(args, name, DEFAULT_MODEL if args.device == "cuda" else switch.SMALL.name)
    args.bits = args.bits and list(dict.fromkeys(args.bits))
