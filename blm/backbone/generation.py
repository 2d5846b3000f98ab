"""Answers token by token: conversations begin and end at any time, all of them share each forward pass.

Shapes: B answers in progress, L positions of the longest, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from blm.backbone.tokenizing import BackboneTokenizer
from blm.types import ChatCapacity, Message, Sampling

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone, Inputs

CONTEXT_TOKENS = 65_536
"""Longest conversation that is served, whatever the model could hold: 2-4 GB of keys and values at 7 B
parameters. It is also 16 answers of 4096 tokens each, nano's whole context."""
BYTES_PER_TOKEN = 16
"""Text with more bytes per token than this is padding: English has about 4, no language more than 8."""
MAX_IMAGES = 64
"""Pictures in one conversation: a video of 64 frames."""


@dataclass(eq=False)
class Answer:
    """One answer in progress."""

    prompt: Tensor
    """[L] tokens asked with."""
    position: int
    """Where the next token stands, for the model's position code."""
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    ended: Literal["stop", "length"] | None = None
    """By the model's end token, or because there was no more room."""

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens it was asked with, pictures included."""
        return len(self.prompt)


class Generation:
    """The answers that a model is giving; belongs to one thread at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.running = backbone, list[Answer]()
        self._cache, self._mask = DynamicCache(), torch.zeros(0, 0)
        takes = inspect.signature(backbone.model.forward).parameters
        self._named = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        config = backbone.model.generation_config
        self._ends = set(np.atleast_1d(config.eos_token_id).tolist())
        self._penalty = config.repetition_penalty or 1.0

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.backbone.decoder.config.max_position_embeddings, CONTEXT_TOKENS)

    @cached_property
    def capacity(self) -> ChatCapacity:
        """What one request can hold at most."""
        longest = max(len(token.encode()) for token in self.backbone.processor.tokenizer.get_vocab())
        image_tokens = self.tokens_per_image(1, 1)
        return ChatCapacity(
            context_tokens=self.context_length,
            image_tokens=image_tokens,
            max_text_bytes=min(longest, BYTES_PER_TOKEN) * self.context_length,
            max_images=min(self.context_length // image_tokens, MAX_IMAGES),
        )

    @cached_property
    def tokenizer(self) -> BackboneTokenizer:
        """What counts tokens beside the model's thread."""
        return BackboneTokenizer(self.backbone)

    def tokens_per_image(self, width: int, height: int) -> int:
        """Return how many tokens a picture of this size [px] takes, without looking at one."""
        counted = self.backbone.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(counted.num_image_tokens[0])

    @torch.no_grad()
    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> list[Answer]:
        """Read conversations, choose the first token of each answer, and go on with them from now on.

        Raises BlmError as `Backbone.encode` does, before anything has changed.
        """
        inputs = self.backbone.encode(conversations)
        positions, mask = positions_of(self.backbone, inputs), inputs["attention_mask"]
        cache = DynamicCache()
        kept = {self._named: cache, "use_cache": True, "logits_to_keep": 1}
        out = self.backbone.model(**inputs, position_ids=positions, **kept)
        following = positions.reshape(-1, *mask.shape)[:, :, -1].amax(0) + 1
        answers = [
            Answer(tokens[seen.bool()], place, sampling)
            for tokens, seen, place, sampling in zip(
                inputs["input_ids"], mask, following.tolist(), samplings, strict=True
            )
        ]
        if self.running:
            _join(self._cache, cache)
            length = max(self._mask.shape[1], mask.shape[1])
            mask = torch.cat([F.pad(m, (length - m.shape[1], 0)) for m in (self._mask, mask)])
            cache = self._cache
        self._cache, self._mask = cache, mask
        self.running += answers
        self._choose(answers, out.logits[:, -1])
        return answers

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every running answer; those that end are no longer among them."""
        if not self.running:
            return
        device = self._mask.device
        self._mask = F.pad(self._mask, (0, 1), value=1)
        out = self.backbone.model(
            input_ids=torch.tensor([[answer.tokens[-1]] for answer in self.running], device=device),
            position_ids=torch.tensor([[answer.position] for answer in self.running], device=device),
            attention_mask=self._mask,
            use_cache=True,
            **{self._named: self._cache},
        )
        for answer in self.running:
            answer.position += 1
        self._choose(self.running, out.logits[:, -1])

    def drop(self, answer: Answer) -> None:
        """Stop an answer that nobody waits for any more."""
        if answer in self.running:
            answer.ended = "length"
            self._leave()

    def text(self, answer: Answer) -> str:
        return self.backbone.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)

    def _choose(self, answers: Sequence[Answer], logits: Tensor) -> None:
        room = self.backbone.decoder.config.max_position_embeddings
        scores = logits.float()
        likeliest = scores.argmax(-1).tolist()
        for answer, row, first in zip(answers, scores, likeliest, strict=True):
            token = self._draw(answer, row) if self._draws(answer.sampling) else first
            answer.tokens.append(token)
            if token in self._ends:
                answer.ended = "stop"
            elif len(answer.tokens) >= min(answer.sampling.max_tokens, room - len(answer.prompt)):
                answer.ended = "length"
        self._leave()

    def _penalty_of(self, sampling: Sampling) -> float:
        return self._penalty if sampling.repetition_penalty is None else sampling.repetition_penalty

    def _draws(self, sampling: Sampling) -> bool:
        return sampling.temperature > 0 or self._penalty_of(sampling) != 1.0

    def _draw(self, answer: Answer, scores: Tensor) -> int:
        """Choose from scores [V] as the answer's sampling says."""
        sampling, penalty = answer.sampling, self._penalty_of(answer.sampling)
        if penalty != 1.0:
            seen = torch.cat([answer.prompt, answer.prompt.new_tensor(answer.tokens)]).unique()
            values = scores[seen]
            scores = scores.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
        if sampling.temperature == 0:
            return int(scores.argmax())
        share = (scores / sampling.temperature).softmax(-1).cpu()
        if sampling.top_p < 1:
            ordered, order = share.sort(descending=True)
            share[order[ordered.cumsum(-1) - ordered >= sampling.top_p]] = 0  # the first one stays
        return int(torch.multinomial(share, 1, generator=answer.draw))

    def _leave(self) -> None:
        """Forget the answers that have ended, and the padding that only they needed."""
        stay = [place for place, answer in enumerate(self.running) if answer.ended is None]
        if len(stay) == len(self.running):
            return
        self.running = [self.running[place] for place in stay]
        if not stay:
            self._cache = DynamicCache()
            return
        rows = torch.tensor(stay, device=self._mask.device)
        self._mask = self._mask[rows]
        longest = int(self._mask.sum(1).amax())
        self._mask = self._mask[:, -longest:]
        for layer in _layers(self._cache):
            layer.keys, layer.values = layer.keys[rows, :, -longest:], layer.values[rows, :, -longest:]


def positions_of(backbone: Backbone, inputs: Inputs) -> Tensor:
    """Return the positions [B, L] of left-padded prompts, or [3, B, L] for M-RoPE models with pictures.

    Given explicitly, so that no call depends on what a model remembers of an earlier one.
    """
    mask = inputs["attention_mask"]
    if "image_grid_thw" not in inputs:
        return (mask.cumsum(-1) - 1).clamp_min(0)
    ids = inputs["input_ids"]
    model: Any = backbone.model.base_model
    three, _ = model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == backbone.processor.image_token_id).long(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=mask,
    )
    return three


def _layers(cache: DynamicCache) -> list[Any]:
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _join(cache: DynamicCache, more: DynamicCache) -> None:
    """Append the rows of `more` to those of `cache`, both padded on the left to the longer one."""
    for mine, other in zip(_layers(cache), _layers(more), strict=True):
        length = max(mine.keys.shape[-2], other.keys.shape[-2])
        for name in ("keys", "values"):
            both = [getattr(mine, name), getattr(other, name)]
            padded = [F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in both]
            setattr(mine, name, torch.cat(padded))
