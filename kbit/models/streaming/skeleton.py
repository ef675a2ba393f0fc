"""A model without its weights, and from which tensors of the files each of them is made.

transformers builds it as ``from_pretrained`` does, from tensors that have a shape and no values: so its own rules
decide on names, dtypes, tied weights and buffers. By the same rules ``parts_of`` says how tensors become weights: most
are one tensor under another name; experts, for one, are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kbit.errors import NotStreamableError
from kbit.models.streaming.extents import Extent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HasShape(Protocol):
    """What stands for a tensor of the files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


S = TypeVar("S", bound=HasShape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part(Generic[S]):
    """Weights of a model that are made together.

    Attributes:
        first: what transformers calls it: the name of the first of them.
        targets: their names in the model.
        sources: the tensors of the files that they are made from, each with what its name matched.
        converter: makes them; None where the one target is the one source.
    """

    first: str
    targets: tuple[str, ...]
    sources: tuple[tuple[str, S], ...]
    converter: Any = None

    def values(self, raw: Sequence[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return the targets' values from those of the sources, in order and in the dtype of the targets."""
        if self.converter is None:
            return {self.first: raw[0]}
        return _converted(self.converter, self.first, self.sources, raw, model)


@dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A model without weights.

    Attributes:
        model: its parameters are on the meta device, in the dtypes that they are loaded in; tied ones are one object.
            Its buffers are on the CPU, with their values.
        info: transformers' report of what is missing, or of no use.
        parts: how to make its parameters, and those of its buffers that the files hold.
    """

    model: PreTrainedModel
    info: Mapping[str, Any]
    parts: tuple[Part[Extent], ...] = field(repr=False)


class _Absent:
    """Stands for a tensor of a file where transformers loads a model: it has a shape, and gives no values."""

    def __init__(self, extent: Extent) -> None:
        self.shape, self.dtype = extent.shape, extent.dtype

    def __getitem__(self, _: object) -> _Absent:
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002  # as a tensor's
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def build(
    auto_class: Any,
    directory: Path,
    extents: Mapping[str, Extent],
    storage: torch.dtype,
    *,
    remote_code: bool,
) -> Skeleton:
    """Build a checkpoint's model without its weights.

    Args:
        auto_class: of transformers, whose ``from_pretrained`` would load it.
        directory: holds its configuration, and its own code.
        extents: its tensors.
        storage: the 16-bit dtype to load them in.
        remote_code: the model's own code may be run.

    Raises:
        NotStreamableError: a weight of the model is made in a way that isn't known.
        OSError, ValueError, KeyError, RuntimeError: as from_pretrained's, of a checkpoint that can't be loaded.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    with torch.device("meta"):
        like = auto_class.from_config(config, trust_remote_code=remote_code)
    absent: Any = {name: _Absent(extent) for name, extent in extents.items()}
    loaded: Any = type(like).from_pretrained(
        None, config=like.config, state_dict=absent, dtype=storage, output_loading_info=True
    )
    model, info = loaded
    read_generation_config(model, directory, remote_code=remote_code)
    parts = tuple(parts_of(model, extents))
    made = {name for part in parts for name in part.targets}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    known = {id(tensors[name]) for name in made if name in tensors}
    unknown = [name for name, tensor in tensors.items() if tensor.is_meta and id(tensor) not in known]
    if unknown:
        raise NotStreamableError(
            f"{type(model).__name__} makes {len(unknown)} weights in a way of its own: {', '.join(unknown[:3])}"
        )
    return Skeleton(model=model, info=info, parts=parts)


def read_generation_config(model: Any, directory: Path, *, remote_code: bool) -> None:
    """Give a model that was made from tensors its directory's generation_config.json, as from_pretrained does."""
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        nowhere = {"cache_dir": None, "force_download": False, "proxies": None, "token": None, "revision": None}
        model.adjust_generation_fn(
            **{"generation_config": None, "from_auto_class": True, "from_pipeline": None, "local_files_only": True},
            **nowhere,
            pretrained_model_name_or_path=directory,
            subfolder="",
            trust_remote_code=remote_code,
        )


def parts_of(model: PreTrainedModel, tensors: Mapping[str, S]) -> Iterator[Part[S]]:
    """Yield how a model's weights are made, by transformers' rules (``convert_and_load_state_dict_in_model``)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model, None, None) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[Any, list[tuple[str, S]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = rename_source_key(name, [], [], prefix, own)
        if target in own:
            converter = None if pattern is None else by_pattern[pattern]
            _, sources = found.setdefault(target, (converter, []))
            sources.append((name if pattern is None else pattern, tensors[name]))
    for target, (converter, sources) in found.items():
        targets: tuple[str, ...] = (target,)
        if converter is not None:
            raw = [torch.empty(tensor.shape, dtype=own[target].dtype, device="meta") for _, tensor in sources]
            targets = tuple(_converted(converter, target, sources, raw, model))
        # Of two tensors for one weight the first is loaded: a renaming knows its own.
        made_from = tuple(sources if converter else sources[:1])
        yield Part(first=target, targets=targets, sources=made_from, converter=converter)


def _converted(
    converter: Any, first: str, sources: Sequence[tuple[str, HasShape]], raw: Sequence[Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Have a rule of transformers make weights, of which `first` is the first."""
    rule = deepcopy(converter)
    for (pattern, _), values in zip(sources, raw, strict=True):
        rule.add_tensor(first, first, pattern, values)
    made = rule.convert(first, model=model, config=model.config)
    return {name: values[0] if isinstance(values, list) else values for name, values in made.items()}


def tie_equal(model: PreTrainedModel, are_equal: Callable[[str, str], bool]) -> None:
    """Tie what the model ties and the files hold twice, where both have equal values, as from_pretrained does.

    Args:
        model: of a skeleton.
        are_equal: compares two parameters by their names.
    """
    pairs = dict(model.all_tied_weights_keys)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for target, source in pairs.items():
        if target not in tensors or source not in tensors or tensors[target] is tensors[source]:
            continue
        if not (tensors[target].is_meta and tensors[source].is_meta):
            continue
        if are_equal(target, source):
            model.tie_weights(missing_keys={target}, recompute_mapping=False)
        else:
            model.all_tied_weights_keys.pop(target)
