"""The ranges of scene seeds, defined only here (`blm.evaluation.protocol` re-exports them).

The ranges are disjoint: no evaluation scene is used in training or to select a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EVALUATION_SEEDS = range(10_000)
"""Scenes of the physical evaluation."""
TRAINING_SEEDS = range(10_000, 1_000_000)
"""Scenes that recipes train on. Seeds beyond all these ranges may also be used for training."""
STAGE1_HELD_OUT_SEEDS = range(1_000_000, 2_000_000)
"""Scenes of the held-out questions of Stage I."""
VALIDATION_SEEDS = range(2_000_000, 2_010_000)
"""Scenes of the validation episodes that a policy runs during its training."""
RESERVED: Mapping[str, range] = {
    "evaluation": EVALUATION_SEEDS,
    "held-out questions": STAGE1_HELD_OUT_SEEDS,
    "validation": VALIDATION_SEEDS,
}
"""Purpose -> seeds that a training set must not contain."""


def count_reserved_seeds(seeds: Iterable[int]) -> dict[str, int]:
    """Return purpose -> number of these seeds that are reserved for it; empty if none is reserved."""
    seeds = list(seeds)
    counts = {purpose: sum(seed in kept for seed in seeds) for purpose, kept in RESERVED.items()}
    return {purpose: count for purpose, count in counts.items() if count}


def reserved_seeds_warning(what: str, counts: Mapping[str, int]) -> str:
    """Return a one-line warning that `what` contains reserved scenes."""
    parts = ", ".join(f"{count} for {purpose}" for purpose, count in counts.items())
    first, last = TRAINING_SEEDS[0], TRAINING_SEEDS[-1]
    return (
        f"{what} holds scenes that are reserved ({parts}): the scores of a model that trains on them mean "
        f"nothing; training scenes have the seeds {first:,} to {last:,}"
    )
