"""Tokenization: conversations -> token ids, loss mask, segment ids, position ids.

Shapes: L positions. Images are loaded again whenever an example is used: those of a corpus do not
fit into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.backbone.video import Clip, Video, grids_of, load_media, media_of
from blm.corpora.format.turns import Messages, is_learnt, split_turns
from blm.types import BlmError, Image, ImageArray, require_numbers

VisionInputs = Mapping[str, tuple[Tensor, ...]]
"""Model inputs other than tokens ("pixel_values", Qwen's "image_grid_thw", ..).

Or cached vision features, in reading order.
"""


@dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """How a conversation becomes a training example."""

    separate_turns: bool = True
    """Prefix attention for conversations whose turns are marked as independent: each turn attends
    to the images and to itself, but not to other turns. Each turn is trained exactly as if it were
    asked alone, and the images are encoded once. All other conversations stay whole, and so do
    those without images or with images in later turns."""
    max_length: int = 2048
    """Maximum length of an example [tokens].
    Longer conversations lose their last turns, but never an image."""
    max_pixels: int | None = None
    """Maximum number of pixels of an image; larger images are scaled down first."""

    def __post_init__(self) -> None:
        require_numbers(self, max_length=(2, 10**9), max_pixels=(1, 10**12))
        if self.max_length < 2 or (self.max_pixels is not None and self.max_pixels < 1):
            raise BlmError(f"{self}: max_length must be at least 2, and max_pixels positive")


@dataclass(frozen=True)
class ProcessorInput:
    """Images, videos, and the text with their placeholders, for the processor."""

    text: str
    images: tuple[Image | Clip, ...]
    root: Path | None
    """Folder that image paths are relative to."""
    max_pixels: int | None

    def process(self, backbone: Backbone) -> tuple[Inputs, int]:
        """Load the images and process them; return the inputs and the number of scaled images."""
        whole, clips = load_media(self.images, self.root)
        images = [limit_pixels(picture, self.max_pixels) for picture in whole]
        count = sum(small is not picture for small, picture in zip(images, whole, strict=True))
        videos = list[Video]()
        for clip in clips:
            frames = [limit_pixels(frame, self.max_pixels) for frame in clip.frames]
            count += sum(small.shape != clip.frames.shape[1:] for small in frames)
            videos.append(Video(np.stack(frames), clip.times))
        return backbone.process([self.text], images, videos=videos), count


class FeatureReader(Protocol):
    """Reads cached vision features when an example is used."""

    def read(self) -> VisionInputs: ...


@dataclass(frozen=True)
class LoadedInputs:
    """Vision inputs in memory."""

    inputs: VisionInputs

    def read(self) -> VisionInputs:
        return self.inputs


@dataclass(frozen=True)
class TokenizedExample:
    """One conversation, ready to train on: all its turns after one copy of its images."""

    tokens: np.ndarray
    """[L] int64 token ids."""
    loss_mask: np.ndarray
    """[L] bool, True at the tokens of answers, end tokens included."""
    segment_ids: np.ndarray
    """[L] int64: 0 for the shared prefix, which all later positions attend to; j > 0 for turn j,
    which only turn j attends to."""
    position_ids: np.ndarray
    """[1, L] int64, or [3, L] for M-RoPE.

    Those of each turn continue from the end of the shared prefix.
    """
    processor_input: ProcessorInput | None = None
    """None if it has no images, or if their features are cached."""
    features: FeatureReader | None = None
    """Reads the cached vision features of its images; None if they are not cached."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shows_video(self) -> bool:
        """Whether the vision tower runs on a video for this example."""
        source = self.processor_input
        return source is not None and any(isinstance(part, Clip) for part in source.images)

    def vision_inputs(self, backbone: Backbone) -> VisionInputs:
        """Return the cached features of its images, or load the images and process them."""
        if self.features is not None:
            return self.features.read()
        if self.processor_input is None:
            return {}
        return vision_inputs_of(self.processor_input.process(backbone)[0])


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Let torch use one thread: for thousands of tiny tensors, more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tokenize_conversation(
    backbone: Backbone,
    messages: Messages,
    config: TokenizationConfig,
    root: Path | None,
    counts: Counter[str],
    *,
    independent: bool = False,
    keep_pixels: bool = False,
) -> TokenizedExample | None:
    """Tokenise one conversation; None if even its first turn that is learnt is too long.

    `independent` tells whether its turns may be separated. `counts` records the outcome. With
    `keep_pixels` the example holds its images as the processor made them, for an example that is used
    at once; by default they are loaded again.
    """
    turns = split_turns(messages) if config.separate_turns and independent else [messages]
    images = media_of(turns[0], backbone.videos_as)
    source = ProcessorInput(backbone.render(turns[0], prompt=False), images, root, config.max_pixels)
    inputs, changed = source.process(backbone)
    tokens, loss_mask, segment_ids = _segments(backbone, inputs["input_ids"][0].numpy(), turns)
    if len(tokens) > config.max_length:
        counts["turns cut"] += 1
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        if any(is_learnt(message) for message in messages[:last]):
            return tokenize_conversation(
                backbone,
                messages[:last],
                config,
                root,
                counts,
                independent=independent,
                keep_pixels=keep_pixels,
            )
        counts["dropped, too long"] += 1
        return None
    counts["kept"] += 1
    if changed:
        counts["pictures shrunk"] += changed
    vision = vision_inputs_of(inputs) if images else {}
    position_ids = _position_ids(backbone, tokens, segment_ids, vision)
    example = TokenizedExample(tokens, loss_mask, segment_ids, position_ids, source if images else None)
    return replace(example, features=LoadedInputs(vision)) if keep_pixels and images else example


def limit_pixels(pixels: ImageArray, max_pixels: int | None) -> ImageArray:
    """Scale an image [height, width, 3] down to at most `max_pixels`.

    A smaller one is returned unchanged.
    """
    height, width = pixels.shape[:2]
    if max_pixels is None or height * width <= max_pixels:
        return pixels
    scale = (max_pixels / (height * width)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC))


def vision_inputs_of(inputs: Inputs) -> VisionInputs:
    """Return the vision inputs among the processor's outputs for one conversation."""
    of_text = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    return {name: (value,) for name, value in inputs.items() if name not in of_text}


def _segments(
    backbone: Backbone, first: np.ndarray, turns: Sequence[Messages]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return token ids, loss mask and segment ids [L] of turns behind one shared prefix.

    `first` are the token ids of turn 0, with all placeholders of its images. The tokens with
    which all turns begin form the prefix. It ends before the last token that precedes an answer:
    that token predicts the answer's first one, so both must belong to the same turn.
    """
    placeholders = _placeholders(backbone)
    plain = [_tokens_and_loss_mask(backbone, turn) for turn in turns]  # with one placeholder per image
    loss_mask = _expand_loss_mask(first, *plain[0], placeholders)
    if len(turns) == 1:
        return first, loss_mask, np.zeros(len(first), dtype=np.int64)
    tails = []
    for tokens, answers in plain:
        cut = _end_of_pictures(tokens, placeholders)
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
    """Return the ids of the tokens that stand for images and videos."""
    processor = backbone.processor
    video = getattr(processor, "video_token_id", None)
    return np.array([processor.image_token_id, *([] if video is None else [video])])


def _expand_loss_mask(
    tokens: np.ndarray, plain: np.ndarray, loss_mask: np.ndarray, placeholders: np.ndarray
) -> np.ndarray:
    """Transfer a loss mask from `plain`, with one placeholder per image, to `tokens`.

    `tokens` has all placeholders. Only the processor knows how many placeholders it writes for an
    image, and which tokens around them; the text between two images is the same in both.
    """
    expanded, end, stop = np.zeros(len(tokens), dtype=bool), len(tokens), len(plain)
    for cut in (*np.flatnonzero(np.isin(plain, placeholders))[::-1].tolist(), -1):
        text, mask = plain[cut + 1 : stop], loss_mask[cut + 1 : stop]
        if mask.any():
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:end], len(text))
            found = np.flatnonzero((windows == text).all(axis=1))
            if not len(found):
                raise BlmError(
                    "an answer cannot be found between the pictures: the processor's text around a picture "
                    "changes the tokens beside it. Put all pictures into the first turn"
                )
            end = int(found[-1])
            expanded[end : end + len(text)] = mask
        stop = cut
    return expanded


def _position_ids(
    backbone: Backbone, tokens: np.ndarray, segment_ids: np.ndarray, vision_inputs: VisionInputs
) -> np.ndarray:
    """Return position ids [1 or 3, L]; each turn continues from the end of the shared prefix."""
    ids = torch.from_numpy(tokens)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= grids_of(concatenate_vision_inputs([vision_inputs]))
    positions = backbone.position_ids(inputs).reshape(-1, len(tokens)).numpy()
    index = np.arange(len(tokens))
    begin = np.maximum.accumulate(np.where(np.diff(segment_ids, prepend=0) != 0, index, 0))
    return positions - np.where(segment_ids > 0, begin - np.argmax(segment_ids > 0), 0)


def _end_of_pictures(tokens: np.ndarray, placeholders: np.ndarray) -> int:
    where = np.flatnonzero(np.isin(tokens, placeholders))
    return int(where[-1]) + 1 if len(where) else 0


def _tokens_and_loss_mask(backbone: Backbone, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and loss mask [L] of a conversation, with one placeholder per image.

    An answer is the text by which the rendered conversation with it is longer than the prompt
    before it, up to the first end token. This works for any chat template that does not rewrite
    earlier turns. Answers without loss are context. Raises BlmError for another template, and for
    a conversation without an answer to learn.
    """
    text = backbone.render(messages, prompt=False)
    special = backbone.special_token_arguments(text)
    tokenizer = backbone.processor.tokenizer.backend_tokenizer  # ten times as fast as a call of its owner
    encoding = tokenizer.encode(text, **special)
    tokens, offsets = np.asarray(encoding.ids), np.asarray(encoding.offsets)
    loss_mask = np.zeros(len(tokens), dtype=bool)
    for index, message in enumerate(messages):
        if not is_learnt(message):
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
        raise BlmError("the conversation has no assistant turn to train on")
    return tokens, loss_mask


def _end_tokens(backbone: Backbone) -> list[int]:
    return list(np.atleast_1d(backbone.model.generation_config.eos_token_id))


def concatenate_vision_inputs(parts: Sequence[VisionInputs]) -> Inputs:
    """Concatenate the vision inputs of several conversations, in order."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([value for part in parts for value in part.get(name, ())]) for name in names}
