"""Initial weights of Stage II: random, or those of a checkpoint with further robots.

A further robot is one more row in each per-embodiment weight. With `only_new` only that row is
trained, so the actions of the other robots stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from blm.datasets.transforms import RobotTransforms
from blm.pictures import joint_fit
from blm.policy.heads import IndexedLinear, with_embodiments
from blm.policy.network import PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.policy.tap import TapConfig
from blm.policy.tuning import TuningRecord
from blm.policy.unet import make_network
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.types import BlmError, PolicyContract, joint_training


@dataclass(frozen=True, eq=False)
class InitialPolicy:
    """The network from which training starts."""

    network: PolicyNetwork
    robots: tuple[str, ...]
    """Names of the robots, in the order of their rows in the indexed weights."""
    checkpoint: CheckpointPolicy | None = None
    """The checkpoint that the weights come from."""
    only_new: bool = False
    """Train only the rows of robots that the checkpoint does not have."""
    new_backbone: bool = False
    """The policy adapts to another backbone than that of the checkpoint."""

    @property
    def num_checkpoint_robots(self) -> int:
        """Number of robots of the checkpoint, and therefore of its rows."""
        return len(self.checkpoint.contract.action_spaces) if self.checkpoint is not None else 0

    @property
    def tuning(self) -> TuningRecord | None:
        """How the backbone of the checkpoint was tuned; None: frozen, or not this backbone."""
        return self.checkpoint.tuning if self.checkpoint is not None and not self.new_backbone else None

    @property
    def origin(self) -> dict[str, Any]:
        """The provenance of the checkpoint, as a part of that of the run; empty without one."""
        return {"start": self.checkpoint.provenance} if self.checkpoint is not None else {}

    def transforms(self) -> dict[str, RobotTransforms]:
        """Return the transforms of the checkpoint, on which its weights depend."""
        return dict(self.checkpoint.transforms) if self.checkpoint is not None else {}

    def extended(self, contract: PolicyContract) -> PolicyContract:
        """Return the contract of the datasets with the robots and data of the checkpoint as well."""
        old = self.checkpoint.contract if self.checkpoint is not None else contract
        fit = joint_fit({old.picture_fit, contract.picture_fit})
        spaces = {**old.action_spaces, **contract.action_spaces}
        return replace(
            contract,
            action_spaces={name: spaces[name] for name in self.robots},
            training=joint_training([old.training, contract.training]),
            picture_fit=fit,
        )

    def freeze(self) -> None:
        """With `only_new`, freeze all but the indexed weights; see also `restore_old_rows`."""
        if self.only_new:
            self.network.requires_grad_(False)
            for layer in indexed_layers(self.network):
                layer.requires_grad_(True)

    @torch.no_grad()
    def restore_old_rows(self, trained: PolicyNetwork) -> None:
        """With `only_new`, copy back the rows of old robots, which weight decay has changed."""
        if self.only_new and self.checkpoint is not None:
            count = self.num_checkpoint_robots
            old_layers = indexed_layers(self.checkpoint.network)
            for layer, old in zip(indexed_layers(trained), old_layers, strict=True):
                layer.weight[:count] = old.weight
                layer.bias[:count] = old.bias


def indexed_layers(network: nn.Module) -> list[IndexedLinear]:
    """Return the layers with one row of weights for each robot."""
    return [layer for layer in network.modules() if isinstance(layer, IndexedLinear)]


def from_scratch(config: PolicyConfig, hidden_size: int, robots: Sequence[str], seed: int) -> InitialPolicy:
    """Return a network with random weights; torch's global generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InitialPolicy(make_network(config, hidden_size, len(robots)), tuple(robots))


def from_checkpoint(
    policy: CheckpointPolicy,
    *,
    backbone: HashedBackbone,
    tap: TapConfig,
    config: PolicyConfig,
    contract: PolicyContract,
    only_new: bool,
    new_backbone: bool = False,
) -> InitialPolicy:
    """Return a copy of a checkpoint's network, with a further row for each new robot of `contract`.

    Raises BlmError unless backbone, layer, pool, order of the prompt, policy config, cameras, image
    size and rate are those of the checkpoint; and if `only_new` is set with no new robot, or with
    datasets of the checkpoint's robots. With `new_backbone`, the backbone only needs the same hidden
    size, and layer, pool and order of the prompt may differ, since H_k is another in any case.
    """
    old = policy.contract
    pairs: dict[str, tuple[object, object]] = {}
    if new_backbone:
        pairs["hidden size"] = (policy.backbone.hidden_size, backbone.backbone.hidden_size)
    else:
        policy.frozen.require(backbone.backbone, "the checkpoint to start from", weights=backbone.weights)
        pairs["layer"] = (policy.tap.layer, tap.layer)
        pairs["pool"] = (policy.tap.pool, tap.pool)
        pairs["prompt"] = (policy.tap.prompt, tap.prompt)
    pairs |= {
        "policy": (policy.network.config, config),
        "cameras": (old.cameras, contract.cameras),
        "frames": (old.frames, contract.frames),
        "image_size": (old.image_size, contract.image_size),
        "rate_hz": (old.rate_hz, contract.rate_hz),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise BlmError(f"{name} of the checkpoint to start from is {theirs}, here it is {ours}")
    for robot in (shared := [r for r in contract.action_spaces if r in old.action_spaces]):
        old.action_spaces[robot].require_same(contract.action_spaces[robot], "the dataset")
    new = [robot for robot in contract.action_spaces if robot not in old.action_spaces]
    if only_new and (shared or not new):
        raise BlmError(
            f"--only-new trains new robots only, and the checkpoint has {shared or list(old.action_spaces)}; "
            "give datasets of other robots, or train all"
        )
    network = with_embodiments(policy.network, len(new)).requires_grad_(True)
    return InitialPolicy(network, (*old.action_spaces, *new), policy, only_new, new_backbone)
