"""The options of ``python -m kbit.bench``: the runs, what all of them take, and what only some do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import torch

from kbit.bench import evaluation, latency, switch
from kbit.bench.decode import PRESETS
from kbit.data_types import MAX_BITS, MIN_BITS, named_dtypes
from kbit.kernels.availability import IMPLS
from kbit.models.streaming.reader import THREADS

DEFAULT_MODEL: Final = "opt-6.7b"
AUTO: Final = "auto"
BATCH: Final = 1
CONTEXT: Final = 128
DOCUMENTS: Final = 1000


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser; ``description`` is what ``--help`` begins with."""
    parser = argparse.ArgumentParser(
        prog="python -m kbit.bench", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_runs(parser)
    _add_options_of_every_run(parser)
    _add_options_of_kernels(parser)
    _add_options_of_one_run(parser)
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--roofline", action="store_true", help="the roofline: table and figure (GPU)")
    mode.add_argument(
        "--model",
        nargs="?",
        const=DEFAULT_MODEL,
        choices=tuple(PRESETS),
        help=f"a decode step of random weights in this shape (GPU; {DEFAULT_MODEL} where none is named)",
    )
    mode.add_argument(
        "--switch",
        nargs="?",
        const=AUTO,
        choices=(AUTO, *switch.SHAPES),
        help=f"change the cell of a model of random weights in this shape ({AUTO}: {DEFAULT_MODEL} on a GPU, "
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
        const=AUTO,
        choices=(AUTO, *switch.SHAPES),
        help=f"llama.cpp's formats and recipes, on a model of this shape ({AUTO}: as of --switch)",
    )
    mode.add_argument("--load", metavar="DIR", help="quantize a checkpoint as it is read, cold and warm")
    mode.add_argument("--layered", metavar="DIR", help="run a checkpoint layer by layer, and whole")
    mode.add_argument("--gptq", choices=tuple(switch.SHAPES), help="GPTQ of random weights in this shape")
    mode.add_argument("--write", choices=tuple(switch.SHAPES), help="write a checkpoint of random weights to --to")
    mode.add_argument("--only", choices=("quantizers", "matmul"), help="one half of the default run")


def _add_options_of_every_run(parser: argparse.ArgumentParser) -> None:
    every = parser.add_argument_group("any run")
    every.add_argument("--out", type=Path, metavar="DIR", help="write tables, numbers and figures there")
    every.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    every.add_argument("--bits", type=int, nargs="+", metavar="K", help=f"{MIN_BITS} to {MAX_BITS} (default: by run)")
    every.add_argument(
        "--blocksize", type=int, default=64, metavar="B", help="values that share an absmax (default 64)"
    )


def _add_options_of_kernels(parser: argparse.ArgumentParser) -> None:
    kernels = parser.add_argument_group("products (GPU)")
    kernels.add_argument(
        "--shapes", type=_shape, nargs="+", metavar="NxK", help="rows and columns of W (default: by run)"
    )
    kernels.add_argument("--rows", type=int, nargs="+", metavar="M", help="rows of x (default: by run)")
    kernels.add_argument("--zero-points", action="store_true", help="of weights with zero points and of HQQ's, too")
    kernels.add_argument("--block-floats", action="store_true", help="of MX formats and NVFP4 of these bits, too")
    codes = parser.add_argument_group("quantizers")
    codes.add_argument("--values", type=int, help="how many (default 2^28 on a GPU, 2^24 on a CPU)")
    codes.add_argument(
        "--dtypes", nargs="+", choices=named_dtypes(), help="data types (default: normal on a GPU, several on a CPU)"
    )
    codes.add_argument("--impl", nargs="+", choices=IMPLS, default=["auto"], help="implementations (default auto)")
    codes.add_argument("--repeats", type=int, default=5, help="timings, of which the median counts (default 5)")
    codes.add_argument("--threads", type=int, default=1, help="torch's on a CPU (default 1: a core's figure)")


def _add_options_of_one_run(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("--model")
    model.add_argument("--batch", type=int, help=f"sequences (default {BATCH})")
    model.add_argument("--context", type=int, help=f"tokens in the cache, the step's included (default {CONTEXT})")
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
    tasks.add_argument("--documents", type=int, help=f"first ones of each task (default {DOCUMENTS})")
    tasks.add_argument("--tokenizer", metavar="DIR", help="for a shape: the directory of a tokenizer")
    tasks.add_argument(
        "--batch-tokens", type=int, help="tokens in a batch of ours, also of --layered (default: as in a study)"
    )


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROWSxCOLUMNS such as 16384x4096")
    return int(rows), int(columns)
