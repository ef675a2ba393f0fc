"""A checkpoint that can be loaded, and the model with its tokenizer that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kbit.errors import SpecError
from kbit.memory import is_out_of_memory
from kbit.models.checkpoint import Headers
from kbit.models.limits import context_of, vocabulary_of
from kbit.models.obeyed import obeyed_files, only
from kbit.models.prequantized.layouts import QuantizedWeight
from kbit.models.stored import Stored
from kbit.models.tokenizers import tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be quantized and evaluated.

    Attributes:
        model: in eval mode, on its device or devices, without gradients; its weights are 16-bit values in the compute
            dtype, its buffers in the dtypes that transformers loads them in.
        tokenizer: the checkpoint's.
        storage_dtype: float16 or bfloat16, what the checkpoint's weights were cast to: pass it to ``quantize_model``.
        tokenizer_hash: models that share it can share encoded data.
    """

    model: PreTrainedModel
    tokenizer: Any
    storage_dtype: torch.dtype
    tokenizer_hash: str

    @property
    def context(self) -> int:
        """The model's context in tokens: its configuration's, else the tokenizer's, else 2048 (ALiBi has no limit)."""
        return context_of(self.model.config, self.tokenizer.model_max_length)

    @property
    def vocab_size(self) -> int:
        """Entries of the model's vocabulary, padding included."""
        return vocabulary_of(self.model.config)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be measured, of which nothing is read but its headers.

    Attributes:
        name: what the user calls it.
        directory: where it lies.
        files: names of its files (``model_files``).
        headers: what those of safetensors hold.
        stored: its tensors, by name; quantized weights as the 16-bit tensors that they stand for.
        quantized: the weights that others quantized, by name.
        storage_dtype: the 16-bit dtype that its weights are cast to.
        compute_dtype: that of activations and arithmetic.
        remote_code: its own code may be run.
    """

    name: str
    directory: Path
    files: Sequence[str]
    headers: Headers
    stored: Mapping[str, Stored]
    quantized: Mapping[str, QuantizedWeight]
    storage_dtype: torch.dtype
    compute_dtype: torch.dtype
    remote_code: bool

    def read(self, read: Callable[[Any, Path, Checkpoint], tuple[PreTrainedModel, T]]) -> tuple[LoadedModel, T]:
        """Have a model made, and load its tokenizer.

        Args:
            read: given transformers' auto class that loads the model, a directory with nothing but its files, and this;
                gives the model, and whatever else.

        Raises:
            SpecError: transformers can't load it.
        """
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        # Whatever else lies in the directory is not hashed, so it must decide nothing.
        with only(self.directory, self.files) as view:
            try:
                # Whether mistral-common happens to be installed must not decide the tokenizer.
                tokenizer = AutoTokenizer.from_pretrained(
                    view, trust_remote_code=self.remote_code, mistral_format=False
                )
                model, rest = read(_auto_class(view, self.remote_code), view, self)
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                if is_out_of_memory(error):
                    raise  # nothing is wrong with the checkpoint
                said = str(error).replace(str(view), self.name)
                allowed = f"a causal language model that transformers can load; it says: {said}"
                raise SpecError("path", self.name, allowed) from error
        model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = str(self.directory)
        model.eval()  # type: ignore[no-untyped-call]
        model.requires_grad_(False)
        of_tokenizer = [self.directory / n for n in ("config.json", *obeyed_files(self.files))]
        loaded = LoadedModel(
            model=model,
            tokenizer=tokenizer,
            storage_dtype=self.storage_dtype,
            tokenizer_hash=tokenizer_hash(tokenizer, of_tokenizer),
        )
        return loaded, rest


def _auto_class(directory: Path, remote_code: bool) -> Any:
    """Return what loads the model: with an image part as such, whole, of which text then runs the language part."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    own_code = remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    composite = config.get_text_config(decoder=True) is not config
    # transformers' causal classes of such models, where there are any, drop what the checkpoint holds beside the text.
    whole = composite and not own_code and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM
