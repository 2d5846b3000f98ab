"""Questions about simulated scenes, with answers computed from the simulator's state.

Directions are seen from the robot, which looks along +x: left is +y, behind is farther from the robot (+x),
in front is nearer. Pointing and boxes are integers 0..1000 of image width and height, x to the right, y down.
Metric answers are whole cm in the frame of the robot's base (x forward, y left, z up). What could be answered
either way (a small gap, a hidden object) is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from blm.backbone.prompt import control_question
from blm.corpora.scenes.comparing import AIR_GAP, comparisons, vector
from blm.corpora.scenes.facts import OPEN, Drawer, Fact, Turn, by_kind
from blm.corpora.scenes.view import Box, Scene, Thing
from blm.tasks.spec import PALETTE

POINT_SCALE = 1000
"""Pointing coordinates run from 0 to this over the image's width and height."""
POINT_STEP = 10
"""They are given to the nearest multiple of this: a pixel of 112."""
MIN_GAP = 0.04
"""Relations are asked only when two things differ by at least this along the axis [m]; by `AIR_GAP` where
one of them may be in the air."""
SIDE = (0.03, 0.07)
"""The middle of the table is within the first of its centre line; left and right begin at the second [m]."""
DOMINANT = 2.0
"""A direction is the main one when it is this many times as far as any other."""
MIN_BOX = 0.07
"""Smallest side of a box that is asked about, as a share of the image: 8 px of 112."""
ON_DISC = 0.03
"""A push is over when the cube is this near the centre of the target [m]."""
KINDS = ("cube", "ball", "cylinder")
"""Kinds that come in every colour: those that are asked about by kind."""
WAYS = ("forward", "back", "left", "right", "down", "up")


def scene_facts(scene: Scene) -> Iterator[Fact]:
    """Everything that may be asked about a scene."""
    for facts in (_objects, _states, _relations, _comparisons, _directions, _pictures, _metric):
        yield from facts(scene)


def solids(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.solid and t.seen]


def _objects(scene: Scene) -> Iterator[Fact]:
    """Existence, attributes, counting: asked of what is to be seen, when nothing is hidden."""
    things = solids(scene)
    if len(things) < sum(t.solid for t in scene.things):
        return
    there = {t.label: t.role for t in things}
    for color in PALETTE:
        for kind in KINDS:
            role = there.get(f"{color} {kind}")
            if role in (None, "distractor"):  # of the task's own objects it would always be yes
                asked, thought = {"thing": f"{color} {kind}"}, _listed(things, color)
                yield Fact("existence", "yes" if role else "no", asked, thought=thought)
    for thing in things:
        if thing.kind in KINDS and sum(t.kind == thing.kind for t in things) == 1:
            wrong = tuple(set(PALETTE) - {thing.color})
            thought = _listed(things, thing.kind)
            yield Fact("attribute_color", thing.color, {"thing": thing.kind}, wrong, thought)
        alone = sum(thing.color in t.color for t in scene.things) == 1
        if thing.role == "distractor" and alone:  # the task's own have always one shape
            wrong = tuple(set(KINDS) - {thing.kind})
            thought = _listed(things, thing.color)
            yield Fact("attribute_shape", thing.kind, {"thing": thing.color}, wrong, thought)
    balls = [t.label for t in things if t.kind == "ball"]
    if len(balls) == 1:
        wrong = tuple(t.label for t in things if t.kind != "ball")
        yield Fact("affordance_roll", balls[0], {}, wrong, _listed(things, "ball"))
    if scene.staging != "held":
        for kind in (*KINDS, "object"):
            number = sum(kind in ("object", t.kind) for t in things)
            wrong = tuple(str(n) for n in (number - 1, number + 1, number + 2) if n >= 0)
            thought = _listed(things, "" if kind == "object" else kind)
            yield Fact("counting", str(number), {"thing": kind}, wrong, thought)


def _listed(things: Sequence[Thing], word: str = "") -> str:
    """What there is, then those of it that have a word in their name."""
    names = sorted(t.label for t in things)
    there = ", ".join(names)
    picked = ", ".join(name for name in names if word in name.split())
    return f"{there}; {word}: {picked or 'nothing'}" if word else there


def _states(scene: Scene) -> Iterator[Fact]:
    """Where the task's object is, and what that allows."""
    thing, goal = scene.object, scene.goal
    held, done = scene.staging == "held", scene.staging == "done"
    if thing.kind != "peg" and thing.seen:
        yield Fact("affordance_held", "yes" if held else "no", {"thing": thing.label})
    if goal is not None and goal.solid and goal.seen:
        thought = _way(scene, thing, goal)
        yield Fact("affordance_room", "no" if done else "yes", {"thing": goal.label}, thought=thought)
    if goal is not None and goal.kind == "sphere" and goal.seen:
        height = float(goal.position[2])
        if not 0.035 < height < 0.07:
            place = ("in the air", "on the table")
            answer = place[height < 0.05]
            wrong, thought = tuple({*place} - {answer}), _where(scene, goal, axis=2)
            yield Fact("location_goal", answer, {"thing": goal.label}, wrong, thought)
    if goal is None or not thing.seen:
        return
    places = ["on the table", "in the gripper"]
    if goal.kind != "sphere":
        places.append(f"{'in' if goal.kind == 'bin' else 'on'} the {goal.label}")
    near = float(np.linalg.norm((thing.position - goal.position)[:2]))
    if goal.kind == "disc" and not held and 0.07 < near < 0.13:
        return
    on = done or (goal.kind == "disc" and near <= 0.07)
    answer = places[1] if held else places[2] if on else places[0]
    yield Fact("location_state", answer, {"thing": thing.label}, tuple({*places} - {answer}))


def _relations(scene: Scene) -> Iterator[Fact]:
    """Left or right, in front or behind; parts of the table; above or below."""
    for a, b in permutations(solids(scene), 2):
        for kind, axis, words in _AXES:
            answer = _side(a.position - b.position, axis, words)
            if answer and a.label != b.label:
                asked, thought = {"thing": a.label, "other": b.label}, _where(scene, a, b, axis=axis)
                yield Fact(kind, answer, asked, _other(answer, words), thought)
    for thing in (t for t in scene.things if t.seen):
        offset = thing.position - scene.tcp
        for kind, axis, words in _AXES:
            answer = _side(offset, axis, words, AIR_GAP)
            if answer and scene.gripper_seen:
                name, thought = "situated_" + kind, _where(scene, thing, None, axis=axis)
                yield Fact(name, answer, {"thing": thing.label}, _other(answer, words), thought)
        side = float(thing.position[1] - scene.middle[1])
        lies = thing.kind not in ("peg", "sphere") and (scene.staging != "held" or thing.role != "object")
        if lies and not SIDE[0] < abs(side) < SIDE[1]:
            parts = ("left", "middle", "right")
            answer = parts[1] if abs(side) < SIDE[1] else parts[0] if side > 0 else parts[2]
            wrong, thought = tuple({*parts} - {answer}), _where(scene, thing, axis=1)
            yield Fact("location_table", answer, {"thing": thing.label}, wrong, thought)
        if (
            thing.kind == "sphere"
            and scene.gripper_seen
            and (answer := _side(-offset, 2, ("above", "below"), AIR_GAP))
        ):
            wrong, thought = _other(answer, ("above", "below")), _where(scene, thing, None, axis=2)
            yield Fact("above", answer, {"thing": thing.label}, wrong, thought)


_AXES = (("left_right", 1, ("left", "right")), ("front_behind", 0, ("behind", "front")))


def _side(offset: np.ndarray, axis: int, words: tuple[str, str], gap: float = MIN_GAP) -> str:
    """The word for an offset along an axis; none when it is small."""
    return "" if abs(offset[axis]) < gap else words[0] if offset[axis] > 0 else words[1]


def _other(answer: str, words: tuple[str, str]) -> tuple[str, ...]:
    return tuple({*words} - {answer})


def _comparisons(scene: Scene) -> Iterator[Fact]:
    """Nearest, farthest, and which of two is nearer, to the gripper and to the goal."""
    things, goal = solids(scene), scene.goal
    if len(things) < sum(t.solid for t in scene.things):
        return
    places = {t.label: t.position - scene.base for t in things}
    gripper: list[Thing | None] = [None] if scene.gripper_seen else []
    for mark in (*gripper, *([goal] if goal and goal.seen else [])):
        name, place = _named(scene, mark)
        asked = {**places, name: place - scene.base}
        yield from comparisons(name, asked, nearest=scene.staging != "held")


def _named(scene: Scene, thing: Thing | None) -> tuple[str, np.ndarray]:
    """Name and place [m] of a thing; of the gripper for none."""
    return ("gripper", scene.tcp) if thing is None else (thing.label, thing.position)


def _where(scene: Scene, *things: Thing | None, axis: int | None = None) -> str:
    """Where things are from the robot in cm, along one axis or all; none of them is the gripper."""
    spots = []
    for name, place in (_named(scene, thing) for thing in things):
        place = place - scene.base
        spot = vector(place) if axis is None else f"{'xyz'[axis]} {round(100 * float(place[axis]))}"
        spots.append(f"{name} {spot}")
    return ", ".join(spots)


def _directions(scene: Scene) -> Iterator[Fact]:
    """The main direction from the gripper to a thing, and from the object to its goal."""
    thing, goal = scene.object, scene.goal
    for other in (t for t in scene.things if t.seen and scene.gripper_seen):
        if way := main_direction(other.position - scene.tcp):
            wrong, thought = tuple({*WAYS} - {way}), _way(scene, None, other)
            yield Fact("situated_move", way, {"thing": other.label}, wrong, thought)
    if goal is not None and goal.seen and thing.seen and scene.staging != "done":
        way = main_direction((goal.position - thing.position) * (1, 1, 0))
        if way:
            words = {"thing": thing.label, "goal": goal.label}
            wrong, thought = tuple({*WAYS[:4]} - {way}), _way(scene, thing, goal)
            yield Fact("forecasting_direction", way, words, wrong, thought)


def _way(scene: Scene, start: Thing | None, end: Thing) -> str:
    """Where both are, and the way between them."""
    return f"{_where(scene, start, end)}: {vector(end.position - _named(scene, start)[1])}"


def main_direction(offset: np.ndarray) -> str:
    """The word for the largest part of an offset [3]; none when no part is large, or two are."""
    size = np.abs(offset)
    axis, second = (int(index) for index in np.argsort(size)[[2, 1]])
    if size[axis] < MIN_GAP or size[axis] < DOMINANT * size[second]:
        return ""
    return (("forward", "back"), ("left", "right"), ("up", "down"))[axis][int(offset[axis] < 0)]


def _pictures(scene: Scene) -> Iterator[Fact]:
    """Points and boxes in every view."""
    for camera, points in scene.points.items():
        for name, point in points.items():
            words = {"thing": name, "camera": camera}
            yield Fact(f"point_{camera}", format_point(point), words)
            box = scene.boxes[camera].get(name)
            if box is not None and min(box[2] - box[0], box[3] - box[1]) >= MIN_BOX:
                yield Fact(f"box_{camera}", format_box(box), words)


def _metric(scene: Scene) -> Iterator[Fact]:
    """Positions, ways and distances of the task's object, its goal and the gripper."""
    thing, goal = scene.object, scene.goal
    asked = [t for t in (thing, goal) if t is not None and t.seen]
    places = [_named(scene, t) for t in (*([None] if scene.gripper_seen else []), *asked)]
    for name, place in places:
        yield Fact("metric_position", format_vector(place - scene.base), {"thing": name})
        if name in ("gripper", "goal"):
            yield Fact("metric_height", format_length(place[2]), {"thing": name})
    for t in asked if scene.gripper_seen else ():
        offset, words, thought = t.position - scene.tcp, {"thing": t.label}, _way(scene, None, t)
        yield Fact("metric_gripper_to_object", format_vector(offset), words, thought=thought)
        yield Fact("metric_gripper_distance", format_length(offset), words, thought=thought)
    if goal is not None and len(asked) == 2:
        way, words = goal.position - thing.position, {"thing": thing.label, "goal": goal.label}
        thought = _way(scene, thing, goal)
        yield Fact("metric_object_to_goal", format_vector(way), words, thought=thought)
        yield Fact("metric_goal_distance", format_length(way), words, thought=thought)


def format_point(fraction: tuple[float, float]) -> str:
    """Write an image position in the pointing convention."""
    return f"({', '.join(str(_thousandths(value)) for value in fraction)})"


def format_box(box: Box) -> str:
    """Write a box as (left, top, right, bottom) in the pointing convention."""
    return f"({', '.join(str(_thousandths(value)) for value in box)})"


def _thousandths(fraction: float) -> int:
    return POINT_STEP * round(fraction * POINT_SCALE / POINT_STEP)


def format_vector(offset: np.ndarray) -> str:
    """Write a vector [m] in whole cm."""
    return f"{vector(offset)} cm"


def format_length(offset: np.ndarray | float) -> str:
    """Write the length of a vector [m] in whole cm."""
    return f"{round(100 * float(np.linalg.norm(offset)))} cm"


def control_turn(scene: Scene, instruction: str, robot: str) -> Turn:
    """The policy's own prompt, answered: where object, goal and gripper are, and what comes next.

    Stage II taps the backbone at exactly this prompt, so Stage I teaches what has to be known there. In a
    random scene nothing is under way, so the first primitive comes next; a thing in the hand is moved,
    and one that is where it belongs is left there.
    """
    roles: dict[str, str] = {t.label: t.role for t in scene.things if t.role != "distractor"}
    roles["gripper"] = "gripper"
    views = []
    for camera, points in scene.points.items():
        spots = [f"{role} {format_point(points[name])}" for name, role in roles.items() if name in points]
        views.append(f"{camera}: {', '.join(spots) or 'nothing'}.")
    question = control_question(instruction, robot, list(scene.points))
    return Turn("control", question, f"{' '.join(views)} next: {_next_primitive(scene)}")


def scan_turns(scene: Scene) -> list[Turn]:
    """One turn a view that lists all that it shows, in order of names; nano's eye is taught with them.

    A view that does not move with the arm also tells where things are from the robot.
    """
    turns = []
    for camera, points in scene.points.items():
        named = dict(_named(scene, thing) for thing in (None, *scene.things))
        places = {} if camera == "wrist" else {n: f" at {vector(p - scene.base)}" for n, p in named.items()}
        spots = ", ".join(
            f"{name} {format_point(points[name])}{places.get(name, '')}" for name in sorted(points)
        )
        turns.append(Turn(f"scan_{camera}", f"List all in the {camera} view.", spots or "nothing"))
    return turns


def read_scan(answer: str) -> dict[str, tuple[int, ...]]:
    """Read the answer of a scan turn: name -> place in thousandths, and in cm from the robot if told."""
    vector = r"\((-?\d+(?:, -?\d+)*)\)"
    found = re.findall(rf"([a-z][a-z ]*) {vector}(?: at {vector})?", answer)
    return {name: tuple(map(int, f"{at}, {xyz}".rstrip(", ").split(", "))) for name, at, xyz in found}


def scan_step(name: str) -> Turn:
    """A turn that names the step under way; nano's eye is taught with it too."""
    return Turn("scan_step", "Name the robot's step.", name)


def _next_primitive(scene: Scene) -> str:
    goal = scene.goal
    if scene.staging == "held":
        return "move"
    if goal is not None and goal.kind == "disc":  # the expert pushes on until the cube is well inside
        far = np.linalg.norm((goal.position - scene.object.position)[:2]) > ON_DISC
        return "approach" if far else "hold"
    return "hold" if scene.staging == "done" else "approach"


def scene_turns(scene: Scene, turns: int, drawer: Drawer, *, pointing: float, metric: float) -> list[Turn]:
    """Draw different questions about one scene: these shares pointing and metric, the rest over all others.

    Points and boxes, and metric questions, may be asked several times, of different things.
    """
    groups = by_kind(scene_facts(scene))
    shares = {("point", "box"): pointing, ("metric",): metric}
    counts = [*drawer.rng.multinomial(turns, [pointing, metric, 1 - pointing - metric])]
    drawn: list[Turn] = []
    for families, count in zip(shares, counts, strict=False):
        for _ in range(count):
            family = families[int(len(families) > 1 and drawer.rng.random() < 0.25)]
            kinds = [kind for kind in sorted(groups) if kind.startswith(family) and groups[kind]]
            if kinds and (fact := drawer.draw(groups[kinds[drawer.rng.integers(len(kinds))]])):
                groups[fact.kind].remove(fact)
                drawn.append(drawer.word(fact))
    rest = {kind: facts for kind, facts in groups.items() if not kind.startswith(OPEN)}
    return drawn + drawer.ask(rest, turns - len(drawn))
