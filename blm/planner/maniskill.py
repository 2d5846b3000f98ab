"""ManiSkill's own motion-planning scripts as an expert for `ManiSkillEnv`, in place of `Expert`.

A script plans only from the start of an episode and drives the simulation itself. Therefore it runs
once while its actions are recorded; then the episode is reset and the actions are replayed, which
gives the same states, bit for bit. Unlike `Expert` a script does not react to its state: collect
without random starts and disturbances.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import time
import types
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blm.planner.arm_planner import PlanError
from blm.planner.expert import HOLD_STEPS
from blm.tasks.maniskill import ManiSkillEnv, from_maniskill, to_maniskill
from blm.types import BlmError, lookup

SETTLE_STEPS = HOLD_STEPS + 20
"""Number of control steps for which the last targets are held at the end.

PlaceSphere's script stops while the sphere still rolls.
"""
_SCRIPTS = "mani_skill.examples.motionplanning.panda.solutions"
_SOLVER = "PandaArmMotionPlanningSolver"
_PICK = ("approach", "descend", "grasp")
SEGMENTS = {
    "push_cube": ("close", "approach", "push"),
    "pull_cube": ("close", "approach", "pull"),
    "pick_cube": (*_PICK, "move"),
    "stack_cube": (*_PICK, "lift", "move", "release"),
    "place_sphere": (*_PICK, "lift", "move", "release"),
    "lift_peg_upright": (*_PICK, "lift", "turn", "lower", "release"),
}
"""Task (also the script's name) -> the primitives of its successive arm and gripper motions."""


class _RecordingEnv:
    """Stands in for the environment of a script: forwards its actions and records them."""

    def __init__(self, env: ManiSkillEnv) -> None:
        self.unwrapped, self._names = env.simulation, SEGMENTS[env.task]
        self.actions: list[NDArray[np.float32]] = []
        self.primitives: list[str] = []
        self.failed: list[str] = []
        self.motion = -1

    @property
    def primitive(self) -> str:
        return self._names[min(self.motion, len(self._names) - 1)]

    def reset(self, **_: Any) -> None:
        """Do nothing: the episode is already at its start."""

    def step(self, action: NDArray[Any]) -> Any:
        self.actions.append(from_maniskill(action))
        self.primitives.append(self.primitive)
        return self.unwrapped.step(to_maniskill(self.actions[-1]))


def _with_motion_count(solver: Any, recorder: _RecordingEnv) -> Any:
    """Return a subclass of ManiSkill's motion planner that reports motions and failed plans."""

    class CountingPlanner(solver):
        def move_to_pose_with_screw(self, pose: Any, dry_run: bool = False, refine_steps: int = 0) -> Any:
            recorder.motion += not dry_run
            result = super().move_to_pose_with_screw(pose, dry_run, refine_steps)
            if not dry_run and isinstance(result, int):  # -1: no plan; several scripts continue anyway
                recorder.failed.append(recorder.primitive)
            return result

        def open_gripper(self, *args: Any, **kwargs: Any) -> Any:
            recorder.motion += 1
            return super().open_gripper(*args, **kwargs)

        def close_gripper(self, *args: Any, **kwargs: Any) -> Any:
            recorder.motion += 1
            return super().close_gripper(*args, **kwargs)

    return CountingPlanner


class ManiSkillExpert:
    """Replays the actions of ManiSkill's script in the episode that has just started."""

    drops = 0
    """Number of lost grasps; always 0, because a script does not notice them."""
    planning_seconds = 0.0
    """Time that the script took in this episode, including its own simulation [s]."""

    def __init__(self, env: ManiSkillEnv, rng: np.random.Generator) -> None:
        lookup("task with a ManiSkill script", env.task, SEGMENTS)
        if int(np.__version__.split(".")[0]) >= 2:
            raise BlmError(f"ManiSkill's planner crashes with numpy 2 or newer; this is {np.__version__}")
        self.env = env
        self.reset(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new episode. `rng` is unused, because the scripts are deterministic."""
        self._actions: list[NDArray[np.float32]] = []
        self._primitives: list[str] = []
        self._next = 0
        self.planning_seconds = 0.0

    def check(self) -> None:
        """Do nothing: reachability is only found out by running the script."""

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}

    @property
    def done(self) -> bool:
        """Whether all actions, including those of settling, were returned."""
        return bool(self._actions) and self._next >= len(self._actions)

    @property
    def remaining(self) -> int:
        """Number of steps left in the current motion."""
        if self.done or not self._actions:
            return 0
        ahead = self._primitives[self._next :]
        return next((i for i, name in enumerate(ahead) if name != ahead[0]), len(ahead))

    def act(self) -> tuple[NDArray[np.float32], str]:
        """Return the action for this step and the primitive that it belongs to.

        Raises PlanError.
        """
        if not self._actions:
            self._plan()
        index = min(self._next, len(self._actions) - 1)
        self._next += 1
        return self._actions[index].copy(), self._primitives[index]

    def _plan(self) -> None:
        """Run the script, then reset the episode to its start. Raises PlanError or BlmError."""
        began = time.perf_counter()
        env = self.env
        if not env.at_start:
            raise BlmError("a ManiSkill script plans from the start of an episode; reset first")
        recorder = _RecordingEnv(env)
        output = io.StringIO()
        script = importlib.import_module(f"{_SCRIPTS}.{env.task}")
        names = {**vars(script), _SOLVER: _with_motion_count(getattr(script, _SOLVER), recorder)}
        solve = types.FunctionType(script.solve.__code__, names, argdefs=script.solve.__defaults__)
        with contextlib.redirect_stdout(output):
            result = solve(recorder)
        solved = bool(env.simulation.evaluate()["success"])
        env.restart()
        self.planning_seconds = time.perf_counter() - began
        if isinstance(result, int) or not recorder.actions or (recorder.failed and not solved):
            why = " ".join(output.getvalue().split()) or "no reason given"
            raise PlanError("no_path", f"{env.task}: no plan for {', '.join(recorder.failed)}: {why}")
        self._actions = recorder.actions + [recorder.actions[-1]] * SETTLE_STEPS
        self._primitives = recorder.primitives + ["hold"] * SETTLE_STEPS
