"""The ranges of scene seeds, stated only here (`blm.evaluation.protocol` shows them as its own).

They are disjoint: no evaluation scene was trained on, and none helped to choose a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EVALUATION_SEEDS = range(10_000)
TRAINING_SEEDS = range(10_000, 1_000_000)
"""What recipes use. Seeds beyond all these ranges are free for training too."""
STAGE1_HELD_OUT_SEEDS = range(1_000_000, 2_000_000)
VALIDATION_SEEDS = range(2_000_000, 2_010_000)
"""Of the episodes that a policy drives during its training."""
RESERVED: Mapping[str, range] = {
    "evaluation": EVALUATION_SEEDS,
    "held-out questions": STAGE1_HELD_OUT_SEEDS,
    "validation": VALIDATION_SEEDS,
}
"""What a training set must not hold: purpose -> seeds."""


def reserved(seeds: Iterable[int]) -> dict[str, int]:
    """Return purpose -> how many of these seeds are reserved for it; empty when all are free for training."""
    seeds = list(seeds)
    counts = {purpose: sum(seed in kept for seed in seeds) for purpose, kept in RESERVED.items()}
    return {purpose: count for purpose, count in counts.items() if count}


def warning(what: str, counts: Mapping[str, int]) -> str:
    """Say that scenes which are reserved were used: one line, in plain words."""
    parts = ", ".join(f"{count} for {purpose}" for purpose, count in counts.items())
    first, last = TRAINING_SEEDS[0], TRAINING_SEEDS[-1]
    return (
        f"{what} holds scenes that are reserved ({parts}): the scores of a model that trains on them mean "
        f"nothing; training scenes have the seeds {first:,} to {last:,}"
    )
