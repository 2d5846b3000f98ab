"""Models of which only the tapped part is loaded: vision tower, embeddings and first blocks.

Later blocks and the head never take memory. Hashing the whole model reads them from the files, one
tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from blm.types import BlmError

NO_HEAD = (
    "only the part of this model that chooses actions is loaded: its later blocks and its head, which "
    "answer questions, are not; load it whole (for `blm serve`: without --actions-only)"
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model is stored."""

    file: Path
    key: str
    """Its name in the file, which may differ from the name in the model."""


@dataclass(frozen=True)
class Absent:
    """The stored tensors of a model that were not loaded."""

    blocks: int
    """Number of blocks of the whole language model."""
    tensors: Mapping[str, StoredTensor]
    """Name in the whole model -> place."""
    dtype: torch.dtype
    """Precision to which loading converts the stored tensors."""

    def beside(self, loaded: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Return all tensors of the whole model by name; those that are not loaded are read, in
        `dtype`, when they are asked for, and not kept."""
        return _Whole(self, loaded, dtype)


@dataclass(frozen=True)
class _Whole(Mapping[str, Tensor]):
    absent: Absent
    loaded: Mapping[str, Tensor]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        if name in self.loaded:
            return self.loaded[name]
        stored = self.absent.tensors[name]
        with safe_open(stored.file, "pt") as file:
            tensor: Tensor = file.get_tensor(stored.key)
        return tensor.to(self.absent.dtype).to(self.dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        yield from self.loaded
        yield from self.absent.tensors

    def __len__(self) -> int:
        return len(self.loaded) + len(self.absent.tensors)


class _NoHead(nn.Module):
    """In place of a head that is not loaded."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BlmError(NO_HEAD)


def load_first_blocks(source: str, config: Any, blocks: int) -> tuple[PreTrainedModel, Absent]:
    """Load blocks 1 .. `blocks` of the language model, and all that runs before them, from a folder
    or a hub id; `config` is that of the whole model, and changes.

    Raises BlmError for a number that the model does not have, and for a model whose later blocks
    cannot be found in safetensors files.
    """
    text = config.get_text_config(decoder=True)
    total: int = text.num_hidden_layers
    if not 1 <= blocks <= total:
        raise BlmError(f"layer {blocks} is outside 1 .. {total}, the blocks of '{source}'")
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config)
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:blocks]
    model: Any = _without_head(kind).from_pretrained(source, config=config)
    missing = stored_names(whole) - stored_names(model)
    return model, Absent(total, _locate(source, whole, missing), model.dtype)


def stored_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters, tied ones once, and of all buffers that are stored."""
    kept = model.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers() if name in kept}
    return {name for name, _ in model.named_parameters()} | buffers


def require_part(part: nn.Module, whole: nn.Module, where: str) -> None:
    """Raise BlmError unless all stored tensors of `part` are, bit for bit, those of `whole`."""
    others = whole.state_dict()
    for name, value in part.state_dict().items():
        if not torch.equal(value.cpu(), others[name].cpu()):
            raise BlmError(f"{where}: the backbone in memory (its '{name}') is not the frozen one")


def _without_head(kind: Any) -> Any:
    """Return the model class `kind` without a head; it keeps its name, which loading goes by."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        self.set_output_embeddings(_NoHead())

    members = {
        "__init__": init,
        "__module__": kind.__module__,
        "_tied_weights_keys": None,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(kind.__name__, (kind,), members)


def _locate(source: str, whole: Any, names: set[str]) -> dict[str, StoredTensor]:
    """Return where tensors of the whole model are stored. Raises BlmError for one that is not
    stored as it is in the model."""
    transforms = get_model_conversion_mapping(whole)
    renamings: Any = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters: Any = [one for one in transforms if isinstance(one, WeightConverter)]
    inside = whole.state_dict()
    found = dict[str, StoredTensor]()
    for file in _weight_files(source):
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
        for key in keys:
            name, converted = rename_source_key(key, renamings, converters, whole.base_model_prefix, inside)
            if name in names and converted is None:
                found[name] = StoredTensor(file, key)
    if lost := sorted(names - found.keys()):
        raise BlmError(
            f"only a part of '{source}' cannot be loaded: its files have no tensor '{lost[0]}'; load it whole"
        )
    return found


def _weight_files(source: str) -> list[Path]:
    """Return the safetensors files of a folder or hub id."""
    settings: Any = {"_raise_exceptions_for_missing_entries": False}
    one = cached_file(source, SAFE_WEIGHTS_NAME, **settings)
    if one is not None:
        return [Path(one)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **settings)
    if index is None:
        raise BlmError(f"'{source}' has no weights in safetensors files (model.safetensors)")
    shards, _ = get_checkpoint_shard_files(source, index)
    return [Path(shard) for shard in shards]
