"""What the suite is, as one version: results and datasets name it, so that a change does not go unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from blm.robots import ROBOTS
from blm.tasks.registry import TASKS
from blm.types import lookup

SUITE_VERSION = "2"
"""Raise it when a success rule or the physics changes; sizes, regions and wordings are hashed anyway."""


def suite_version(robots: Sequence[str], tasks: Sequence[str]) -> str:
    """Version and short hash of these arms and tasks: all constants, regions, phrasings, step limits."""
    arms = [lookup("robot", name, ROBOTS) for name in robots]
    specs = [lookup("task", name, TASKS) for name in tasks]
    words = [[spec.phrasings, spec.held_out_phrasings, spec.max_steps, spec.view_shift] for spec in specs]
    scenes = [[repr(spec.items(arm)), repr(spec.region(arm))] for spec in specs for arm in arms]
    text = json.dumps([words, repr(arms), scenes])
    return f"{SUITE_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
