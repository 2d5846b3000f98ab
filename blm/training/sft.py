"""Stage I: supervised fine-tuning of a backbone on conversations, with loss on the assistant's tokens only.

Everything is tokenised once, before training; pictures wait as uint8. The language head runs on answer
positions only, which are few beside the picture tokens. Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from blm.backbone import Backbone, Inputs
from blm.backbone.prompt import load_pixels
from blm.training.loop import LoopConfig, run_loop
from blm.types import BlmError, Image, Message

Messages = tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    loop: LoopConfig
    vision_scale: float = 1.0
    """Times `loop.lr` is the rate of the vision tower; 0 freezes it. The same for the two below."""
    projector_scale: float = 1.0
    language_scale: float = 1.0
    """Language model, embeddings and head."""
    separate_turns: bool = True
    """Let a turn see the pictures and its own question, not the other turns: each is then trained exactly as
    it is asked alone, while the pictures are read once. Set it to False for dialogues that refer back."""
    max_length: int = 2048
    """Rows longer than this [tokens] lose their last turns; pictures are never cut."""

    def rate(self, name: str) -> float:
        """Return the peak learning rate of a parameter, by its name in any Llava- or Qwen-VL-like model."""
        if "projector" in name or "merger" in name:
            return self.loop.lr * self.projector_scale
        vision = "vision_tower" in name or "visual" in name
        return self.loop.lr * (self.vision_scale if vision else self.language_scale)


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


@dataclass(frozen=True)
class RowBatch:
    ids: tuple[int, ...]
    """Indices of conversations."""
    inputs: Inputs
    learn: Tensor
    """[B, L] bool."""


def train_stage1(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    config: Stage1Config,
    out: Path,
    *,
    root: Path | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
) -> Counter[str]:
    """Train `backbone` in place and save it to `out/backbone`; return how many rows it kept, cut and dropped.

    Image paths are relative to `root`. Raises BlmError naming the conversation that cannot be used.
    """
    counts: Counter[str] = Counter()
    with _one_thread():
        rows = _read(backbone, conversations, config, root, counts)
    if not rows:
        raise BlmError(f"no conversation can be trained on: {dict(counts)}")
    model, size = backbone.model, config.loop.batch_size

    @lru_cache(2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((config.loop.seed, epoch)).permutation(len(rows))

    def next_batch(step: int) -> RowBatch:
        places = range(step * size, (step + 1) * size)
        ids = tuple(int(order(place // len(rows))[place % len(rows)]) for place in places)
        return collate(backbone, [rows[index] for index in ids], ids)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.rate(name) > 0)

    def loss(batch: RowBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        model.train()
        return answer_loss(backbone, batch)

    def evaluate(step: int) -> Mapping[str, float]:
        model.eval()
        return on_eval(step) if on_eval is not None else {}

    run_loop(model, loss, next_batch, config.loop, out, learning_rate=config.rate, on_eval=evaluate)
    model.eval()
    backbone.save(out / "backbone")
    return counts


def _read(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    config: Stage1Config,
    root: Path | None,
    counts: Counter[str],
) -> list[Row]:
    rows = []
    for index, messages in enumerate(track(conversations, "reading", console=Console(stderr=True))):
        try:
            row = make_row(backbone, tuple(messages), config, root, counts)
        except BlmError as error:
            raise BlmError(f"conversation {index}: {error}") from error
        if row is not None:
            rows.append(row)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: handing each to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def answer_loss(backbone: Backbone, batch: RowBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the mean cross-entropy of the answers: the model's own loss with labels -100 elsewhere."""
    inputs = backbone.place(batch.inputs)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = _unpacked(backbone, inputs["pixel_values"]).to(backbone.model.dtype)
    learn = batch.learn.to(inputs["input_ids"].device)[:, 1:]
    hidden = backbone.model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = backbone.model.get_output_embeddings()(hidden[:, :-1][learn]).float()
    targets = inputs["input_ids"][:, 1:][learn]
    return F.cross_entropy(logits, targets), {
        "token_accuracy": (logits.argmax(-1) == targets).float().mean(),
        "answer_tokens": float(len(targets)),
    }


def make_row(
    backbone: Backbone, messages: Messages, config: Stage1Config, root: Path | None, counts: Counter[str]
) -> Row | None:
    """Tokenise one conversation; None if even its first turn is too long. `counts` says what happened."""
    turns = _separated(messages) if config.separate_turns else [messages]
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
    if len(tokens) > config.max_length:
        counts["turns cut"] += 1
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        if any(message.role == "assistant" for message in messages[:last]):
            return make_row(backbone, messages[:last], config, root, counts)
        counts["dropped, too long"] += 1
        return None
    counts["kept"] += 1
    numbers = [np.full(len(tail), number) for number, (tail, _) in enumerate(tails, start=len(tails) > 1)]
    return Row(
        tokens,
        np.concatenate([learn[:shared], *(answers for _, answers in tails)]),
        np.concatenate([np.zeros(shared, dtype=np.int64), *numbers]),
        _packed(backbone, read["pixel_values"]) if images else None,
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


def collate(backbone: Backbone, rows: Sequence[Row], ids: tuple[int, ...]) -> RowBatch:
    """Pad rows on the right; a batch with separated turns gets its own positions and attention mask."""
    shape = (len(rows), max(len(row.tokens) for row in rows))
    tokens = np.full(shape, backbone.processor.tokenizer.pad_token_id, dtype=np.int64)
    learn, valid, branch = (np.zeros(shape, dtype=kind) for kind in (bool, np.int64, np.int64))
    for at, row in enumerate(rows):
        place = (at, slice(len(row.tokens)))
        tokens[place], learn[place], branch[place], valid[place] = row.tokens, row.learn, row.branch, 1
    inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(valid)}
    pixels = [row.pixels for row in rows if row.pixels is not None]
    grids = [row.grid for row in rows if row.grid is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if grids:
        inputs["image_grid_thw"] = torch.cat(grids)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.processor.image_token_id).long()
    if branch.any():
        inputs |= _separation(backbone, inputs, branch)
    return RowBatch(ids, inputs, torch.from_numpy(learn))


def _separation(backbone: Backbone, inputs: Inputs, branch: np.ndarray) -> Inputs:
    """Return the attention mask and positions under which turns of one row do not see each other.

    A turn attends to what is shared (branch 0) and to itself, and counts on from the end of what is shared.
    Padding comes last, so the causal rule alone hides it.
    """
    if backbone.model.config._attn_implementation != "sdpa":
        raise BlmError("separate_turns needs a model loaded with sdpa attention; set separate_turns=False")
    at = np.arange(branch.shape[1])
    begins = np.diff(branch, axis=1, prepend=0) != 0
    begin = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    shared = np.argmax(branch > 0, axis=1)[:, None]
    back = torch.from_numpy(np.where(branch > 0, begin - shared, 0))
    positions = torch.from_numpy(at).expand_as(back)
    if "image_grid_thw" in inputs:  # three rows: M-RoPE
        positions, _ = backbone.model.base_model.get_rope_index(
            **{name: value for name, value in inputs.items() if name != "pixel_values"}
        )
    mine = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    mask = torch.from_numpy(mine & (at[:, None] >= at[None, :]))[:, None]
    return {"position_ids": positions - back, "attention_mask": mask}


def _packed(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Return normalised pixels as uint8, a quarter of the memory; unchanged where that would lose any."""
    mean, std = _normalisation(backbone, pixels)
    raw = ((pixels.reshape(len(pixels), 3, -1) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    raw = raw.reshape(pixels.shape)
    return raw if torch.allclose(_unpacked(backbone, raw), pixels, atol=1e-5) else pixels


def _unpacked(backbone: Backbone, pixels: Tensor) -> Tensor:
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
