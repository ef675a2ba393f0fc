"""Our reader of safetensors headers against the library's, so that a change of the format is noticed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kbit.errors import CheckpointError
from kbit.models import checkpoint
from kbit.models.checkpoint import safetensors_header
from kbit.models.loading import find_checkpoint
from kbit.models.streaming.streamed import open_streamed
from sweeps.config import DEMO_DIR
from sweeps.study.hub import local_model

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def written(directory: Path) -> Path:
    """A file of every dtype, of 0 to 3 dimensions, one of them empty, with metadata."""
    shapes = [(), (1,), (3, 5), (2, 3, 4), (0, 4)]
    tensors = {
        f"{str(dtype).removeprefix('torch.')}.{len(shape)}.{sum(shape)}": torch.arange(
            max(1, torch.Size(shape).numel()), dtype=torch.float32
        )[: torch.Size(shape).numel()]
        .reshape(shape)
        .to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }
    path = directory / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("which", ["every dtype", "a model"])
def test_names_dtypes_and_shapes_are_the_librarys(which: str, tmp_path: Path) -> None:
    path = written(tmp_path) if which == "every dtype" else DEMO_DIR / "models" / "neox-xs" / "model.safetensors"
    ours = {t.name: (t.dtype, t.shape) for t in safetensors_header(path)}
    with safe_open(path, framework="pt") as theirs:
        slices = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118  # not a mapping
        assert ours == {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def test_offsets_are_where_the_library_finds_the_bytes(tmp_path: Path) -> None:
    path = written(tmp_path)
    data, tensors = path.read_bytes(), load_file(path)
    for stored in safetensors_header(path):
        expected = tensors[stored.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[stored.start : stored.stop] == expected, stored.name


@pytest.mark.parametrize("damage", ["cut short", "too long", "no header", "header is no JSON"])
def test_both_refuse_a_damaged_file(damage: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(
        {
            "cut short": data[:-1],
            "too long": data + b"\0",
            "no header": data[:4],
            "header is no JSON": data[:8] + b"x" * length + data[8 + length :],
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"all\.safetensors"):
        safetensors_header(path)
    with pytest.raises(Exception, match=r"[Hh]eader|Incomplete|invalid"):
        load_file(path)


def test_headers_are_read_once_where_a_model_is_loaded_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    directory, read = DEMO_DIR / "models" / "neox-xs", list[Path]()

    def header(file: Path) -> tuple[checkpoint.StoredTensor, ...]:
        read.append(file)
        return safetensors_header(file)

    monkeypatch.setattr(checkpoint, "safetensors_header", header)
    find_checkpoint(str(directory), revision=None, compute_dtype="storage", trust_remote_code=False)
    assert len(read) == 1
    open_streamed(str(directory), compute_dtype="storage")
    assert len(read) == 2
    local_model(directory)
    assert len(read) == 3
