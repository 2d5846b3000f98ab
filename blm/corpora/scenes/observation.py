"""Observations of a simulated scene: objects, positions, image points and boxes.

Scenes vary more than the initial states of the tasks: the task's object may be elsewhere, in the
hand, or at its goal, and a goal in the air may be lower. Positions are in the world frame (x
forward from the robot, y left, z up) [m]; image positions are fractions of width (to the right) and
height (down).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mujoco
import numpy as np

from blm.robots.build import FINGERS
from blm.tasks import Env
from blm.tasks.naming import Naming
from blm.tasks.place_sphere import resting_height
from blm.tasks.spec import MARKERS, ObjectState
from blm.tasks.variation import CameraShift
from blm.types import ImageArray

MIN_VISIBLE = 8e-4
"""Minimum share of an image that an object must cover to be asked about: 10 px of 112 x 112."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image's width and height."""
Arrangement = Literal["sampled", "displaced", "held", "done"]
ARRANGEMENTS: dict[Arrangement, float] = {"sampled": 0.3, "displaced": 0.3, "held": 0.2, "done": 0.2}
"""Change of a scene after its reset -> its probability."""
CLEAR = 0.08
"""Minimum distance of a moved object from other objects and from the tool [m]."""


Role = Literal["object", "goal", "top", "other", "distractor"]
"""Role in the instruction: the object to move, the goal to move it to, the end of a peg that must be up;
a thing that fits as well but is not named; or none."""


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene, with the label that questions use."""

    key: str
    """Its key in `Env.objects()`; that of the peg, with a colour, for one of its ends."""
    label: str
    """Its name in questions, e.g. 'red cube'."""
    kind: str
    color: str
    position: np.ndarray
    """World frame [m], shape [3]."""
    role: Role = "goal"
    seen: bool = True
    """Whether a third-person camera shows it."""

    @property
    def solid(self) -> bool:
        """Whether it can be counted and compared, unlike goal markers and the ends of a peg."""
        return self.kind not in (*MARKERS, "end")


@dataclass(frozen=True)
class SceneObservation:
    """The annotations of one moment, from which questions are computed."""

    objects: tuple[SceneObject, ...]
    tcp: np.ndarray
    """World position of the tool centre point [m], shape [3]."""
    points: dict[str, dict[str, tuple[float, float]]]
    """Camera -> label -> image position as fractions of width and height, if visible.

    The wrist view omits the gripper, because it never moves there.
    """
    images: dict[str, ImageArray]
    boxes: dict[str, dict[str, Box]]
    """Camera -> label -> bounding box, for objects that the image border does not cut off."""
    base: np.ndarray
    """World position of the robot's base [m], shape [3]."""
    middle: np.ndarray
    """World position of the workspace's centre [m], shape [2]."""
    arrangement: Arrangement = "sampled"
    task: str = ""
    instruction: str = ""
    naming: Naming = field(default_factory=Naming)
    cameras_known: bool = True
    """Whether the third-person cameras are where the plain suite has them.

    From a camera at an unknown place an image does not tell positions in the robot's frame.
    """

    @property
    def object(self) -> SceneObject:
        """The object that the task moves."""
        return next(t for t in self.objects if t.role == "object")

    @property
    def gripper_seen(self) -> bool:
        """Whether a third-person camera shows the tool centre point."""
        return any("gripper" in points for points in self.points.values())

    @property
    def goal(self) -> SceneObject | None:
        """The goal of the task's object; None for the peg's task."""
        return next((t for t in self.objects if t.role == "goal"), None)

    def in_centimetres(self) -> SceneObservation:
        """Round all positions to whole centimetres from the robot's base.

        Answers then follow exactly from positions that a thought states in centimetres.
        """

        def rounded(place: np.ndarray) -> np.ndarray:
            return self.base + np.round(place - self.base, 2)

        objects = tuple(replace(item, position=rounded(item.position)) for item in self.objects)
        return replace(self, objects=objects, tcp=rounded(self.tcp))


class SceneObserver:
    """Observes an environment: one image and one segmentation mask per camera.

    Images have the sensor errors of the episode's variation; masks have none. `close` frees the
    environment's renderers.
    """

    def __init__(self, env: Env, cameras: Sequence[str]) -> None:
        self.env, self.cameras = env, tuple(cameras)

    def observe(self, arrangement: Arrangement = "sampled") -> SceneObservation:
        """Render all cameras and return the observation."""
        env, size = self.env, self.env.image_size
        things, tcp = list(_things(env)), np.asarray(env.tcp()[0])
        images = env.observe(self.cameras)["pixels"]
        points, boxes, seen = {}, {}, set()
        for camera in self.cameras:
            geoms = env.geoms(camera)
            masks = {thing.label: np.isin(geoms, parts) for thing, parts in things}
            visible = [t for t, _ in things if masks[t.label].sum() >= MIN_VISIBLE * size**2]
            where = env.project(np.stack([t.position for t in visible] + [tcp]), camera)[:, :2]
            named = [t.label for t in visible] + ["gripper"]
            points[camera] = {
                name: (float(u), float(v))
                for name, (u, v) in zip(named, where / size, strict=True)
                if 0 <= u < 1 and 0 <= v < 1 and not (name == "gripper" and camera == "wrist")
            }
            boxes[camera] = {t.label: box for t in visible if (box := box_of(masks[t.label])) is not None}
            seen |= {t.label for t in visible} if camera != "wrist" else set()
        return SceneObservation(
            objects=tuple(replace(thing, seen=thing.label in seen) for thing, _ in things),
            tcp=tcp,
            points=points,
            images=images,
            boxes=boxes,
            base=np.array(env.robot.base_position),
            middle=np.array(env.task_spec.region(env.robot).centre),
            arrangement=arrangement,
            task=env.task,
            instruction=env.task_description,
            naming=env.naming,
            cameras_known=env.variation.camera == CameraShift(),
        )

    def close(self) -> None:
        self.env.close()


def box_of(mask: np.ndarray) -> Box | None:
    """Return the bounding box of a mask [size, size]; None if it is empty or touches the border."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    size = len(mask)
    if not len(rows) or min(rows[0], columns[0]) == 0 or max(rows[-1], columns[-1]) == size - 1:
        return None
    left, right = columns[0], columns[-1] + 1
    top, bottom = rows[0], rows[-1] + 1
    return (left / size, top / size, right / size, bottom / size)


def _things(env: Env) -> Iterator[tuple[SceneObject, np.ndarray]]:
    """Yield every object of the scene with its geoms; the ends of a peg if one of them is named."""
    for key, state in env.objects().items():
        geoms = np.flatnonzero(env.model.geom_bodyid == env.data.body(key).id)
        yield SceneObject(key, state.label, state.kind, state.color, state.position, _role(env, key)), geoms
    for item in env.items:
        if item.name in env.task_spec.swap and "top" in env.naming.words:
            geoms = np.flatnonzero(env.model.geom_bodyid == env.data.body(item.name).id)
            for part, geom in zip(item.parts, geoms, strict=True):
                role: Role = "top" if part.color == env.naming.words["top"] else "other"
                key, named = f"{item.name} {part.color}", f"{part.color} end"
                place = env.data.geom_xpos[geom].copy()
                yield SceneObject(key, named, "end", part.color, place, role), np.array([geom])


def _role(env: Env, key: str) -> Role:
    if key.startswith("distractor"):
        return "distractor"
    parts: dict[str, Role] = {env.task_spec.object: "object", env.task_spec.goal: "goal"}
    return {env.naming.swap.get(part, part): role for part, role in parts.items()}.get(key, "other")


def rearrange(env: Env, rng: np.random.Generator) -> Arrangement:
    """Move the task's object elsewhere, into the hand or to its goal; return the arrangement.

    Nothing is moved if there is no free position; the long peg always stays in place.
    """
    arrangement: Arrangement = rng.choice(list(ARRANGEMENTS), p=list(ARRANGEMENTS.values()))
    tool = env.tcp()
    item = env.named_objects()[env.task_spec.object]
    _lower_goal(env, rng)
    place = None if item.kind == "peg" else _new_position(env, arrangement, item, rng)
    if place is None:
        return "sampled"
    turn = rng.uniform(0, 2 * np.pi)
    quaternion = np.array([np.cos(turn / 2), 0.0, 0.0, np.sin(turn / 2)])
    if arrangement == "held":
        mujoco.mju_mat2Quat(quaternion, tool[1].ravel())
        for finger in FINGERS:
            env.data.joint(finger).qpos[0] = item.size[0]
    env.data.joint(item.name).qpos[:] = (*place, *quaternion)
    mujoco.mj_forward(env.model, env.data)
    return arrangement


def _lower_goal(env: Env, rng: np.random.Generator) -> None:
    """Lower a floating goal to or near the table with a probability of one half, for variety."""
    for goal in env.objects().values():
        low = float(rng.choice((goal.size[0], rng.uniform(goal.size[0], 0.15))))
        if goal.kind == "sphere" and rng.random() < 0.5:
            env.data.mocap_pos[env.model.body(goal.name).mocapid[0], 2] = low
            mujoco.mj_forward(env.model, env.data)


def _new_position(
    env: Env, arrangement: Arrangement, item: ObjectState, rng: np.random.Generator
) -> np.ndarray | None:
    """Return the object's new position [3], or None if it stays."""
    objects, tcp = env.objects(), env.tcp()[0]
    others = {key: state for key, state in objects.items() if key != item.name}
    goal = env.named_objects().get(env.task_spec.goal)
    if arrangement == "sampled" or (arrangement == "done" and (goal is None or goal.kind == "sphere")):
        return None
    if arrangement == "held":
        clear = _is_free(tcp, None, list(others.values()))
        return tcp if clear and tcp[2] > 2 * item.size[0] else None
    if arrangement == "done" and goal is not None:
        rise = {
            "disc": item.size[0],
            "cube": item.size[0] + goal.size[0],
            "bin": resting_height(item, goal),
        }[goal.kind]
        radius = 0.6 * goal.size[0] if goal.kind == "disc" else 0.0
        spot = goal.position + np.array([*rng.uniform(-radius, radius, 2) / np.sqrt(2), rise])
        return spot if _is_free(spot, tcp, [o for o in others.values() if o.name != goal.name]) else None
    area = env.task_spec.region(env.robot)
    reach = np.array(area.half) + 0.04
    for _ in range(20):
        spot = np.array([*(area.centre + reach * rng.uniform(-1, 1, 2)), item.size[0]])
        if _is_free(spot, tcp, list(others.values())):
            return spot
    return None


def _is_free(spot: np.ndarray, tcp: np.ndarray | None, others: Sequence[ObjectState]) -> bool:
    """Whether no solid object and no tool is within CLEAR of this position."""
    taken = [other.position for other in others if other.kind not in MARKERS]
    taken += [] if tcp is None else [tcp]
    return all(float(np.linalg.norm(place - spot)) > CLEAR for place in taken)
