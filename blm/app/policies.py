"""Policies by name, for evaluation: a checkpoint, a server, the expert, a baseline, a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blm.app.model import check_device
from blm.datasets.lerobot import open_dataset
from blm.evaluation import PhysicalProtocol, RandomPolicy, ZeroPolicy
from blm.evaluation.physical.baselines import ReplayPolicy
from blm.planner.arm_planner import PlanError
from blm.planner.expert import Expert
from blm.policy.checkpoint import checkpoint_folder, checkpoint_kind
from blm.policy.policy import CheckpointPolicy, RealTimeChunkingPolicy
from blm.robots import ROBOTS
from blm.serving.client import RemotePolicy
from blm.tasks import Env
from blm.types import ActionChunk, BlmError, Episode, Observation, Policy, PolicyContract

SCHEMES = ("ws://", "wss://")
HELP = (
    "a checkpoint folder, blm-nano, expert, zero, random, replay:DATASET, or an OpenPI server ws://HOST:PORT"
)


class ExpertPolicy:
    """The planning expert as a policy: it looks into the simulator, and is asked anew at every step.

    When it finds no plan it holds still to the end, and the episode counts as what it then is: a failure.
    """

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = contract
        self._expert: Expert | None = None
        self._stuck = False

    def reset(self) -> None: ...

    def attach(self, env: Env) -> None:
        """Start an episode in this environment, from its present state."""
        rng = np.random.default_rng((env.np_random_seed, 1))
        if self._expert is None or self._expert.env is not env:
            self._expert = Expert(env, rng)
        self._expert.reset(rng)
        self._stuck = False

    def act(self, observation: Observation) -> ActionChunk:
        assert self._expert is not None, "attach comes before act"
        if not self._stuck:
            try:
                action, _ = self._expert.act()
                return ActionChunk(actions=action[None], rate_hz=self.contract.rate_hz)
            except PlanError:
                self._stuck = True
        return ActionChunk(actions=observation.state[None], rate_hz=self.contract.rate_hz)


def contract_without_model(
    name: str, *, cameras: tuple[str, ...], image_size: int, horizon: int, execute: int
) -> PolicyContract:
    """What a policy without weights promises: all robots, the pictures that it is to be given."""
    return PolicyContract(
        action_spaces={robot: spec.action_space for robot, spec in ROBOTS.items()},
        cameras=cameras,
        image_size=image_size,
        horizon=horizon,
        execute=execute,
        revision=name,
    )


def find_policy(
    name: str,
    *,
    cameras: tuple[str, ...],
    image_size: int,
    horizon: int,
    execute: int,
    api_key: str | None,
    device: str,
    server_name: str = "",
) -> Callable[[], Policy]:
    """Return a picklable maker of the policy that `name` means (see HELP), checked as far as that is cheap.

    `cameras` to `execute` are for policies that have no contract of their own, `device` for checkpoints.
    `server_name` says which model a server without a contract holds: its address does not tell.
    Raises BlmError with the valid forms for anything else.
    """
    look: Any = {"cameras": cameras, "image_size": image_size}
    if name == "expert":
        return partial(ExpertPolicy, contract_without_model(name, **look, horizon=1, execute=1))
    contract = contract_without_model(name, **look, horizon=horizon, execute=execute)
    if name in ("zero", "random"):
        return partial(ZeroPolicy if name == "zero" else RandomPolicy, contract)
    if name.startswith(SCHEMES):
        identity = f"{server_name} at {name}" if server_name else ""
        return partial(RemotePolicy, name, api_key=api_key, contract=replace(contract, revision=identity))
    if (checkpoint_folder(name) / "manifest.json").is_file():
        check_device(device)
        return partial(load_checkpoint, Path(name), device=device)
    raise BlmError(f"no policy '{name}': give {HELP}")


def load_checkpoint(folder: Path, *, device: str = "cpu") -> Policy:
    """Read a checkpoint of any kind."""
    if checkpoint_kind(folder) == "diffusion_policy":
        from blm.baselines.diffusion_policy import DiffusionPolicy

        return DiffusionPolicy.load(folder, device=device)
    return CheckpointPolicy.load(folder, device=device)


def continuing(make: Callable[[], Policy]) -> Policy:
    """Make a policy that goes on from its own last chunk. Raises BlmError for one that cannot."""
    policy = make()
    if not isinstance(policy, CheckpointPolicy):
        raise BlmError(
            f"only a checkpoint of Stage II can go on from its last chunk, not a {type(policy).__name__}"
        )
    return RealTimeChunkingPolicy(policy)


def contract_of(make: Callable[[], Policy]) -> PolicyContract:
    """What the policy promises; a connection that this opens is closed again."""
    policy = make()
    contract = policy.contract
    if isinstance(policy, RemotePolicy):
        policy.close()
    return contract


def load_replay(folder: Path) -> tuple[Callable[[], Policy], PhysicalProtocol]:
    """Return the maker of a policy that replays a dataset, and the protocol that it is for."""
    dataset = open_dataset(folder)
    episodes: list[Episode] = [dataset.episode(i, cameras=()) for i in range(dataset.num_episodes)]
    make = partial(ReplayPolicy, episodes)
    return make, PhysicalProtocol.for_replay(make().contract, episodes)
