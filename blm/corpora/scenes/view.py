"""What is to be seen in a simulated scene: objects, positions, image points and boxes.

Scenes are varied beyond what the tasks start with: the object elsewhere, in the hand, or where it belongs;
the goal in the air lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mujoco
import numpy as np

from blm.robots.build import FINGERS
from blm.tasks import Env
from blm.tasks.place_sphere import REST
from blm.tasks.push_cube import TARGET_RADIUS
from blm.tasks.rendering import Renderer
from blm.tasks.spec import ObjectState
from blm.types import ImageArray

MIN_VISIBLE = 8e-4
"""An object is asked about in a picture only when it covers this share of it: 10 px of 112 x 112."""
MARKERS = ("sphere", "disc")
"""Goals that are no objects: they are called by name only."""
Box = tuple[float, float, float, float]
Staging = Literal["sampled", "displaced", "held", "done"]
STAGINGS: dict[Staging, float] = {"sampled": 0.3, "displaced": 0.3, "held": 0.2, "done": 0.2}
"""How scenes are changed after their reset, and how often."""
CLEAR = 0.08
"""Things that are moved come no nearer than this to others and to the tool [m]."""


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
    seen: bool = True
    """Whether a camera that does not move with the arm shows it."""

    @property
    def solid(self) -> bool:
        """Whether it can be counted and compared: goal markers are no objects."""
        return self.kind not in MARKERS


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
    boxes: dict[str, dict[str, Box]]
    """Camera -> label -> left, top, right, bottom of its pixels, as fractions, for what is wholly visible."""
    base: np.ndarray
    """Position of the robot's base [3] and, in `middle`, of its workspace's centre [2], world [m]."""
    middle: np.ndarray
    staging: Staging = "sampled"

    @property
    def object(self) -> Thing:
        return next(t for t in self.things if t.role == "object")

    @property
    def gripper_seen(self) -> bool:
        """Whether a camera that does not move with the arm shows the tool centre point."""
        return any("gripper" in points for points in self.points.values())

    @property
    def goal(self) -> Thing | None:
        """What the object has to be moved to; the peg's task has none."""
        return next((t for t in self.things if t.role == "goal"), None)

    def in_centimetres(self) -> Scene:
        """The same with every place at a whole cm from the robot: what is said about it follows exactly from
        places that are told so."""

        def rounded(place: np.ndarray) -> np.ndarray:
            return self.base + np.round(place - self.base, 2)

        things = tuple(replace(thing, position=rounded(thing.position)) for thing in self.things)
        return replace(self, things=things, tcp=rounded(self.tcp))


class Observer:
    """Looks at an environment's present state: one picture and one segmentation a camera. Close it."""

    def __init__(self, env: Env, cameras: Sequence[str]) -> None:
        self.env, self.cameras = env, tuple(cameras)
        self._renderer = Renderer(env.model, env.image_size)

    def scene(self, staging: Staging = "sampled") -> Scene:
        env, size = self.env, self.env.image_size
        objects, tcp = env.objects(), np.asarray(env.tcp()[0])
        labels = {key: label(state) for key, state in objects.items()}
        images, points, boxes, seen = {}, {}, {}, set()
        for camera in self.cameras:
            images[camera] = self._renderer.rgb(env.data, camera, size)
            bodies = np.append(env.model.geom_bodyid, 0)[self._renderer.geoms(env.data, camera, size)]
            masks = {key: bodies == env.data.body(key).id for key in objects}
            visible = [key for key in objects if masks[key].sum() >= MIN_VISIBLE * size**2]
            where = env.project(np.stack([objects[key].position for key in visible] + [tcp]), camera)[:, :2]
            named = [labels[key] for key in visible] + ["gripper"]
            points[camera] = {
                name: (float(u), float(v))
                for name, (u, v) in zip(named, where / size, strict=True)
                if 0 <= u < 1 and 0 <= v < 1 and not (name == "gripper" and camera == "wrist")
            }
            boxes[camera] = {labels[k]: box for k in visible if (box := box_of(masks[k])) is not None}
            seen |= set(visible) if camera != "wrist" else set()
        things = tuple(
            Thing(key, labels[key], s.kind, s.color, s.position, _role(env, key), key in seen)
            for key, s in objects.items()
        )
        middle = np.array(env.task_spec.region(env.robot).centre)
        base = np.array(env.robot.base_position)
        return Scene(things, tcp, points, images, boxes, base, middle, staging)

    def close(self) -> None:
        self._renderer.close()


def box_of(mask: np.ndarray) -> Box | None:
    """Extent of a mask's pixels as fractions of the image; None when it touches the border (it is cut)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    size = len(mask)
    if not len(rows) or min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == size - 1:
        return None
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (left / size, top / size, right / size, bottom / size)


def _role(env: Env, key: str) -> Literal["object", "goal", "distractor"]:
    if key == env.task_spec.object:
        return "object"
    return "distractor" if key.startswith("distractor") else "goal"


def label(state: ObjectState) -> str:
    """What people call it: colour and kind for an object, its name for a goal marker."""
    return state.name if state.kind in MARKERS else f"{state.color} {state.kind}"


def stage(env: Env, rng: np.random.Generator) -> Staging:
    """Move the task's object to another place, into the hand, or where it belongs; return what was done.

    Nothing is moved where that is not possible without touching something; the long peg stays where it is.
    """
    staging: Staging = rng.choice(list(STAGINGS), p=list(STAGINGS.values()))
    objects, tool = env.objects(), env.tcp()
    thing = objects[env.task_spec.object]
    _lower_goal(env, rng)
    place = None if thing.kind == "peg" else _place(env, staging, thing, rng)
    if place is None:
        return "sampled"
    turn = rng.uniform(0, 2 * np.pi)
    quaternion = np.array([np.cos(turn / 2), 0.0, 0.0, np.sin(turn / 2)])
    if staging == "held":
        mujoco.mju_mat2Quat(quaternion, tool[1].ravel())
        for finger in FINGERS:
            env.data.joint(finger).qpos[0] = thing.size[0]
    env.data.joint(thing.name).qpos[:] = (*place, *quaternion)
    mujoco.mj_forward(env.model, env.data)
    return staging


def _lower_goal(env: Env, rng: np.random.Generator) -> None:
    """Bring a goal in the air down to the table, or near it, now and then: else it were always in the air."""
    for goal in env.objects().values():
        low = float(rng.choice((goal.size[0], rng.uniform(goal.size[0], 0.15))))
        if goal.kind == "sphere" and rng.random() < 0.5:
            env.data.mocap_pos[env.model.body(goal.name).mocapid[0], 2] = low
            mujoco.mj_forward(env.model, env.data)


def _place(env: Env, staging: Staging, thing: ObjectState, rng: np.random.Generator) -> np.ndarray | None:
    """Where the object goes; None for nowhere."""
    objects, tcp = env.objects(), env.tcp()[0]
    others = {key: state for key, state in objects.items() if key != thing.name}
    goal = next((s for key, s in others.items() if not key.startswith("distractor")), None)
    if staging == "sampled" or (staging == "done" and (goal is None or goal.kind == "sphere")):
        return None
    if staging == "held":
        clear = _free(tcp, None, list(others.values()))
        return tcp if clear and tcp[2] > 2 * thing.size[0] else None
    if staging == "done" and goal is not None:
        rise = {"disc": thing.size[0], "cube": 2 * thing.size[0], "bin": REST}[goal.kind]
        spread = 0.6 * TARGET_RADIUS if goal.kind == "disc" else 0.0
        spot = goal.position + np.array([*rng.uniform(-spread, spread, 2) / np.sqrt(2), rise])
        return spot if _free(spot, tcp, [o for o in others.values() if o is not goal]) else None
    area = env.task_spec.region(env.robot)
    reach = np.array(area.half) + 0.04
    for _ in range(20):
        spot = np.array([*(area.centre + reach * rng.uniform(-1, 1, 2)), thing.size[0]])
        if _free(spot, tcp, list(others.values())):
            return spot
    return None


def _free(spot: np.ndarray, tcp: np.ndarray | None, others: Sequence[ObjectState]) -> bool:
    """Whether nothing solid, nor the tool, is near this spot."""
    taken = [other.position for other in others if other.kind not in MARKERS]
    taken += [] if tcp is None else [tcp]
    return all(float(np.linalg.norm(place - spot)) > CLEAR for place in taken)
