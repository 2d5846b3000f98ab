"""The version of the suite, which results and datasets record, so that a change is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from blm.robots import ROBOTS
from blm.tasks.registry import TASKS
from blm.tasks.visibility import RULE
from blm.types import lookup

SUITE_VERSION = "2"
"""Increase it if a success rule or the physics changes; sizes, regions and instructions are hashed."""
VISIBLE_SUITE_VERSION = "3"
"""The same with `blm.tasks.visibility`: the scenes of version 2, of which those with a hidden goal
are drawn again."""


def suite_version(robots: Sequence[str], tasks: Sequence[str], *, visible_goals: bool = False) -> str:
    """Return version and short hash of robots and tasks: everything that defines scenes.

    The hash covers the representation of `RobotSpec`, `Item` and `Region`, including the names of
    classes and fields.
    """
    arms = [lookup("robot", name, ROBOTS) for name in robots]
    specs = [lookup("task", name, TASKS) for name in tasks]
    words = [[spec.phrasings, spec.held_out_phrasings, spec.max_steps, spec.view_shift] for spec in specs]
    scenes = [[repr(spec.items(arm)), repr(spec.region(arm))] for spec in specs for arm in arms]
    rule = [RULE] if visible_goals else []
    text = json.dumps([words, repr(arms), scenes, *rule])
    version = VISIBLE_SUITE_VERSION if visible_goals else SUITE_VERSION
    return f"{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
