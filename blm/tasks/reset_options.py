"""The options of `TaskEnv.reset`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from blm.tasks.spec import TaskSpec
from blm.tasks.variation import Variation
from blm.tasks.wordings import TRAINING_WORDINGS
from blm.types import lookup


@dataclass(frozen=True, kw_only=True)
class ResetOptions:
    """How an episode differs from the default one of its seed."""

    arm: str = "home"
    """Initial pose of the arm: "home" or "random"."""
    phrasing: int | None = None
    """Index of the instruction, see `TaskSpec.instruction`; by default the seed draws one."""
    wording: str | None = None
    """Text of the instruction instead, whose slots are filled; it may be empty."""
    named: str = "own"
    """"own", or "other" for the instruction of the other thing in the scene, by which success is judged."""
    variation: Variation | None = None
    """Difference from the plain suite; by default it is drawn from the environment's randomization."""
    visible_goals: bool = False
    """Whether a scene with a hidden goal is drawn again, see `blm.tasks.visibility`."""

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Self:
        """Read Gymnasium's options. Raises BlmError for an unknown name."""
        known = {field.name: field for field in fields(cls)}
        for name in options or {}:
            lookup("reset option", name, known)
        return cls(**(options or {}))

    def instruction(self, spec: TaskSpec, rng: np.random.Generator, *, grammar: bool) -> str:
        """Return the text of the instruction; its slots are not filled.

        Unless an option states it, one of the task's phrasings is drawn, or one of its training
        wordings if `grammar`. Raises BlmError for an unknown phrasing.
        """
        if self.wording is not None:
            return self.wording
        if self.phrasing is not None:
            return spec.instruction(self.phrasing)
        choices = TRAINING_WORDINGS[spec.name] if grammar else spec.phrasings
        return choices[int(rng.integers(len(choices)))]
