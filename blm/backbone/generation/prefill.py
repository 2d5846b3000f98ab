"""Reading a prompt piece by piece, so that whoever shares the model waits for one piece and not for all.

A piece is one pass over a few pictures, or one over at most `size` tokens that follow those read so far. The
keys and values are those of one pass over everything, up to rounding: attention is causal.
Shapes: B conversations, L prompt positions, N pictures, V vocabulary, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blm.backbone.generation.batch import Answer, Batch
from blm.backbone.video import MEDIA
from blm.types import Sampling

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone, Inputs


@dataclass(frozen=True, eq=False)
class Prompt:
    """Conversations as the model reads them, on the CPU, padded on the left."""

    inputs: Inputs
    positions: Tensor
    """[B, L], or [3, B, L] for M-RoPE."""
    samplings: Sequence[Sampling]
    """One for each answer."""
    rows: Sequence[int]
    """The conversation that each answer belongs to."""

    @property
    def tokens(self) -> int:
        """Length of the longest conversation."""
        return self.inputs["input_ids"].shape[1]

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values its answers keep at most."""
        return sum(self.tokens + sampling.max_tokens for sampling in self.samplings)


@dataclass(frozen=True)
class _Group:
    """Pictures that are encoded in one pass, and the placeholders that they fill, in reading order."""

    pictures: slice
    placeholders: slice
    first_column: int
    last_column: int


class PrefixReader:
    """Runs a model over pieces of a prompt. Belongs to one thread; the model itself is not changed."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._model = shallow(backbone.model)
        base = backbone.model.base_model
        view: Any = self._model if base is backbone.model else shallow(base)
        if view is not self._model:
            self._model._modules[backbone.model.base_model_prefix] = view
        view.get_image_features = self._current_features
        self._features: Any = None

    def encode(self, pixel_values: Tensor, grid: Tensor | None) -> Any:
        """Return what the model's vision part gives for some pictures."""
        base: Any = self.backbone.model.base_model
        more = {} if grid is None else {"image_grid_thw": grid}
        return base.get_image_features(pixel_values=pixel_values, **more, return_dict=True)

    def read(self, features: Any, **inputs: Any) -> Any:
        """Run the model with `features` at the picture placeholders of this piece, if it has any."""
        self._features = features
        try:
            if features is not None:  # what is in it does not matter: the features are there
                inputs["pixel_values"] = torch.empty(0)
            return self._model(**inputs)
        finally:
            self._features = None

    def _current_features(self, *given: Any, **named: Any) -> Any:
        return self._features


class Prefill:
    """A prompt that is being read. `advance` does one piece of the work."""

    def __init__(self, reader: PrefixReader, prompt: Prompt, size: int | None, cache_name: str) -> None:
        """`size`: tokens in one pass; None: everything in one pass."""
        self.prompt, self.cache = prompt, DynamicCache()
        self._reader, self._cache_name = reader, cache_name
        self._done = 0
        self.logits: Tensor | None = None
        """[B, V] scores of the first token of each answer, once all is read."""
        self.answers: list[Answer] | None = None
        """With their first tokens."""
        self.copied = list[Batch]()
        """What was read, for each of the answers that go on."""
        self.ids: Tensor = reader.backbone.place({"ids": prompt.inputs["input_ids"]})["ids"]
        self.mask: Tensor = reader.backbone.place({"mask": prompt.inputs["attention_mask"]})["mask"]
        self._positions = prompt.positions.to(self.ids.device)
        seen = prompt.inputs["input_ids"] == reader.backbone.processor.image_token_id
        self._numbers = torch.where(seen, seen.flatten().cumsum(0).view_as(seen) - 1, -1)
        """[B, L] number of each placeholder in reading order, -1 elsewhere."""
        self._size = size or 2 * seen.numel()  # then both bounds hold everything
        self._groups = self._grouped(seen)
        # Videos are read in one pass too: only files on this machine hold any, no request to a server does.
        whole = self._size >= prompt.tokens and len(self._groups) <= 1
        self._at_once = whole or "video_grid_thw" in prompt.inputs
        self._encoded = list[Any]()
        """Features of the groups so far; None for those that are not needed any more."""

    @torch.no_grad()
    def advance(self) -> bool:
        """Encode one group of pictures or read one piece of text; True when all is read."""
        if self._at_once:
            self._read_whole()
            return True
        end = min(self._done + self._size, self.prompt.tokens)
        if len(self._encoded) < len(self._groups) and self._groups[len(self._encoded)].first_column < end:
            self._encoded.append(self._encode(self._groups[len(self._encoded)]))
            return False
        out = self._reader.read(self._features(end), input_ids=self.ids[:, self._done : end], **self._at(end))
        self._done = end
        for number, group in enumerate(self._groups[: len(self._encoded)]):
            if group.last_column < end:
                self._encoded[number] = None
        if end == self.prompt.tokens:
            self.logits = out.logits[:, -1]
        return self.logits is not None

    def _read_whole(self) -> None:
        """One pass over pictures and text, as for an action: what was seen for one is known for the other."""
        pictures = {name: value for name, value in self.prompt.inputs.items() if name in MEDIA}
        pictures = self._reader.backbone.place(pictures)
        out = self._reader.backbone.model(input_ids=self.ids, **pictures, **self._at(self.prompt.tokens))
        self.logits = out.logits[:, -1]

    def _at(self, end: int) -> dict[str, Any]:
        return {
            "attention_mask": self.mask[:, :end],
            "position_ids": self._positions[..., self._done : end],
            self._cache_name: self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def _encode(self, group: _Group) -> Any:
        inputs = self.prompt.inputs
        pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
        if grid is None:
            pixels = pixels[group.pictures]
        else:  # patches of all pictures stand in one row
            patches = [0, *grid.prod(-1).cumsum(0).tolist()]
            pixels = pixels[patches[group.pictures.start] : patches[group.pictures.stop]]
            grid = self._reader.backbone.place({"grid": grid[group.pictures]})["grid"]
        return self._reader.encode(self._reader.backbone.place({"pixels": pixels})["pixels"], grid)

    def _features(self, end: int) -> Any:
        """Features for the placeholders among the next columns, in the form that the model wants."""
        numbers = self._numbers[:, self._done : end]
        wanted = numbers[numbers >= 0]
        if not len(wanted):
            return None
        parts = list[Any]()
        for group, features in zip(self._groups, self._encoded, strict=False):
            inside = (wanted >= group.placeholders.start) & (wanted < group.placeholders.stop)
            if inside.any():
                parts.append((features, (wanted[inside] - group.placeholders.start).to(self.ids.device)))
        chosen = copy.copy(parts[0][0])
        chosen.pooler_output = _select([(one.pooler_output, rows) for one, rows in parts])
        if getattr(chosen, "deepstack_features", None) is not None:  # Qwen3-VL
            levels = range(len(chosen.deepstack_features))
            chosen.deepstack_features = [
                _select([(one.deepstack_features[level], rows) for one, rows in parts]) for level in levels
            ]
        return chosen

    def _grouped(self, seen: Tensor) -> list[_Group]:
        """Pictures in reading order, as many together as have half of `size` tokens, at least one.

        Half: for nano, two pictures cost as much as 64 tokens of text do.
        """
        columns = seen.nonzero()[:, 1].tolist()
        groups, first, begin, token = list[_Group](), 0, 0, 0
        sizes = self._picture_sizes(len(columns))
        for number, size in enumerate(sizes):
            token += size
            last = number + 1 == len(sizes)
            if last or token + sizes[number + 1] - begin > self._size // 2:
                inside = columns[begin:token]
                groups.append(_Group(slice(first, number + 1), slice(begin, token), min(inside), max(inside)))
                first, begin = number + 1, token
        return groups

    def _picture_sizes(self, placeholders: int) -> list[int]:
        inputs = self.prompt.inputs
        if "image_grid_thw" in inputs:
            merged = self._reader.backbone.model.config.vision_config.spatial_merge_size**2
            sizes: list[int] = (inputs["image_grid_thw"].prod(-1) // merged).tolist()
            return sizes
        count = len(inputs.get("pixel_values", ()))
        return [placeholders // count] * count if count else []


def _select(parts: Sequence[tuple[Any, Tensor]]) -> Any:
    """Pick rows of picture features in the form in which they came: [N, T, d] as [K, 1, d], else [[K, d]]."""
    first = parts[0][0]
    square = isinstance(first, Tensor) and first.ndim == 3
    flat = [
        (one.flatten(0, -2) if isinstance(one, Tensor) else torch.cat(list(one)))[rows] for one, rows in parts
    ]
    rows = torch.cat(flat)
    return rows[:, None] if square else (rows,)


def shallow(module: nn.Module) -> nn.Module:
    """Return a view of a module: its children may be exchanged, and attributes set, without touching it."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view
