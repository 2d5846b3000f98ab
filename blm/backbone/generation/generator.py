"""Text generation with continuous batching and chunked prefill.

Conversations begin and end at any time; sequences that fit share a forward pass. Each call does one
bounded piece of work: `advance` prefills one chunk of a prompt, `step` generates one token for one
batch. A failure affects only its own request: an invalid prompt never joins a batch, and a
sequence that cannot continue leaves its batch with its `error` set. Shapes: B sequences in a batch,
L positions of the longest, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from blm.backbone.generation.batch import Batch, GeneratedSequence, KeyValueCache, cache_argument, fail
from blm.backbone.generation.detokenizer import Detokenizer
from blm.backbone.generation.prefill import ChunkRunner, Prefill, Prompt
from blm.backbone.generation.sampling import TokenChooser
from blm.backbone.model import MultimodalModel
from blm.backbone.tokenizing import BackboneTokenizer
from blm.types import BlmError, ChatCapacity, Message, Sampling

log = logging.getLogger(__name__)
CACHE_TOKENS = 65_536
"""Maximum number of tokens in the key-value cache of one request: 2-4 GB at 7 B parameters.

It bounds the context length even of models that support more. It also allows 16 answers of 4096
tokens, nano's whole context.
"""
BYTES_PER_TOKEN = 16
"""Maximum bytes of text per token, for bounds on a request: about 4 in English, at most 8."""
MAX_IMAGES = 64
"""Maximum number of images in one conversation: a video of 64 frames."""
PIECE_TOKENS = {"cpu": 128}
"""Prompt tokens in one prefill pass, by device type."""
PIECE_TOKENS_ELSEWHERE = 512
"""On an accelerator: the prefill budget at which vLLM's chunked prefill starts
(`max_num_batched_tokens`)."""
STEP_TOKENS = {"cpu": 8192}
"""Cached tokens in one decoding pass, which reads and copies each of them for each new token."""
STEP_TOKENS_ELSEWHERE = 262_144


class Generation:
    """The sequences that a model is generating.

    Other threads may use only `prepare` and the limits.
    """

    def __init__(
        self, backbone: MultimodalModel, *, piece_tokens: int | None = None, step_tokens: int | None = None
    ) -> None:
        """Limit the tokens of one prefill pass and of one decoding pass; None: by device type."""
        device = str(backbone.model.device.type)
        self.backbone = backbone
        self.piece_tokens = piece_tokens or PIECE_TOKENS.get(device, PIECE_TOKENS_ELSEWHERE)
        self.step_tokens = step_tokens or STEP_TOKENS.get(device, STEP_TOKENS_ELSEWHERE)
        self._batches = list[Batch]()
        self._chunk_runner = ChunkRunner(backbone)
        self._cache_name = cache_argument(backbone.model)
        config = backbone.model.generation_config
        end_tokens = np.atleast_1d(config.eos_token_id).tolist()
        self._chooser = TokenChooser(end_tokens, config.repetition_penalty or 1.0)

    # --- limits: any thread ---

    @property
    def context_length(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        return min(self.backbone.decoder.config.max_position_embeddings, CACHE_TOKENS)

    @cached_property
    def capacity(self) -> ChatCapacity:
        """Limits on one request."""
        longest = max(len(token.encode()) for token in self.backbone.processor.tokenizer.get_vocab())
        image_tokens = self.tokens_per_image(1, 1)
        return ChatCapacity(
            context_tokens=self.context_length,
            image_tokens=image_tokens,
            max_text_bytes=min(longest, BYTES_PER_TOKEN) * self.context_length,
            max_images=min(self.context_length // image_tokens, MAX_IMAGES),
        )

    def tokens_per_image(self, width: int, height: int) -> int:
        """Return the number of tokens of an image of this size [px]."""
        counted = self.backbone.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(counted.num_image_tokens[0])

    # --- prompts: any thread ---

    @cached_property
    def _tokenizing_backbone(self) -> MultimodalModel:
        """The backbone with a separate processor, so that tokenization never delays an action."""
        backbone = copy.copy(self.backbone)
        backbone.processor = copy.deepcopy(self.backbone.processor)
        backbone._processing = threading.Lock()
        return backbone

    @cached_property
    def tokenizer(self) -> BackboneTokenizer:
        """The tokenizer for threads other than the model's."""
        return BackboneTokenizer(self._tokenizing_backbone)

    def prepare(self, messages: Sequence[Message], samplings: Sequence[Sampling]) -> Prompt:
        """Tokenise one conversation, to be answered once for each sampling; may run in any thread.

        `max_tokens` is reduced to the room that the context leaves. Raises BlmError for a prompt
        that does not fit (before tokenization where its size alone shows it), and as
        `Backbone.render` and `Backbone.process` do.
        """
        self._require_room(messages)
        inputs = self._tokenizing_backbone.read([messages])
        length, count = inputs["input_ids"].shape[1], len(samplings)
        room = min(self.context_length, CACHE_TOKENS // count) - length
        if room < 1:
            raise BlmError(
                f"the prompt has {length} tokens; for {count} answer(s) the server holds "
                f"{length + room}, the answer's first token included; use fewer images or words"
            )
        clamped = [replace(s, max_tokens=min(s.max_tokens, room)) for s in samplings]
        return Prompt(inputs, self.backbone.position_ids(inputs), clamped, [0] * count)

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
            raise BlmError(
                f"the conversation has {len(images)} images; at most {capacity.max_images} are allowed"
            )
        tokens = sum(self.tokens_per_image(p.shape[1], p.shape[0]) for p in images if p is not None)
        if tokens > capacity.context_tokens:
            raise BlmError(
                f"{len(images)} images of these sizes take {tokens} tokens; the context holds "
                f"{capacity.context_tokens}: use fewer or smaller ones"
            )

    # --- the model's thread ---

    @property
    def running(self) -> list[GeneratedSequence]:
        """The sequences that are being generated."""
        return [sequence for batch in self._batches for sequence in batch.sequences]

    def begin(self, prompt: Prompt) -> Prefill:
        """Return the prefill of a prompt, not yet started."""
        return Prefill(self._chunk_runner, prompt, self.piece_tokens, self._cache_name)

    def advance(self, prefill: Prefill) -> list[GeneratedSequence] | None:
        """Run one piece of a prefill; after the last, return its sequences with their first tokens.

        On an error only the prefill has changed; it cannot be used any more.
        """
        if prefill.logits is None and not prefill.advance():
            return None
        return self._enter(prefill)

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> list[GeneratedSequence]:
        """Prefill conversations in one pass, and add their answers to a batch.

        The first token of each answer is chosen here. Raises BlmError as `Backbone.encode` does. On
        any error no running sequence has changed.
        """
        inputs = self.backbone.read(conversations)
        limit = self.backbone.decoder.config.max_position_embeddings
        clamped = [
            replace(sampling, max_tokens=max(1, min(sampling.max_tokens, limit - length)))
            for sampling, length in zip(samplings, inputs["attention_mask"].sum(1).tolist(), strict=True)
        ]
        prompt = Prompt(inputs, self.backbone.position_ids(inputs), clamped, range(len(clamped)))
        prefill = Prefill(self._chunk_runner, prompt, None, self._cache_name)
        prefill.advance()
        while (sequences := self._enter(prefill)) is None:
            pass
        return sequences

    @torch.no_grad()
    def step(self) -> None:
        """Generate the next token of every sequence of one batch; batches take turns (round robin).

        A sequence that ends, or fails with an `error`, leaves its batch. When a whole pass fails,
        all sequences of its batch fail, and no others.
        """
        if not self._batches:
            return
        batch = self._batches.pop(0)
        try:
            self._batches += self._decode_step(batch)
        except Exception as error:
            log.exception("a batch of %d answers failed", len(batch.sequences))
            fail(batch.sequences, error)

    def drop(self, sequence: GeneratedSequence) -> None:
        """Stop a sequence whose client has left."""
        for batch in self._batches:
            if sequence in batch.sequences:
                sequence.ended = "length"
                self._batches.remove(batch)
                self._batches += self._without_ended(batch)
                return

    def text(self, sequence: GeneratedSequence) -> str:
        """Return the text generated so far; the cost of a call does not grow with the text."""
        if sequence.detokenizer is None:
            if not sequence.is_running:
                tokenizer: Any = self.backbone.processor.tokenizer
                return str(tokenizer.decode(sequence.tokens, skip_special_tokens=True))
            sequence.detokenizer = Detokenizer(self.backbone.processor.tokenizer)
        return sequence.detokenizer.text(sequence.tokens)

    @torch.no_grad()
    def _enter(self, prefill: Prefill) -> list[GeneratedSequence] | None:
        """Choose first tokens, copy the key-value cache batch by batch, and join the batches."""
        if prefill.sequences is None:
            prefill.sequences = self._first_tokens(prefill)
        running = [number for number, sequence in enumerate(prefill.sequences) if sequence.is_running]
        batch_size = max(1, self.step_tokens // prefill.prompt.tokens)
        copied = sum(len(batch.sequences) for batch in prefill.copied)
        if chosen := running[copied : copied + batch_size]:
            whole = KeyValueCache(prefill.cache, prefill.mask)
            cache = whole.select([prefill.prompt.rows[number] for number in chosen])
            prefill.copied.append(Batch([prefill.sequences[number] for number in chosen], cache))
        if copied + len(chosen) < len(running):
            return None
        batches = list(self._batches)
        for batch in prefill.copied:
            self._join(batches, batch)
        self._batches = batches
        return prefill.sequences

    def _first_tokens(self, prefill: Prefill) -> list[GeneratedSequence]:
        prompt, mask = prefill.prompt, prefill.mask
        assert prefill.logits is not None
        rows = torch.tensor(prompt.rows, device=mask.device)
        # The largest position is not always the last: Qwen2.5-VL gives late patches of a video larger ones.
        following = prompt.positions.reshape(-1, *mask.shape).amax((0, 2)) + 1
        sequences = [
            GeneratedSequence(prefill.ids[row][mask[row].bool()], int(following[row]), sampling)
            for row, sampling in zip(prompt.rows, prompt.samplings, strict=True)
        ]
        self._chooser.choose(sequences, prefill.logits[rows])
        if errors := [sequence.error for sequence in sequences if sequence.error is not None]:
            raise errors[0]
        return sequences

    def _join(self, batches: list[Batch], entering: Batch) -> None:
        """Merge a new batch into the first that stays within `step_tokens`, or append it."""
        for number, batch in enumerate(batches):
            longest = max(batch.length, entering.length)
            if (len(batch.sequences) + len(entering.sequences)) * longest <= self.step_tokens:
                batches[number] = batch.joined(entering)
                return
        batches.append(entering)

    def _decode_step(self, batch: Batch) -> list[Batch]:
        """Generate one token for each sequence; return the remaining batch or batches."""
        device, cache = batch.cache.mask.device, batch.cache.extended()
        last = [[sequence.tokens[-1], sequence.position] for sequence in batch.sequences]
        tokens, positions = torch.tensor(last, device=device).split(1, dim=1)  # one copy to the device
        out = self.backbone.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=cache.mask,
            use_cache=True,
            **{self._cache_name: cache.cache},
        )
        batch.cache = cache
        for sequence in batch.sequences:
            sequence.position += 1
        self._chooser.choose(batch.sequences, out.logits[:, -1])
        return self._without_ended(batch)

    def _without_ended(self, batch: Batch) -> list[Batch]:
        """Return a batch without its ended sequences, split in two if it has grown too large."""
        rows = [row for row, sequence in enumerate(batch.sequences) if sequence.is_running]
        try:
            if len(rows) > 1 and len(rows) * batch.length > self.step_tokens:
                half = len(rows) // 2
                return [batch.select(rows[:half]), batch.select(rows[half:])]
            if len(rows) < len(batch.sequences):
                return [batch.select(rows)] if rows else []
        except Exception as error:  # the copy may run out of memory
            fail(batch.sequences, error)
            return []
        return [batch]
