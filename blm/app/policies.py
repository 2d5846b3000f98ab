"""Load policies by name: a checkpoint, a server, the planning expert, a baseline, a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blm.app.model import check_device
from blm.backbone.compilation import CompileMode, require_compiler
from blm.backbone.precision import LoadOptions, WeightDtype, require_attention
from blm.datasets.lerobot import open_dataset
from blm.evaluation import PhysicalProtocol, RandomPolicy, ZeroPolicy
from blm.evaluation.physical.reference_policies import ReplayPolicy
from blm.planner.arm_planner import PlanError
from blm.planner.expert import Expert
from blm.policy.checkpoint import checkpoint_folder, checkpoint_kind
from blm.policy.policy import CheckpointPolicy, RealTimeChunkingPolicy
from blm.robots import ROBOTS
from blm.serving.client import RemotePolicy
from blm.tasks import Env, TaskEnv
from blm.types import ActionChunk, BlmError, Episode, Observation, Policy, PolicyContract

SCHEMES = ("ws://", "wss://")
HELP = (
    "a checkpoint folder, blm-nano, expert, zero, random, replay:DATASET, lerobot:FOLDER, or an OpenPI "
    "server ws://HOST:PORT"
)


class ExpertPolicy:
    """The planning expert as a policy: it reads the simulator's state and plans at every step.

    When it finds no plan, it holds still until the end, and the episode counts as a failure.
    """

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = contract
        self._expert: Expert | None = None
        self._stuck = False

    def reset(self) -> None: ...

    def attach(self, env: TaskEnv) -> None:
        """Start an episode in this environment, from its current state."""
        if not isinstance(env, Env):
            raise BlmError("the planning expert reads MuJoCo; it cannot act in another simulator")
        rng = np.random.default_rng((env.np_random_seed, 1))
        if self._expert is None or self._expert.env is not env:
            self._expert = Expert(env, rng)
        self._expert.reset(rng)
        self._stuck = False

    def act(self, observation: Observation) -> ActionChunk:
        assert self._expert is not None, "call attach before act"
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
    """Return the contract of a policy without weights, for all robots."""
    return PolicyContract(
        action_spaces={robot: spec.action_space for robot, spec in ROBOTS.items()},
        cameras=cameras,
        image_size=image_size,
        horizon=horizon,
        execute=execute,
        revision=name,
        training="none",
    )


def policy_factory(
    name: str,
    *,
    cameras: tuple[str, ...],
    image_size: int,
    horizon: int,
    execute: int,
    api_key: str | None,
    load: LoadOptions,
    server_name: str = "",
) -> Callable[[], Policy]:
    """Return a picklable function that creates the policy `name` in any process (see HELP).

    `cameras`, `image_size`, `horizon` and `execute` are for policies without a contract, `device`
    is for checkpoints, and `api_key` for servers. `server_name` identifies the model behind a
    server without a contract, because the address does not. Raises BlmError, which lists the valid
    forms, for any other name.
    """
    pictures: Any = {"cameras": cameras, "image_size": image_size}
    if name == "expert":
        return partial(ExpertPolicy, contract_without_model(name, **pictures, horizon=1, execute=1))
    contract = contract_without_model(name, **pictures, horizon=horizon, execute=execute)
    if name in ("zero", "random"):
        return partial(ZeroPolicy if name == "zero" else RandomPolicy, contract)
    if name.startswith(SCHEMES):
        identity = f"{server_name} at {name}" if server_name else ""
        stated = replace(contract, revision=identity, training="unknown")
        return partial(RemotePolicy, name, api_key=api_key, contract=stated)
    if (checkpoint_folder(name) / "manifest.json").is_file():
        check_device(device := load.get("device", "cpu"))
        require_attention(load.get("attn_implementation"))
        require_compiler(load.get("compile", "none"), device)
        return partial(load_checkpoint, Path(name), **load)
    raise BlmError(f"no policy '{name}'; give {HELP}")


def load_checkpoint(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: WeightDtype | None = None,
    attn_implementation: str | None = None,
    compile: CompileMode = "none",
) -> Policy:
    """Load a checkpoint of any kind, only to act; `dtype` and `attn_implementation` are those of its
    backbone.

    Raises BlmError for missing or altered files, and for a baseline that should be compiled.
    """
    if checkpoint_kind(folder) == "diffusion_policy":
        if compile != "none":
            raise BlmError(f"--compile needs a checkpoint of Stage II, and '{folder}' is a baseline")
        from blm.baselines.diffusion_policy import DiffusionPolicy

        return DiffusionPolicy.load(folder, device=device)
    return CheckpointPolicy.load(
        folder,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        actions_only=True,
        compile=compile,
    )


def with_real_time_chunking(make: Callable[[], Policy]) -> Policy:
    """Create a policy whose chunks continue the previous chunk (real-time chunking).

    Raises BlmError for any policy but a checkpoint of Stage II.
    """
    policy = make()
    if not isinstance(policy, CheckpointPolicy):
        raise BlmError(
            "real-time chunking needs a checkpoint of Stage II, which can continue its previous chunk; this "
            f"policy is a {type(policy).__name__}"
        )
    return RealTimeChunkingPolicy(policy)


def load_replay(folder: Path) -> tuple[Callable[[], Policy], PhysicalProtocol]:
    """Return a factory of a dataset's replay policy, and the protocol of the replay check."""
    dataset = open_dataset(folder)
    episodes: list[Episode] = [dataset.episode(i, cameras=()) for i in range(dataset.num_episodes)]
    make = partial(ReplayPolicy, episodes)
    return make, PhysicalProtocol.for_replay(make().contract, episodes)
