"""Execution of action chunks: which action to execute now, and when to ask the policy again.

A policy returns a chunk of H actions, the first of them for the step of its observation. Of each
chunk, `execute` actions are executed before the next decision (receding horizon). In simulation,
the evaluation, the collector's policy pilot, the playground and the examples use this class. For a
real arm, where time is continuous, `blm.runtime.timeline` does the same by the chunk's age.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from blm.types import BlmError, FloatArray, ImageArray, Observation, PolicyContract


class ChunkExecutor:
    """Executes action chunks, one action per control step.

    In every step: if `decision_due`, ask the policy and `receive` its chunk; then execute
    `next_action`.

    With an inference delay of d steps, a chunk arrives d steps after its observation. Until then,
    the rest of the previous chunk is executed; after its end, its last action is held. The first d
    actions of the new chunk are skipped. If the delay is longer than `execute`, the policy is asked
    again as soon as its chunk has arrived.
    """

    def __init__(self, execute: int, hold: FloatArray) -> None:
        """Execute `execute` >= 1 actions per decision; hold `hold` [D] until the first chunk."""
        if execute < 1:
            raise BlmError(f"execute is {execute}; it must be 1 or more")
        self.execute = execute
        self.step = 0
        """Control steps executed so far."""
        self._chunk = np.asarray(hold)[None]
        self._observed_at = 0
        """The step of the observation of the current chunk."""
        self._arriving: FloatArray | None = None
        self._asked_at = self._arrives_at = self._due_at = 0

    @property
    def decision_due(self) -> bool:
        """Whether the policy must be asked before the next action."""
        return self.step >= self._due_at

    def receive(self, chunk: FloatArray, delay: int = 0) -> None:
        """Take the chunk [H, D] for the present observation; it arrives `delay` steps later.

        Raises BlmError for a chunk without actions.
        """
        if not len(chunk):
            raise BlmError("the policy returned a chunk without actions")
        self._update()
        self._arriving = chunk
        self._asked_at = self.step
        self._arrives_at = self.step + delay
        self._due_at = max(self._arrives_at, self.step + min(self.execute, len(chunk)))

    def next_action(self) -> FloatArray:
        """Return the action [D] of the present step, and advance to the next step."""
        self._update()
        action = self._chunk[min(self.step - self._observed_at, len(self._chunk) - 1)]
        self.step += 1
        return action

    def _update(self) -> None:
        """Switch to the chunk that has arrived, if any."""
        if self._arriving is not None and self.step >= self._arrives_at:
            self._chunk, self._observed_at = self._arriving, self._asked_at
            self._arriving = None


class ObservationHistory:
    """The observations of an episode's last decisions, for policies that see several frames.

    Training pairs a frame with those `execute` steps, twice `execute` steps, .. before it; so does
    a policy that is asked every `execute` steps.
    """

    def __init__(self, contract: PolicyContract) -> None:
        """Begin an episode of a policy with this contract."""
        self._frames = contract.frames
        self._earlier: tuple[Observation, ...] = ()

    def extend(self, observation: Observation) -> Observation:
        """Return the observation of a new decision with those of the decisions before it."""
        if self._frames == 1:
            return observation
        complete = replace(observation, history=self._earlier)
        self._earlier = (*self._earlier, observation)[1 - self._frames :]
        return complete


def frames_of(images: Sequence[Mapping[str, ImageArray]], count: int, steps: int) -> dict[str, ImageArray]:
    """Return the images of `count` observations, oldest first, under one name for each view.

    The names say how many control steps ago a view was seen: "base 16 steps ago", "base 8 steps
    ago", "base", with observations `steps` apart. At the beginning of an episode there are fewer
    observations; the oldest one is then repeated.
    """
    given = [images[0]] * (count - len(images)) + list(images)
    return {
        camera if not age else f"{camera} {age} steps ago": pixels
        for age, views in zip(range((count - 1) * steps, -1, -steps), given, strict=True)
        for camera, pixels in views.items()
    }


def view_names(cameras: Sequence[str], count: int, steps: int) -> list[str]:
    """Return the names of the views in the prompt of `count` observations; see `frames_of`."""
    blank = np.zeros((1, 1, 3), np.uint8)
    return list(frames_of([dict.fromkeys(cameras, blank)], count, steps))
