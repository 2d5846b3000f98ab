"""Comparison of a computation on a pretended GPU with the same one on the CPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blm.backbone import Backbone
from tests.support.backbones import MAKERS
from tests.support.pretended_gpu import GpuTensor, Sync, on_gpu, values

GPU = "cuda:3"
"""Not the current GPU, so code that drops the index uses another GPU, and fails."""


every_family = pytest.mark.parametrize("backbone", list(MAKERS), indirect=True)


def twin(backbone: Backbone) -> Backbone:
    """Return a copy with its own weights."""
    return Backbone(copy.deepcopy(backbone.model), backbone.processor)


def moved(backbone: Backbone) -> Backbone:
    """Move a backbone to `GPU` in place, and return it."""
    on_gpu(backbone.model, GPU)
    return backbone


def of_the_package(syncs: list[Sync]) -> list[Sync]:
    """Return those that code of the package causes itself, not through transformers."""
    return [sync for sync in syncs if sync.via.startswith(Path(sync.where.split(":")[0]).name)]


def assert_same(found: Any, wanted: Any) -> None:
    """Assert that tensors are bit-equal, and that those found are on `GPU`."""
    pairs = zip(found, wanted, strict=True)
    for name, (one, other) in enumerate(pairs):
        assert isinstance(one, GpuTensor) and str(one.device) == GPU, name
        assert torch.equal(values(one), other), name


def log_rows(out: Path) -> list[dict[str, float]]:
    """Return the rows of a log, with zeros for the columns that depend on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "tokens_per_s", "data_share", "seconds")
    return [{name: 0.0 if name in timed else value for name, value in row.items()} for row in rows]
