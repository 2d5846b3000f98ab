"""Scenes in which only the words decide: drawn colours, and things that stand side by side."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import numpy as np

from blm.tasks.spec import PALETTE, TaskState

DISPLACED = 0.03
"""Displacement of a thing that was not named which fails the episode [m]."""
_ALIKE = (
    ("red", "orange", "pink"),
    ("orange", "yellow"),
    ("pink", "purple"),
    ("purple", "blue"),
    ("blue", "cyan"),
)
"""Colours that may be mistaken for each other in a small image under another light."""
_DRAWN = tuple(color for color in PALETTE if color != "white")
"""Colours of things; white is hard to see on the table."""


def are_alike(one: str, other: str) -> bool:
    """Whether two colours are equal or may be mistaken for each other."""
    return one == other or any(one in group and other in group for group in _ALIKE)


def draw_colors(rng: np.random.Generator, count: int, unlike: Collection[str] = ()) -> list[str]:
    """Draw `count` colours that are not alike, nor like any of `unlike`."""
    free = [color for color in _DRAWN if not any(are_alike(color, other) for other in unlike)]
    sets = [
        chosen
        for chosen in combinations(free, count)
        if not any(are_alike(one, other) for one, other in combinations(chosen, 2))
    ]
    return [str(color) for color in rng.permutation(sets[int(rng.integers(len(sets)))])]


def side_by_side(
    rng: np.random.Generator, centre: tuple[float, float], gap: tuple[float, float], depth: float
) -> list[tuple[float, float]]:
    """Draw x, y of two things on both sides of `centre`, in random order.

    They are `gap` (a range) apart in y, and each is up to `depth` off in x [m].
    """
    x, y = centre
    half = rng.uniform(*gap) / 2 * rng.choice((-1, 1))
    return [(float(x + depth * rng.uniform(-1, 1)), float(y + side * half)) for side in (1, -1)]


def is_displaced(state: TaskState, name: str) -> bool:
    """Whether a thing is further from its start than the rule allows."""
    return bool(np.linalg.norm(state.displacement(name)) > DISPLACED)
