"""A scripted expert that can be asked for the next action in any state of the environment."""

from __future__ import annotations

import time
from collections import Counter

import mink
import numpy as np
from numpy.typing import NDArray

from blm.planner.arm_planner import REASONS, ArmPlanner, PlanError, Pose, Vector, path_length
from blm.planner.collision import CLEARANCE, TOUCH
from blm.planner.decompositions import DECOMPOSITIONS, KEY_POSES
from blm.planner.primitives import Path, Step, View
from blm.tasks import Env
from blm.types import lookup

HOLD_STEPS = 10
"""Steps of holding still at the goal after which a demonstration is over, if nothing else is said."""
STILL = 0.15
"""Greatest joint speed of an arm that holds still [rad/s]; the tasks ask for .2."""
LAG = 0.06
"""How long the servos trail their targets [s]."""
OFF_PLAN = 0.12
"""Distance from the plan, corrected for the lag, at which the expert plans anew [rad]."""
SLACK = 0.1
"""A new plan starts from the last targets unless they are further than this from the joints [rad]."""
CLOSE = 0.004
"""Distance kept from items by motions that have to be near them [m]."""
TRIES = 2
"""A candidate that was carried out this often and is due again goes to the end of the ranking."""
SETTLING = 0.2
"""What it counts to be due again at once: the arm may still be on its way to where it was sent."""
SEARCHES = 3
"""Candidates for which ways are sampled before a motion is given up."""
REACH = 2.0
"""Joint positions within this of the arm's [rad] are preferred: others are another posture."""
KINDS = (
    ("line", np.inf),
    ("joint_space", REACH),
    ("sampled", REACH),
    ("joint_space", np.inf),
    ("sampled", np.inf),
)
"""Of ways: straight for the tool, straight for the joints, around obstacles; how far their ends may be."""


class Expert:
    """State feedback: the primitive due is decided from the measured state, its motion planned from there.

    A plan is given up when its object moves, its grasp is lost, or something else moved the arm. A candidate
    that was carried out TRIES times and is due again at the same place is ranked last: where the effect of a
    motion does not come about, the choice of poses is rolled back.
    """

    def __init__(self, env: Env, rng: np.random.Generator, hold: int = HOLD_STEPS) -> None:
        self.env, self.hold = env, hold
        self.planner = ArmPlanner(env.robot, env.items)
        self._decide = lookup("task with an expert", env.task, DECOMPOSITIONS)
        self._solid = frozenset(item.name for item in env.items if item.role != "marker")
        self.reset(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Forget the episode so far; the planner's model stays."""
        self._rng = rng
        self._step = Step(primitive="none", opening=1.0)
        self._plan: Vector = np.empty((0, self.planner.dof))
        self._next = self._held = 0
        self._counts = Counter[str]()
        self._done: list[tuple[str, Pose, float]] = []
        self._aim: Pose | None = None
        self._length = 0.0
        self.drops = 0
        """Grasps that were lost."""
        self.planning_seconds = 0.0
        """Wall time spent planning."""

    @property
    def done(self) -> bool:
        """Whether the goal has been held, standing still, for `hold` steps."""
        return self._held >= self.hold

    @property
    def remaining(self) -> int:
        """Steps left of the current motion."""
        return len(self._plan) - self._next

    def metrics(self) -> dict[str, float]:
        """What planning took since the reset; the same for the same episode.

        plans: motions planned; replans: those that replaced an unfinished one; joint_path_rad: their length
        in joint space; joint_space_paths and sampled_paths: those that are no straight lines of the tool;
        rollbacks: candidates passed over because they had failed; candidates_rejected, in all and
        rejected_<reason>: those that could not be planned, some in several ways.
        """
        names = ("plans", "replans", "joint_space_paths", "sampled_paths", "rollbacks")
        rejected = {f"rejected_{reason}": self._counts[f"rejected_{reason}"] for reason in REASONS}
        counts = {name: self._counts[name] for name in names}
        total = {"joint_path_rad": self._length, "candidates_rejected": sum(rejected.values())}
        return {**counts, **total, **rejected}

    def check(self) -> None:
        """Raise PlanError "unreachable" when a stage of the task is beyond the arm in the present scene.

        Each stage needs one pose that the arm reaches without going into itself or the table.
        """
        began = time.perf_counter()
        rng, home = np.random.default_rng(0), np.array(self.env.robot.home)
        stages = lookup("task with key poses", self.env.task, KEY_POSES)(self._view())
        self.planner.place({}, touches=self._solid)
        reached = [any(self.planner.solve(pose, home, rng) is not None for pose in stage) for stage in stages]
        self.planning_seconds += time.perf_counter() - began
        if not all(reached):
            number = reached.index(False)
            raise PlanError(
                "unreachable",
                f"'{self.env.embodiment}' reaches none of {len(stages[number])} poses for stage {number + 1} "
                f"of {len(stages)} of '{self.env.task}'",
            )

    def act(self) -> tuple[NDArray[np.float32], str]:
        """Return the action for this step and the primitive that it belongs to. Raises PlanError."""
        view = self._view()
        if not self._follows(view):
            began = time.perf_counter()
            try:
                self._begin(self._decide(view), view)
            finally:
                self.planning_seconds += time.perf_counter() - began
        target, step = self._plan[self._next], self._step
        self._next += 1
        still = np.abs(self._speeds()).max() < STILL
        self._held = self._held + 1 if still and step.primitive == "hold" else 0
        return np.append(target, step.opening).astype(np.float32), step.primitive

    def _view(self) -> View:
        env = self.env
        position, rotation = env.tcp()
        tool = Pose.from_rotation_and_translation(mink.SO3.from_matrix(rotation), position)
        return View(env.robot, tool, env.gripper_opening, env.objects(), env.is_grasping)

    def _begin(self, step: Step, view: View) -> None:
        if self._step.primitive in ("lift", "move") and step.primitive == "approach":
            self.drops += 1
        unfinished = self._aim is not None and self.remaining > 0
        if self._aim is not None and not unfinished:
            share = 1.0 if step.primitive != self._step.primitive else SETTLING
            self._done.append((self._step.primitive, self._aim, share))
        last, self._plan = self._plan[-1:], self._plan[:0]
        self._step, self._next, self._aim = step, 0, None
        self._place(step, view)
        if step.paths:
            self._plan = self._first_feasible(step, view)
            self._counts["plans"] += 1
            self._counts["replans"] += unfinished
        elif len(last) and np.abs(last - self._joints()).max() < SLACK:
            self._plan = last
        else:
            self._plan = self._start()[None]

    def _first_feasible(self, step: Step, view: View) -> Vector:
        """Plan the best candidate that the arm can do and go on from. Raises PlanError when there is none.

        The simplest kind of way for any candidate comes first; less clearance only where more is impossible.
        """
        paths, kinds = self._ranked(step), KINDS if step.free else KINDS[:1]
        for clearance in (CLEARANCE, CLOSE, -TOUCH) if step.free else (CLOSE, -TOUCH):
            errors: list[PlanError] = []
            for kind in kinds:
                searched = 0
                for rank, path in enumerate(paths):
                    if kind[0] == "sampled":  # only where nothing but the way is missing
                        if errors[rank].reason != "no_path" or searched == SEARCHES:
                            continue
                        searched += 1
                    try:
                        plan = self._plan_one(kind, path, clearance, step, view)
                    except PlanError as error:
                        self._counts[f"rejected_{error.reason}"] += 1
                        if error.reason == "timeout":
                            raise
                        errors[rank : rank + 1] = [error]
                        continue
                    self._aim = path[0][-1]
                    self._counts[f"{kind[0]}_paths"] += 1
                    return plan
            if not any(error.reason in ("collision", "no_path") for error in errors):
                break
        raise errors[0]

    def _plan_one(
        self, kind: tuple[str, float], path: Path, clearance: float, step: Step, view: View
    ) -> Vector:
        """Plan one candidate one way; return targets [T, dof]. Raises PlanError."""
        (poses, ahead), (name, reach), planner, start = path, kind, self.planner, self._start()
        if name == "line":
            waypoints = planner.path(start, poses, clearance)
        else:
            sample = name == "sampled"
            waypoints = planner.detour(start, poses[-1], self._rng, clearance, sample=sample, reach=reach)
        if ahead:
            self._place(step, view, ahead=True)
            try:
                planner.path(waypoints[-1], ahead)
            finally:
                self._place(step, view)
        plan = planner.retime(waypoints, step.speed)
        if name != "line" and not planner.is_free(plan, clearance / 2):
            raise PlanError("collision", "the smooth trajectory leaves the way that is free")
        self._length += path_length(waypoints)
        return plan

    def _place(self, step: Step, view: View, ahead: bool = False) -> None:
        """Tell the planner where things are. Motions near the object, and those ahead, may touch it."""
        touches = {*step.touches}
        if not step.carried and (ahead or not step.free):
            touches.add(self.env.task_spec.object)
        opening = max(step.opening, view.opening)
        self.planner.place(
            view.objects, touches=touches, carried=step.carried, tool=view.tool, opening=opening
        )

    def _ranked(self, step: Step) -> list[Path]:
        """The candidates, those that were carried out in vain last."""
        mine = [(pose, share) for primitive, pose, share in self._done if primitive == step.primitive]
        tries = [sum(n for pose, n in mine if _is_same(path[0][-1], pose)) for path in step.paths]
        worn = [count > TRIES - 0.5 * SETTLING for count in tries]
        self._counts["rollbacks"] += worn[0] and not all(worn)
        order = sorted(range(len(worn)), key=lambda rank: worn[rank])
        return [step.paths[rank] for rank in order]

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


def _is_same(one: Pose, other: Pose) -> bool:
    """Whether two poses are one candidate (2 mm, 1 deg)."""
    near = np.linalg.norm(one.translation() - other.translation()) < 0.002
    return bool(near and np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()) < 0.0175)
