"""The best weights of a run, by closed-loop success or validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from blm.io import replacing


class BestCheckpoint:
    """Tracks the weights with the best validation of a run, in `out/best.safetensors`."""

    def __init__(self, out: Path) -> None:
        self.file, self.facts = out / "best.safetensors", dict[str, str]()
        if self.file.exists():
            with safe_open(self.file, "pt") as stored:
                self.facts = stored.metadata() or {}

    def update(self, weights: nn.Module, step: int, metrics: Mapping[str, float]) -> None:
        """Save these weights if they are the best so far, by success or validation loss."""
        score = metrics.get("success", -metrics.get("val_loss_flow", math.inf))
        if score > float(self.facts.get("score", -math.inf)):
            self.facts = {"score": str(score), "step": str(step)}
            with replacing(self.file) as temporary:
                save_file(weights.state_dict(), temporary, self.facts)

    def load(self, network: nn.Module) -> None:
        """Copy the best weights into `network`."""
        network.load_state_dict(load_file(self.file))
