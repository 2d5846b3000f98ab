"""Packing: several examples in one sequence, which do not attend to each other.

Exact packing needs an explicit mask and explicit position ids: transformers derives a mask from
positions in some models and call forms, and in others silently lets examples attend to each other.
`require_exact` verifies it for the given model. Shapes: G sequences of L positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.backbone.precision import is_mixed, mixed_precision
from blm.corpora.format.turns import split_turns
from blm.media import load_pixels
from blm.training.sft.prefix_attention import PrefixAttentionLayout, prefix_attention_layout
from blm.training.sft.tokenize import (
    Messages,
    TokenizationConfig,
    TokenizedExample,
    concatenate_vision_inputs,
    tokenize_conversation,
)
from blm.types import BlmError, Image, Message

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Maximum difference of packed and unpacked logits, relative to the largest logit.

Examples that attend to each other exceed it. Rounding errors are smaller: in float32 up to 6e-5 (smol,
on an Intel Xeon with AMX).
"""


@dataclass(frozen=True)
class ExampleBatch:
    """Examples in G padded sequences."""

    ids: tuple[int, ...]
    """Numbers of its examples."""
    inputs: Inputs
    """Arguments of the model's forward, on the CPU."""
    loss_mask: Tensor
    """[G, L] bool, True at the tokens of answers."""
    logit_positions: Tensor
    """[K] positions in the flattened batch whose logits the loss uses: those before the tokens of
    answers. The first token of a sequence is never predicted."""
    tokens: int
    """Tokens without padding."""
    prefix_layout: PrefixAttentionLayout | None = None
    """The attention mask for `use_prefix_attention`; None: a causal mask suffices."""

    @property
    def padding(self) -> float:
        """Share of padding in the batch."""
        return 1 - self.tokens / self.loss_mask.numel()

    def pin_memory(self) -> ExampleBatch:
        """Return a batch whose tensors for the model are in pinned (page-locked) memory."""
        return replace(
            self,
            inputs={name: value.pin_memory() for name, value in self.inputs.items()},
            logit_positions=self.logit_positions.pin_memory(),
            prefix_layout=None if self.prefix_layout is None else self.prefix_layout.pin_memory(),
        )


def collate(backbone: Backbone, examples: Sequence[TokenizedExample], ids: tuple[int, ...]) -> ExampleBatch:
    """Pad examples on the right, one per sequence."""
    return pack(backbone, [[example] for example in examples], ids)


def pack(
    backbone: Backbone, sequences: Sequence[Sequence[TokenizedExample]], ids: tuple[int, ...]
) -> ExampleBatch:
    """Concatenate the examples of each sequence, and pad the sequences on the right.

    A position attends to those earlier positions of its example that belong to the shared prefix or
    to its own turn. Padding attends to padding. Raises BlmError for a model that does not take such
    a mask.
    """
    examples = [example for sequence in sequences for example in sequence]
    shape = (len(sequences), max(sum(map(len, sequence)) for sequence in sequences))
    tokens = np.full(shape, backbone.processor.tokenizer.pad_token_id)
    example_ids = np.full(shape, -1)
    segment_ids = np.zeros(shape, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    axes = max(len(example.position_ids) for example in examples)
    position_ids = np.zeros((axes, *shape), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        end = 0
        for number, example in enumerate(sequence):
            span = (row, slice(end, end := end + len(example)))
            tokens[span] = example.tokens
            example_ids[span] = number
            segment_ids[span] = example.segment_ids
            loss_mask[span] = example.loss_mask
            position_ids[:, *span] = example.position_ids
    plain = all(len(sequence) == 1 for sequence in sequences) and not segment_ids.any()
    inputs = {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": (
            torch.from_numpy((example_ids >= 0).astype(np.int64))
            if plain
            else _attention_mask(backbone, example_ids, segment_ids)
        ),
        "position_ids": torch.from_numpy(position_ids if axes > 1 else position_ids[0]),
    }
    if backbone.has_two_way_pictures:
        inputs["token_type_ids"] = (inputs["input_ids"] == backbone.placeholder_id).long()
    inputs |= concatenate_vision_inputs([example.vision_inputs(backbone) for example in examples])
    layout = None if plain else prefix_attention_layout(example_ids, segment_ids)
    return ExampleBatch(
        ids=ids,
        inputs=inputs,
        loss_mask=torch.from_numpy(loss_mask),
        logit_positions=torch.from_numpy(np.flatnonzero(np.roll(loss_mask, -1, axis=1))),
        tokens=sum(map(len, examples)),
        prefix_layout=layout,
    )


def _attention_mask(backbone: Backbone, example_ids: np.ndarray, segment_ids: np.ndarray) -> Tensor:
    """Return the attention mask [G, 1, L, L] bool, True where attended."""
    require_maskable(backbone)
    same_example = torch.from_numpy(example_ids[:, :, None] == example_ids[:, None, :])
    same_turn_or_prefix = torch.from_numpy(
        (segment_ids[:, :, None] == segment_ids[:, None, :]) | (segment_ids[:, None, :] == 0)
    )
    return same_example.logical_and_(same_turn_or_prefix).tril_()[:, None]


def require_maskable(backbone: Backbone) -> None:
    """Raise BlmError, naming the model, if it takes no mask that separates examples or turns.

    The attention implementation is "sdpa" unless the model was loaded with another one.
    """
    kinds = set(getattr(backbone.decoder.config, "layer_types", None) or ())
    name, remedy = type(backbone.model).__name__, "set pack_length=0 and limits.separate_turns=False"
    if kinds - {"full_attention"}:
        raise BlmError(
            f"{name} has blocks of {sorted(kinds)}; only full attention takes a mask for packing and "
            f"separate_turns: {remedy}"
        )
    if backbone.has_two_way_pictures:
        raise BlmError(
            f"the pictures of {name} attend in both directions, which packing and separate_turns would "
            f"undo: {remedy}"
        )
    kind = backbone.model.config._attn_implementation
    if kind != "sdpa":
        raise BlmError(
            f"this model was loaded with '{kind}' attention; packing and separate_turns need 'sdpa'. "
            f"Load it so, or {remedy}"
        )


@torch.no_grad()
def require_exact(backbone: Backbone) -> float:
    """Return the largest difference of packed and unpacked logits, relative to the largest.

    Three examples in one sequence (images and two turns, one image, none) are compared with plain
    calls of the model on each turn alone. Raises BlmError, naming the model, if the difference
    exceeds TOLERANCE.
    """
    require_maskable(backbone)
    name, precision = type(backbone.model).__name__, backbone.model.dtype
    if is_mixed(backbone.model):
        precision = torch.bfloat16
    was = backbone.model.training
    backbone.model.eval()
    with mixed_precision(backbone.model):
        packed, alone = _probe_logits(backbone)
    backbone.model.train(was)
    error = ((packed - alone).abs().max() / alone.abs().max()).item()
    if not error <= TOLERANCE[precision]:
        raise BlmError(
            f"{name} cannot be packed: examples attend to each other. Its "
            "logits differ from those of single examples by "
            f"{error:.1e} of their size (at most {TOLERANCE[precision]:.0e}). Set pack_length=0"
        )
    return error


def _probe_logits(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Return logits [positions, V] of all turns of the probe conversations, packed and alone."""
    conversations, examples = probe_conversations(backbone), probe_examples(backbone)
    inputs = backbone.place(pack(backbone, [examples], ()).inputs)
    logits = backbone.model(**inputs, use_cache=False).logits[0].float()
    packed, alone = [], []
    for conversation, example, own in zip(
        conversations, examples, logits.split(list(map(len, examples))), strict=True
    ):
        for number, turn in enumerate(split_turns(conversation), start=1):
            attended = (example.segment_ids == 0) | (example.segment_ids == number)
            packed.append(own[torch.from_numpy(attended)])
            pictures = [load_pixels(image) for message in turn for image in message.images]
            plain = backbone.place(backbone.process([backbone.render(turn, prompt=False)], pictures))
            alone.append(backbone.model(**plain, use_cache=False).logits[0].float())
    return torch.cat(packed), torch.cat(alone)


def probe_conversations(backbone: Backbone) -> list[Messages]:
    """Return three short conversations on which packing is checked."""
    ramp = np.arange(112, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :] * 2, np.uint8(64)), axis=-1)
    has_vision = hasattr(backbone.model.base_model, "get_image_features")
    images = [Image(picture), Image(255 - picture)] if has_vision else []
    what = (Message("user", (*images, "What is in the picture?")), Message("assistant", ("a ramp",)))
    more = (Message("user", ("Is it grey?",)), Message("assistant", ("no",)))
    one = (Message("user", (*images[1:], "What is in the picture?")), what[1])
    return [(*what, *more), one, more]


def probe_examples(backbone: Backbone) -> list[TokenizedExample]:
    """Return the probe conversations as examples."""
    config = TokenizationConfig(max_length=1_000_000)
    examples = [
        tokenize_conversation(backbone, conversation, config, None, Counter(), independent=True)
        for conversation in probe_conversations(backbone)
    ]
    return [example for example in examples if example is not None]
