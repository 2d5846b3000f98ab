"""Supervised attention: where nano's language model looks when it writes the position of a thing.

To answer with a position, a model must find the thing's image token by its name and read the digits
in it. Neither is of use without the other, so the answers alone teach both only after a long
plateau, if at all (docs/LOG.md). During pretraining, some heads are therefore trained to attend to
the token of the thing whose position is written, as in "Neural Machine Translation with Supervised
Attention" (Liu et al., 2016). Shapes: G sequences of L positions, N images with T tokens, Q queries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from blm.backbone import Backbone
from blm.backbone.grounding import FOUND, NAME_SIZE, GroundingTower
from blm.corpora.scenes.questions import POINT_SCALE
from blm.training.sft.pack import ExampleBatch

BLOCK = 1
"""The block whose attention is supervised, from 0: that of the induction heads, which has the names
of the preceding two tokens (`blm/backbone/nano/induction.py`). Its second half of heads is free."""
NEAR = 0.05
"""Maximum distance between a position in an answer and the token's thing [fraction of the image]."""
CERTAIN = 0.2
"""Minimum probability that the token's thing is in the image."""
NUMBER = re.compile(r"\d+")


class SupervisedAttention:
    """The mean negative log-probability that heads attend to the things that answers locate.

    Within `watch`, a call of the model stores what the loss needs: the tokens of the vision tower,
    and the input of the supervised attention.
    """

    def __init__(self, backbone: Backbone) -> None:
        """`backbone` is a nano: its language model is a Llama, its tower a `GroundingTower`."""
        tower = backbone.model.base_model.vision_tower
        assert isinstance(tower, GroundingTower)
        self.tower, self.image_token = tower, backbone.model.config.image_token_index
        self.attention = cast(LlamaAttention, backbone.decoder.layers[BLOCK].self_attn)
        tokenizer = backbone.processor.tokenizer
        self.texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        self._tokens = self._hidden = torch.empty(0)
        self._rotary = torch.empty(0), torch.empty(0)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Store what the tower and the attention do in this context."""

        def keep_tokens(module: nn.Module, inputs: Any, output: Any) -> None:
            self._tokens = output.last_hidden_state.detach()

        def keep_input(module: nn.Module, positional: Any, named: Mapping[str, Any]) -> None:
            self._hidden, self._rotary = named["hidden_states"], named["position_embeddings"]

        with ExitStack() as hooks:
            hooks.callback(self.tower.register_forward_hook(keep_tokens).remove)
            hooks.callback(self.attention.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            yield

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss for the batch of the last call, and metrics; 0 if it locates nothing.

        The metric is the share of queries that give the thing's token most of their attention.
        """
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        losses = [0 * self._scores(0, torch.zeros(1, dtype=torch.long)).mean()[None]]  # DDP: always used
        slots = self._slots(ids)
        for row, (tokens, answers) in enumerate(zip(ids, batch.loss_mask, strict=True)):
            queries, keys = self._targets(tokens, answers, slots[row])
            if len(queries):
                causal = torch.arange(ids.shape[1]) <= queries[:, None]
                allowed = mask[row, 0, queries] if mask.ndim == 4 else causal
                scores = self._scores(row, queries.to(self._hidden.device))
                scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
                losses.append(-scores.log_softmax(-1)[:, torch.arange(len(keys)), keys].mean(0))
        count, every = max(sum(map(len, losses)) - 1, 1), torch.cat(losses)
        return every.sum() / count, {"attended": (every[1:].detach() < math.log(2)).sum() / count}

    def _scores(self, row: int, queries: Tensor) -> Tensor:
        """Return the attention logits [heads, Q, L] of the supervised heads in one sequence."""
        cos, sin = (part.expand(len(self._hidden), -1, -1)[row] for part in self._rotary)
        q = self._project(self.attention.q_proj, self._hidden[row, queries])
        k = self._project(self.attention.k_proj, self._hidden[row])
        q = q * cos[queries] + rotate_half(q) * sin[queries]
        k = k * cos + rotate_half(k) * sin
        return q @ k.transpose(1, 2) * self.attention.scaling

    def _project(self, projection: nn.Linear, hidden: Tensor) -> Tensor:
        """Return the queries or keys [heads, L, D] of the second half of the heads."""
        heads = projection(hidden).unflatten(-1, (-1, self.attention.head_dim)).transpose(0, 1)
        return cast(Tensor, heads[len(heads) // 2 :])

    def _slots(self, ids: Tensor) -> list[list[ImageTokens]]:
        """Return the images of each sequence: where their tokens are, and what these are about."""
        at = NAME_SIZE
        tokens = self._tokens[:, :FOUND].cpu()
        presence, points = tokens[..., at], tokens[..., at + 1 : at + 3] / tokens[..., at : at + 1]
        images = iter(zip(presence, (points + 1) / 2, strict=True))
        count, rows = self._tokens.shape[1], []
        for row in ids:
            starts = (row == self.image_token).nonzero().flatten()[::count].tolist()
            rows.append([ImageTokens(start, *next(images)) for start in starts])
        return rows

    def _targets(
        self, ids: Tensor, answers: Tensor, images: Sequence[ImageTokens]
    ) -> tuple[Tensor, list[int]]:
        """Return the positions that predict parts of a point, and the position each attends to."""
        queries, keys = list[int](), list[int]()
        for begin, end, point in located(self.texts, ids.tolist(), answers.tolist()):
            before = [image for image in images if image.start < begin]
            slot = before[-1].nearest(point) if before else None
            if slot is not None:
                queries += range(begin, end)
                keys += [slot] * (end - begin)
        return torch.tensor(queries, dtype=torch.long), keys


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in a sequence."""

    start: int
    """Position of the first."""
    presence: Tensor
    """[FOUND] probability that a token's thing is in the image."""
    points: Tensor
    """[FOUND, 2] its position as fractions of the image."""

    def nearest(self, point: tuple[float, float]) -> int | None:
        """Return the position of the token of the nearest thing; None if none is near."""
        distance = (self.points - torch.tensor(point)).norm(dim=-1)
        distance = distance.masked_fill(self.presence < CERTAIN, torch.inf)
        best = int(distance.argmin())
        return self.start + best if distance[best] < NEAR else None


def located(
    texts: Sequence[str], tokens: Sequence[int], answers: Sequence[bool]
) -> Iterator[tuple[int, int, tuple[float, float]]]:
    """Yield the points and boxes in answers: begin, end and centre [fractions of the image].

    The tokens begin .. end - 1 predict a number or the comma behind it; `texts` are the texts of
    the vocabulary, `answers` is True at the tokens of answers.
    """
    begin, written = None, ""
    for at, (token, is_answer) in enumerate(zip(tokens, answers, strict=True)):
        text = texts[token]
        if begin is None or not is_answer:
            begin = at if "(" in text and is_answer else None
            written = ""
        elif ")" in text:
            numbers = [int(number) / POINT_SCALE for number in NUMBER.findall(written)]
            if len(numbers) == 4:  # a box: two corners
                yield begin, at, ((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2)
            elif len(numbers) > 1:
                yield begin, at, (numbers[0], numbers[1])
            begin = None
        else:
            written += text
