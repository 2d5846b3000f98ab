"""ManiSkill's own motion-planning scripts as an expert for `ManiSkillEnv`, in place of `Expert`.

A script plans from the start of an episode only and drives the simulation itself. So it is run once, its
actions are kept, the episode is taken back to its start, and the actions are played: the states are the same
again, bit for bit. Unlike `Expert` it does not react: collect without random starts and disturbances.
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
"""Steps for which the last targets are held. PlaceSphere's script stops while the sphere still rolls."""
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
"""Task, also the script's name -> what its successive motions of arm or gripper are called."""


class _Tape:
    """What a script takes for the environment: passes its actions on and keeps them."""

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
        """Nothing: the expert is asked at the start of an episode."""

    def step(self, action: NDArray[Any]) -> Any:
        self.actions.append(from_maniskill(action))
        self.primitives.append(self.primitive)
        return self.unwrapped.step(to_maniskill(self.actions[-1]))


def _traced(solver: Any, tape: _Tape) -> Any:
    """ManiSkill's motion planner, telling the tape which motion it is at and which had no plan."""

    class Traced(solver):
        def move_to_pose_with_screw(self, pose: Any, dry_run: bool = False, refine_steps: int = 0) -> Any:
            tape.motion += not dry_run
            result = super().move_to_pose_with_screw(pose, dry_run, refine_steps)
            if not dry_run and isinstance(result, int):  # -1: no plan; several scripts carry on regardless
                tape.failed.append(tape.primitive)
            return result

        def open_gripper(self, *args: Any, **kwargs: Any) -> Any:
            tape.motion += 1
            return super().open_gripper(*args, **kwargs)

        def close_gripper(self, *args: Any, **kwargs: Any) -> Any:
            tape.motion += 1
            return super().close_gripper(*args, **kwargs)

    return Traced


class ManiSkillExpert:
    """Plays what ManiSkill's script does in the episode that the environment has just begun."""

    drops = 0
    """Grasps that were lost and taken again: a script does not notice."""
    planning_seconds = 0.0
    """Time that the script took in this episode, with its own run through the simulation [s]."""

    def __init__(self, env: ManiSkillEnv, rng: np.random.Generator) -> None:
        lookup("task with a ManiSkill script", env.task, SEGMENTS)
        if int(np.__version__.split(".")[0]) >= 2:
            raise BlmError(f"ManiSkill's planner crashes with numpy 2 or newer; this is {np.__version__}")
        self.env = env
        self.reset(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Forget the episode so far. Nothing is drawn from `rng`: the scripts are deterministic."""
        self._actions: list[NDArray[np.float32]] = []
        self._primitives: list[str] = []
        self._next, self.planning_seconds = 0, 0.0

    def check(self) -> None:
        """Nothing: whether the arm can do it, the script finds out."""

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    @property
    def done(self) -> bool:
        """Whether script and settling are over."""
        return bool(self._actions) and self._next >= len(self._actions)

    @property
    def remaining(self) -> int:
        """Steps left of the current motion."""
        if self.done or not self._actions:
            return 0
        ahead = self._primitives[self._next :]
        return next((i for i, name in enumerate(ahead) if name != ahead[0]), len(ahead))

    def act(self) -> tuple[NDArray[np.float32], str]:
        """Return the action for this step and the primitive that it belongs to. Raises PlanError."""
        if not self._actions:
            self._plan()
        index = min(self._next, len(self._actions) - 1)
        self._next += 1
        return self._actions[index].copy(), self._primitives[index]

    def _plan(self) -> None:
        """Run the script and take the episode back to its start. Raises PlanError, BlmError."""
        began, env = time.perf_counter(), self.env
        if not env.at_start:
            raise BlmError("a ManiSkill script plans from the start of an episode; reset first")
        tape, said = _Tape(env), io.StringIO()
        script = importlib.import_module(f"{_SCRIPTS}.{env.task}")
        names = {**vars(script), _SOLVER: _traced(getattr(script, _SOLVER), tape)}
        solve = types.FunctionType(script.solve.__code__, names, argdefs=script.solve.__defaults__)
        with contextlib.redirect_stdout(said):
            result = solve(tape)
        solved = bool(env.simulation.evaluate()["success"])
        env.restart()
        self.planning_seconds = time.perf_counter() - began
        if isinstance(result, int) or not tape.actions or (tape.failed and not solved):
            why = " ".join(said.getvalue().split()) or "no reason given"
            raise PlanError("no_path", f"{env.task}: no plan for {', '.join(tape.failed)}: {why}")
        self._actions = tape.actions + [tape.actions[-1]] * SETTLE_STEPS
        self._primitives = tape.primitives + ["hold"] * SETTLE_STEPS
