"""Stage I: supervised fine-tuning of a backbone on conversations, with loss on the assistant's tokens only.

Everything is tokenised once, before training; pictures wait as uint8. The language head runs on answer
positions only, which are few beside the picture tokens. Shapes: B rows, L positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from blm.backbone import Backbone
from blm.training.answers import answer_loss
from blm.training.loop import LoopConfig, run_loop
from blm.training.packing import RowBatch, collate
from blm.training.rows import Limits, one_thread, read_rows
from blm.types import BlmError, Message


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    loop: LoopConfig
    vision_scale: float = 1.0
    """Times `loop.lr` is the rate of the vision tower; 0 freezes it. The same for the two below."""
    projector_scale: float = 1.0
    language_scale: float = 1.0
    """Language model, embeddings and head."""
    limits: Limits = field(default_factory=Limits)

    def rate(self, name: str) -> float:
        """Return the peak learning rate of a parameter, by its name in any Llava- or Qwen-VL-like model."""
        if "projector" in name or "merger" in name:
            return self.loop.lr * self.projector_scale
        vision = "vision_tower" in name or "visual" in name
        return self.loop.lr * (self.vision_scale if vision else self.language_scale)


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
    with one_thread():
        rows = read_rows(backbone, conversations, config.limits, root, counts)
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
