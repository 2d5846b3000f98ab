"""What free questions are made of: the things of a scene in words, and a question with its key facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from blm.corpora.scenes.observation import SceneObject, SceneObservation
from blm.types import KeyFacts

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Numbers in words."""


@dataclass(frozen=True)
class FreeQuestion:
    """A question that can be asked about a scene, and what its answer must say."""

    kind: str
    facts: KeyFacts
    words: Mapping[str, str] = field(default_factory=dict)
    """Words that fill the templates of the question and of its answer."""
    variant: str = ""
    """Variant of the truth, which chooses the wordings of the answer."""


@dataclass(frozen=True)
class SceneInWords:
    """What a scene shows, for questions in free words."""

    scene: SceneObservation

    @cached_property
    def objects(self) -> tuple[SceneObject, ...]:
        """The objects that a third-person camera shows, sorted by label."""
        seen = (t for t in self.scene.objects if t.solid and t.seen)
        return tuple(sorted(seen, key=lambda t: t.label))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(t.label for t in self.objects)

    @property
    def complete(self) -> bool:
        """Whether every object is seen."""
        return all(t.seen for t in self.scene.objects if t.solid)

    @property
    def held(self) -> bool:
        return self.scene.arrangement == "held"

    @cached_property
    def markers(self) -> tuple[SceneObject, ...]:
        """The goal markers that a third-person camera shows."""
        return tuple(t for t in self.scene.objects if t.seen and not t.solid and t.kind != "end")

    @cached_property
    def things(self) -> tuple[str, ...]:
        """Names of everything that any camera shows; a floating goal is also a ball of its colour."""
        shown = {name for points in self.scene.points.values() for name in points}
        there = [t for t in self.scene.objects if t.kind != "end" and (t.seen or t.label in shown)]
        spheres = [f"{t.color} ball" for t in there if t.kind == "sphere"]
        return tuple(sorted({t.label for t in there} | {*spheres}))

    def facts(self, *required: str, forbidden: Sequence[str] = ()) -> KeyFacts:
        """Return key facts of an answer that may name everything that is there."""
        return KeyFacts(required=required, forbidden=tuple(forbidden), things=self.things)


def listing(parts: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def some(labels: Sequence[str]) -> str:
    """Return "a red cube and a blue ball"."""
    return listing([f"a {label}" for label in labels])


def counted(number: int, noun: str) -> str:
    """Return "two cubes", "one cube", or "12 cubes" for a number without a word in NUMBERS."""
    name = NUMBERS[number] if number < len(NUMBERS) else number
    return f"{name} {noun}{'' if number == 1 else 's'}"
