"""Which thing is nearest to a mark, which is farthest, which of two is nearer: from places alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

import numpy as np

from blm.corpora.scenes.facts import Fact

AIR_GAP = 0.06
"""Things are compared only when their distances differ by at least this [m]; one may be in the air."""

Places = Mapping[str, np.ndarray]
"""Name -> place [3] in the frame of the robot's base [m]."""


def comparisons(mark: str, places: Places, *, nearest: bool = True) -> Iterator[Fact]:
    """Yield what can be asked about the distances of all other places from a mark.

    `nearest` is false where the answer is known without looking: something is in the gripper.
    """
    far = {
        name: float(np.linalg.norm(place - places[mark])) for name, place in places.items() if name != mark
    }
    ranked = sorted(far, key=lambda name: (far[name], name))
    if len(ranked) < 2:
        return
    words, (first, second), (before, last) = {"thing": mark}, ranked[:2], ranked[-2:]
    if far[second] - far[first] >= AIR_GAP and nearest:
        thought = ranking(mark, places, "nearest")
        yield Fact("comparing_nearest", first, words, tuple(ranked[1:]), thought)
    if far[last] - far[before] >= AIR_GAP:
        thought = ranking(mark, places, "farthest")
        yield Fact("comparing_farthest", last, words, tuple(ranked[:-1]), thought)
    for one, two in permutations(ranked, 2):
        if abs(far[one] - far[two]) >= AIR_GAP:
            asked = {"goal": mark, "thing": one, "other": two}
            thought = ranking(mark, {name: places[name] for name in (mark, one, two)}, "nearest")
            yield Fact("comparing_closer", min(one, two, key=far.__getitem__), asked, thought=thought)


def ranking(mark: str, places: Places, word: str) -> str:
    """Write where things are, the way from the mark to each, and how far that is [cm]; then which is
    nearest or farthest."""
    ways = {name: place - places[mark] for name, place in sorted(places.items()) if name != mark}
    far = {name: float(np.linalg.norm(way)) for name, way in ways.items()}
    told = (
        f"{name} {vector(places[name])}: {vector(way)} {name} {round(100 * far[name])}"
        for name, way in ways.items()
    )
    chosen = (min if word == "nearest" else max)(far, key=far.__getitem__)
    return f"{', '.join([f'{mark} {vector(places[mark])}', *told])}; {word} {chosen}"


def vector(offset: np.ndarray) -> str:
    """Write a vector [m] in whole cm."""
    return f"({', '.join(str(round(100 * float(value))) for value in offset)})"
