"""Rows -> batches: several rows in one sequence, under a mask and positions that make each as if alone.

Exact packing needs both, spelt out: transformers builds a mask from positions in some models and call forms
and silently lets rows see each other in others. `require_exact` proves it for the model at hand.
Shapes: G sequences of L positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.media import load_pixels
from blm.training.sft.prefix_attention import Turns, lay_out
from blm.training.sft.tokenize import Limits, Messages, Row, join, make_row, ready, separated
from blm.types import BlmError, Image, Message

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of packed and unpacked logits, relative to the largest logit: rounding stays a tenth
below it, rows that see each other lie above."""


@dataclass(frozen=True)
class ExampleBatch:
    ids: tuple[int, ...]
    """Indices of conversations."""
    inputs: Inputs
    loss_mask: Tensor
    """[G, L] bool."""
    before_answers: Tensor
    """[K] positions in the flattened batch whose next token is learnt; the first token of a row never is."""
    tokens: int
    """Positions that are no padding."""
    turns: Turns | None = None
    """The same as the attention mask, for a decoder that is `turned`; None: a causal mask says it."""

    @property
    def padding(self) -> float:
        """Share of padding in the batch."""
        return 1 - self.tokens / self.loss_mask.numel()

    def pin_memory(self) -> ExampleBatch:
        """Copy what the model reads to page-locked memory, from which the host need not wait for a copy."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        turns = None if self.turns is None else self.turns.pin_memory()
        return replace(self, inputs=inputs, turns=turns, before_answers=self.before_answers.pin_memory())


def collate(backbone: Backbone, rows: Sequence[Row], ids: tuple[int, ...]) -> ExampleBatch:
    """Pad rows on the right, one a sequence."""
    return pack(backbone, [[row] for row in rows], ids)


def pack(backbone: Backbone, groups: Sequence[Sequence[Row]], ids: tuple[int, ...]) -> ExampleBatch:
    """Lay each group of rows end to end in one sequence and pad these on the right.

    A position attends to earlier positions of its row that are shared or of its own turn. Padding attends to
    padding. Raises BlmError for a model that does not take such a mask.
    """
    rows = [row for group in groups for row in group]
    shape = (len(groups), max(sum(map(len, group)) for group in groups))
    tokens = np.full(shape, backbone.processor.tokenizer.pad_token_id)
    owner, segment_ids = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=bool)
    positions = np.zeros((max(len(row.positions) for row in rows), *shape), dtype=np.int64)
    for line, group in enumerate(groups):
        end = 0
        for number, row in enumerate(group):
            place = (line, slice(end, end := end + len(row)))
            tokens[place], owner[place] = row.tokens, number
            loss_mask[place], segment_ids[place] = row.loss_mask, row.segment_ids
            positions[:, *place] = row.positions
    alone = all(len(group) == 1 for group in groups) and not segment_ids.any()
    mask = torch.from_numpy((owner >= 0).astype(np.int64)) if alone else _mask(backbone, owner, segment_ids)
    places = torch.from_numpy(positions if len(positions) > 1 else positions[0])
    inputs = {"input_ids": torch.from_numpy(tokens), "attention_mask": mask, "position_ids": places}
    inputs |= join([row.media(backbone) for row in rows])
    turns = None if alone else lay_out(owner, segment_ids)
    before_answers = torch.from_numpy(np.flatnonzero(np.roll(loss_mask, -1, axis=1)))
    return ExampleBatch(ids, inputs, torch.from_numpy(loss_mask), before_answers, sum(map(len, rows)), turns)


def _mask(backbone: Backbone, owner: np.ndarray, segment_ids: np.ndarray) -> Tensor:
    """Return the attention mask [G, 1, L, L], True where attended."""
    kind = backbone.model.config._attn_implementation
    if kind != "sdpa":
        raise BlmError(
            f"this model was loaded with '{kind}' attention; packing and separate_turns need 'sdpa'. "
            "Load it so, or set pack_length=0 and separate_turns=False"
        )
    same = torch.from_numpy(owner[:, :, None] == owner[:, None, :])
    turn = torch.from_numpy(
        (segment_ids[:, :, None] == segment_ids[:, None, :]) | (segment_ids[:, None, :] == 0)
    )
    return same.logical_and_(turn).tril_()[:, None]


@torch.no_grad()
def require_exact(backbone: Backbone) -> float:
    """Return the error of packing with this model: the largest difference of logits, relative to their size.

    Three rows in one sequence, with pictures and two turns, with one picture, and with none, are compared
    with plain calls of the model on each turn alone. Raises BlmError, naming the model, if the error is above
    the tolerance of its precision (TOLERANCE).
    """
    kinds = set(getattr(backbone.decoder.config, "layer_types", None) or ())
    name, precision = type(backbone.model).__name__, backbone.model.dtype
    if kinds - {"full_attention"}:
        raise BlmError(f"{name} has blocks of {sorted(kinds)}; only full attention takes a mask for packing")
    was = backbone.model.training
    backbone.model.eval()
    packed, alone = _probe_logits(backbone)
    backbone.model.train(was)
    error = ((packed - alone).abs().max() / alone.abs().max()).item()
    if not error <= TOLERANCE[precision]:
        raise BlmError(
            f"{name} cannot be packed: rows see each other. Its logits differ from those of rows alone by "
            f"{error:.1e} of their size (at most {TOLERANCE[precision]:.0e}). Set pack_length=0"
        )
    return error


def _probe_logits(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Return logits [positions, V] of all turns of the probe, packed and alone."""
    talks, rows = probe_talks(backbone), probe_rows(backbone)
    inputs = ready(backbone, pack(backbone, [rows], ()).inputs)
    logits = backbone.model(**inputs, use_cache=False).logits[0].float().split([len(row) for row in rows])
    packed, alone = [], []
    for talk, row, mine in zip(talks, rows, logits, strict=True):
        for number, turn in enumerate(separated(talk), start=1):
            packed.append(mine[torch.from_numpy((row.segment_ids == 0) | (row.segment_ids == number))])
            pictures = [load_pixels(image) for message in turn for image in message.images]
            plain = backbone.place(backbone.process([backbone.render(turn, prompt=False)], pictures))
            alone.append(backbone.model(**plain, use_cache=False).logits[0].float())
    return torch.cat(packed), torch.cat(alone)


def probe_talks(backbone: Backbone) -> list[Messages]:
    """Return three short conversations that tell whether packing is exact."""
    ramp = np.arange(112, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :] * 2, np.uint8(64)), axis=-1)
    sees = hasattr(backbone.model.base_model, "get_image_features")
    images = [Image(picture), Image(255 - picture)] if sees else []
    what = (Message("user", (*images, "What is in the picture?")), Message("assistant", ("a ramp",)))
    more = (Message("user", ("Is it grey?",)), Message("assistant", ("no",)))
    one = (Message("user", (*images[1:], "What is in the picture?")), what[1])
    return [(*what, *more), one, more]


def probe_rows(backbone: Backbone) -> list[Row]:
    """Return the rows of the probe: pictures and two turns, one picture, text."""
    rows = [
        make_row(backbone, talk, Limits(max_length=1_000_000), None, Counter())
        for talk in probe_talks(backbone)
    ]
    return [row for row in rows if row is not None]
