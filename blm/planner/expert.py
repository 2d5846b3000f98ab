"""A scripted expert: it computes the next action from any state of the environment."""

from __future__ import annotations

import time
from collections import Counter

import mink
import numpy as np
from numpy.typing import NDArray

from blm.planner.arm_planner import REASONS, ArmPlanner, PlanError, Pose, Vector, path_length
from blm.planner.collision import CLEARANCE, TOUCH
from blm.planner.decompositions import DECOMPOSITIONS, KEY_POSES
from blm.planner.primitives import Candidate, Primitive, WorldState
from blm.tasks import Env
from blm.tasks.spec import Item
from blm.types import lookup

HOLD_STEPS = 10
"""Default number of control steps that the arm holds still at the goal before a demonstration ends."""
STILL = 0.15
"""Maximum joint speed of an arm that holds still [rad/s]; the tasks require 0.2."""
LAG = 0.06
"""Time by which the servos lag behind their targets [s]; see `robots.build.DAMPING_TIME`."""
OFF_PLAN = 0.12
"""Deviation from the plan, corrected for the lag, that triggers replanning [rad]."""
SLACK = 0.1
"""A new plan starts from the last targets unless they are further than this from the joints [rad]."""
CLOSE = 0.004
"""Distance kept from items by motions that must be close to them [m]."""
TRIES = 2
"""A candidate that was executed this often without effect moves to the end of the ranking."""
SETTLING = 0.2
"""Weight of an attempt whose primitive is due again at once: the arm may still be on its way."""
SEARCHES = 3
"""Maximum number of candidates for which paths are sampled before the expert gives up."""
REACH = 2.0
"""Goals within this distance of the present joints are preferred [rad]; others change the posture."""
PLANNERS = (
    ("line", np.inf),
    ("joint_space", REACH),
    ("sampled", REACH),
    ("joint_space", np.inf),
    ("sampled", np.inf),
)
"""Planning methods in the order tried: straight for the tool, straight in joint space, sampled
around obstacles; and how far from the present joints a goal may be [rad]."""


class Expert:
    """Chooses a primitive from the measured state and plans its motion from there.

    The expert replans when the object moves, when the grasp is lost, or when something else moved
    the arm. A candidate that was executed TRIES times and is due again at the same pose is ranked
    last: if a motion has no effect, another candidate pose is tried.
    """

    def __init__(self, env: Env, rng: np.random.Generator, hold: int = HOLD_STEPS) -> None:
        self.env, self.hold = env, hold
        self._decide = lookup("task with an expert", env.task, DECOMPOSITIONS)
        self._solid: tuple[Item, ...] | None = None
        self.reset(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new episode; the planner's model is kept if the solid things are the same."""
        self._rng = rng
        solid = tuple(
            item for item in (*self.env.items, *self.env.solid_distractors) if item.role != "marker"
        )
        if solid != self._solid:
            self._solid, self.planner = solid, ArmPlanner(self.env.robot, solid)
        self._primitive = Primitive(name="none", opening=1.0)
        self._plan: Vector = np.empty((0, self.planner.dof))
        self._next = self._steps_held = 0
        self._counts = Counter[str]()
        self._attempted: list[tuple[str, Pose, float]] = []  # primitive, target pose, weight
        self._target_pose: Pose | None = None
        self._length = 0.0
        self.drops = 0
        """Number of grasps that were lost."""
        self.planning_seconds = 0.0
        """Wall time spent planning."""

    @property
    def done(self) -> bool:
        """Whether the arm has held still at the goal for `hold` steps."""
        return self._steps_held >= self.hold

    @property
    def remaining(self) -> int:
        """Number of steps left in the current motion."""
        return len(self._plan) - self._next

    def metrics(self) -> dict[str, float]:
        """Return planning statistics since the reset; they are reproducible for an episode.

        plans: planned motions; replans: motions that replaced an unfinished one; joint_path_rad:
        total length in joint space; joint_space_paths and sampled_paths: motions that are not
        straight tool lines; rollbacks: candidates skipped because they had failed before;
        candidates_rejected (total) and rejected_<reason>: failed attempts at planning a candidate.
        """
        names = ("plans", "replans", "joint_space_paths", "sampled_paths", "rollbacks")
        rejected = {f"rejected_{reason}": self._counts[f"rejected_{reason}"] for reason in REASONS}
        counts = {name: self._counts[name] for name in names}
        total = {"joint_path_rad": self._length, "candidates_rejected": sum(rejected.values())}
        return {**counts, **total, **rejected}

    def check(self) -> None:
        """Raise PlanError "unreachable" if the arm cannot reach a key pose in this scene.

        Of each key pose's candidates, one must be reachable without a collision with the arm itself
        or the table.
        """
        began = time.perf_counter()
        rng = np.random.default_rng(0)
        home = np.array(self.env.robot.home)
        key_poses = lookup("task with key poses", self.env.task, KEY_POSES)(self._world_state())
        self.planner.update_collision_world({}, touches=[item.name for item in self._solid or ()])
        reached = [
            any(self.planner.inverse_kinematics(pose, home, rng) is not None for pose in candidates)
            for candidates in key_poses
        ]
        self.planning_seconds += time.perf_counter() - began
        if not all(reached):
            number = reached.index(False)
            raise PlanError(
                "unreachable",
                f"'{self.env.embodiment}' reaches none of the {len(key_poses[number])} candidates for "
                f"key pose {number + 1} of {len(key_poses)} of '{self.env.task}'",
            )

    def act(self) -> tuple[NDArray[np.float32], str]:
        """Return the action [D] for this step and the name of its primitive. Raises PlanError."""
        state = self._world_state()
        if not self._plan_holds(state):
            began = time.perf_counter()
            try:
                self._start_primitive(self._decide(state), state)
            finally:
                self.planning_seconds += time.perf_counter() - began
        target = self._plan[self._next]
        primitive = self._primitive
        self._next += 1
        still = np.abs(self._joint_velocities()).max() < STILL
        self._steps_held = self._steps_held + 1 if still and primitive.name == "hold" else 0
        return np.append(target, primitive.opening).astype(np.float32), primitive.name

    def _world_state(self) -> WorldState:
        """Measure the state of arm and scene."""
        env = self.env
        position, rotation = env.tcp()
        tool = Pose.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)
        return WorldState(
            env.robot, tool, env.gripper_opening, env.objects(), env.is_grasping, env.naming.swap
        )

    def _start_primitive(self, primitive: Primitive, state: WorldState) -> None:
        if self._primitive.name in ("lift", "move") and primitive.name == "approach":
            self.drops += 1
        unfinished = self._target_pose is not None and self.remaining > 0
        if self._target_pose is not None and not unfinished:
            weight = 1.0 if primitive.name != self._primitive.name else SETTLING
            self._attempted.append((self._primitive.name, self._target_pose, weight))
        last = self._plan[-1:]
        self._plan = self._plan[:0]
        self._primitive = primitive
        self._next = 0
        self._target_pose = None
        self._update_collision_world(primitive, state)
        if primitive.candidates:
            self._plan = self._first_feasible(primitive, state)
            self._counts["plans"] += 1
            self._counts["replans"] += unfinished
        elif len(last) and np.abs(last - self._joint_positions()).max() < SLACK:
            self._plan = last
        else:
            self._plan = self._start_configuration()[None]

    def _first_feasible(self, primitive: Primitive, state: WorldState) -> Vector:
        """Plan the best feasible candidate. Raises PlanError if there is none.

        The simplest planning method is tried for all candidates first, and the clearance is reduced
        only if nothing is feasible with more.
        """
        candidates = self._ranked_candidates(primitive)
        methods = PLANNERS if primitive.free else PLANNERS[:1]
        for clearance in (CLEARANCE, CLOSE, -TOUCH) if primitive.free else (CLOSE, -TOUCH):
            errors: list[PlanError] = []
            for method in methods:
                searched = 0
                for rank, candidate in enumerate(candidates):
                    if method[0] == "sampled":  # only if the goal is feasible and the path is blocked
                        if errors[rank].reason != "no_path" or searched == SEARCHES:
                            continue
                        searched += 1
                    try:
                        plan = self._plan_candidate(method, candidate, clearance, primitive, state)
                    except PlanError as error:
                        self._counts[f"rejected_{error.reason}"] += 1
                        if error.reason == "timeout":
                            raise
                        errors[rank : rank + 1] = [error]
                        continue
                    self._target_pose = candidate.poses[-1]
                    self._counts[f"{method[0]}_paths"] += 1
                    return plan
            if not any(error.reason in ("collision", "no_path") for error in errors):
                break
        raise errors[0]

    def _plan_candidate(
        self,
        method: tuple[str, float],
        candidate: Candidate,
        clearance: float,
        primitive: Primitive,
        state: WorldState,
    ) -> Vector:
        """Plan one candidate with one method; return targets [T, dof]. Raises PlanError."""
        name, reach = method
        planner = self.planner
        start = self._start_configuration()
        if name == "line":
            waypoints = planner.plan_cartesian(start, candidate.poses, clearance)
        else:
            waypoints = planner.plan_joint_space(
                start, candidate.poses[-1], self._rng, clearance, sample=name == "sampled", reach=reach
            )
        if candidate.next_poses:
            self._update_collision_world(primitive, state, ahead=True)
            try:
                planner.plan_cartesian(waypoints[-1], candidate.next_poses)
            finally:
                self._update_collision_world(primitive, state)
        plan = planner.retime(waypoints, primitive.speed)
        if name != "line" and not planner.is_free(plan, clearance / 2):
            raise PlanError("collision", "the smoothed trajectory leaves the collision-free path")
        self._length += path_length(waypoints)
        return plan

    def _update_collision_world(self, primitive: Primitive, state: WorldState, ahead: bool = False) -> None:
        """Update the item poses of the planner.

        The arm may touch the task's object in motions near it, and in those of the next primitive
        (`ahead`).
        """
        touches = {*primitive.touches}
        if not primitive.carried and (ahead or not primitive.free):
            touches.add(state.item(self.env.task_spec.object).name)
        opening = max(primitive.opening, state.opening)
        self.planner.update_collision_world(
            state.objects, touches=touches, carried=primitive.carried, tool=state.tool, opening=opening
        )

    def _ranked_candidates(self, primitive: Primitive) -> list[Candidate]:
        """Return the candidates; those that were executed without effect come last."""
        earlier = [(pose, weight) for name, pose, weight in self._attempted if name == primitive.name]
        tries = [
            sum(weight for pose, weight in earlier if _is_same(candidate.poses[-1], pose))
            for candidate in primitive.candidates
        ]
        exhausted = [count > TRIES - 0.5 * SETTLING for count in tries]
        self._counts["rollbacks"] += exhausted[0] and not all(exhausted)
        order = sorted(range(len(exhausted)), key=lambda rank: exhausted[rank])
        return [primitive.candidates[rank] for rank in order]

    def _plan_holds(self, state: WorldState) -> bool:
        """Whether the current plan is unfinished, valid and followed by the arm."""
        if self._next >= len(self._plan) or not self._primitive.valid(state):
            return False
        ahead = self._joint_positions() + LAG * self._joint_velocities()
        return bool(np.abs(ahead - self._plan[self._next - 1]).max() < OFF_PLAN)

    def _start_configuration(self) -> Vector:
        """Return the last joint targets if they are near the joints, so that plans join smoothly."""
        q = self._joint_positions()
        near = np.clip(self.env.data.ctrl[: self.planner.dof], q - SLACK, q + SLACK)
        return q if self.planner.collides(near) else near

    def _joint_positions(self) -> Vector:
        return self.env.data.qpos[: self.planner.dof].copy()

    def _joint_velocities(self) -> Vector:
        return self.env.data.qvel[: self.planner.dof]


def _is_same(one: Pose, other: Pose) -> bool:
    """Whether two poses are the same candidate, within 2 mm and 1 degree."""
    near = np.linalg.norm(one.translation() - other.translation()) < 0.002
    return bool(near and np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()) < 0.0175)
