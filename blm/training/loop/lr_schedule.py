"""The learning-rate schedule: linear warm-up, then half a cosine down to zero.

Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017 (one cycle, no
restart).
"""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, steps: int, warmup_fraction: float) -> float:
    """Return the factor in 0 .. 1 of every peak learning rate at `step` (from 0).

    It rises linearly over the first `warmup_fraction` of `steps`, reaches 1 and falls along half a
    cosine to zero at the end of the run.
    """
    warmup = max(1, round(warmup_fraction * steps))
    decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / warmup) * decay
