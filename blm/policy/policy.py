"""The trained policy: observation -> intent tokens -> action chunk; sole reader and writer of its folder.

Beside what every checkpoint has (checkpoint.py) the folder holds the backbone, a stock folder. Loading
refuses a backbone that is not, bit for bit, the one that the policy was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.backbone.prompt import control_prompt, to_chat
from blm.bridge import BridgeConfig
from blm.datasets.transforms import RobotTransforms
from blm.policy.checkpoint import folder_of, identified, read_config, read_transforms, write_checkpoint
from blm.policy.flow import continuation_weights, seeded_noise
from blm.policy.network import PolicyConfig, PolicyNetwork
from blm.types import ActionChunk, BlmError, FloatArray, Observation, PolicyContract


@dataclass(frozen=True)
class FrozenProof:
    """What shows that a backbone did not change: a hash of its parameters, some logits on fixed prompts."""

    fingerprint: str
    logits: tuple[float, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> FrozenProof:
        logits = backbone.probe_logits().flatten()
        return cls(backbone.fingerprint(), tuple(logits[:: max(1, len(logits) // 256)].tolist()))

    def require(self, backbone: Backbone, where: str) -> None:
        """Raise BlmError unless `backbone` is the proved one; its logits may differ as devices round."""
        now = FrozenProof.of(backbone)
        slack = 0.01 if backbone.model.dtype == torch.float32 else 0.5
        same_logits = np.allclose(now.logits, self.logits, rtol=0, atol=slack)
        if now.fingerprint != self.fingerprint or not same_logits:
            raise BlmError(
                f"{where}: the backbone (fingerprint {now.fingerprint[:12]}) is not the frozen one of Stage "
                f"II ({self.fingerprint[:12]}), or answers differently; restore it or train Stage II again"
            )


class CheckpointPolicy:
    """A `Policy`: tap the frozen backbone, bridge, Euler steps, undo the transforms, clip to the limits."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        frozen: FrozenProof,
        layer: int,
        network: PolicyNetwork,
        transforms: Mapping[str, RobotTransforms],
        contract: PolicyContract,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """`provenance`: how it was made, if it was loaded."""
        self.provenance = provenance or {}
        self.backbone, self.frozen, self.layer, self.transforms = backbone, frozen, layer, transforms
        self.network = network.eval().requires_grad_(False)
        self.contract = identified(contract, network, transforms, frozen.fingerprint)

    @property
    def device(self) -> str:
        """Device that it runs on: "cpu", "cuda:3"."""
        return str(self.backbone.model.device)

    def reset(self) -> None:
        """Nothing to forget: a decision depends on its observation alone."""

    def act(self, observation: Observation) -> ActionChunk:
        return self.act_batch([observation])[0]

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return one chunk of absolute targets per observation, each with noise of its own seed.

        An observation alone gives the same bits every time; among others its actions differ by about 1e-5,
        because matrix products of another shape round differently. Raises BlmError for what does not fit.
        """
        checked = [self.contract.check(observation) for observation in observations]
        prompts = [control_prompt(o.instruction, o.robot, o.images) for o in checked]
        config, robots = self.network.config, list(self.contract.action_spaces)
        states = [self.transforms[o.robot].state.forward(o.state) for o in checked]
        inputs = (
            torch.stack([pad_dims(state, config.max_dim) for state in states]),
            torch.tensor([robots.index(o.robot) for o in checked]),
            seeded_noise([o.seed for o in checked], (config.horizon, config.max_dim)),
            torch.stack([pad_dims(np.ones_like(o.state), config.max_dim) > 0 for o in checked]),
        )
        device = self.backbone.model.device
        going_on = self._going_on(checked)
        # copied before the backbone runs: afterwards the host would wait for it
        kept = going_on and (going_on[0].to(device), going_on[1].to(device))
        state, robot, noise, dims = (x.to(device) for x in inputs)
        tapped = self.backbone.tap(self.backbone.encode(prompts, side="right"), self.layer)
        actions = self.network.sample(tapped.hidden, tapped.mask, state, robot, noise, dims, kept)
        return decode(self.contract, self.transforms, checked, actions)

    def _going_on(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor] | None:
        """Normalised chunks in progress and their weights; None if nobody sent one."""
        if all(o.chunk is None for o in observations):
            return None
        config = self.network.config
        wanted = torch.zeros(len(observations), config.horizon, config.max_dim)
        weights = torch.zeros(len(observations), config.horizon)
        for row, o in enumerate(observations):
            if o.chunk is not None:
                whole = np.concatenate(
                    [o.chunk, np.repeat(o.chunk[-1:], config.horizon - len(o.chunk), axis=0)]
                )
                wanted[row] = pad_dims(
                    self.transforms[o.robot].actions.forward(whole, o.state), config.max_dim
                )
                weights[row] = continuation_weights(len(o.chunk), o.frozen, config.horizon)
        return wanted, weights

    def save(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the checkpoint folder whole, then put it in the place of one that is there."""
        config = {
            "kind": "blm",
            "policy": asdict(self.network.config),
            "contract": self.contract.to_json(),
            "layer": self.layer,
            "prompt": prompt_version(self.backbone, self.contract.cameras),
            "dtype": str(self.backbone.model.dtype).removeprefix("torch."),
            "frozen": asdict(self.frozen),
            "provenance": dict(provenance),
        }

        def add_backbone(work: Path) -> None:
            (work / "backbone").mkdir()
            self.backbone.write_into(work / "backbone")

        write_checkpoint(folder, config, self.network.state_dict(), self.transforms, add_backbone)

    @classmethod
    def load(cls, folder: Path | str, *, device: str = "cpu") -> CheckpointPolicy:
        """Read a checkpoint, or a release by name.

        Raises BlmError, naming file and fix, unless it is whole and unaltered.
        """
        folder = folder_of(folder)
        config = read_config(folder)
        contract = PolicyContract.from_json(config["contract"])
        backbone = Backbone.load(folder / "backbone", device=device, dtype=getattr(torch, config["dtype"]))
        backbone.freeze()
        frozen = FrozenProof(config["frozen"]["fingerprint"], tuple(config["frozen"]["logits"]))
        frozen.require(backbone, f"checkpoint '{folder}'")
        if (now := prompt_version(backbone, contract.cameras)) != config["prompt"]:
            raise BlmError(
                f"checkpoint '{folder}' was trained with control prompts of version {config['prompt']}, this "
                f"program writes version {now}; use the program version of the checkpoint or train again"
            )
        policy = {**config["policy"], "bridge": BridgeConfig(**config["policy"]["bridge"])}
        with torch.device("meta"):  # no time, memory or random numbers for weights that are replaced
            network = PolicyNetwork(PolicyConfig(**policy), backbone.hidden_size, len(contract.action_spaces))
        network.load_state_dict(load_file(folder / "policy.safetensors", device), assign=True)
        return cls(
            backbone=backbone,
            frozen=frozen,
            layer=config["layer"],
            network=network,
            transforms=read_transforms(folder),
            contract=contract,
            provenance=config["provenance"],
        )


class RealTimeChunkingPolicy:
    """A policy that goes on from its own last chunk: what was planned and not yet done binds what comes.

    Real-time chunking without a delay: motion across chunks is smooth, at the price of a backward pass
    through the policy in each denoising step.
    """

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy = policy
        self.contract = replace(policy.contract, revision=f"{policy.contract.revision}+continued")
        self._left: FloatArray | None = None

    def reset(self) -> None:
        self._left = None

    def act(self, observation: Observation) -> ActionChunk:
        chunk = self.policy.act(replace(observation, chunk=self._left))
        left = chunk.actions[self.contract.execute :]
        self._left = left if len(left) else None
        return chunk


def decode(
    contract: PolicyContract,
    transforms: Mapping[str, RobotTransforms],
    observations: Sequence[Observation],
    normalised: Tensor,
) -> list[ActionChunk]:
    """Return what normalised actions [B, H, D] tell each robot to do, within its limits."""
    chunks = []
    for o, actions_HD in zip(observations, normalised.double().cpu().numpy(), strict=True):
        space = contract.action_spaces[o.robot]
        actions = transforms[o.robot].actions.inverse(actions_HD[:, : space.dim], o.state)
        assert np.isfinite(actions).all(), "the policy produced an action that is not finite"
        clipped = np.clip(actions, space.low, space.high).astype(np.float32)
        chunks.append(ActionChunk(actions=clipped, rate_hz=space.rate_hz))
    return chunks


def pad_dims(values: FloatArray, size: int) -> Tensor:
    """Return `values` [.., D] as a float32 tensor [.., size], zero in the dimensions that a robot lacks."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
    return torch.from_numpy(np.pad(values, missing).astype(np.float32))


def prompt_version(backbone: Backbone, cameras: Sequence[str]) -> str:
    """Return a short hash of the control prompt's wording and of the chat template that renders it."""
    blank = np.zeros((8, 8, 3), np.uint8)
    chat = to_chat(control_prompt("{instruction}", "{robot}", dict.fromkeys(cameras, blank)))
    text = json.dumps([chat, backbone.processor.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
