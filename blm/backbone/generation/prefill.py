"""Chunked prefill: a prompt is processed in pieces, between which the model serves other requests.

A piece is one pass of the vision tower over a few images, or one pass of the language model over
the next `size` tokens. Keys and values equal those of one pass over everything, up to rounding:
attention is causal. Shapes: B conversations, L prompt positions, N images, V vocabulary, d hidden
size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from blm.backbone.generation.batch import Batch, GeneratedSequence
from blm.backbone.model import Inputs, MultimodalModel
from blm.backbone.truncation import shallow_copy
from blm.backbone.video import MEDIA
from blm.types import Sampling


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokenized conversations, on the CPU and left-padded, and how to answer them."""

    inputs: Inputs
    positions: Tensor
    """[B, L], or [3, B, L] for M-RoPE."""
    samplings: Sequence[Sampling]
    """One for each answer."""
    rows: Sequence[int]
    """The conversation (row of `inputs`) of each answer."""

    @property
    def tokens(self) -> int:
        """Tokens of the longest conversation."""
        return self.inputs["input_ids"].shape[1]

    @property
    def cache_tokens(self) -> int:
        """Maximum tokens in the key-value cache of its answers."""
        return sum(self.tokens + sampling.max_tokens for sampling in self.samplings)


@dataclass(frozen=True)
class _PictureGroup:
    """Images that are encoded in one pass, and the placeholders that they fill, in order."""

    pictures: slice
    placeholders: slice
    first_column: int
    last_column: int


class ChunkRunner:
    """Runs a model over pieces of a prompt, with precomputed vision features.

    Use it from one thread; the model itself does not change.
    """

    def __init__(self, backbone: MultimodalModel) -> None:
        self.backbone = backbone
        backbone.require_whole()
        self._model = shallow_copy(backbone.model)
        base = backbone.model.base_model
        view: Any = self._model if base is backbone.model else shallow_copy(base)
        if view is not self._model:
            self._model._modules[backbone.model.base_model_prefix] = view
        view.get_image_features = self._current_features
        self._features: Any = None

    def encode(self, pixel_values: Tensor, grid: Tensor | None) -> Any:
        """Return the vision features of some images, in the form of `get_image_features`."""
        base: Any = self.backbone.model.base_model
        more = {} if grid is None else {"image_grid_thw": grid}
        return base.get_image_features(pixel_values=pixel_values, **more, return_dict=True)

    def run(self, features: Any, **inputs: Any) -> Any:
        """Run the model, with `features` at the image placeholders of this piece, if any."""
        self._features = features
        try:
            if features is not None:  # a stand-in: `get_image_features` returns the features
                inputs["pixel_values"] = torch.empty(0)
            return self._model(**inputs)
        finally:
            self._features = None

    def _current_features(self, *given: Any, **named: Any) -> Any:
        return self._features


class Prefill:
    """The prefill of one prompt; `advance` does one piece of it."""

    def __init__(self, runner: ChunkRunner, prompt: Prompt, size: int | None, cache_name: str) -> None:
        """`size`: tokens in one pass; None: everything in one pass."""
        self.prompt, self.cache = prompt, DynamicCache()
        self._runner, self._cache_name = runner, cache_name
        self._done = 0
        self.logits: Tensor | None = None
        """[B, V] logits of the first token of each answer, when the prefill is complete."""
        self.sequences: list[GeneratedSequence] | None = None
        """The answers, with their first tokens."""
        self.copied = list[Batch]()
        """Copies of the key-value cache for the sequences that are running."""
        self.ids: Tensor = runner.backbone.place({"ids": prompt.inputs["input_ids"]})["ids"]
        self.mask: Tensor = runner.backbone.place({"mask": prompt.inputs["attention_mask"]})["mask"]
        self._positions = prompt.positions.to(self.ids.device)
        is_placeholder = prompt.inputs["input_ids"] == runner.backbone.placeholder_id
        self._numbers = torch.where(
            is_placeholder, is_placeholder.flatten().cumsum(0).view_as(is_placeholder) - 1, -1
        )
        """[B, L] number of each placeholder in reading order, -1 elsewhere."""
        if "token_type_ids" in prompt.inputs:
            size = None  # tokens of a picture attend to each other in both directions: they need one pass
        self._size = size or 2 * is_placeholder.numel()  # large enough for one pass
        self._groups = self._picture_groups(is_placeholder)
        # Videos are read in one pass too: only files on this machine hold any, no request to a server does.
        whole = self._size >= prompt.tokens and len(self._groups) <= 1
        self._at_once = whole or "video_grid_thw" in prompt.inputs
        self._encoded = list[Any]()
        """Features of the groups so far; None for those whose placeholders are all processed."""

    @torch.no_grad()
    def advance(self) -> bool:
        """Encode one group of images or process one chunk of tokens; True when complete."""
        if self._at_once:
            self._run_whole()
            return True
        end = min(self._done + self._size, self.prompt.tokens)
        if len(self._encoded) < len(self._groups) and self._groups[len(self._encoded)].first_column < end:
            self._encoded.append(self._encode(self._groups[len(self._encoded)]))
            return False
        out = self._runner.run(
            self._features(end), input_ids=self.ids[:, self._done : end], **self._arguments(end)
        )
        self._done = end
        for number, group in enumerate(self._groups[: len(self._encoded)]):
            if group.last_column < end:
                self._encoded[number] = None
        if end == self.prompt.tokens:
            self.logits = out.logits[:, -1]
        return self.logits is not None

    def _run_whole(self) -> None:
        """Run images and text in one pass, as for an action, so both share the vision cache."""
        pictures = {name: value for name, value in self.prompt.inputs.items() if name in MEDIA}
        pictures = self._runner.backbone.place(pictures)
        out = self._runner.backbone.model(
            input_ids=self.ids, **pictures, **self._arguments(self.prompt.tokens)
        )
        self.logits = out.logits[:, -1]

    def _arguments(self, end: int) -> dict[str, Any]:
        """Return the arguments of the model's forward for the tokens up to column `end`."""
        kinds = self.prompt.inputs.get("token_type_ids")
        two_way = {} if kinds is None else {"token_type_ids": kinds[:, self._done : end].to(self.ids.device)}
        return {
            **two_way,
            "attention_mask": self.mask[:, :end],
            "position_ids": self._positions[..., self._done : end],
            self._cache_name: self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def _encode(self, group: _PictureGroup) -> Any:
        inputs = self.prompt.inputs
        pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
        if grid is None:
            pixels = pixels[group.pictures]
        else:  # the patches of all images are concatenated
            patches = [0, *grid.prod(-1).cumsum(0).tolist()]
            pixels = pixels[patches[group.pictures.start] : patches[group.pictures.stop]]
            grid = self._runner.backbone.place({"grid": grid[group.pictures]})["grid"]
        return self._runner.encode(self._runner.backbone.place({"pixels": pixels})["pixels"], grid)

    def _features(self, end: int) -> Any:
        """Return the features of the placeholders up to column `end`."""
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

    def _picture_groups(self, is_placeholder: Tensor) -> list[_PictureGroup]:
        """Split the images, in order, into groups of at most `size` / 2 tokens, or one image.

        Half of `size`, because for nano two images cost as much as 64 tokens of text.
        """
        columns = is_placeholder.nonzero()[:, 1].tolist()
        groups, first, begin, token = list[_PictureGroup](), 0, 0, 0
        sizes = self._picture_sizes(len(columns))
        for number, size in enumerate(sizes):
            token += size
            last = number + 1 == len(sizes)
            if last or token + sizes[number + 1] - begin > self._size // 2:
                inside = columns[begin:token]
                groups.append(
                    _PictureGroup(slice(first, number + 1), slice(begin, token), min(inside), max(inside))
                )
                first, begin = number + 1, token
        return groups

    def _picture_sizes(self, placeholders: int) -> list[int]:
        inputs = self.prompt.inputs
        if "image_grid_thw" in inputs:
            merged = self._runner.backbone.model.config.vision_config.spatial_merge_size**2
            sizes: list[int] = (inputs["image_grid_thw"].prod(-1) // merged).tolist()
            return sizes
        count = len(inputs.get("pixel_values", ()))
        return [placeholders // count] * count if count else []


def _select(parts: Sequence[tuple[Any, Tensor]]) -> Any:
    """Select K rows of image features: [K, 1, d] if the features are [N, T, d], else [[K, d]]."""
    first = parts[0][0]
    square = isinstance(first, Tensor) and first.ndim == 3
    flat = [
        (one.flatten(0, -2) if isinstance(one, Tensor) else torch.cat(list(one)))[rows] for one, rows in parts
    ]
    rows = torch.cat(flat)
    return rows[:, None] if square else (rows,)
