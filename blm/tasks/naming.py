"""The instruction of an episode: its text, and which of the things in the scene it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blm.tasks.spec import SceneDraw, TaskSpec
from blm.types import BlmError, lookup


@dataclass(frozen=True)
class Naming:
    """The words of an instruction, and what they name."""

    words: Mapping[str, str] = field(default_factory=dict)
    """Words that fill the slots of the instruction."""
    other_words: Mapping[str, str] = field(default_factory=dict)
    """Words of the instruction that names the other thing of the scene; empty if there is none."""
    swap: Mapping[str, str] = field(default_factory=dict)
    """Item -> the item that has its part in the instruction; see `TaskSpec.swap`."""


def name_things(spec: TaskSpec, draw: SceneDraw, named: str) -> Naming:
    """Return the naming of a scene; `named` is "own" or "other".

    Raises BlmError for another value, and if the scene has no other thing to name.
    """
    if lookup("named thing", named, {"own": False, "other": True}):
        if not draw.other_words:
            raise BlmError(f"the scenes of task '{spec.name}' have no other thing to name")
        return Naming(draw.other_words, draw.words, spec.swap)
    return Naming(draw.words, draw.other_words)


def fill_slots(spec: TaskSpec, wording: str, words: Mapping[str, str]) -> str:
    """Return the instruction. Raises BlmError for a wording with an unknown slot."""
    try:
        return wording.format(**words)
    except (KeyError, IndexError, ValueError) as error:
        raise BlmError(
            f"wording {wording!r} of task '{spec.name}' has slots other than {sorted(words)}"
        ) from error
