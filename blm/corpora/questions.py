"""Questions about simulated scenes, with answers computed from the simulator's state.

Directions are seen from the robot, which looks along +x: left is +y, behind is farther from the robot (+x),
in front is nearer. Pointing uses the project's one convention: integers 0..1000 of image width and height,
"(x, y)", x to the right, y down. Yes/no kinds draw positive and negative cases equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from blm.backbone.prompt import control_question
from blm.tasks import Env
from blm.tasks.spec import PALETTE, ObjectState
from blm.types import Image, ImageArray, Message

POINT_SCALE = 1000
"""Pointing coordinates run from 0 to this over the image's width and height."""
MIN_VISIBLE_PX = 6
"""An object is asked about in a picture only when it covers at least this many pixels [px]."""
MIN_GAP_M = 0.03
"""Relations are asked only when two objects differ by at least this along the axis [m]."""
KINDS = ("cube", "ball", "cylinder")
"""Kinds that come in every colour: those that are asked about by kind."""
MARKERS = ("sphere", "disc")
"""Goals that are no objects: they are pointed at by name only."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene as questions speak of it."""

    key: str
    """Its key in `Env.objects()`."""
    label: str
    """What people call it, e.g. 'red cube'."""
    kind: str
    color: str
    position: np.ndarray
    """World frame [m], shape [3]."""
    role: Literal["object", "goal", "distractor"] = "goal"
    """Its part in the task: what has to be moved, what it has to be moved to, or none."""


@dataclass(frozen=True)
class Scene:
    """The facts of one moment: what the questions are computed from."""

    things: tuple[Thing, ...]
    tcp: np.ndarray
    """World position of the tool centre point [m], shape [3]."""
    points: dict[str, dict[str, tuple[float, float]]]
    """Camera -> label -> image position as fractions of width and height, for what is visible there.

    The gripper is left out of the wrist view: it never moves in it.
    """
    images: dict[str, ImageArray]


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


def observe_scene(env: Env, cameras: Sequence[str]) -> Scene:
    """Read the facts of the environment's present state."""
    things = tuple(
        Thing(key, label(state), state.kind, state.color, state.position, _role(env, key))
        for key, state in env.objects().items()
    )
    tcp = np.asarray(env.tcp()[0])
    size = env.image_size
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for camera in cameras:
        visible = env.visible_pixels(camera)
        seen = [t for t in things if visible[t.key] >= MIN_VISIBLE_PX]
        where = env.project(np.stack([t.position for t in seen] + [tcp]), camera)[:, :2] / size
        named = [*(t.label for t in seen), "gripper"]
        points[camera] = {
            label: (float(u), float(v))
            for label, (u, v) in zip(named, where, strict=True)
            if 0 <= u < 1 and 0 <= v < 1 and not (label == "gripper" and camera == "wrist")
        }
    return Scene(things, tcp, points, dict(env.observe()["pixels"]))


def _role(env: Env, key: str) -> Literal["object", "goal", "distractor"]:
    if key == env.task_spec.object:
        return "object"
    return "distractor" if key.startswith("distractor") else "goal"


def label(state: ObjectState) -> str:
    """What people call it: colour and kind for an object, its name for a goal marker."""
    return state.name if state.kind in MARKERS else f"{state.color} {state.kind}"


def format_point(fraction: tuple[float, float]) -> str:
    """Write an image position in the pointing convention."""
    x, y = (round(value * POINT_SCALE) for value in fraction)
    return f"({x}, {y})"


def ask_existence(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Is there such an object? Half of the questions name one that is not there."""
    present = {t.label for t in solid(scene)}
    absent = [f"{c} {k}" for c in PALETTE for k in KINDS if f"{c} {k}" not in present]
    yes = bool(rng.integers(2)) and bool(present)
    named = str(rng.choice(sorted(present) if yes else absent))
    return Turn("existence", f"Is there a {named} on the table?", "yes" if yes else "no")


def ask_color(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """What colour is the only object of its kind?"""
    alone = [t for t in solid(scene) if sum(o.kind == t.kind for o in solid(scene)) == 1]
    if not alone:
        return None
    thing = alone[rng.integers(len(alone))]
    return Turn("color", f"What colour is the {thing.kind}?", thing.color)


def ask_count(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """How many objects of a kind, or in all?"""
    kind = str(rng.choice([*KINDS, "object"]))
    number = sum(kind in ("object", t.kind) for t in solid(scene))
    return Turn("count", f"How many {kind}s are on the table?", str(number))


def ask_relation(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Left or right, in front or behind, as the robot sees it."""
    lateral = bool(rng.integers(2))
    axis, words = (1, ("left", "right")) if lateral else (0, ("behind", "front"))
    pairs = [
        (a, b)
        for a in solid(scene)
        for b in solid(scene)
        if a.label != b.label and abs(a.position[axis] - b.position[axis]) >= MIN_GAP_M
    ]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    options = "left or right of" if lateral else "in front of or behind"
    answer = words[0] if a.position[axis] > b.position[axis] else words[1]
    return Turn(
        "left_right" if lateral else "front_behind", f"Is the {a.label} {options} the {b.label}?", answer
    )


def ask_nearest(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Which object is nearest to the gripper? Asked when the runner-up is clearly farther."""
    ranked = sorted(solid(scene), key=lambda t: float(np.linalg.norm(t.position - scene.tcp)))
    if len(ranked) < 2:
        return None
    first, second = (float(np.linalg.norm(t.position - scene.tcp)) for t in ranked[:2])
    if second - first < MIN_GAP_M:
        return None
    return Turn("nearest", "Which object is nearest to the gripper?", ranked[0].label)


def ask_point(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Where is it in a picture?"""
    cameras = [camera for camera, points in scene.points.items() if points]
    if not cameras:
        return None
    camera = cameras[0] if rng.random() < 0.7 else cameras[rng.integers(len(cameras))]
    labels = sorted(scene.points[camera])
    named = labels[rng.integers(len(labels))]
    answer = format_point(scene.points[camera][named])
    return Turn(f"point_{camera}", f"Point to the {named} in the {camera} view.", answer)


ASKERS: dict[str, Callable[[Scene, np.random.Generator], Turn | None]] = {
    "point": ask_point,
    "existence": ask_existence,
    "color": ask_color,
    "count": ask_count,
    "relation": ask_relation,
    "nearest": ask_nearest,
}


def ask_done(instruction: str, done: bool) -> Turn:
    """Is the instruction fulfilled in this frame?"""
    return Turn("task_done", f"Task: {instruction} Is the task done?", "yes" if done else "no")


def ask_next(instruction: str, primitive: str) -> Turn:
    """Which primitive does the robot carry out next?"""
    return Turn("next_primitive", f"Task: {instruction} What is the next primitive?", primitive)


def control_turn(scene: Scene, instruction: str, robot: str) -> Turn:
    """The policy's own prompt, answered: where object, goal and gripper are, and what comes next.

    Stage II taps the backbone at exactly this prompt, so Stage I teaches what has to be known there. In a
    random scene nothing is under way, so the first primitive comes next.
    """
    roles: dict[str, str] = {t.label: t.role for t in scene.things if t.role != "distractor"}
    roles["gripper"] = "gripper"
    views = []
    for camera, points in scene.points.items():
        spots = [f"{role} {format_point(points[name])}" for name, role in roles.items() if name in points]
        views.append(f"{camera}: {', '.join(spots) or 'nothing'}.")
    question = control_question(instruction, robot, list(scene.points))
    return Turn("control", question, f"{' '.join(views)} next: approach")


def scene_turns(scene: Scene, turns: int, rng: np.random.Generator) -> list[Turn]:
    """Draw different questions about one scene: half of them pointing, the rest over the other kinds.

    Pointing gets half because a policy needs it most and it is learnt slowest.
    """
    others = [kind for kind in ASKERS if kind != "point"]
    drawn: dict[str, Turn] = {}
    for index in range(4 * turns):
        kind = "point" if index % 2 == 0 else str(rng.choice(others))
        turn = ASKERS[kind](scene, rng)
        if turn is not None:
            drawn.setdefault(turn.question, turn)
        if len(drawn) == turns:
            break
    return list(drawn.values())


def to_messages(images: Sequence[ImageArray], turns: Sequence[Turn]) -> tuple[Message, ...]:
    """One conversation: the pictures come with the first question."""
    pictures = tuple(Image(image) for image in images)
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        messages.append(Message("user", (*pictures, turn.question) if index == 0 else (turn.question,)))
        messages.append(Message("assistant", (turn.answer,)))
    return tuple(messages)


def solid(scene: Scene) -> list[Thing]:
    """The objects that can be counted and compared: goal markers are no objects."""
    return [t for t in scene.things if t.kind not in MARKERS]
