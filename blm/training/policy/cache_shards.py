"""The content of a shard of a hidden-state cache: its values, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blm.datasets.mixture import IndexArray
from blm.io import replacing
from blm.jobs import Result
from blm.training.caches.files import ShardFile, describe_file
from blm.training.policy.hidden_states import HiddenStateRows, LiveHiddenStates
from blm.training.policy.quantization import CodingError, ErrorMeter, TokenCodec
from blm.types import BlmError


@dataclass(frozen=True, kw_only=True)
class CacheShard(ShardFile):
    """A file of the cache, as the manifest describes it."""

    frames: Sequence[int]
    """Dataset frames, in order."""
    lengths: Sequence[int]
    """Tokens of each row of hidden states; a frame has one row per view."""
    error: float | None = None
    """RMS error of decoded tokens, relative to the normalised tokens; None for float16."""
    worst_error: float | None = None
    """Largest such error of a token."""
    cosine: float | None = None
    """Smallest cosine between a token and its decoded one."""


def coding_error(shards: Iterable[CacheShard]) -> CodingError | None:
    """Return the error of compact shards; None for float16."""
    counts, squares, worst, cosines = list[int](), list[float](), list[float](), list[float]()
    for shard in shards:
        if shard.error is None or shard.worst_error is None or shard.cosine is None:
            return None
        counts.append(sum(shard.lengths))
        squares.append(shard.error**2)
        worst.append(shard.worst_error)
        cosines.append(shard.cosine)
    return CodingError(float(np.average(squares, weights=counts)) ** 0.5, max(worst), min(cosines))


@dataclass(frozen=True)
class ShardWriter:
    """What a process computes shards with."""

    live: LiveHiddenStates
    codec: TokenCodec | None

    def write(self, payload: tuple[Path, Sequence[IndexArray]]) -> Result:
        """Write the shard of a payload: its path, and the cached frames of each of its episodes."""
        path, episodes = payload
        copies = self.live.config.views + 1
        rows = [
            row
            for frames in episodes
            for row in self.live.read(np.repeat(frames, copies), np.tile(np.arange(copies), len(frames)))
        ]
        stored, error = self.store(rows)
        coding = dict[str, float]()
        if error is not None:
            coding = {"error": error.rms, "worst_error": error.worst, "cosine": error.cosine}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, stored)
        frames = np.concatenate(episodes).tolist()
        return {"frames": frames, "lengths": [len(row) for row in rows], **coding, **describe_file(path)}

    def store(self, rows: HiddenStateRows) -> tuple[NDArray[Any], CodingError | None]:
        """Return hidden states in the form of the cache, [tokens, ..], and the error of codes.

        Codes are computed on the device of the backbone. Raises BlmError for values that are not
        finite in this form.
        """
        if self.codec is None:
            with np.errstate(over="ignore"):
                stored = np.concatenate(rows).astype(np.float16)
            self._require_finite(stored)
            return stored, None
        codes, meter, device = list[NDArray[np.uint8]](), ErrorMeter(), self.live.backbone.model.device
        for start in range(0, len(rows), self.live.config.batch_size):
            values = np.concatenate(rows[start : start + self.live.config.batch_size])
            self._require_finite(values)
            hidden = torch.from_numpy(values).to(device)
            made = self.codec.encode(hidden)
            meter.add(hidden, self.codec.decode(made))
            codes.append(made.cpu().numpy())
        return np.concatenate(codes), meter.result()

    def _require_finite(self, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            layer = self.live.config.layer
            raise BlmError(
                f"hidden states at layer {layer} exceed {values.dtype}; train without a cache"
                + (" or with --intents.precision compact" if values.dtype == np.float16 else "")
            )
