"""Which files of a checkpoint are obeyed when it is loaded, tokenizes and generates; a view of a directory with no
others. Needs no torch.

The identity of a local model hashes exactly the files of ``kbit.models.checkpoint.model_files``, and ``only`` shows
transformers exactly those. So each file is part of the identity, or is refused, or has no effect.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from kbit.errors import CheckpointError

OBEYED: Final = (
    "generation_config.json",  # generate's defaults: penalties, suppressed tokens, end tokens
    "config.*.json",  # by version of transformers, where config.json lists them (configuration_files)
    "*.py",  # a model's own code (auto_map)
    # What the tokenizer is set up by.
    "tokenizer.json",
    "tokenizer.*.json",  # by version of transformers, where tokenizer_config.json lists them (fast_tokenizer_files)
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    # Vocabularies, by the names that transformers' tokenizers give them; a test compares.
    "*.model",  # SentencePiece: tokenizer.model, spiece.model, sentencepiece.bpe.model; tiktoken.model
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "*tekken*.json",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_pronunciation.json",
    "word_shape.json",
)
"""Names, or patterns of names, of files beside config.json and the weights. Chat templates are not among them, since no
evaluation applies one.
"""

FIRST_OBEYED: Final = (
    *("*.py", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)
"""Those of them that were part of the first identities, for telling a model that has changed from one that has not."""

REFUSED: Final = {
    "adapter_config.json": "it belongs to an adapter, which is never applied: merge the adapter into the weights and "
    "save those (peft: merge_and_unload), or name a directory without it",
}
"""Files that would make another model of the directory, with what to do about each."""


def obeyed_files(names: Iterable[str], patterns: Collection[str] = OBEYED) -> list[str]:
    """Of these names, those of files that are obeyed besides config.json and the weights."""
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def check_refused(names: Collection[str]) -> None:
    """Refuse a checkpoint with a file that would make another model of it.

    Raises:
        CheckpointError: names the file and says what to do.
    """
    for name, reason in REFUSED.items():
        if name in names:
            raise CheckpointError(f"{name} is there, and {reason}")


def check_own_code(directory: Path, names: Iterable[str]) -> None:
    """Refuse code that is to be run but is another repository's, at a commit that nobody named.

    Raises:
        CheckpointError: a file's ``auto_map`` names such code.
    """
    for name in names:
        if name.endswith("config.json"):
            classes = json.loads((directory / name).read_bytes()).get("auto_map") or {}
            flat = json.dumps(classes)
            if "--" in flat:
                raise CheckpointError(
                    f"auto_map in {name} names code of another repository ({flat[:200]}), which is no part of this "
                    "model and may change: copy its Python files into the directory, and name them without 'REPO--'"
                )


@contextmanager
def only(directory: Path, names: Iterable[str]) -> Iterator[Path]:
    """Make a temporary directory of the same name in which only some files of a directory are: links to them."""
    with tempfile.TemporaryDirectory(prefix="kbit-model-") as temporary:
        # Code that a checkpoint brings is imported under the directory's name.
        view = Path(temporary) / (directory.resolve().name or "model")
        view.mkdir()
        for name in names:
            (view / name).symlink_to((directory / name).absolute())
        yield view
