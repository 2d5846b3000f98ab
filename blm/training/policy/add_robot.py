"""Stage II from a checkpoint: go on with its robots, or add further arms to it.

A further arm is one more row in each per-embodiment weight. Trained with `only_new`, nothing else changes:
what drives the other robots stays as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from blm.backbone.backbone import Backbone
from blm.datasets.transforms import RobotTransforms
from blm.policy.heads import IndexedLinear, with_embodiments
from blm.policy.network import PolicyConfig, PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.types import ActionSpace, BlmError, PolicyContract


@dataclass(frozen=True, eq=False)
class Start:
    """What a training begins with."""

    network: PolicyNetwork
    robots: tuple[str, ...]
    """In the order of the rows of indexed weights."""
    before: CheckpointPolicy | None = None
    """The checkpoint that it goes on from."""
    only_new: bool = False

    @property
    def old(self) -> int:
        """Number of rows that the checkpoint had."""
        return len(self.before.contract.action_spaces) if self.before is not None else 0

    def transforms(self) -> dict[str, RobotTransforms]:
        """Those of the checkpoint: normalisation is a part of what was trained."""
        return dict(self.before.transforms) if self.before is not None else {}

    def spaces(self) -> dict[str, ActionSpace]:
        return dict(self.before.contract.action_spaces) if self.before is not None else {}

    def freeze(self) -> None:
        """Let only rows of indexed weights train, if only new ones shall."""
        if self.only_new:
            self.network.requires_grad_(False)
            for layer in indexed(self.network):
                layer.requires_grad_(True)

    @torch.no_grad()
    def restore(self, trained: PolicyNetwork) -> None:
        """Give rows back that were not to change: weight decay reached them, no loss did."""
        if self.only_new and self.before is not None:
            for now, then in zip(indexed(trained), indexed(self.before.network), strict=True):
                now.weight[: self.old] = then.weight
                now.bias[: self.old] = then.bias


def indexed(network: nn.Module) -> list[IndexedLinear]:
    return [layer for layer in network.modules() if isinstance(layer, IndexedLinear)]


def fresh(config: PolicyConfig, hidden_size: int, robots: Sequence[str], seed: int) -> Start:
    """Return a network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Start(PolicyNetwork(config, hidden_size, len(robots)), tuple(robots))


def continued(
    policy: CheckpointPolicy,
    *,
    backbone: Backbone,
    layer: int,
    config: PolicyConfig,
    contract: PolicyContract,
    only_new: bool,
) -> Start:
    """Return a copy of the network of a checkpoint, with rows for those of `contract` that it does not know.

    Raises BlmError unless backbone, layer, policy and what robots share are those of the checkpoint, and if
    `only_new` leaves nothing to train, or would train on a robot that shall not change.
    """
    policy.frozen.require(backbone, "the checkpoint to start from")
    there, old = policy.network.config, policy.contract
    pairs = {
        "layer": (policy.layer, layer),
        "policy": (there, config),
        "cameras": (old.cameras, contract.cameras),
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
            f"only new robots shall train, and the checkpoint knows {shared or list(old.action_spaces)}; "
            "give datasets of other robots, or let all train"
        )
    network = with_embodiments(policy.network, len(new)).requires_grad_(True)
    return Start(network, (*old.action_spaces, *new), policy, only_new)
