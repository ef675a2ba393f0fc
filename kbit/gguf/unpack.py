"""A GGUF file as a Hugging Face directory: weights dequantized to 16 bits, with the bits that the file stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch

from kbit.errors import CheckpointError
from kbit.gguf.architectures import ARCHITECTURES
from kbit.gguf.export import read_gguf
from kbit.gguf.file import GgufFile, read_file
from kbit.gguf.vocabulary import tokenizer_of
from kbit.models.architectures import block_layers
from kbit.specs.checkpoint import STORED_BITS

_CONTEXT: Final = "context_length"


def unpack(source: Path, target: Path) -> None:
    """Write a directory that is loaded like any model.

    Its config.json has, under ``STORED_BITS``, the bits that the file stores of each layer in the blocks, and of the
    embedding and the head where these are quantized. Values are rounded to float16, or to bfloat16 where the file has
    such.

    Raises:
        CheckpointError: the file can't be read, its tokenizer isn't byte-level BPE, or `target` holds something.
        OSError: it can't be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already: name a new or an empty directory")
    file = read_file(source)
    files = tokenizer_of(file.metadata, _context(file))
    formats = {stored.format.name for stored in file.tensors.values()}
    dtype = torch.bfloat16 if "bf16" in formats else torch.float16
    model = read_gguf(source, storage_dtype=dtype, dtype=dtype)
    setattr(model.config, STORED_BITS, _stored_bits(file, model))
    model.save_pretrained(target)
    for name, about in files.items():
        (target / name).write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n")


def _stored_bits(file: GgufFile, model: Any) -> dict[str, int]:
    """Return the bits of each layer, by its name in the model."""
    architecture = ARCHITECTURES[str(file.metadata["general.architecture"])]
    inside = {f"{layer.name}.weight" for layer in block_layers(model)}
    found = {}
    for parameter, _ in model.named_parameters():
        stored = file.tensors[str(architecture.name_of(parameter))]
        if parameter in inside or stored.format.bits <= 8:
            found[parameter.removesuffix(".weight")] = 8 * stored.nbytes
    return found


def _context(file: GgufFile) -> int:
    return int(file.metadata[f"{file.metadata.get('general.architecture')}.{_CONTEXT}"])
