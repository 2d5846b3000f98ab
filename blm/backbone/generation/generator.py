"""Answers token by token: conversations begin and end at any time, and those that fit share a pass.

No call takes longer than one bounded piece of work: `advance` reads one piece of a prompt, `step` makes one
token of the answers of one batch. What fails harms nothing else: a prompt that cannot be read was never among
the answers, and an answer that cannot go on leaves them with its `error`.
Shapes: B answers in a batch, L positions of the longest, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blm.backbone.generation.batch import Answer, Batch, RowCache, fail
from blm.backbone.generation.detokenizer import Detokenizer
from blm.backbone.generation.prefill import Prefill, PrefixReader, Prompt
from blm.backbone.generation.sampling import ScoreError, choose_token, is_greedy, penalise
from blm.backbone.tokenizing import BackboneTokenizer
from blm.types import BlmError, ChatCapacity, Message, Sampling

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone, Inputs

log = logging.getLogger(__name__)
CACHE_TOKENS = 65_536
"""Tokens whose keys and values one request may keep: 2-4 GB at 7 B parameters. No longer context is served,
whatever the model could hold; it is also 16 answers of 4096 tokens, nano's whole context."""
BYTES_PER_TOKEN = 16
"""Text with more bytes per token than this is padding: English has about 4, no language more than 8."""
MAX_IMAGES = 64
"""Pictures in one conversation: a video of 64 frames."""
PIECE_TOKENS = {"cpu": 128}
"""Prompt tokens in one pass, by kind of device."""
PIECE_TOKENS_ELSEWHERE = 512
"""On an accelerator: the prefill budget at which vLLM's chunked prefill starts (`max_num_batched_tokens`)."""
STEP_TOKENS = {"cpu": 8192}
"""Cached tokens in one pass that makes tokens: each of them is read, and copied once, for each new one."""
STEP_TOKENS_ELSEWHERE = 262_144


class Generation:
    """The answers that a model is giving; but for `prepare` and the limits it belongs to one thread."""

    def __init__(
        self, backbone: Backbone, *, piece_tokens: int | None = None, step_tokens: int | None = None
    ) -> None:
        """`piece_tokens`, `step_tokens`: bounds on one call's work, else as measured for the device."""
        device = str(backbone.model.device.type)
        self.backbone = backbone
        self.piece_tokens = piece_tokens or PIECE_TOKENS.get(device, PIECE_TOKENS_ELSEWHERE)
        self.step_tokens = step_tokens or STEP_TOKENS.get(device, STEP_TOKENS_ELSEWHERE)
        self._batches = list[Batch]()
        self._reader = PrefixReader(backbone)
        takes = inspect.signature(backbone.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        config = backbone.model.generation_config
        self._ends = set(np.atleast_1d(config.eos_token_id).tolist())
        self._penalty = config.repetition_penalty or 1.0

    # --- limits: any thread ---

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.backbone.decoder.config.max_position_embeddings, CACHE_TOKENS)

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

    def tokens_per_image(self, width: int, height: int) -> int:
        """Return how many tokens a picture of this size [px] takes, without looking at one."""
        counted = self.backbone.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(counted.num_image_tokens[0])

    # --- prompts: any thread ---

    @cached_property
    def _front(self) -> Backbone:
        """The backbone with a processor of its own, so that no action waits while a prompt is tokenised."""
        front = copy.copy(self.backbone)
        front.processor = copy.deepcopy(self.backbone.processor)
        front._processing = threading.Lock()
        return front

    @cached_property
    def tokenizer(self) -> BackboneTokenizer:
        """What counts tokens beside the model's thread."""
        return BackboneTokenizer(self._front)

    def prepare(self, messages: Sequence[Message], samplings: Sequence[Sampling]) -> Prompt:
        """Tokenise one conversation, with an answer for each sampling; may run in any thread.

        Answers are clamped to what the context holds. Raises BlmError for a prompt that does not fit, before
        it is tokenised where its size alone tells, and as `Backbone.render` and `Backbone.process` do.
        """
        self._require_room(messages)
        inputs = self._front.read([messages])
        length, count = inputs["input_ids"].shape[1], len(samplings)
        room = min(self.context_length, CACHE_TOKENS // count) - length
        if room < 1:
            raise BlmError(
                f"the prompt has {length} tokens; for {count} answer(s) the server holds "
                f"{length + room}, the answer's first token included: use fewer pictures or words"
            )
        clamped = [replace(s, max_tokens=min(s.max_tokens, room)) for s in samplings]
        return Prompt(inputs, positions_of(self._front, inputs), clamped, [0] * count)

    def _require_room(self, messages: Sequence[Message]) -> None:
        capacity = self.capacity
        images = [image.pixels for message in messages for image in message.images]
        size = sum(len(message.text.encode()) for message in messages)
        if size > capacity.max_text_bytes:
            raise BlmError(
                f"the text has {size} bytes; at most {capacity.max_text_bytes} fit into the context of "
                f"{capacity.context_tokens} tokens"
            )
        if len(images) > capacity.max_images:
            raise BlmError(f"{len(images)} pictures; one conversation may have {capacity.max_images}")
        tokens = sum(self.tokens_per_image(p.shape[1], p.shape[0]) for p in images if p is not None)
        if tokens > capacity.context_tokens:
            raise BlmError(
                f"{len(images)} pictures of these sizes take {tokens} tokens; the context holds "
                f"{capacity.context_tokens}: use fewer or smaller ones"
            )

    # --- the model's thread ---

    @property
    def running(self) -> list[Answer]:
        """The answers in progress."""
        return [answer for batch in self._batches for answer in batch.answers]

    def begin(self, prompt: Prompt) -> Prefill:
        """Return a prompt's reading, of which nothing is done yet."""
        return Prefill(self._reader, prompt, self.piece_tokens, self._cache_name)

    def advance(self, prefill: Prefill) -> list[Answer] | None:
        """Read one piece; after the last one return the answers, each with its first token.

        Raises whatever stands in the way; then nothing has changed but the prefill, which is of no more use.
        """
        if prefill.logits is None and not prefill.advance():
            return None
        return self._enter(prefill)

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> list[Answer]:
        """Read conversations in one pass, choose the first token of each answer, and go on with them.

        Raises BlmError as `Backbone.encode` does; when anything fails, nothing has changed.
        """
        inputs = self.backbone.read(conversations)
        limit = self.backbone.decoder.config.max_position_embeddings
        clamped = [
            replace(sampling, max_tokens=max(1, min(sampling.max_tokens, limit - length)))
            for sampling, length in zip(samplings, inputs["attention_mask"].sum(1).tolist(), strict=True)
        ]
        prompt = Prompt(inputs, positions_of(self.backbone, inputs), clamped, range(len(clamped)))
        prefill = Prefill(self._reader, prompt, None, self._cache_name)
        prefill.advance()
        while (answers := self._enter(prefill)) is None:
            pass
        return answers

    @torch.no_grad()
    def step(self) -> None:
        """Choose the next token of every answer of one batch, the batches in turn.

        An answer that ends is not among those running any more; nor is one that fails, which has an `error`.
        When a whole pass fails, its batch does, and no other.
        """
        if not self._batches:
            return
        batch = self._batches.pop(0)
        try:
            self._batches += self._stepped(batch)
        except Exception as error:
            log.exception("a batch of %d answers failed", len(batch.answers))
            fail(batch.answers, error)

    def drop(self, answer: Answer) -> None:
        """Stop an answer that nobody waits for any more."""
        for batch in self._batches:
            if answer in batch.answers:
                answer.ended = "length"
                self._batches.remove(batch)
                self._batches += self._kept(batch)
                return

    def text(self, answer: Answer) -> str:
        """Return what an answer says so far; each new token costs the same, however long it is."""
        if answer.detokenizer is None:
            if not answer.goes_on:
                tokenizer: Any = self.backbone.processor.tokenizer
                return str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
            answer.detokenizer = Detokenizer(self.backbone.processor.tokenizer)
        return answer.detokenizer.text(answer.tokens)

    @torch.no_grad()
    def _enter(self, prefill: Prefill) -> list[Answer] | None:
        """Choose first tokens, copy what was read for one batch of answers a call, then take them all on."""
        if prefill.answers is None:
            prefill.answers = self._first_tokens(prefill)
        staying = [number for number, answer in enumerate(prefill.answers) if answer.goes_on]
        together = max(1, self.step_tokens // prefill.prompt.tokens)
        copied = sum(len(batch.answers) for batch in prefill.copied)
        if some := staying[copied : copied + together]:
            rows = RowCache(prefill.cache, prefill.mask).select([prefill.prompt.rows[n] for n in some])
            prefill.copied.append(Batch([prefill.answers[number] for number in some], rows))
        if copied + len(some) < len(staying):
            return None
        batches = list(self._batches)
        for batch in prefill.copied:
            self._place(batches, batch)
        self._batches = batches
        return prefill.answers

    def _first_tokens(self, prefill: Prefill) -> list[Answer]:
        prompt, mask = prefill.prompt, prefill.mask
        assert prefill.logits is not None
        rows = torch.tensor(prompt.rows, device=mask.device)
        following = prompt.positions.reshape(-1, *mask.shape)[:, :, -1].amax(0) + 1
        answers = [
            Answer(prefill.ids[row][mask[row].bool()], int(following[row]), sampling)
            for row, sampling in zip(prompt.rows, prompt.samplings, strict=True)
        ]
        self._choose(answers, prefill.logits[rows])
        if errors := [answer.error for answer in answers if answer.error is not None]:
            raise errors[0]
        return answers

    def _place(self, batches: list[Batch], entering: Batch) -> None:
        """Join a batch that stays small enough, else be one more."""
        for number, batch in enumerate(batches):
            longest = max(batch.length, entering.length)
            if (len(batch.answers) + len(entering.answers)) * longest <= self.step_tokens:
                batches[number] = batch.joined(entering)
                return
        batches.append(entering)

    def _stepped(self, batch: Batch) -> list[Batch]:
        device, rows = batch.rows.mask.device, batch.rows.longer()
        last = [[answer.tokens[-1], answer.position] for answer in batch.answers]
        tokens, positions = torch.tensor(last, device=device).split(1, dim=1)
        out = self.backbone.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=rows.mask,
            use_cache=True,
            **{self._cache_name: rows.cache},
        )
        batch.rows = rows
        for answer in batch.answers:
            answer.position += 1
        self._choose(batch.answers, out.logits[:, -1])
        return self._kept(batch)

    def _kept(self, batch: Batch) -> list[Batch]:
        """Return a batch without the answers that have ended, in two halves where it has grown too large."""
        rows = [row for row, answer in enumerate(batch.answers) if answer.goes_on]
        try:
            if len(rows) > 1 and len(rows) * batch.length > self.step_tokens:
                half = len(rows) // 2
                return [batch.select(rows[:half]), batch.select(rows[half:])]
            if len(rows) < len(batch.answers):
                return [batch.select(rows)] if rows else []
        except Exception as error:  # no memory for the copy
            fail(batch.answers, error)
            return []
        return [batch]

    def _choose(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Add a token to each answer; one for which none can be chosen has an error from now on."""
        scores = logits.float()
        found = torch.stack([scores.argmax(-1), scores.amax(-1).isfinite()], dim=1).tolist()
        for answer, row, (first, good) in zip(answers, scores, found, strict=True):
            try:
                if not good:
                    raise ScoreError("the model gave scores that are not finite")
                token = self._draw(answer, row) if self._draws(answer.sampling) else first
            except Exception as error:
                fail([answer], error)
                continue
            answer.tokens.append(token)
            if answer.seen is not None:
                answer.seen[token] = True
            if token in self._ends:
                answer.ended = "stop"
            elif len(answer.tokens) >= answer.sampling.max_tokens:
                answer.ended = "length"

    def _penalty_of(self, sampling: Sampling) -> float:
        return self._penalty if sampling.repetition_penalty is None else sampling.repetition_penalty

    def _draws(self, sampling: Sampling) -> bool:
        return not is_greedy(sampling) or self._penalty_of(sampling) != 1.0

    def _draw(self, answer: Answer, scores: Tensor) -> int:
        """Choose from scores [V] as the answer's sampling says."""
        penalty = self._penalty_of(answer.sampling)
        if penalty != 1.0:
            if answer.seen is None:
                answer.seen = torch.zeros_like(scores, dtype=torch.bool)
                answer.seen[answer.prompt] = True
            scores = penalise(scores, answer.seen, penalty)
        return choose_token(scores, answer.sampling, answer.draw)


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
