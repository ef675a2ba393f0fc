"""Checks of a model that has just been read: it is what its files hold, and it predicts tokens from those before."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from kbit.errors import SpecError
from kbit.models.architectures import key_of
from kbit.models.checkpoint import is_buffer
from kbit.models.stored import Stored, values_of
from kbit.quantizer.storage import STORAGE_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED: Final = 4
"""Tensors that a message names."""
_PROBE: Final = 4
_NEGLIGIBLE: Final = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Changes of logits, in standard deviations, below which a token is not seen: about two roundings in 16 bits. Causal
architectures change by exactly 0 where the two sequences run side by side; BERT and its kind by 0.002 to 4.
"""
_ABOVE_NOISE: Final = 3
"""How many times as large as the change by running a sequence alone (experts then take other batches) it has to be."""


def check_complete(model: PreTrainedModel, info: Mapping[str, Any], stored: Mapping[str, Stored], *, name: str) -> None:
    """Check that every weight of the files is in the model, and every weight of the model in the files.

    Args:
        model: as from_pretrained made it.
        info: its loading info.
        stored: what the files hold.
        name: what the user calls the model.

    Raises:
        SpecError: names what is missing, of another shape, or in the files alone; or both numbers of parameters.
    """
    lacking = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lacking:
        raise SpecError(
            "path",
            name,
            "a checkpoint with every weight of its configuration; missing or of another shape: " + _list(lacking),
        )
    stray = [key for key in info["unexpected_keys"] if key not in stored or stored[key].is_weight]
    if stray:
        raise SpecError(
            "path",
            name,
            f"a checkpoint whose config.json has a place for every weight; {type(model).__name__} has none for "
            f"{_list(stray)}. Give the config.json that belongs to these weights (its number of layers?), or save the "
            "language model alone",
        )
    in_files, on_purpose = _in_files(model, stored)
    in_model = _numel(dict(model.named_parameters()))
    # Buffers may be in the files or not: the model makes some of those that are missing.
    allowed = {in_model, _numel(model.state_dict(keep_vars=True))}
    if allowed.isdisjoint({in_files, in_files - sum(tensor.numel for tensor in on_purpose)}):
        left_out = f", of which transformers leaves out {_list(t.name for t in on_purpose)}" if on_purpose else ""
        raise SpecError(
            "path",
            name,
            f"a checkpoint of as many parameters as its model: the files hold {in_files:,}{left_out}, and "
            f"{type(model).__name__} has {in_model:,}. {_difference(model, stored)}",
        )


def check_range(model: PreTrainedModel, stored: Mapping[str, Stored], storage: torch.dtype, *, name: str) -> None:
    """Check that no finite value of the files became infinite in the 16-bit dtype.

    Infinities of the files themselves pass: they are the checkpoint's. Only files of a wider range are looked at.

    Raises:
        SpecError: names the tensors and their largest values.
    """
    largest = torch.finfo(storage).max
    wider = [t for t in stored.values() if t.dtype is not None and torch.finfo(t.dtype).max > largest]
    if not wider or all(_is_finite(p) for p in model.parameters()):
        return
    beyond = ((tensor.name, _beyond(values, values.to(storage))) for tensor, values in values_of(wider))
    found = [f"{tensor} has {value:g}" for tensor, value in beyond if value is not None]
    if found:
        raise _out_of_range(name, storage, found)


def check_arrived(tensor: str, values: Tensor, stored: Tensor, *, name: str) -> None:
    """Check that no finite value of one tensor, as its file has it, became infinite in the 16-bit dtype.

    Raises:
        SpecError: names the tensor and its largest value.
    """
    if not values.is_floating_point() or torch.finfo(values.dtype).max <= torch.finfo(stored.dtype).max:
        return
    if not _is_finite(stored) and (value := _beyond(values, stored)) is not None:
        raise _out_of_range(name, stored.dtype, [f"{tensor} has {value:g}"])


def _beyond(values: Tensor, stored: Tensor) -> float | None:
    """Return the largest of the finite values that became infinite as they are stored; None where there is none."""
    beyond = values[torch.isinf(stored) & torch.isfinite(values)]
    return beyond[beyond.abs().argmax()].item() if beyond.numel() else None


def _out_of_range(name: str, storage: torch.dtype, found: Collection[str]) -> SpecError:
    way_out = "Save it in bfloat16, whose range is wider: model.to(torch.bfloat16).save_pretrained(DIR)"
    return SpecError(
        "path",
        name,
        f"a checkpoint whose values {STORAGE_DTYPES[storage]}, which its weights are cast to, can hold (up to "
        f"{torch.finfo(storage).max:g}); {_list(found)}. "
        f"{way_out if storage == torch.float16 else 'Clip these values'}",
    )


@torch.inference_mode()
def check_causal(model: PreTrainedModel, *, name: str) -> None:
    """Check that a token changes no prediction before it: only then is a loss over all tokens a perplexity.

    Args:
        model: in eval mode, where it is to run.
        name: what the user calls the model.

    Raises:
        SpecError: names the change.
    """
    embedding: Any = model.get_input_embeddings()
    ids = _probe_tokens(model.config).to(embedding.weight.device)
    together = _earlier(model, ids)
    if not torch.isfinite(together).all():
        return  # it diverged: its evaluations say so
    scale = together.std().clamp_min(torch.finfo(torch.float32).tiny)
    change = float((together[0] - together[1]).abs().max() / scale)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if change <= _NEGLIGIBLE.get(dtype, _NEGLIGIBLE[torch.float32]):
        return
    alone = torch.cat([_earlier(model, row[None]) for row in ids])
    noise = float((alone - together).abs().max() / scale)
    if change > _ABOVE_NOISE * noise:
        raise SpecError(
            "path",
            name,
            f"a causal language model; in {type(model).__name__} the last token changes what is predicted before it, "
            f"by {change:.2g} standard deviations of the logits. An encoder has no perplexity; one that was trained as "
            "a decoder says is_decoder: true in config.json",
        )


def _earlier(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits at all positions but the last: float32 [rows, length - 1, vocabulary]."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits[:, :-1].float()


def _probe_tokens(config: Any) -> Tensor:
    """Two sequences that differ in their last token, without special tokens, which may be masked: int64 [2, 4]."""
    ask = getattr(config, "get_text_config", None)
    parts = (config,) if ask is None else (config, ask(decoder=True))
    named = [value for part in parts for key, value in vars(part).items() if key.endswith(("token_id", "_index"))]
    flat = (n for value in named for n in (value if isinstance(value, list | tuple) else (value,)))
    special = {n for n in flat if isinstance(n, int)}
    usable = (n for n in range(10**6) if n not in special)
    *common, first, second = (next(usable) for _ in range(_PROBE + 1))
    return torch.tensor([[*common, first], [*common, second]])


def _numel(tensors: Mapping[str, Tensor]) -> int:
    """Values of a model's tensors, tied ones once, without what is no weight."""
    return sum({key_of(t): t.numel() for key, t in tensors.items() if _is_weight(key, t)}.values())


def _in_files(model: PreTrainedModel, stored: Mapping[str, Stored]) -> tuple[int, list[Stored]]:
    """Return the parameters in the files, tied ones once, and the tensors that transformers ignores on purpose."""
    own = model.state_dict(keep_vars=True)
    weights = {tensor: _name_in(own, tensor.name, model.base_model_prefix) for tensor in stored.values()}
    weights = {tensor: key for tensor, key in weights.items() if tensor.is_weight}
    tied: set[tuple[object, ...]] = set()
    total = 0
    for tensor, key in weights.items():
        place = None if key is None else key_of(own[key])
        if place is None or place not in tied:
            total += tensor.numel
        if place is not None:
            tied.add(place)
    ignored: Collection[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    on_purpose = [t for t, key in weights.items() if key is None and any(re.search(p, t.name) for p in ignored)]
    return total, on_purpose


def _name_in(own: Collection[str], key: str, prefix: str) -> str | None:
    """Return the model's name of a tensor in a file, which may have the base model's prefix or not; None if unknown."""
    return next((k for k in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")) if k in own), None)


def _difference(model: PreTrainedModel, stored: Mapping[str, Stored]) -> str:
    own = {key: t for key, t in model.state_dict(keep_vars=True).items() if _is_weight(key, t)}
    known = {key: _name_in(own, key, model.base_model_prefix) for key, t in stored.items() if t.is_weight}
    held = {key_of(own[key]) for key in known.values() if key is not None}
    extra = [key for key, name in known.items() if name is None]
    absent = [key for key, t in own.items() if key_of(t) not in held]
    return f"In the files alone: {_list(extra) or 'none'}; in the model alone: {_list(absent) or 'none'}"


def _is_weight(key: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not is_buffer(key, tuple(tensor.shape))


def _is_finite(parameter: Tensor) -> bool:
    # aminmax reads once; isinf is ten times slower in 16 bits.
    return parameter.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter.detach()))


def _list(names: Any) -> str:
    every = sorted(map(str, names))
    return ", ".join(every[:_NAMED]) + (f" and {len(every) - _NAMED} more" if len(every) > _NAMED else "")
