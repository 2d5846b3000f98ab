"""Policies without a model: what a score must beat before it means anything, and the replay of
recordings.

The first two take the contract of the policy under test, so that both run under one protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blm.robots import ROBOTS
from blm.tasks import Env
from blm.types import ActionChunk, BlmError, Episode, FloatArray, Observation, PolicyContract

REACH_RAD = 0.2
"""A random target lies within this of the present joint position [rad]."""


REPLAY_CHUNK = 8
"""Recorded actions handed out at a time."""
SAME_STATE = 1e-4
"""Greatest difference between the recorded first state and the scene's [rad]; recordings are
float32."""


class ZeroPolicy:
    """Holds still."""

    name = "zero"

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = replace(contract, revision=self.name)

    def reset(self) -> None: ...

    def act(self, observation: Observation) -> ActionChunk:
        actions = np.tile(self.target(observation), (self.contract.horizon, 1))
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)

    def target(self, observation: Observation) -> FloatArray:
        """[D] where to go and stay for one chunk."""
        return observation.state


class RandomPolicy(ZeroPolicy):
    """Moves every joint to a random place nearby, and the gripper to a random opening."""

    name = "random"

    def target(self, observation: Observation) -> FloatArray:
        rng = np.random.default_rng(observation.seed)
        space = self.contract.action_spaces[observation.robot]
        target = observation.state + rng.uniform(-REACH_RAD, REACH_RAD, space.dim)
        target[-1] = rng.uniform()
        return np.clip(target, space.low, space.high).astype(np.float32)


class ReplayPolicy:
    """Plays what was executed in recorded episodes, each in its own scene: it must succeed there
    again.

    For `PhysicalProtocol.for_replay` with the same episodes: a check of data and simulator, never a
    score.
    """

    def __init__(self, episodes: Sequence[Episode]) -> None:
        """`episodes` need no pictures; their metric "random_start" says where the arm started."""
        self._episodes = {(episode.robot, episode.task, episode.seed): episode for episode in episodes}
        recording = hashlib.sha256(b"".join(_played(episode).tobytes() for episode in episodes))
        robots = dict.fromkeys(episode.robot for episode in episodes)
        self.contract = PolicyContract(
            action_spaces={name: ROBOTS[name].action_space for name in robots},
            cameras=(),
            image_size=112,
            horizon=REPLAY_CHUNK,
            execute=REPLAY_CHUNK,
            revision=f"replay-{recording.hexdigest()[:12]}",
        )
        self._left: FloatArray = np.empty((0, 0))

    def reset(self) -> None: ...

    def attach(self, env: Env) -> None:
        """Bring the scene to the start of its recording. Raises BlmError where they do not agree."""
        seed = env.np_random_seed
        name = f"{env.embodiment}/{env.task}/{seed}"
        episode = self._episodes.get((env.embodiment, env.task, seed))
        if episode is None:
            raise BlmError(f"no recorded episode '{name}'; take the protocol from the same episodes")
        env.reset(seed=seed, options={"arm": "random" if episode.metrics.get("random_start") else "home"})
        gap = float(np.abs(env.state() - episode.states[0]).max())
        if gap > SAME_STATE:
            raise BlmError(
                f"episode '{name}' was recorded from another start (state differs by {gap:.2g}); the suite "
                "has changed since, or it was made from a state that its seed does not give"
            )
        self._left = _played(episode)

    def act(self, observation: Observation) -> ActionChunk:
        """The next recorded actions; after the end, the last one again."""
        chunk, self._left = self._left[:REPLAY_CHUNK], self._left[REPLAY_CHUNK:]
        missing = REPLAY_CHUNK - len(chunk)
        self._left = self._left if len(self._left) else chunk[-1:]
        actions = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)


def _played(episode: Episode) -> FloatArray:
    """[T, D] what the arm was told; in a noisy episode the actions are only what it should have
    done.
    """
    return episode.actions if episode.executed is None else episode.executed
