"""Policies without a model: hold still, random motion, and replay of recorded episodes.

The first two are baselines. They take the contract of the policy under test, so that both run under
one protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blm.robots import ROBOTS
from blm.tasks import TaskEnv
from blm.tasks.eef_env import CONTROLS, space_of
from blm.types import ActionChunk, ActionSpace, BlmError, Episode, FloatArray, Observation, PolicyContract

REACH_RAD = 0.2
"""Maximum distance of a random target from the current joint position [rad]."""
REPLAY_CHUNK = 8
"""Number of recorded actions per chunk."""
SAME_STATE = 1e-4
"""Maximum difference of the first state from the recorded one, which is float32 [rad]."""


class ZeroPolicy:
    """Hold-still policy: every target is the current state."""

    name = "zero"

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = replace(contract, revision=self.name, training="none")

    def reset(self) -> None: ...

    def act(self, observation: Observation) -> ActionChunk:
        actions = np.tile(self.target(observation), (self.contract.horizon, 1))
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)

    def target(self, observation: Observation) -> FloatArray:
        """Return the target [D] of a whole chunk."""
        return observation.state


class RandomPolicy(ZeroPolicy):
    """Moves every joint to a random position nearby, and the gripper to a random opening."""

    name = "random"

    def target(self, observation: Observation) -> FloatArray:
        rng = np.random.default_rng(observation.seed)
        space = self.contract.action_spaces[observation.robot]
        target = observation.state + rng.uniform(-REACH_RAD, REACH_RAD, space.dim)
        target[-1] = rng.uniform()
        return np.clip(target, space.low, space.high).astype(np.float32)


class ReplayPolicy:
    """Executes the actions of recorded episodes again, each in its own scene.

    Use it with `PhysicalProtocol.for_replay` of the same episodes. It checks the data and the
    simulator and is not a score: every recorded success must succeed again.
    """

    def __init__(self, episodes: Sequence[Episode]) -> None:
        """`episodes` need no images. Their metric "random_start" marks random arm starts."""
        self._episodes = {(episode.robot, episode.task, episode.seed): episode for episode in episodes}
        recording = hashlib.sha256(b"".join(_executed_actions(episode).tobytes() for episode in episodes))
        sizes = {episode.robot: episode.actions.shape[1] for episode in episodes}
        self.contract = PolicyContract(
            action_spaces={name: _space_of_size(name, size) for name, size in sizes.items()},
            cameras=(),
            image_size=112,
            horizon=REPLAY_CHUNK,
            execute=REPLAY_CHUNK,
            revision=f"replay-{recording.hexdigest()[:12]}",
            training="none",
        )
        self._left: FloatArray = np.empty((0, 0))

    def reset(self) -> None: ...

    def attach(self, env: TaskEnv) -> None:
        """Bring the scene to the start of its recording. Raises BlmError if the two differ."""
        seed = env.np_random_seed
        name = f"{env.embodiment}/{env.task}/{seed}"
        episode = self._episodes.get((env.embodiment, env.task, seed))
        if episode is None:
            raise BlmError(f"no recorded episode '{name}'; take the protocol from the same episodes")
        env.reset(seed=seed, options={"arm": "random" if episode.metrics.get("random_start") else "home"})
        gap = float(np.abs(env.resting_action() - episode.states[0]).max())
        if gap > SAME_STATE:
            raise BlmError(
                f"episode '{name}' was recorded from another start (state differs by {gap:.2g}); the suite "
                "has changed since, or the episode did not start from the scene of its seed"
            )
        self._left = _executed_actions(episode)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next recorded actions; after the end, the last one repeatedly."""
        chunk = self._left[:REPLAY_CHUNK]
        missing = REPLAY_CHUNK - len(chunk)
        rest = self._left[REPLAY_CHUNK:]
        self._left = rest if len(rest) else chunk[-1:]
        actions = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)


def _space_of_size(robot: str, size: int) -> ActionSpace:
    """Return the one of the suite's action spaces of a robot that has so many dimensions."""
    both = (space_of(ROBOTS[robot], control) for control in CONTROLS)
    spaces = {space.dim: space for space in both}
    if size not in spaces:
        raise BlmError(f"recorded actions of '{robot}' have {size} numbers; the suite's have {[*spaces]}")
    return spaces[size]


def _executed_actions(episode: Episode) -> FloatArray:
    """Return the commands [T, D]. With action noise, they differ from the recorded labels."""
    return episode.actions if episode.executed is None else episode.executed
