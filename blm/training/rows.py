"""Conversations -> rows: tokens, which of them are learnt, and the pictures. Shapes: L positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from blm.backbone import Backbone
from blm.media import load_pixels
from blm.types import BlmError, Image, Message

Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a conversation becomes a row."""

    separate_turns: bool = True
    """Let a turn see the pictures and its own question, not the other turns: each is then trained exactly as
    it is asked alone, while the pictures are read once. Set it to False for dialogues that refer back."""
    max_length: int = 2048
    """Rows longer than this [tokens] lose their last turns; pictures are never cut."""


@dataclass(frozen=True)
class Row:
    """One conversation, ready to train on: all its turns behind one copy of its pictures."""

    tokens: np.ndarray
    """[L] int64."""
    learn: np.ndarray
    """[L] bool: the tokens of answers and their end tokens."""
    branch: np.ndarray
    """[L] int64: 0 is seen by all later positions, j > 0 by turn j only."""
    pixels: Tensor | None
    """uint8 if that loses nothing, else as the processor made it."""
    grid: Tensor | None
    """Qwen's `image_grid_thw`, one line per picture."""


def read_rows(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    limits: Limits,
    root: Path | None,
    counts: Counter[str],
) -> list[Row]:
    rows = []
    for index, messages in enumerate(track(conversations, "reading", console=Console(stderr=True))):
        try:
            row = make_row(backbone, tuple(messages), limits, root, counts)
        except BlmError as error:
            raise BlmError(f"conversation {index}: {error}") from error
        if row is not None:
            rows.append(row)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: handing each to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_row(
    backbone: Backbone, messages: Messages, limits: Limits, root: Path | None, counts: Counter[str]
) -> Row | None:
    """Tokenise one conversation; None if even its first turn is too long. `counts` says what happened."""
    turns = _separated(messages) if limits.separate_turns else [messages]
    images = [load_pixels(image, root) for message in turns[0] for image in message.images]
    read = backbone.process([backbone.render(turns[0], prompt=False)], images)
    placeholder = backbone.processor.image_token_id
    plain = [
        _answers(backbone, turn) for turn in turns
    ]  # with one placeholder a picture; `first` has them all
    first = read["input_ids"][0].numpy()
    learn = np.zeros(len(first), dtype=bool)
    learn[first != placeholder] = plain[0][1][plain[0][0] != placeholder]
    shared = _end_of_pictures(first, placeholder)
    tails = [(first[shared:], learn[shared:])]
    for tokens, answers in plain[1:]:
        cut = _end_of_pictures(tokens, placeholder)
        tails.append((tokens[cut:], answers[cut:]))
    tokens = np.concatenate([first[:shared], *(tail for tail, _ in tails)])
    if len(tokens) > limits.max_length:
        counts["turns cut"] += 1
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        if any(message.role == "assistant" for message in messages[:last]):
            return make_row(backbone, messages[:last], limits, root, counts)
        counts["dropped, too long"] += 1
        return None
    counts["kept"] += 1
    numbers = [np.full(len(tail), number) for number, (tail, _) in enumerate(tails, start=len(tails) > 1)]
    return Row(
        tokens,
        np.concatenate([learn[:shared], *(answers for _, answers in tails)]),
        np.concatenate([np.zeros(shared, dtype=np.int64), *numbers]),
        pack_pixels(backbone, read["pixel_values"]) if images else None,
        read.get("image_grid_thw"),
    )


def _end_of_pictures(tokens: np.ndarray, placeholder: int) -> int:
    where = np.flatnonzero(tokens == placeholder)
    return int(where[-1]) + 1 if len(where) else 0


def _separated(messages: Messages) -> list[Messages]:
    """Return each turn as its own conversation, with all the pictures, which must be in the first turn."""
    system = tuple(message for message in messages if message.role == "system")
    users = [message for message in messages if message.role == "user"]
    answers = [message for message in messages if message.role == "assistant"]
    if len(users) != len(answers) or any(message.images for message in users[1:]):
        return [messages]
    pictures = users[0].content[
        : 1 + max((i for i, p in enumerate(users[0].content) if isinstance(p, Image)), default=-1)
    ]
    asked = [users[0], *(Message("user", (*pictures, *message.content)) for message in users[1:])]
    return [(*system, question, answer) for question, answer in zip(asked, answers, strict=True)]


def _answers(backbone: Backbone, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a conversation, one placeholder a picture, and which of them are answers.

    An answer is what the template adds between the prompt that asks for it and the conversation that has it,
    up to the first end token; so this works for any template that does not rewrite earlier turns.
    """
    text = backbone.render(messages, prompt=False)
    read = backbone.processor.tokenizer.backend_tokenizer.encode(text)  # ten times the speed of a call
    tokens, offsets = np.asarray(read.ids), np.asarray(read.offsets)
    learn = np.zeros(len(tokens), dtype=bool)
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = backbone.render(messages[:index], prompt=True)
        last = index + 1 == len(messages)
        after = text if last else backbone.render(messages[: index + 1], prompt=False)
        if not (text.startswith(before) and text.startswith(after)):
            raise BlmError("the chat template rewrites earlier turns; the answer's tokens cannot be found")
        inside = np.flatnonzero((offsets[:, 0] >= len(before)) & (offsets[:, 1] <= len(after)))
        ends = np.flatnonzero(np.isin(tokens[inside], _end_tokens(backbone)))
        learn[inside[: ends[0] + 1] if len(ends) else inside] = True
    if not learn.any():
        raise BlmError("no assistant turn to learn from")
    return tokens, learn


def _end_tokens(backbone: Backbone) -> list[int]:
    return list(np.atleast_1d(backbone.model.generation_config.eos_token_id))


def pack_pixels(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Return normalised pixels as uint8, a quarter of the memory; unchanged where that would lose any."""
    mean, std = _normalisation(backbone, pixels)
    raw = ((pixels.reshape(len(pixels), 3, -1) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    raw = raw.reshape(pixels.shape)
    return raw if torch.allclose(unpack_pixels(backbone, raw), pixels, atol=1e-5) else pixels


def unpack_pixels(backbone: Backbone, pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = _normalisation(backbone, pixels)
    return ((pixels.reshape(len(pixels), 3, -1) / 255 - mean) / std).reshape(pixels.shape)


def _normalisation(backbone: Backbone, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per colour [3, 1]; colour is the slowest axis of a picture and of a Qwen patch."""
    settings = backbone.processor.image_processor
    values = (settings.image_mean, settings.image_std)
    mean, std = (torch.tensor(value, device=pixels.device)[:, None] for value in values)
    return mean, std
