"""Questions about simulated scenes, with answers computed from the simulator's state.

Directions are relative to the robot, which looks along +x: left is +y, behind is farther from the
robot (+x), in front is nearer. Points and boxes are integers 0..1000 of image width and height, x
to the right, y down. Metric answers are whole centimetres in the frame of the robot's base (x
forward, y left, z up). Ambiguous questions (a small gap, a hidden object) are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from blm.backbone.prompt import PromptOrder, control_texts
from blm.corpora.scenes.annotations import NUMERIC_KINDS, Annotation, QuestionSampler, QuestionTurn, by_kind
from blm.corpora.scenes.comparing import AIR_GAP, comparisons, vector
from blm.corpora.scenes.instructions import instruction_annotations
from blm.corpora.scenes.observation import Box, SceneObject, SceneObservation
from blm.tasks.spec import PALETTE

POINT_SCALE = 1000
"""Image coordinates run from 0 to this over the image's width and height."""
POINT_STEP = 10
"""Image coordinates are rounded to multiples of this, about one pixel of 112."""
MIN_GAP = 0.04
"""Minimum difference along an axis for a spatial relation [m]; `AIR_GAP` applies in the air."""
MIDDLE_OF_TABLE = (0.03, 0.07)
"""Distance from the table's centre line up to which an object is in the middle [m].

The second number is the distance from which it is left or right.
"""
DOMINANT = 2.0
"""Minimum ratio of the largest to the second largest component for a main direction."""
MIN_BOX = 0.07
"""Minimum side of a box that is asked about, as a share of the image: 8 px of 112."""
ON_DISC = 0.03
"""A push ends when the cube is this near the target's centre [m]; see
`planner.primitives.PUSH_NEAR`."""
KINDS = ("cube", "ball", "cylinder")
"""Kinds of objects that exist in every colour."""
DIRECTIONS = ("forward", "back", "left", "right", "down", "up")


def scene_annotations(scene: SceneObservation) -> Iterator[Annotation]:
    """Yield all annotations of a scene; no directions and distances if its cameras are moved."""
    yield from instruction_annotations(scene.task, scene.instruction, scene.naming)
    for extract in (_objects, _states, _relations, _comparisons, _directions, _pictures, _metric):
        if scene.cameras_known or extract in (_objects, _pictures):
            yield from extract(scene)


def visible_objects(scene: SceneObservation) -> list[SceneObject]:
    return [t for t in scene.objects if t.solid and t.seen]


def _objects(scene: SceneObservation) -> Iterator[Annotation]:
    """Existence, attributes and counting, if no object is hidden."""
    visible = visible_objects(scene)
    if len(visible) < sum(t.solid for t in scene.objects):
        return
    there = {t.label: t.role for t in visible}
    for color in PALETTE:
        for kind in KINDS:
            role = there.get(f"{color} {kind}")
            if role in (None, "other", "distractor"):  # object and goal of a task are always there
                asked = {"thing": f"{color} {kind}"}
                thought = _listing(visible, color)
                yield Annotation("existence", "yes" if role else "no", asked, thought=thought)
    for item in visible:
        if item.kind in KINDS and sum(t.kind == item.kind for t in visible) == 1:
            wrong = tuple(set(PALETTE) - {item.color})
            thought = _listing(visible, item.kind)
            yield Annotation("attribute_color", item.color, {"thing": item.kind}, wrong, thought)
        alone = sum(item.color in t.color for t in scene.objects) == 1
        if item.role == "distractor" and alone:  # the task's own objects always have the same shape
            wrong = tuple(set(KINDS) - {item.kind})
            thought = _listing(visible, item.color)
            yield Annotation("attribute_shape", item.kind, {"thing": item.color}, wrong, thought)
    balls = [t.label for t in visible if t.kind == "ball"]
    if len(balls) == 1:
        wrong = tuple(t.label for t in visible if t.kind != "ball")
        yield Annotation("affordance_roll", balls[0], {}, wrong, _listing(visible, "ball"))
    if scene.arrangement != "held":
        for kind in (*KINDS, "object"):
            number = sum(kind in ("object", t.kind) for t in visible)
            wrong = tuple(str(n) for n in (number - 1, number + 1, number + 2) if n >= 0)
            thought = _listing(visible, "" if kind == "object" else kind)
            yield Annotation("counting", str(number), {"thing": kind}, wrong, thought)


def _listing(visible: Sequence[SceneObject], word: str = "") -> str:
    """Write the thought: all labels, then those that contain `word`."""
    names = sorted(t.label for t in visible)
    there = ", ".join(names)
    picked = ", ".join(name for name in names if word in name.split())
    return f"{there}; {word}: {picked or 'nothing'}" if word else there


def _states(scene: SceneObservation) -> Iterator[Annotation]:
    """The state of the task's object, and its affordances."""
    item, goal = scene.object, scene.goal
    held, done = scene.arrangement == "held", scene.arrangement == "done"
    if item.kind != "peg" and item.seen:
        yield Annotation("affordance_held", "yes" if held else "no", {"thing": item.label})
    if goal is not None and goal.solid and goal.seen:
        thought = _displacement(scene, item, goal)
        yield Annotation("affordance_room", "no" if done else "yes", {"thing": goal.label}, thought=thought)
    if goal is not None and goal.kind == "sphere" and goal.seen:
        height = float(goal.position[2])
        if not 0.035 < height < 0.07:
            place = ("in the air", "on the table")
            answer = place[height < 0.05]
            wrong = tuple({*place} - {answer})
            thought = _positions(scene, goal, axis=2)
            yield Annotation("location_goal", answer, {"thing": goal.label}, wrong, thought)
    if goal is None or not item.seen:
        return
    places = ["on the table", "in the gripper"]
    if goal.kind != "sphere":
        places.append(f"{'in' if goal.kind == 'bin' else 'on'} the {goal.label}")
    near = float(np.linalg.norm((item.position - goal.position)[:2]))
    if goal.kind == "disc" and not held and _is_at_edge(scene, item, near):
        return
    on = done or (goal.kind == "disc" and near <= 0.07)
    answer = places[1] if held else places[2] if on else places[0]
    yield Annotation("location_state", answer, {"thing": item.label}, tuple({*places} - {answer}))


def _is_at_edge(scene: SceneObservation, item: SceneObject, near: float) -> bool:
    """Whether it is unclear if the object lies on the goal, `near` [m] away, or if it lies on another."""
    others = [t for t in scene.objects if t.kind == "disc" and t.role == "other"]
    elsewhere = any(float(np.linalg.norm((item.position - t.position)[:2])) < 0.13 for t in others)
    return 0.07 < near < 0.13 or elsewhere


def _relations(scene: SceneObservation) -> Iterator[Annotation]:
    """Left or right, in front or behind, above or below, and regions of the table."""
    for a, b in permutations(visible_objects(scene), 2):
        for kind, axis, words in _AXES:
            answer = _direction_word(a.position - b.position, axis, words)
            if answer and a.label != b.label:
                asked = {"thing": a.label, "other": b.label}
                thought = _positions(scene, a, b, axis=axis)
                yield Annotation(kind, answer, asked, _opposite(answer, words), thought)
    for item in (t for t in scene.objects if t.seen):
        offset = item.position - scene.tcp
        for kind, axis, words in _AXES:
            answer = _direction_word(offset, axis, words, AIR_GAP)
            if answer and scene.gripper_seen:
                name = "situated_" + kind
                thought = _positions(scene, item, None, axis=axis)
                yield Annotation(name, answer, {"thing": item.label}, _opposite(answer, words), thought)
        side = float(item.position[1] - scene.middle[1])
        lies = item.kind not in ("peg", "sphere", "end") and (
            scene.arrangement != "held" or item.role != "object"
        )
        if lies and not MIDDLE_OF_TABLE[0] < abs(side) < MIDDLE_OF_TABLE[1]:
            parts = ("left", "middle", "right")
            answer = parts[1] if abs(side) < MIDDLE_OF_TABLE[1] else parts[0] if side > 0 else parts[2]
            wrong = tuple({*parts} - {answer})
            thought = _positions(scene, item, axis=1)
            yield Annotation("location_table", answer, {"thing": item.label}, wrong, thought)
        if (
            item.kind == "sphere"
            and scene.gripper_seen
            and (answer := _direction_word(-offset, 2, ("above", "below"), AIR_GAP))
        ):
            wrong = _opposite(answer, ("above", "below"))
            thought = _positions(scene, item, None, axis=2)
            yield Annotation("above", answer, {"thing": item.label}, wrong, thought)


_AXES = (("left_right", 1, ("left", "right")), ("front_behind", 0, ("behind", "front")))


def _direction_word(offset: np.ndarray, axis: int, words: tuple[str, str], gap: float = MIN_GAP) -> str:
    """Return the word for an offset along an axis; empty if the offset is small."""
    return "" if abs(offset[axis]) < gap else words[0] if offset[axis] > 0 else words[1]


def _opposite(answer: str, words: tuple[str, str]) -> tuple[str, ...]:
    return tuple({*words} - {answer})


def _comparisons(scene: SceneObservation) -> Iterator[Annotation]:
    """Distance comparisons relative to the gripper and to the goal."""
    visible, goal = visible_objects(scene), scene.goal
    if len(visible) < sum(t.solid for t in scene.objects):
        return
    places = {t.label: t.position - scene.base for t in visible}
    gripper: list[SceneObject | None] = [None] if scene.gripper_seen else []
    for mark in (*gripper, *([goal] if goal and goal.seen else [])):
        name, place = _name_and_position(scene, mark)
        asked = {**places, name: place - scene.base}
        yield from comparisons(name, asked, nearest=scene.arrangement != "held")


def _name_and_position(scene: SceneObservation, item: SceneObject | None) -> tuple[str, np.ndarray]:
    """Return the label and position [3] of an object; of the gripper for None."""
    return ("gripper", scene.tcp) if item is None else (item.label, item.position)


def _positions(scene: SceneObservation, *items: SceneObject | None, axis: int | None = None) -> str:
    """Write positions relative to the robot [cm], along one axis or all.

    None stands for the gripper.
    """
    spots = []
    for name, place in (_name_and_position(scene, item) for item in items):
        place = place - scene.base
        spot = vector(place) if axis is None else f"{'xyz'[axis]} {round(100 * float(place[axis]))}"
        spots.append(f"{name} {spot}")
    return ", ".join(spots)


def _directions(scene: SceneObservation) -> Iterator[Annotation]:
    """Directions from the gripper to an object, and from the task's object to its goal."""
    item, goal = scene.object, scene.goal
    for other in (t for t in scene.objects if t.seen and scene.gripper_seen):
        if direction := main_direction(other.position - scene.tcp):
            wrong = tuple({*DIRECTIONS} - {direction})
            thought = _displacement(scene, None, other)
            yield Annotation("situated_move", direction, {"thing": other.label}, wrong, thought)
    if goal is not None and goal.seen and item.seen and scene.arrangement != "done":
        direction = main_direction((goal.position - item.position) * (1, 1, 0))
        if direction:
            words = {"thing": item.label, "goal": goal.label}
            wrong = tuple({*DIRECTIONS[:4]} - {direction})
            thought = _displacement(scene, item, goal)
            yield Annotation("forecasting_direction", direction, words, wrong, thought)


def _displacement(scene: SceneObservation, start: SceneObject | None, end: SceneObject) -> str:
    """Write the thought: the positions of both and the displacement between them [cm]."""
    return f"{_positions(scene, start, end)}: {vector(end.position - _name_and_position(scene, start)[1])}"


def main_direction(offset: np.ndarray) -> str:
    """Return the word for the dominant component of an offset [3]; empty if none dominates."""
    size = np.abs(offset)
    axis, second = (int(index) for index in np.argsort(size)[[2, 1]])
    if size[axis] < MIN_GAP or size[axis] < DOMINANT * size[second]:
        return ""
    return (("forward", "back"), ("left", "right"), ("up", "down"))[axis][int(offset[axis] < 0)]


def _pictures(scene: SceneObservation) -> Iterator[Annotation]:
    """Points and boxes in every camera image."""
    for camera, points in scene.points.items():
        for name, point in points.items():
            words = {"thing": name, "camera": camera}
            yield Annotation(f"point_{camera}", format_point(point), words)
            box = scene.boxes[camera].get(name)
            if box is not None and min(box[2] - box[0], box[3] - box[1]) >= MIN_BOX:
                yield Annotation(f"box_{camera}", format_box(box), words)


def _metric(scene: SceneObservation) -> Iterator[Annotation]:
    """Positions, displacements and distances of the task's object, its goal and the gripper."""
    item, goal = scene.object, scene.goal
    asked = [t for t in (item, goal) if t is not None and t.seen]
    places = [_name_and_position(scene, t) for t in (*([None] if scene.gripper_seen else []), *asked)]
    for name, place in places:
        yield Annotation("metric_position", format_vector(place - scene.base), {"thing": name})
        if name in ("gripper", "goal"):
            yield Annotation("metric_height", format_length(place[2]), {"thing": name})
    for t in asked if scene.gripper_seen else ():
        offset = t.position - scene.tcp
        words = {"thing": t.label}
        thought = _displacement(scene, None, t)
        yield Annotation("metric_gripper_to_object", format_vector(offset), words, thought=thought)
        yield Annotation("metric_gripper_distance", format_length(offset), words, thought=thought)
    if goal is not None and len(asked) == 2:
        displacement = goal.position - item.position
        words = {"thing": item.label, "goal": goal.label}
        thought = _displacement(scene, item, goal)
        yield Annotation("metric_object_to_goal", format_vector(displacement), words, thought=thought)
        yield Annotation("metric_goal_distance", format_length(displacement), words, thought=thought)


def format_point(fraction: tuple[float, float]) -> str:
    """Write an image position in the pointing convention."""
    return f"({', '.join(str(_thousandths(value)) for value in fraction)})"


def format_box(box: Box) -> str:
    """Write a box as (left, top, right, bottom) in the pointing convention."""
    return f"({', '.join(str(_thousandths(value)) for value in box)})"


def _thousandths(fraction: float) -> int:
    return POINT_STEP * round(fraction * POINT_SCALE / POINT_STEP)


def format_vector(offset: np.ndarray) -> str:
    """Write a vector [m] in whole centimetres."""
    return f"{vector(offset)} cm"


def format_length(offset: np.ndarray | float) -> str:
    """Write the length of a vector [m] in whole centimetres."""
    return f"{round(100 * float(np.linalg.norm(offset)))} cm"


def control_turn(scene: SceneObservation, instruction: str, robot: str, order: PromptOrder) -> QuestionTurn:
    """Return the control prompt with its answer: object, goal, gripper, next primitive.

    Stage II taps the backbone's hidden states at exactly this prompt, so Stage I teaches the
    answer. In a random scene the first primitive comes next; an object in the hand is moved, and an
    object at its goal stays there.
    """
    spare = ("other", "distractor")
    roles: dict[str, str] = {t.label: t.role for t in scene.objects if t.role not in spare}
    roles["gripper"] = "gripper"
    views = []
    for camera, points in scene.points.items():
        spots = [f"{role} {format_point(points[name])}" for name, role in roles.items() if name in points]
        views.append(f"{camera}: {', '.join(spots) or 'nothing'}.")
    before, question = control_texts(instruction, robot, list(scene.points), order)
    answer = f"{' '.join(views)} next: {_next_primitive(scene)}"
    return QuestionTurn("control", question, answer, before=before)


def scan_turns(scene: SceneObservation) -> list[QuestionTurn]:
    """Return one turn per view that lists everything visible, sorted by name.

    These turns train nano's vision tower. Third-person views also give positions relative to the
    robot, unless their cameras are moved.
    """
    turns = []
    for camera, points in scene.points.items():
        named = dict(_name_and_position(scene, item) for item in (None, *scene.objects))
        known = scene.cameras_known and camera != "wrist"
        places = {n: f" at {vector(p - scene.base)}" for n, p in named.items()} if known else {}
        spots = ", ".join(
            f"{name} {format_point(points[name])}{places.get(name, '')}" for name in sorted(points)
        )
        turns.append(QuestionTurn(f"scan_{camera}", f"List all in the {camera} view.", spots or "nothing"))
    return turns


def read_scan(answer: str) -> dict[str, tuple[int, ...]]:
    """Parse a scan answer: name -> image position [thousandths], then position [cm] if given."""
    vector = r"\((-?\d+(?:, -?\d+)*)\)"
    found = re.findall(rf"([a-z][a-z ]*) {vector}(?: at {vector})?", answer)
    return {name: tuple(map(int, f"{at}, {xyz}".rstrip(", ").split(", "))) for name, at, xyz in found}


def scan_step(name: str) -> QuestionTurn:
    """Return a turn that names the current step; it also trains nano's vision tower."""
    return QuestionTurn("scan_step", "Name the robot's step.", name)


def _next_primitive(scene: SceneObservation) -> str:
    goal = scene.goal
    if scene.arrangement == "held":
        return "move"
    if goal is not None and goal.kind == "disc":  # the expert pushes until the cube is well inside
        far = np.linalg.norm((goal.position - scene.object.position)[:2]) > ON_DISC
        return "approach" if far else "hold"
    return "hold" if scene.arrangement == "done" else "approach"


def scene_turns(
    scene: SceneObservation, turns: int, sampler: QuestionSampler, *, pointing: float, metric: float
) -> list[QuestionTurn]:
    """Sample `turns` different questions about one scene.

    A fraction `pointing` of them are points and boxes and a fraction `metric` are metric questions,
    possibly several of one kind about different objects. The rest is distributed over all other
    kinds.
    """
    groups = by_kind(scene_annotations(scene))
    shares = {("point", "box"): pointing, ("metric",): metric}
    counts = [*sampler.rng.multinomial(turns, [pointing, metric, 1 - pointing - metric])]
    drawn: list[QuestionTurn] = []
    for families, count in zip(shares, counts, strict=False):
        for _ in range(count):
            family = families[int(len(families) > 1 and sampler.rng.random() < 0.25)]
            kinds = [kind for kind in sorted(groups) if kind.startswith(family) and groups[kind]]
            if kinds and (annotation := sampler.sample(groups[kinds[sampler.rng.integers(len(kinds))]])):
                groups[annotation.kind].remove(annotation)
                drawn.append(sampler.phrase(annotation))
    rest = {kind: annotations for kind, annotations in groups.items() if not kind.startswith(NUMERIC_KINDS)}
    return drawn + sampler.sample_turns(rest, turns - len(drawn))
