"""Conversations -> rows: tokens, which of them are learnt, and the pictures. Shapes: L positions.

Pictures are read again whenever a row is used: a corpus of them does not fit in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.backbone.video import Clip, Video, grids_of, load_media, token_types
from blm.backbone.video import media_of as media_of_messages
from blm.types import BlmError, Image, ImageArray, Message, require_numbers

Messages = tuple[Message, ...]
Media = Mapping[str, tuple[Tensor, ...]]
"""What a model reads beside tokens ("pixel_values", Qwen's "image_grid_thw", ..), or cached features, in
reading order."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a conversation becomes a row."""

    separate_turns: bool = True
    """Let a turn see the pictures and its own question, not the other turns: each is then trained exactly as
    it is asked alone, while the pictures are read once. Set it to False for dialogues about pictures that
    refer back; conversations without pictures, and those with pictures in later turns, always stay whole."""
    max_length: int = 2048
    """Rows longer than this [tokens] lose their last turns; pictures are never cut."""
    max_pixels: int | None = None
    """Larger pictures are shrunk to this many pixels before the model's own processing."""

    def __post_init__(self) -> None:
        require_numbers(self, max_length=(2, 10**9), max_pixels=(1, 10**12))
        if self.max_length < 2 or (self.max_pixels is not None and self.max_pixels < 1):
            raise BlmError(f"limits {self}: lengths and pixels must be positive")


@dataclass(frozen=True)
class Shown:
    """Pictures and videos, and the text that has their placeholders."""

    text: str
    images: tuple[Image | Clip, ...]
    root: Path | None
    max_pixels: int | None

    def read(self, backbone: Backbone) -> tuple[Inputs, int]:
        """Return what the model's processor makes of them, and how many pictures were shrunk."""
        whole, clips = load_media(self.images, self.root)
        images = [shrunk(pixels, self.max_pixels) for pixels in whole]
        count = sum(small is not pixels for small, pixels in zip(images, whole, strict=True))
        videos = list[Video]()
        for clip in clips:
            frames = [shrunk(frame, self.max_pixels) for frame in clip.frames]
            count += sum(small.shape != clip.frames.shape[1:] for small in frames)
            videos.append(Video(np.stack(frames), clip.times))
        return backbone.process([self.text], images, videos=videos), count


@dataclass(frozen=True)
class Row:
    """One conversation, ready to train on: all its turns behind one copy of its pictures."""

    tokens: np.ndarray
    """[L] int64."""
    loss_mask: np.ndarray
    """[L] bool: the tokens of answers and their end tokens."""
    segment_ids: np.ndarray
    """[L] int64: 0 is seen by all later positions, j > 0 by turn j only."""
    positions: np.ndarray
    """[1 or 3, L] int64: a turn counts on from the end of what is shared; three rows are M-RoPE's."""
    shown: Shown | None = None
    """None: no pictures, or their features are cached."""
    features: Media = field(default_factory=dict)
    """Cached features of its pictures."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shows_video(self) -> bool:
        """Whether the model's eye will see a video for this row."""
        return self.shown is not None and any(isinstance(part, Clip) for part in self.shown.images)

    def media(self, backbone: Backbone) -> Media:
        """Return the features of its pictures, or what the model's processor makes of them."""
        if self.shown is None:
            return self.features
        return media_of(self.shown.read(backbone)[0])


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
    turns = separated(messages) if limits.separate_turns else [messages]
    images = media_of_messages(turns[0], backbone.videos_as)
    shown = Shown(backbone.render(turns[0], prompt=False), images, root, limits.max_pixels)
    read, changed = shown.read(backbone)
    tokens, loss_mask, segment_ids = _segments(backbone, read["input_ids"][0].numpy(), turns)
    if len(tokens) > limits.max_length:
        counts["turns cut"] += 1
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        if any(message.role == "assistant" for message in messages[:last]):
            return make_row(backbone, messages[:last], limits, root, counts)
        counts["dropped, too long"] += 1
        return None
    counts["kept"] += 1
    if changed:
        counts["pictures shrunk"] += changed
    positions = _positions(backbone, tokens, segment_ids, media_of(read) if images else {})
    return Row(tokens, loss_mask, segment_ids, positions, shown if images else None)


def shrunk(pixels: ImageArray, most: int | None) -> ImageArray:
    """Return a picture of at most `most` pixels in the same proportions; itself if it is no larger."""
    height, width = pixels.shape[:2]
    if most is None or height * width <= most:
        return pixels
    scale = (most / (height * width)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC))


def media_of(read: Inputs) -> Media:
    """Return what a processor made of the pictures of one conversation."""
    words = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    return {name: (value,) for name, value in read.items() if name not in words}


def _segments(
    backbone: Backbone, first: np.ndarray, turns: Sequence[Messages]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, loss mask and segment ids of turns behind one prefix; `first` is turn 0 with pictures.

    What all turns begin with is shared, but a turn's answer never begins right after it: the token before
    each learnt one must be of the same turn.
    """
    placeholder = _placeholders(backbone)
    plain = [_answers(backbone, turn) for turn in turns]  # with one placeholder a picture
    loss_mask = _spread(first, *plain[0], placeholder)
    if len(turns) == 1:
        return first, loss_mask, np.zeros(len(first), dtype=np.int64)
    tails = []
    for tokens, answers in plain:
        cut = _end_of_pictures(tokens, placeholder)
        tails.append((tokens[cut:], answers[cut:]))
    same = min(int(answers.argmax()) - 1 for _, answers in tails)
    starts = np.stack([tail[:same] for tail, _ in tails])
    different = np.flatnonzero((starts != starts[0]).any(axis=0))
    same = int(different[0]) if len(different) else same
    shared = len(first) - len(tails[0][0]) + same
    numbers = [np.full(len(tail) - same, number) for number, (tail, _) in enumerate(tails, start=1)]
    return (
        np.concatenate([first[:shared], *(tail[same:] for tail, _ in tails)]),
        np.concatenate([loss_mask[:shared], *(answers[same:] for _, answers in tails)]),
        np.concatenate([np.zeros(shared, dtype=np.int64), *numbers]),
    )


def _placeholders(backbone: Backbone) -> np.ndarray:
    """Return the tokens that stand for pictures and videos."""
    processor = backbone.processor
    video = getattr(processor, "video_token_id", None)
    return np.array([processor.image_token_id, *([] if video is None else [video])])


def _spread(
    tokens: np.ndarray, plain: np.ndarray, loss_mask: np.ndarray, placeholder: np.ndarray
) -> np.ndarray:
    """Carry `loss_mask` from `plain`, with one placeholder a picture, to `tokens`, with pictures written out.

    How a picture is written out is the processor's secret; the text between pictures is the same in both.
    """
    wide, end, stop = np.zeros(len(tokens), dtype=bool), len(tokens), len(plain)
    for cut in (*np.flatnonzero(np.isin(plain, placeholder))[::-1].tolist(), -1):
        piece, mine = plain[cut + 1 : stop], loss_mask[cut + 1 : stop]
        if mine.any():
            starts = np.lib.stride_tricks.sliding_window_view(tokens[:end], len(piece))
            end = int(np.flatnonzero((starts == piece).all(axis=1))[-1])
            wide[end : end + len(piece)] = mine
        stop = cut
    return wide


def _positions(backbone: Backbone, tokens: np.ndarray, segment_ids: np.ndarray, media: Media) -> np.ndarray:
    at = np.arange(len(tokens))
    positions = at[None]
    grids = grids_of(join([media]))
    if grids:
        ids = torch.from_numpy(tokens)[None]
        three, _ = backbone.model.base_model.get_rope_index(
            input_ids=ids, mm_token_type_ids=token_types(backbone.processor, ids), **grids
        )
        positions = three[:, 0].numpy()
    begin = np.maximum.accumulate(np.where(np.diff(segment_ids, prepend=0) != 0, at, 0))
    return positions - np.where(segment_ids > 0, begin - np.argmax(segment_ids > 0), 0)


def _end_of_pictures(tokens: np.ndarray, placeholder: np.ndarray) -> int:
    where = np.flatnonzero(np.isin(tokens, placeholder))
    return int(where[-1]) + 1 if len(where) else 0


def separated(messages: Messages) -> list[Messages]:
    """Return each turn as its own conversation, with all the pictures, if they are in the first turn."""
    system = tuple(message for message in messages if message.role == "system")
    users = [message for message in messages if message.role == "user"]
    answers = [message for message in messages if message.role == "assistant"]
    turns = [message.role for message in messages[len(system) :]]
    seen = [message.role for message in messages if message.images]
    if turns != ["user", "assistant"] * len(users) or seen != ["user"] or not users[0].images:
        return [messages]
    last = max(index for index, part in enumerate(users[0].content) if isinstance(part, Image))
    pictures = users[0].content[: last + 1]
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
    loss_mask = np.zeros(len(tokens), dtype=bool)
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
        loss_mask[inside[: ends[0] + 1] if len(ends) else inside] = True
    if not loss_mask.any():
        raise BlmError("no assistant turn to learn from")
    return tokens, loss_mask


def _end_tokens(backbone: Backbone) -> list[int]:
    return list(np.atleast_1d(backbone.model.generation_config.eos_token_id))


def join(media: Sequence[Media]) -> Inputs:
    """Concatenate media in order."""
    names = dict.fromkeys(name for one in media for name in one)
    return {name: torch.cat([piece for one in media for piece in one.get(name, ())]) for name in names}


def ready(backbone: Backbone, inputs: Inputs) -> Inputs:
    """Return inputs on the model's device, pictures in its precision."""
    device = backbone.model.device
    return backbone.place({name: value.to(device, non_blocking=True) for name, value in inputs.items()})
