"""Load a checkpoint as the 16-bit baseline that every cell starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import CheckpointError, SpecError
from kbit.memory import is_out_of_memory
from kbit.models.architectures import block_layers
from kbit.models.checkpoint import Headers, model_files, read_config, tensors_in, weights_among
from kbit.models.limits import context_of, vocabulary_of
from kbit.models.obeyed import OBEYED, check_own_code, obeyed_files, only
from kbit.models.placement import place
from kbit.models.prequantized.layouts import QuantizedWeight, part_names, quantized_weights
from kbit.models.refusals import check_checkpoint
from kbit.models.stored import Stored, stored_dtype, stored_tensors, values_of
from kbit.models.tokenizers import tokenizer_hash
from kbit.models.verification import check_causal, check_complete, check_range
from kbit.quantizer.storage import STORAGE_DTYPES

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


def load_model(
    path_or_id: str,
    *,
    revision: str | None = None,
    device: str,
    compute_dtype: str,
    gpus: int = 1,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model in its 16-bit storage dtype, then cast it up to the compute dtype if that is wider.

    The storage dtype is that of most of the checkpoint's weights if it is float16 or bfloat16, else float16. Weights
    come from safetensors, or from torch files read with weights_only: nothing in a checkpoint is run. Weights that
    others quantized (``kbit.models.prequantized``) are dequantized, and the bits that the files store of each layer are
    under ``stored_bits`` of the model's configuration.

    Args:
        path_or_id: a Hugging Face directory, or a hub id (from the local cache alone where HF_HUB_OFFLINE is set).
        revision: the hub commit, tag or branch; not for a directory.
        device: 'cpu', 'cuda' or 'cuda:N'.
        compute_dtype: 'float16', 'bfloat16' or 'float32', the dtype of activations and arithmetic; or 'storage', the
            checkpoint's own 16-bit dtype.
        gpus: with device 'cuda', how many GPUs to spread the model over, from the first on.
        trust_remote_code: run the modelling code that the repository brings.

    Raises:
        ArchitectureError: its blocks hold a matrix that can't be quantized, or none.
        SpecError: no such device, or not so many; the directory or repository, its weights or its configuration are
            missing or unusable; or compute_dtype can't hold the weights.
    """
    check_device(device, gpus)
    found = find_checkpoint(
        path_or_id, revision=revision, compute_dtype=compute_dtype, trust_remote_code=trust_remote_code
    )
    loaded, info = found.read(_from_quantized if found.quantized else _from_pretrained)
    model = loaded.model
    check_complete(model, info, _without_idle(found, info), name=path_or_id)
    check_range(model, found.stored, found.storage_dtype, name=path_or_id)
    place(model, device, found.compute_dtype, gpus=gpus)
    check_causal(model, name=path_or_id)
    block_layers(model)  # a matrix that no cell would quantize is refused before anything is measured
    return loaded


def check_device(device: str, gpus: int = 1) -> None:
    """Refuse a device, or a number of GPUs, that torch doesn't find (SpecError)."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError("device", device, "'cpu' on this machine: torch finds no GPU")
    if gpus > 1 and (device != "cuda" or gpus > torch.cuda.device_count()):
        found = torch.cuda.device_count()
        raise SpecError("gpus", gpus, f"1, or with device='cuda' as many as torch finds, which is {found}")


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


def find_checkpoint(
    path_or_id: str, *, revision: str | None, compute_dtype: str, trust_remote_code: bool
) -> Checkpoint:
    """Find a checkpoint, and check what its configuration and headers say; arguments and errors as ``load_model``'s."""
    if compute_dtype not in COMPUTE_DTYPES:
        raise SpecError("compute_dtype", compute_dtype, "one of " + ", ".join(COMPUTE_DTYPES))
    directory = _directory(path_or_id, revision)
    names, headers = _model_files(directory, path_or_id, trust_remote_code)
    quantized = quantized_weights(read_config(directory), tensors_in(headers))
    parts = part_names(quantized)
    of_files = stored_tensors(weights_among(directory, names), headers)
    stored = {name: tensor for name, tensor in of_files.items() if name not in parts}
    storage = stored_dtype(stored)
    stored |= {
        w.name: Stored(name=w.name, dtype=storage, shape=w.shape, file=w.as_16_bit().file) for w in quantized.values()
    }
    compute: torch.dtype = storage if compute_dtype == "storage" else getattr(torch, compute_dtype)
    if compute not in (storage, torch.float32):
        allowed = f"{STORAGE_DTYPES[storage]}, as {path_or_id} is stored, or float32, which is wider"
        raise SpecError("compute_dtype", compute_dtype, allowed)
    return Checkpoint(
        name=path_or_id,
        directory=directory,
        files=names,
        headers=headers,
        stored=stored,
        quantized=quantized,
        storage_dtype=storage,
        compute_dtype=compute,
        remote_code=trust_remote_code,
    )


def _directory(path_or_id: str, revision: str | None) -> Path:
    """Find the checkpoint's local directory; what isn't one is looked for on the hub, or in its cache."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1 or path.exists():
        raise SpecError("path", path_or_id, "an existing directory with config.json and the model's weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Of indexes, *.json fetches whatever there is.
    patterns = ["*.json", *OBEYED]
    try:
        # Torch files only where there are no safetensors: many repositories hold both, and more.
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            directory = Path(snapshot_download(path_or_id, revision=revision, allow_patterns=[*patterns, weights]))
            if any(directory.glob(weights)):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        where = f"a Hugging Face hub id, at a revision that exists (revision={revision}), or an existing directory"
        reason = str(error).strip().splitlines()[0]
        raise SpecError("model", path_or_id, f"{where}; the hub or its local cache says: {reason}") from error
    return directory


def _model_files(directory: Path, name: str, remote_code: bool) -> tuple[Sequence[str], Headers]:
    try:
        names = model_files(directory)
        headers = check_checkpoint(directory, names)
        if remote_code:
            check_own_code(directory, names)
    except (CheckpointError, OSError) as error:
        raise SpecError("path", name, f"a directory with a model that can be used: {error}") from error
    return names, headers


def _from_quantized(auto_class: Any, directory: Path, found: Checkpoint) -> tuple[PreTrainedModel, Any]:
    from kbit.models.prequantized.loading import from_quantized

    return from_quantized(auto_class, directory, found)


def _without_idle(found: Checkpoint, info: Any) -> Mapping[str, Stored]:
    """Return what the files hold without biases of zeros, which tools add to quantized layers that have none."""
    beside = {f"{name.removesuffix('.weight')}.bias" for name in found.quantized} & set(info["unexpected_keys"])
    idle = {bias.name for bias, values in values_of([found.stored[name] for name in beside]) if not values.any()}
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if key not in idle]
    return {name: tensor for name, tensor in found.stored.items() if name not in idle}


def _from_pretrained(auto_class: Any, directory: Path, found: Checkpoint) -> tuple[PreTrainedModel, Any]:
    loaded: tuple[PreTrainedModel, Any] = auto_class.from_pretrained(
        directory,
        dtype=found.storage_dtype,
        trust_remote_code=found.remote_code,
        weights_only=True,
        output_loading_info=True,
    )
    return loaded


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
