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

import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from kbit.bench import checkpoint, switch
from kbit.bench.arguments import make_parser
from kbit.bench.checks import check
from kbit.bench.report import Report, environment
from kbit.bench.runs import chosen_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says. Exits with 2 on bad input, before anything is measured."""
    began = time.monotonic()
    parser = make_parser(__doc__)
    args = parser.parse_args(arguments)
    check(parser, args)

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    torch.set_num_threads(args.threads)
    if args.write:
        checkpoint.write(switch.SHAPES[args.write], args.to, device=args.device, say=say)
        say(f"written: {args.to}")
        return
    name, run = chosen_run(args)
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


if __name__ == "__main__":
    main()
