"""File systems that lose power, forget, are slow and fail: a layer in C under a process, and replays of what it saw."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def compiled_layer(directory: Path) -> Path:
    """Compile the layer (layer.c says what it does) as a library for LD_PRELOAD; skip without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to compile the layer under the file system: apt install gcc")
    library = directory / "layer.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    command += [str(Path(__file__).with_name("layer.c")), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def under_layer(library: Path, root: Path, **settings: object) -> dict[str, str]:
    """Return the environment of a process whose files in ``root`` are under the layer; settings as layer.c has them."""
    layer = {f"LAYER_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_PRELOAD": str(library), "LAYER_ROOT": str(root), **layer}
