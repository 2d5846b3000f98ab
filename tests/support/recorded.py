"""Recorded planner episodes."""

from __future__ import annotations

import numpy as np


def recorded():
    """Return the primitive labels and the success flags of an episode with flickering labels."""
    runs = [
        ("approach", 8),
        ("descend", 9),
        ("grasp", 2),
        ("lift", 1),
        ("grasp", 1),
        ("lift", 6),
        ("move", 10),
    ]
    labels = [name for name, count in [*runs, ("hold", 10)] for _ in range(count)]
    return labels, np.arange(len(labels)) >= 40
