"""Write a checkpoint of random weights in an OPT shape: safetensors in parts, never more than a tensor in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kbit.bench.decode import Architecture

PART_BYTES: Final = 4 * 10**9
_STD: Final = 0.02
_WRITERS: Final = 8
_PIECE: Final = 1 << 26


def write(a: Architecture, directory: Path, *, device: str, say: Callable[[str], None]) -> None:
    """Write config.json, a tokenizer of a few words and float16 weights, normally distributed; norms are ones.

    Args:
        a: the shape.
        directory: is made; what has these names there is replaced.
        device: where numbers are drawn.
        say: told of each part.
    """
    from transformers import AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    config = opt_config(a)
    config.save_pretrained(directory)
    _write_tokenizer(directory)
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM
        model = made.from_config(config, dtype=torch.float16)
    parameters = dict(model.named_parameters())  # tied ones once
    parts = list(_parts(parameters))
    names = [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    generator = torch.Generator(device).manual_seed(0)
    for name, part in zip(names, parts, strict=True):
        say(f"writing {name}: {sum(t.nbytes for t in part.values()) / 1e9:.1f} GB")
        _write_part(directory / name, part, generator)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in parameters.values())},
        "weight_map": {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def opt_config(a: Architecture) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        ffn_dim=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        word_embed_proj_dim=a.hidden,
        max_position_embeddings=a.positions,
        dtype="float16",
    )


def _parts(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > PART_BYTES:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _write_part(file: Path, part: Mapping[str, Tensor], generator: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in part.items():
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(target, len(text).to_bytes(8, "little") + text, 0)
        position = 8 + len(text)
        with ThreadPoolExecutor(_WRITERS) as pool:
            for name, tensor in part.items():
                values: Any = _values(name, tensor, generator).view(-1).view(torch.uint8).numpy()
                view = memoryview(values)
                pieces = range(0, len(view), _PIECE)
                written = [pool.submit(_pwrite, target, view[p : p + _PIECE], position + p) for p in pieces]
                for done in written:
                    done.result()
                position += tensor.nbytes
        os.fsync(target)  # what isn't on the disk yet can't be dropped from memory
    finally:
        os.close(target)


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if like.ndim == 1:
        return torch.full(like.shape, float(name.endswith("norm.weight")), dtype=torch.float16)
    values = torch.empty(like.shape, dtype=torch.float16, device=generator.device)
    return values.normal_(0, _STD, generator=generator).cpu()


def _pwrite(target: int, values: memoryview, position: int) -> None:
    while values:
        done = os.pwrite(target, values, position)
        values, position = values[done:], position + done


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, unk_token="<unk>").save_pretrained(directory)
