"""Questions that compare distances: nearest, farthest, and the nearer of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

import numpy as np

from blm.corpora.scenes.annotations import Annotation

AIR_GAP = 0.06
"""Minimum difference of two distances that are compared [m]; one object may be in the air."""

Places = Mapping[str, np.ndarray]
"""Name -> position [3] in the frame of the robot's base [m]."""


def comparisons(mark: str, places: Places, *, nearest: bool = True) -> Iterator[Annotation]:
    """Yield the questions about the distances of all other positions from `mark`.

    Set `nearest` to False if the nearest object follows from the text alone, for example when the
    gripper holds it.
    """
    far = {
        name: float(np.linalg.norm(place - places[mark])) for name, place in places.items() if name != mark
    }
    ranked = sorted(far, key=lambda name: (far[name], name))
    if len(ranked) < 2:
        return
    words = {"thing": mark}
    first, second = ranked[:2]
    before, last = ranked[-2:]
    if far[second] - far[first] >= AIR_GAP and nearest:
        thought = ranking(mark, places, "nearest")
        yield Annotation("comparing_nearest", first, words, tuple(ranked[1:]), thought)
    if far[last] - far[before] >= AIR_GAP:
        thought = ranking(mark, places, "farthest")
        yield Annotation("comparing_farthest", last, words, tuple(ranked[:-1]), thought)
    for one, two in permutations(ranked, 2):
        if abs(far[one] - far[two]) >= AIR_GAP:
            asked = {"goal": mark, "thing": one, "other": two}
            thought = ranking(mark, {name: places[name] for name in (mark, one, two)}, "nearest")
            yield Annotation("comparing_closer", min(one, two, key=far.__getitem__), asked, thought=thought)


def ranking(mark: str, places: Places, word: str) -> str:
    """Write the thought of a comparison: positions, displacements, distances [cm], result."""
    displacements = {name: place - places[mark] for name, place in sorted(places.items()) if name != mark}
    far = {name: float(np.linalg.norm(displacement)) for name, displacement in displacements.items()}
    parts = (
        f"{name} {vector(places[name])}: {vector(displacement)} {name} {round(100 * far[name])}"
        for name, displacement in displacements.items()
    )
    chosen = (min if word == "nearest" else max)(far, key=far.__getitem__)
    return f"{', '.join([f'{mark} {vector(places[mark])}', *parts])}; {word} {chosen}"


def vector(offset: np.ndarray) -> str:
    """Write a vector [m] in whole centimetres, e.g. '(12, -3, 0)'."""
    return f"({', '.join(str(round(100 * float(value))) for value in offset)})"
