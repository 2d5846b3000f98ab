"""The record of a backbone that was tuned in Stage II, which a checkpoint keeps and shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

TuningKind = Literal["lora", "last_blocks"]


@dataclass(frozen=True, kw_only=True)
class TuningRecord:
    """How Stage II changed the backbone. A checkpoint without this record has a frozen one."""

    kind: TuningKind
    first_block: int
    """First block of the language model that was tuned, counted from 1."""
    last_block: int
    """Last such block, which is the tapped one."""
    rank: int
    """Rank of the LoRA adapters, which are merged into the weights; 0 for other kinds."""
    lr: float
    """Peak learning rate of the backbone's part."""
    language_weight: float
    """Weight of the language loss of co-training; 0: none."""
    corpora: tuple[str, ...]
    """Names of the corpora of co-training."""
    before: str
    """sha256 of the backbone before Stage II."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the record that config.json of a checkpoint holds."""
        stored = {field.name: value[field.name] for field in fields(cls)}
        return cls(**{**stored, "corpora": tuple(stored["corpora"])})

    def describe(self) -> str:
        """Return the record in words, without a full stop."""
        how = f"LoRA of rank {self.rank}" if self.kind == "lora" else "all weights"
        text = f"tuned in Stage II: {how} in blocks {self.first_block} to {self.last_block}"
        text += f", learning rate {self.lr:g}"
        if self.language_weight:
            text += f"; co-trained on {', '.join(self.corpora)} (weight {self.language_weight:g})"
        return text
