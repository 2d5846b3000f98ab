"""Supervised attention: where nano's language model looks for the position of a thing.

To answer with a position, a model must find the thing's image token by its name and read the digits
in it. Neither is of use without the other, so answers alone teach both only after a long plateau,
if at all (docs/LOG.md). Some heads are therefore trained to attend to the token of the thing, as in
"Neural Machine Translation with Supervised Attention" (Liu et al., 2016): where an answer writes a
position, in the image or in the robot's frame, and where a control prompt names object, goal and
gripper of a view behind the task (`PromptOrder` query_last). There, hidden states also learn to hold
the position, for the policy.
Shapes: G sequences of L positions, Q queries, C channels.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from blm.backbone import Backbone
from blm.backbone.grounding import (
    DECIMAL,
    FOUND,
    FREQUENCIES,
    NAME_SCALE,
    NAME_SIZE,
    REACH,
    VIEWS,
    WORDS,
    GroundingTower,
    map_words,
)
from blm.backbone.prompt import QUERY_LAST
from blm.corpora.scenes.questions import POINT_SCALE
from blm.training.sft.pack import ExampleBatch
from blm.types import BlmError

NAMED_BLOCK, ROLE_BLOCK = 1, 2
"""The blocks, from 0, whose second halves of heads are supervised. The first is that of the induction
heads, where each position knows the preceding two tokens (`blm/backbone/nano/induction.py`): enough
for a name. What a role means in a task takes one more block to find out."""
NEAR = 0.05
"""Maximum distance between a position in an answer and the token's thing [fraction of the image]."""
NEAR_CM = 10.0
"""Maximum distance between a position in the robot's frame in an answer and that of the token [cm]."""
CERTAIN = 0.2
"""Minimum weight of the token's thing, about the probability that it is in the image."""
POSITION_WEIGHT = 10.0
"""Weight of the error of the positions that hidden states hold [fraction of the image]."""
NOWHERE = 5.0
"""Tokens of images without a known camera have a position at most this far from the robot [cm]."""
METRIC_AT = NAME_SIZE + 1 + 2 + 4 * len(FREQUENCIES) + 2 * DECIMAL
"""First feature of the position in the robot's frame in a token of a `GroundingTower`."""
POINT_OR_BOX = re.compile(r"\((\d+(?:, \d+){3}|\d+, \d+)\)")
VECTOR = r"\((-?\d+), (-?\d+), (-?\d+)\)"
METRIC = re.compile(rf"([a-z]+(?: [a-z]+)*) ({VECTOR}|[xyz] -?\d+)")
"""A thing and its position, or one coordinate of it, in the thoughts before an answer [cm]."""
ONLY_METRIC = re.compile(rf"<\|assistant\|>({VECTOR}) cm")
"""An answer that is the position of the thing in the question [cm]."""
QUERIES = re.compile(rf"(?:{QUERY_LAST.pattern} ?)+")
ROLE_POINT = re.compile(r"(object|goal|gripper) \((\d+), (\d+)\)")
USER = "<|user|>"
ANSWER = re.compile(r"<\|assistant\|>(.*?)<\|end\|>", re.DOTALL)
Point = tuple[float, float]
"""x, y as fractions of the image."""


class RoleQuery(NamedTuple):
    """A position of a control prompt that names the object, the goal or the gripper of a view."""

    at: int
    """The position."""
    view: int
    """The view, counted from the last image before the position: -1, -2, .."""
    point: Point | None
    """Where the thing is in that view, if it is there."""


class Located(NamedTuple):
    """A point, or the centre of a box, in an answer."""

    at: range
    """The positions that predict its tokens."""
    view: str
    """The camera that its turn names last; empty if it names none."""
    point: Point
    """The point."""


class Measured(NamedTuple):
    """A position in the robot's frame in an answer, or one coordinate of it."""

    at: range
    """The positions that predict its tokens."""
    name: str
    """The thing that is named before it; empty if none is."""
    place: tuple[float, float, float] | None
    """The position [cm]; None for a single coordinate."""


class SequenceText:
    """The text of a sequence, and the token of each of its characters."""

    def __init__(self, texts: Sequence[str], tokens: Sequence[int], views: Sequence[str] = ()) -> None:
        """`texts` are the texts of the vocabulary, `views` the names of the cameras."""
        parts = [texts[token] for token in tokens]
        self.text, self.ends = "".join(parts), list(accumulate(map(len, parts)))
        self.view = re.compile(rf"\b({'|'.join(views)})\b" if views else "(?!)")

    def token(self, character: int) -> int:
        """Return the position of the token with this character."""
        return bisect_right(self.ends, character)

    def located(self, answers: Sequence[bool]) -> Iterator[Located]:
        """Yield points, and centres of boxes, in answers. `answers` is True at the tokens of answers."""
        for match in POINT_OR_BOX.finditer(self.text):
            begin, end = self.token(match.start()), self.token(match.end() - 1)
            if answers[begin] and answers[end]:
                x, y, *more = (int(number) / POINT_SCALE for number in match[1].split(", "))
                if len(more) == 2:  # a box: its other corner
                    x, y = (x + more[0]) / 2, (y + more[1]) / 2
                turn = self.text.rfind(USER, 0, match.start())
                views = self.view.findall(self.text, max(turn, 0), match.start())
                yield Located(range(begin, end), views[-1] if views else "", (x, y))

    def measured(self, answers: Sequence[bool]) -> Iterator[Measured]:
        """Yield positions in the robot's frame, and single coordinates, in answers."""
        for match in METRIC.finditer(self.text):
            yield from self._measured(match.span(2), answers, match[1], match.groups()[2:])
        for match in ONLY_METRIC.finditer(self.text):
            yield from self._measured(match.span(1), answers, "", match.groups()[1:])

    def _measured(
        self, span: tuple[int, int], answers: Sequence[bool], name: str, numbers: Sequence[str | None]
    ) -> Iterator[Measured]:
        begin, end = self.token(span[0]), self.token(span[1] - 1)
        if answers[begin] and answers[end]:
            place = [float(number) for number in numbers if number]
            yield Measured(range(begin, end), name, (place[0], place[1], place[2]) if place else None)

    def roles(self) -> Iterator[RoleQuery]:
        """Yield the roles that control prompts with the order query_last ask for."""
        for group in QUERIES.finditer(self.text):
            views = [*QUERY_LAST.finditer(self.text, group.start(), group.end())]
            answer = ANSWER.search(self.text, group.end())
            for number, view in enumerate(views):
                part = re.search(rf"{re.escape(view[1])}: ([^.]*)", answer[1] if answer else "")
                found = ROLE_POINT.findall(part[1] if part else "")
                points = {role: (int(x) / POINT_SCALE, int(y) / POINT_SCALE) for role, x, y in found}
                for place in (2, 3, 4):
                    yield RoleQuery(
                        self.token(view.end(place) - 1), number - len(views), points.get(view[place])
                    )


class SupervisedAttention:
    """The loss of supervised attention for the last call of the model, within `watch`."""

    def __init__(self, backbone: Backbone) -> None:
        """Raises BlmError for a model that is not a nano: a Llama behind a `GroundingTower`."""
        tower = getattr(backbone.model.base_model, "vision_tower", None)
        layers = backbone.decoder.layers
        if not (isinstance(tower, GroundingTower) and isinstance(layers[0].self_attn, LlamaAttention)):
            raise BlmError(
                f"supervised attention needs image tokens that each are about a thing, as nano has them, and "
                f"a Llama; {type(backbone.model).__name__} is no such model. Drop --supervise-attention"
            )
        if len(layers) <= ROLE_BLOCK:
            raise BlmError(f"supervised attention needs {ROLE_BLOCK + 1} blocks; the model has {len(layers)}")
        self.tower, self.image_token = tower, backbone.model.config.image_token_index
        self.blocks = {at: layers[at] for at in (NAMED_BLOCK, ROLE_BLOCK)}
        tokenizer = backbone.processor.tokenizer
        self.texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        width = backbone.decoder.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        self.readout = torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q
        """[C, 3] fixed directions in which hidden states, scaled to a root mean square of 1, hold x, y and
        whether the thing is there."""
        self.image_tokens = self.states = torch.empty(0)
        self.inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what the tower and the supervised blocks do in this context."""

        def keep_tokens(module: nn.Module, inputs: Any, output: Any) -> None:
            self.image_tokens = output.last_hidden_state.detach()

        def keep_states(module: nn.Module, inputs: Any, output: Any) -> None:
            self.states = output if isinstance(output, Tensor) else output[0]

        def keep_input(at: int, named: dict[str, Any]) -> None:
            self.inputs[at] = named["hidden_states"], named["position_embeddings"]

        with ExitStack() as hooks:
            hooks.callback(self.tower.register_forward_hook(keep_tokens).remove)
            hooks.callback(self.blocks[ROLE_BLOCK].register_forward_hook(keep_states).remove)
            for at, block in self.blocks.items():
                hook = block.self_attn.register_forward_pre_hook(
                    lambda module, positional, named, at=at: keep_input(at, named), with_kwargs=True
                )
                hooks.callback(hook.remove)
            yield

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss for the batch of the last call, 0 if it locates nothing, and metrics.

        The metrics are the mean probabilities of the tokens to attend to, and the mean error of the
        positions of roles; NaN where there is nothing to measure.
        """
        losses: dict[str, list[Tensor]] = {"named": [], "roles": [], "role_error": [], "seen": []}
        slots = self._slots(batch.inputs["input_ids"])
        for row, tokens in enumerate(batch.inputs["input_ids"].tolist()):
            text = SequenceText(self.texts, tokens, self.tower.config.views)
            answers = batch.loss_mask[row].tolist()
            seen = partial(visible, batch.inputs["attention_mask"][row], slots[row])
            wanted: list[tuple[range, int | None]] = [
                (at, nearest(in_view(seen(at[0]), view), -1, point))
                for at, view, point in text.located(answers)
            ]
            wanted += [(one.at, self._metric_token(seen(one.at[0]), one)) for one in text.measured(answers)]
            named = [(at, slot) for positions, slot in wanted if slot is not None for at in positions]
            losses["named"] += self._attention(NAMED_BLOCK, batch, row, named)
            roles = list(text.roles())
            found = [
                (role.at, slot)
                for role in roles
                if role.point and (slot := nearest(seen(role.at), role.view, role.point)) is not None
            ]
            losses["roles"] += self._attention(ROLE_BLOCK, batch, row, found)
            if roles:
                error, visibility = self._held(row, roles)
                losses["role_error"].append(error)
                losses["seen"].append(visibility)
        means = {name: torch.cat(parts).mean() for name, parts in losses.items() if any(map(len, parts))}
        weights = {"role_error": POSITION_WEIGHT}
        total = sum((weights.get(name, 1.0) * mean for name, mean in means.items()), torch.zeros(()))
        nan = torch.tensor(torch.nan)
        metrics: dict[str, Tensor | float] = {
            "attended": (-means.get("named", nan).detach()).exp(),
            "roles_attended": (-means.get("roles", nan).detach()).exp(),
            "role_error": means.get("role_error", nan).detach(),
        }
        return total.to(self.image_tokens.device), metrics

    def _held(self, row: int, roles: Sequence[RoleQuery]) -> tuple[Tensor, Tensor]:
        """Return errors of held positions [visible roles, 2], and losses of visibility [roles]."""
        states = self.states[row, [role.at for role in roles]].float()
        held = F.rms_norm(states, states.shape[1:]) @ self.readout.to(states.device)
        there = torch.tensor([role.point is not None for role in roles], device=held.device)
        points = held.new_tensor([role.point for role in roles if role.point]).reshape(-1, 2)
        seen = F.binary_cross_entropy_with_logits(held[:, 2], there.float(), reduction="none")
        return (held[there, :2] - points).abs().mean(-1), seen

    def _attention(
        self, block: int, batch: ExampleBatch, row: int, pairs: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the negative log-probabilities [Q] that the heads attend to the pairs' keys."""
        if not pairs:
            return []
        hidden, rotary = self.inputs[block]
        attention = cast(LlamaAttention, self.blocks[block].self_attn)
        queries, keys = torch.tensor(pairs, device=hidden.device).T
        cos, sin = (part.expand(len(hidden), -1, -1)[row] for part in rotary)
        q = _second_half(attention.q_proj(hidden[row, queries]), attention.head_dim)
        k = _second_half(attention.k_proj(hidden[row]), attention.head_dim)
        q = q * cos[queries] + rotate_half(q) * sin[queries]
        k = k * cos + rotate_half(k) * sin
        mask = batch.inputs["attention_mask"].to(hidden.device)
        causal = torch.arange(len(k[0]), device=hidden.device) <= queries[:, None]
        scores = q @ k.transpose(1, 2) * attention.scaling
        scores = scores.masked_fill(~(mask[row, 0, queries] if mask.ndim == 4 else causal), -torch.inf)
        return [-scores.float().log_softmax(-1)[:, torch.arange(len(keys)), keys].mean(0)]

    def _metric_token(self, images: Sequence[ImageTokens], found: Measured) -> int | None:
        """Return the position of the image token with the place of a thing in the robot's frame.

        It is of the first view that has a thing of that name; without a name, of the first with a thing
        near the place. None if there is none.
        """
        words = set(map_words(found.name, self.tower.config.compound))
        name = torch.tensor([word in words for word in self.tower.words] + [False] * WORDS)[:WORDS]
        for image in images:
            ruled_out = (image.weights < CERTAIN) | (image.places.norm(dim=-1) < NOWHERE)
            distance = torch.zeros(FOUND)
            if found.place:
                distance = (image.places - torch.tensor(found.place)).norm(dim=-1)
                ruled_out |= distance > NEAR_CM
            if found.name:
                ruled_out |= (image.names != name).any(-1)
            best = int(distance.masked_fill(ruled_out, torch.inf).argmin())
            if not ruled_out[best]:
                return image.start + best
        return None

    def _slots(self, ids: Tensor) -> list[list[ImageTokens]]:
        """Return the images of each sequence: where their tokens are, and what these are about."""
        tokens = self.image_tokens[:, :FOUND].float().cpu()
        weights, points = tokens[..., NAME_SIZE], tokens[..., NAME_SIZE + 1 : NAME_SIZE + 3]
        points = (points / weights[..., None] + 1) / 2
        names = tokens[..., :WORDS] > NAME_SCALE / 2 * weights[..., None]
        places = 100 * REACH * tokens[..., METRIC_AT : METRIC_AT + 3] / weights[..., None]
        cameras = dict(enumerate(self.tower.config.views))
        views = [cameras.get(view, "") for view in self.image_tokens[:, 0, -VIEWS:].argmax(-1).tolist()]
        images = iter(zip(weights, points, names, places, views, strict=True))
        count = self.image_tokens.shape[1]
        starts = [(row == self.image_token).nonzero().flatten()[::count].tolist() for row in ids]
        return [[ImageTokens(start, *next(images)) for start in row] for row in starts]


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in a sequence."""

    start: int
    """Position of the first."""
    weights: Tensor
    """[FOUND] weight of each token's thing, about its probability."""
    points: Tensor
    """[FOUND, 2] its position as fractions of the image."""
    names: Tensor
    """[FOUND, WORDS] whether its name has each word."""
    places: Tensor
    """[FOUND, 3] its position in the robot's frame [cm], about 0 in a view of an unknown camera."""
    view: str
    """The camera, as the tower sees it; empty before its pretraining."""


def visible(mask: Tensor, images: Sequence[ImageTokens], at: int) -> list[ImageTokens]:
    """Return the images that a position attends to: those before it of its own example.

    `mask` is the attention mask of the sequence: [L], or [1, L, L] of packed examples.
    """
    return [image for image in images if image.start < at and (mask.ndim == 1 or mask[0, at, image.start])]


def in_view(images: Sequence[ImageTokens], view: str) -> list[ImageTokens]:
    """Return the images of the camera; all of them if it is not named or not there."""
    return [image for image in images if image.view == view] or list(images)


def nearest(images: Sequence[ImageTokens], index: int, point: Point) -> int | None:
    """Return the position of the token of the thing nearest to a point of an image.

    None without that image, and if no thing is near.
    """
    if len(images) < -index:
        return None
    image = images[index]
    distance = (image.points - torch.tensor(point)).norm(dim=-1)
    distance = distance.masked_fill(image.weights < CERTAIN, torch.inf)
    best = int(distance.argmin())
    return image.start + best if distance[best] < NEAR else None


def _second_half(projected: Tensor, head_dim: int) -> Tensor:
    """Return [heads / 2, L, D] of projections [L, heads * D] of all heads."""
    heads = projected.unflatten(-1, (-1, head_dim)).transpose(0, 1)
    return heads[len(heads) // 2 :]
