"""Free questions about a scene, as a visitor asks them, with answers and key facts by its truth.

The key facts say what every right answer states and what none states (see `blm.types.KeyFacts`); the
answer is one of many right ones. Nothing is asked whose answer is unclear: about hidden objects,
small gaps, or a task that is almost done.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import permutations

import numpy as np

from blm.corpora.scenes.annotations import QuestionTurn
from blm.corpora.scenes.comparing import AIR_GAP
from blm.corpora.scenes.free_talk import talk_questions
from blm.corpora.scenes.free_talk_templates import REFUSAL_TEMPLATES, ROBOT_TEMPLATES, SMALL_TALK_TEMPLATES
from blm.corpora.scenes.free_task import resting_place, task_questions
from blm.corpora.scenes.free_templates import SCENE_TEMPLATES, FreeWordings
from blm.corpora.scenes.free_words import FreeQuestion, SceneInWords, counted, listing, some
from blm.corpora.scenes.observation import SceneObject, SceneObservation
from blm.corpora.scenes.questions import KINDS, MIDDLE_OF_TABLE, MIN_GAP
from blm.corpora.scenes.templates import Wording
from blm.robots import RobotSpec
from blm.tasks.spec import PALETTE
from blm.tasks.wordings import expand

FREE_TEMPLATES: Mapping[str, FreeWordings] = {
    **SCENE_TEMPLATES,
    **ROBOT_TEMPLATES,
    **REFUSAL_TEMPLATES,
    **SMALL_TALK_TEMPLATES,
}
"""Kind of free question -> its wordings."""
NEXT_TO = 0.12
"""Maximum distance of two objects that are next to each other [m]."""
NOTHING = "nothing|no|none"
"""Fact of an answer that names no object."""


def free_questions(scene: SceneObservation, robot: RobotSpec) -> Iterator[FreeQuestion]:
    """Yield all free questions about a scene."""
    words = SceneInWords(scene)
    if words.objects:
        for ask in (_views, _lists, _attributes, _places, _pairs, _searches):
            yield from ask(words)
        yield from task_questions(words)
    yield from talk_questions(words, robot)


def free_turns(
    scene: SceneObservation, robot: RobotSpec, count: int, rng: np.random.Generator, wording: Wording
) -> list[QuestionTurn]:
    """Draw at most `count` free questions of different kinds; variants of the truth are equally likely."""
    if count == 0:
        return []
    groups: dict[str, dict[str, list[FreeQuestion]]] = defaultdict(lambda: defaultdict(list))
    for question in free_questions(scene, robot):
        groups[question.kind][question.variant].append(question)
    turns = []
    for kind in rng.permutation(sorted(groups))[:count]:
        variants = groups[str(kind)]
        alike = variants[str(rng.choice(sorted(variants)))]
        turns.append(phrase(alike[int(rng.integers(len(alike)))], rng, wording))
    return turns


def phrase(question: FreeQuestion, rng: np.random.Generator, wording: Wording) -> QuestionTurn:
    """Return a free question and its answer in random wordings."""
    templates = FREE_TEMPLATES[question.kind]
    patterns = (getattr(templates, wording), templates.answers[question.variant])
    filled = (str(rng.choice(expand(str(rng.choice(some))))).format(**question.words) for some in patterns)
    asked, answer = (re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text) for text in filled)
    return QuestionTurn(question.kind, asked, answer, facts=question.facts)


def _views(words: SceneInWords) -> Iterator[FreeQuestion]:
    """What there is to see, and its description."""
    named = {"things": some(words.labels), "object": words.scene.object.label, "place": resting_place(words)}
    facts = words.facts(*words.labels)
    if not words.held:
        yield FreeQuestion("free_see", facts, named)
        goal = words.scene.goal
        done = (
            words.scene.arrangement == "done" and goal is not None and goal.seen and words.scene.object.seen
        )
        yield FreeQuestion("free_describe", facts, named, "done" if done else "free")
    elif words.scene.object.seen:
        for kind in ("free_see", "free_describe"):
            yield FreeQuestion(kind, facts, named, "held")


def _lists(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Counts, and what there is besides an object, if no object is hidden."""
    if words.held or not words.complete:
        return
    labels = words.labels
    named = {
        "things": some(labels),
        "number": counted(len(labels), "object"),
        "are": "is" if len(labels) == 1 else "are",
    }
    yield FreeQuestion("free_count", words.facts(f"#{len(labels)}", *labels), named)
    for label in labels:
        others = [other for other in labels if other != label]
        asked = {"thing": label, "things": some(others) if others else ""}
        if others:
            facts = words.facts(*others, forbidden=("nothing",))
            yield FreeQuestion("free_besides", facts, asked, "some")
        else:
            facts = words.facts("no|only|just|nothing", forbidden=("yes",))
            yield FreeQuestion("free_besides", facts, asked, "none")
    small = [t.label for t in words.objects if t.kind in (*KINDS, "peg")]
    if small:
        listed = some(small)
        named = {"things": listed, "Things": listed[0].upper() + listed[1:]}
        forbidden = [t.label for t in words.markers]
        yield FreeQuestion("free_pick_up", words.facts(*small, forbidden=forbidden), named)


def _attributes(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Colours and shapes, if no object is hidden."""
    if not words.complete:
        return
    colors = sorted({color for t in words.objects for color in t.color.split(" and ")})
    marked = {color for t in words.markers for color in t.color.split(" and ")}
    wrong = [color for color in PALETTE if color not in (*colors, *marked, "white")]  # the robot is white
    facts = words.facts(*colors, forbidden=wrong)
    yield FreeQuestion("free_colours", facts, {"colours": listing(colors)})
    kinds = Counter(t.kind for t in words.objects)
    if kinds.keys() <= {*KINDS}:
        absent = [kind for kind in KINDS if kind not in kinds]
        floating = any(t.kind == "sphere" for t in words.markers)
        facts = words.facts(*kinds, forbidden=[kind for kind in absent if not (kind == "ball" and floating)])
        shapes = [counted(number, kind) for kind, number in sorted(kinds.items())]
        one = len(words.objects) == 1
        named = {"shapes": listing(shapes), "are": "is" if one else "are"}
        if not one:
            yield FreeQuestion("free_shapes", facts, named)
        shared = [[t.label for t in words.objects if t.color == color] for color in colors]
        pairs = [labels for labels in shared if len(labels) == 2]
        if pairs and max(map(len, shared)) == 2:
            color = pairs[0][0].split()[0]
            named = {"pair": listing([f"the {label}" for label in pairs[0]]), "colour": color}
            yield FreeQuestion("free_same_colour", words.facts("yes", color), named, "yes")
        elif not pairs and len(words.objects) > 1 and max(map(len, shared)) == 1:
            yield FreeQuestion("free_same_colour", words.facts("no|different|own colour"), {}, "no")


def _places(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Where an object is, what the gripper holds, and what is nearest to the robot."""
    item = words.scene.object
    if words.held and item.seen:
        facts = words.facts(item.label, forbidden=("nothing", "empty"))
        yield FreeQuestion("free_held", facts, {"object": item.label}, "held")
        facts = words.facts("gripper*|hand|holding|held")
        yield FreeQuestion("free_where", facts, {"thing": item.label}, "held")
    elif not words.held:
        yield FreeQuestion("free_held", words.facts("nothing|empty|no|not holding|not hold"), variant="free")
    for thing in words.objects:
        side = float(thing.position[1] - words.scene.middle[1])
        if thing.kind == "peg" or (words.held and thing.role == "object"):
            continue
        named = {"thing": thing.label, "side": "left" if side > 0 else "right"}
        if abs(side) < MIDDLE_OF_TABLE[0]:
            facts = words.facts("middle|centre|center|central", forbidden=("left", "right"))
            yield FreeQuestion("free_where", facts, named, "middle")
        elif abs(side) > MIDDLE_OF_TABLE[1]:
            opposite = "right" if side > 0 else "left"
            facts = words.facts(named["side"], forbidden=(opposite, "middle", "centre", "center"))
            yield FreeQuestion("free_where", facts, named, "side")
    ranked = sorted(words.objects, key=lambda t: _distance(t.position, words.scene.base))
    if len(ranked) > 1 and words.complete and not words.held:
        far = [_distance(t.position, words.scene.base) for t in ranked]
        if far[1] - far[0] >= AIR_GAP:
            facts = words.facts(ranked[0].label, forbidden=[t.label for t in ranked[1:]])
            yield FreeQuestion("free_nearest", facts, {"near": ranked[0].label})


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the horizontal distance of two positions [m]."""
    return float(np.linalg.norm((one - other)[:2]))


def _pairs(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Neighbours, and sides as the robot sees them, if every object is seen and stands on the table."""
    if not words.complete or words.held or any(t.kind == "peg" for t in words.objects):
        return
    for thing in words.objects:
        others = [other for other in words.objects if other is not thing]
        yield from _neighbour(words, thing, others)
        across = {other.label: float(other.position[1] - thing.position[1]) for other in others}
        if not across or min(map(abs, across.values())) < MIN_GAP:
            continue
        for side, sign in (("left", 1), ("right", -1)):
            there = [name for name, offset in across.items() if sign * offset > 0]
            rest = [name for name in across if name not in there]
            facts = words.facts(*(there or [NOTHING]), forbidden=rest)
            asked = {"thing": thing.label, "things": some(there) if there else ""}
            yield FreeQuestion(f"free_{side}", facts, asked, "some" if there else "none")
    for one, other in permutations(words.objects, 2):
        offset = float(one.position[1] - other.position[1])
        if abs(offset) >= MIN_GAP:
            side = "left" if offset > 0 else "right"
            facts = words.facts(f"{one.label} <{side}> {other.label}")
            named = {"thing": one.label, "other": other.label, "side": side}
            yield FreeQuestion("free_relation", facts, named)


def _neighbour(words: SceneInWords, thing: SceneObject, others: list[SceneObject]) -> Iterator[FreeQuestion]:
    """Yield the question which object is next to a thing, if exactly one is near it."""
    ranked = sorted((_distance(t.position, thing.position), t.label) for t in (*others, *words.markers))
    stacked = words.scene.arrangement == "done"
    if stacked or not ranked or ranked[0][0] > NEXT_TO:
        return
    near = ranked[0][1]
    apart = len(ranked) < 2 or ranked[1][0] - ranked[0][0] >= AIR_GAP
    if apart and near in words.labels:
        facts = words.facts(near, forbidden=[t.label for t in others if t.label != near])
        yield FreeQuestion("free_next_to", facts, {"thing": thing.label, "near": near, "a_near": f"a {near}"})


STRANGE = (
    "cat", "dog", "bird", "fish", "cup", "bottle", "plate", "spoon", "apple", "banana", "lemon", "book",
    "phone", "laptop", "chair", "lamp", "clock", "car", "bicycle", "plant", "hat", "shoe", "umbrella",
    "hammer", "guitar", "person",
)  # fmt: skip
"""Things that no scene shows."""


def _searches(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Whether a thing is there."""
    listed = {"things": some(words.labels)}
    for label in words.labels:
        facts = words.facts("yes", forbidden=("no",))
        yield FreeQuestion("free_can_see", facts, {**listed, "thing": label}, "yes")
    if not words.complete:
        return
    for name in (f"{color} {kind}" for color in PALETTE for kind in KINDS):
        if name not in words.things:
            facts = words.facts("no|only", forbidden=("yes", name))
            yield FreeQuestion("free_can_see", facts, {**listed, "thing": name}, "no")
    for name in STRANGE:
        facts = words.facts("no|only", forbidden=("yes", name))
        yield FreeQuestion("free_strange", facts, {**listed, "strange": name})
