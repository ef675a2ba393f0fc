"""Load a checkpoint as the 16-bit baseline that every cell starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kbit.compute_dtypes import COMPUTE_DTYPES
from kbit.errors import CheckpointError, SpecError
from kbit.models.architectures import block_layers
from kbit.models.checkpoint import Headers, model_files, read_config, tensors_in, weights_among
from kbit.models.loadable import Checkpoint, LoadedModel
from kbit.models.obeyed import OBEYED, check_own_code
from kbit.models.placement import place
from kbit.models.prequantized.layouts import part_names, quantized_weights
from kbit.models.refusals import check_checkpoint
from kbit.models.stored import Stored, stored_dtype, stored_tensors, values_of
from kbit.models.verification import check_causal, check_complete, check_range
from kbit.quantizer.storage import STORAGE_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
