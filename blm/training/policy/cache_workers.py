"""Worker processes that fill a cache of frames, each with a copy of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blm.backbone.backbone import Backbone
from blm.datasets.lerobot import EpisodeDataset, open_dataset
from blm.datasets.mapping import DataMapping
from blm.jobs import Result, WorkUnit, run_units
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig

WriteShard = Callable[[Any], Result]
"""Writes the shard of a work unit's payload."""


@dataclass(frozen=True)
class FrameWorkers:
    """Computes the shards of a cache of frames; a `Compute` of `fill_cache`.

    On the CPU, worker processes do it. On a GPU they would hold further copies of the backbone, so
    this process does it.
    """

    hashed: HashedBackbone
    """Workers load it from its source, up to the tapped block."""
    dataset: EpisodeDataset
    config: HiddenStateConfig
    open_writer: Callable[[Backbone, EpisodeDataset], WriteShard]
    """Called once in each process that computes; picklable."""

    def __call__(self, units: Sequence[WorkUnit], journal: Path, title: str) -> None:
        """Compute the shards of these work units."""
        backbone = self.hashed.backbone
        if self.config.workers and backbone.model.device.type == "cpu":
            run_units(
                _write,
                units,
                journal=journal,
                title=title,
                workers=self.config.workers,
                setup=_set_up,
                setup_args=(
                    self.open_writer,
                    self.hashed.source,
                    backbone.model.dtype,
                    backbone.attn_implementation,
                    self.config.layer,
                    self.dataset.folder,
                    self.dataset.mapping,
                ),
            )
        else:
            write = self.open_writer(backbone, self.dataset)
            run_units(write, units, journal=journal, title=title, workers=0)


_writer: list[WriteShard] = []
"""The writer of this worker process; set by `_set_up`."""


def _set_up(
    open_writer: Callable[[Backbone, EpisodeDataset], WriteShard],
    source: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    layer: int,
    dataset: Path,
    mapping: DataMapping | None,
) -> None:
    backbone = Backbone.load(source, dtype=dtype, attn_implementation=attn_implementation, blocks=layer)
    backbone.freeze()
    _writer[:] = [open_writer(backbone, open_dataset(dataset, mapping))]


def _write(payload: Any) -> Result:
    return _writer[0](payload)
