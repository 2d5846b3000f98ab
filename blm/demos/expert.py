"""A scripted expert that can be asked for the next action in any state of the environment."""

from __future__ import annotations

import mink
import numpy as np
from numpy.typing import NDArray

from blm.demos.planner import ArmPlanner, PlanError, Pose, Vector
from blm.demos.primitives import DECOMPOSITIONS, Step, View
from blm.tasks import Env
from blm.types import lookup

HOLD_STEPS = 10
"""Steps of holding still at the goal after which a demonstration is over."""
STILL = 0.15
"""Greatest joint speed of an arm that holds still [rad/s]; the tasks ask for .2."""
LAG = 0.06
"""How long the servos trail their targets [s]."""
OFF_PLAN = 0.12
"""Distance from the plan, corrected for the lag, at which the expert plans anew [rad]."""
SLACK = 0.1
"""A new plan starts from the last targets unless they are further than this from the joints [rad]."""


class Expert:
    """State feedback: the primitive due is decided from the measured state, its motion planned from there.

    A plan is given up when its object moves, its grasp is lost, or something else moved the arm.
    """

    def __init__(self, env: Env, rng: np.random.Generator) -> None:
        self.env = env
        self.planner = ArmPlanner(env.robot)
        self._decide = lookup("task with an expert", env.task, DECOMPOSITIONS)
        self.reset(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Forget the episode so far; the planner's model stays."""
        self._rng = rng
        self._step = Step(primitive="none", opening=1.0)
        self._plan: Vector = np.empty((0, self.planner.dof))
        self._next = self._held = 0
        self.drops = 0
        """Grasps that were lost."""

    @property
    def done(self) -> bool:
        """Whether the goal has been held, standing still, for HOLD_STEPS steps."""
        return self._held >= HOLD_STEPS

    @property
    def remaining(self) -> int:
        """Steps left of the current motion."""
        return len(self._plan) - self._next

    def act(self) -> tuple[NDArray[np.float32], str]:
        """Return the action for this step and the primitive that it belongs to. Raises PlanError."""
        env = self.env
        position, rotation = env.tcp()
        tool = Pose.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)
        view = View(env.robot, tool, env.gripper_opening, env.objects(), env.is_grasping)
        if not self._follows(view):
            self._begin(self._decide(view))
        target, step = self._plan[self._next], self._step
        self._next += 1
        still = np.abs(self._speeds()).max() < STILL
        self._held = self._held + 1 if still and step.primitive == "hold" else 0
        return np.append(target, step.opening).astype(np.float32), step.primitive

    def _begin(self, step: Step) -> None:
        if self._step.primitive in ("lift", "move") and step.primitive == "approach":
            self.drops += 1
        last, self._plan = self._plan[-1:], self._plan[:0]
        self._step, self._next = step, 0
        if step.paths:
            self._plan = self._first_feasible(step)
        elif len(last) and np.abs(last - self._joints()).max() < SLACK:
            self._plan = last
        else:
            self._plan = self._start()[None]

    def _first_feasible(self, step: Step) -> Vector:
        """Plan the best candidate that the arm can do and go on from. Raises PlanError when there is none."""
        start = self._start()
        for free in (False, True) if step.free else (False,):
            failures: list[PlanError] = []
            for poses, ahead in step.paths:
                try:
                    line = self.planner.detour(start, poses[-1], self._rng) if free else None
                    waypoints = self.planner.path(start, poses) if line is None else line
                    self.planner.path(waypoints[-1], ahead)
                    return self.planner.retime(waypoints, step.speed)
                except PlanError as error:
                    failures.append(error)
        raise failures[0]

    def _follows(self, view: View) -> bool:
        """Whether the current plan still stands."""
        if self._next >= len(self._plan) or not self._step.valid(view):
            return False
        ahead = self._joints() + LAG * self._speeds()
        return bool(np.abs(ahead - self._plan[self._next - 1]).max() < OFF_PLAN)

    def _start(self) -> Vector:
        """Where the arm was last sent, if it is near: plans then join without a jerk."""
        q = self._joints()
        near = np.clip(self.env.data.ctrl[: self.planner.dof], q - SLACK, q + SLACK)
        return q if self.planner.collides(near) else near

    def _joints(self) -> Vector:
        return self.env.data.qpos[: self.planner.dof].copy()

    def _speeds(self) -> Vector:
        return self.env.data.qvel[: self.planner.dof]
