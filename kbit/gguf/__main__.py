"""Unpack a GGUF file into a directory that studies take as path=DIR.

python -m kbit.gguf FILE.gguf DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kbit.errors import CheckpointError


def main(arguments: Sequence[str] | None = None) -> None:
    """Unpack what the command line says. Exits with 2 on a file that can't be read."""
    parser = argparse.ArgumentParser(prog="python -m kbit.gguf", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("directory", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    from kbit.gguf.unpack import unpack

    try:
        unpack(args.file, args.directory)
    except (CheckpointError, OSError) as error:
        parser.error(str(error))
    print(f"{args.directory}: evaluate it with path={args.directory} 'sweep.quant=[{{method: checkpoint, bits: 4}}]'")


if __name__ == "__main__":
    main()
