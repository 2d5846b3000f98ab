"""The trained policy: observation -> H_k -> intent tokens -> action chunk; its checkpoint.

In addition to the files of every checkpoint (checkpoint.py) the folder holds the backbone, as a
stock transformers folder. Loading refuses a backbone that is not, bit for bit, the one that the
policy was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from blm.backbone.backbone import Backbone
from blm.backbone.compilation import CompileMode, Compiler, batch_bucket, pad_prompts, require_compiler
from blm.backbone.pooling import tap_pooled
from blm.backbone.precision import WeightDtype, frozen_dtype, place_weights
from blm.backbone.prompt import control_prompt
from blm.bridge import BridgeConfig
from blm.chunks import frames_of, view_names
from blm.datasets.decoding import decode_chunks
from blm.datasets.transforms import RobotTransforms
from blm.policy.checkpoint import (
    checkpoint_folder,
    read_config,
    read_transforms,
    with_hashes,
    write_checkpoint,
)
from blm.policy.codec import pad_dims, prompt_version
from blm.policy.flow import ActionPrefix, prefix_weights, seeded_noise
from blm.policy.frozen import FrozenProof
from blm.policy.network import PolicyConfig, PolicyNetwork
from blm.policy.tap import TapConfig
from blm.policy.tuning import TuningRecord
from blm.policy.unet import make_network
from blm.types import ActionChunk, BlmError, FloatArray, ImageArray, Observation, PolicyContract


def _view_names(contract: PolicyContract) -> list[str]:
    return view_names(contract.cameras, contract.frames, contract.execute)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The content of config.json in a policy's checkpoint, beside the format version."""

    policy: PolicyConfig
    contract: PolicyContract
    tap: TapConfig
    """How H_k is obtained; config.json has its fields beside the others."""
    prompt: str
    """Version of the control prompt."""
    dtype: str
    """Type of the backbone's weights, such as "bfloat16"."""
    frozen: FrozenProof
    provenance: Mapping[str, Any]
    tuning: TuningRecord | None = None
    """How Stage II tuned the backbone; None if it was frozen."""

    def to_json(self) -> dict[str, Any]:
        value = {"kind": "blm", **asdict(self), "contract": self.contract.to_json()}
        tap = value.pop("tap")
        value |= {"layer": tap["layer"], "pool": tap["pool"]}
        if self.tap.prompt != "pictures_first":
            value["prompt_order"] = self.tap.prompt
        return {name: part for name, part in value.items() if name != "tuning" or part is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckpointConfig:
        policy = {**value["policy"], "bridge": BridgeConfig(**value["policy"]["bridge"])}
        if "unet_widths" in policy:
            policy["unet_widths"] = tuple(policy["unet_widths"])
        return cls(
            policy=PolicyConfig(**policy),
            contract=PolicyContract.from_json(value["contract"]),
            tap=TapConfig(
                layer=value["layer"],
                pool=value.get("pool", 1),  # older checkpoints have neither pooling nor another order
                prompt=value.get("prompt_order", "pictures_first"),
            ),
            prompt=value["prompt"],
            dtype=value["dtype"],
            frozen=FrozenProof.from_json(value["frozen"]),
            provenance=value["provenance"],
            tuning=TuningRecord.from_json(value["tuning"]) if "tuning" in value else None,
        )


class CheckpointPolicy:
    """A `Policy`: tapped backbone, bridge, Euler steps, inverse transforms, clipping."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        frozen: FrozenProof,
        tap: TapConfig,
        network: PolicyNetwork,
        transforms: Mapping[str, RobotTransforms],
        contract: PolicyContract,
        tuning: TuningRecord | None = None,
    ) -> None:
        """With a tuned backbone, `frozen` is the proof of its weights after the tuning."""
        self.tap, self.tuning = tap, tuning
        self.prefixes = tap.prefix_cache(backbone)
        """Cache of the texts of control prompts; None: every decision reads the whole prompt."""
        self.provenance: Mapping[str, Any] = {}
        """That of the loaded checkpoint."""
        self.backbone, self.frozen, self.transforms = backbone, frozen, transforms
        self.network = network.eval().requires_grad_(False)
        self._sample: Callable[..., Tensor] | None = None
        """The compiled sampler, with the bridge."""
        self.contract = with_hashes(contract, network, transforms, frozen.fingerprint)

    @property
    def device(self) -> str:
        """Device that the policy runs on, such as "cpu" or "cuda:3"."""
        return str(self.backbone.model.device)

    def reset(self) -> None:
        """Do nothing: a chunk depends on its observation alone."""

    def compile(self, compiler: Compiler) -> None:
        """Compile the tapped blocks, and bridge and sampler, from the next action on.

        Batches are then padded to powers of 2, and prompts to multiples of 32 tokens; each pair of
        sizes is compiled when it first occurs. Actions differ by rounding (about 1e-5 in float32).
        A chunk that continues another one (real-time chunking) is sampled without compilation.
        Compiled blocks read whole prompts, without the prefix cache.
        """
        self.backbone.compile_tap(self.tap.layer, compiler)
        self.prefixes = None
        self._sample = compiler(self.network.sample)

    def warm_up(self, batch_sizes: Sequence[int] = (1,)) -> None:
        """Choose actions for blank observations of these numbers, so that later calls are fast."""
        robot, space = next(iter(self.contract.action_spaces.items()))
        side = self.contract.image_size
        blank = Observation(
            robot=robot,
            instruction="pick up the cube.",
            images={camera: np.zeros((side, side, 3), np.uint8) for camera in self.contract.cameras},
            state=space.middle_state(),
        )
        for size in batch_sizes:
            self.act_batch([blank] * size)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the chunk for one observation; see `act_batch`."""
        return self.act_batch([observation])[0]

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return one chunk of absolute targets per observation, each with the noise of its seed.

        One observation gives the same bits every time. In a batch its actions differ by about 1e-5,
        because matrix products of another shape round differently. Raises BlmError for an
        observation that does not match the contract.
        """
        checked = [self.contract.check(observation) for observation in observations]
        if self._sample is not None:
            checked += checked[-1:] * (batch_bucket(len(checked)) - len(checked))
        order = self.tap.prompt
        prompts = [control_prompt(o.instruction, o.robot, self._views(o), order=order) for o in checked]
        config, robots = self.network.config, list(self.contract.action_spaces)
        states = [self.transforms[o.robot].state.forward(o.state) for o in checked]
        inputs = (
            torch.stack([pad_dims(state, config.max_dim) for state in states]),
            torch.tensor([robots.index(o.robot) for o in checked]),
            seeded_noise([o.seed for o in checked], (config.horizon, config.max_dim)),
            torch.stack([torch.arange(config.max_dim) < self._dim(o) for o in checked]),
        )
        device = self.backbone.model.device
        prefix = self._action_prefix(checked)
        # copied before the backbone runs, because a later copy would wait for the backbone
        prefix = prefix and prefix.to(device)
        state, robot, noise, dims = (x.to(device) for x in inputs)
        read, sample = self.backbone.read(prompts, side="right"), self.network.sample
        if self._sample is not None:
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            read = pad_prompts(read, self.backbone.processor.tokenizer.pad_token_id)
            sample = sample if prefix else self._sample
        tapped = tap_pooled(self.backbone, read, self.tap.layer, self.tap.pool, self.prefixes)
        actions = sample(tapped.hidden, tapped.mask, state, robot, noise, dims, prefix)
        count = len(observations)
        normalised = actions[:count].double().cpu().numpy()
        return decode_chunks(self.contract, self.transforms, checked[:count], normalised)

    def _dim(self, observation: Observation) -> int:
        return self.contract.action_spaces[observation.robot].dim

    def _views(self, observation: Observation) -> dict[str, ImageArray]:
        """Return the images of the present observation and of its history, by view."""
        images = [one.images for one in (*observation.history, observation)]
        return frames_of(images, self.contract.frames, self.contract.execute)

    def _action_prefix(self, observations: Sequence[Observation]) -> ActionPrefix | None:
        """Return the current chunks, normalised; None if no observation has one."""
        if all(o.chunk is None for o in observations):
            return None
        config = self.network.config
        actions = torch.zeros(len(observations), config.horizon, config.max_dim)
        weights = torch.zeros(len(observations), config.horizon)
        for row, o in enumerate(observations):
            if o.chunk is not None:
                held = np.repeat(o.chunk[-1:], config.horizon - len(o.chunk), axis=0)
                padded = np.concatenate([o.chunk, held])
                normalised = self.transforms[o.robot].actions.forward(padded, o.state)
                actions[row] = pad_dims(normalised, config.max_dim)
                weights[row] = prefix_weights(len(o.chunk), o.inference_delay, config.horizon)
        return ActionPrefix(actions, weights)

    def save(self, folder: Path, provenance: Mapping[str, Any], *, proved: bool = False) -> None:
        """Write the checkpoint folder atomically; it may replace an unaltered checkpoint.

        `proved` skips hashing the backbone: the caller has just done it, or is about to load the
        folder, which does it. Raises BlmError if the
        backbone is no longer in the precision in which it was frozen, or is not whole.
        """
        self.backbone.require_whole()
        if not proved:
            self.frozen.require(self.backbone, f"cannot write '{folder}'")
        config = CheckpointConfig(
            policy=self.network.config,
            contract=self.contract,
            tap=self.tap,
            prompt=prompt_version(self.backbone, _view_names(self.contract), self.tap.prompt),
            dtype=str(self.backbone.model.dtype).removeprefix("torch."),
            frozen=self.frozen.with_logits(self.backbone),
            provenance=dict(provenance),
            tuning=self.tuning,
        )

        def add_backbone(work: Path) -> None:
            (work / "backbone").mkdir()
            self.backbone.write_into(work / "backbone")

        write_checkpoint(folder, config.to_json(), self.network.state_dict(), self.transforms, add_backbone)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: str = "cpu",
        dtype: WeightDtype | None = None,
        attn_implementation: str | None = None,
        actions_only: bool = False,
        compile: CompileMode = "none",
    ) -> CheckpointPolicy:
        """Load a checkpoint folder, or a release by name.

        The backbone is compared with the frozen one in its stored precision, and then converted to
        `dtype`: by default bfloat16 on CUDA, and the stored precision elsewhere. Bridge and policy
        stay in float32. With `actions_only` the blocks after the tapped one and the head stay on
        disk: they are hashed with the rest, but the backbone cannot answer, and its logits are not
        compared. A checkpoint whose hash covers computed buffers is loaded whole. With `compile`
        the policy is compiled, and has chosen its first action. Raises BlmError, naming the file
        and a remedy, unless the folder is complete and unaltered, and if it cannot be compiled.
        """
        require_compiler(compile, device)
        folder = checkpoint_folder(folder)
        config = CheckpointConfig.from_json(read_config(folder))
        backbone = Backbone.load(
            folder / "backbone",
            dtype=getattr(torch, config.dtype),
            attn_implementation=attn_implementation,
            blocks=config.tap.layer if actions_only and config.frozen.weights else None,
        )
        backbone.freeze()
        backbone.require_layer(config.tap.layer)
        config.frozen.require(backbone, f"checkpoint '{folder}'")
        keeps = dtype is None and torch.device(device).type != "cuda"
        precision = getattr(torch, config.dtype) if keeps else frozen_dtype(device, dtype)
        place_weights(backbone.model, device, precision)
        if backbone.absent is None:
            config.frozen.compare_logits(backbone, f"checkpoint '{folder}'")
        now = prompt_version(backbone, _view_names(config.contract), config.tap.prompt)
        if now != config.prompt:
            raise BlmError(
                f"checkpoint '{folder}' was trained with control prompts of version {config.prompt}, this "
                f"program writes version {now}; use the program version of the checkpoint or train again"
            )
        with torch.device("meta"):  # saves time, memory and random numbers: the weights are replaced below
            network = make_network(config.policy, backbone.hidden_size, len(config.contract.action_spaces))
        network.load_state_dict(load_file(folder / "policy.safetensors", device), assign=True)
        policy = cls(
            backbone=backbone,
            frozen=config.frozen,
            tap=config.tap,
            network=network,
            transforms=read_transforms(folder),
            contract=config.contract,
            tuning=config.tuning,
        )
        policy.provenance = config.provenance
        if compile != "none":
            policy.compile(Compiler(compile))
            policy.warm_up()
        return policy


class RealTimeChunkingPolicy:
    """A policy whose chunks continue the remainder of its previous chunk.

    Real-time chunking with an inference delay of 0: motion across chunks is smooth, at the price of
    a backward pass through the policy in each denoising step.
    """

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy = policy
        self.contract = replace(policy.contract, revision=f"{policy.contract.revision}+continued")
        self._remainder: FloatArray | None = None

    def reset(self) -> None:
        """Forget the previous chunk, at the start of an episode."""
        self._remainder = None

    def act(self, observation: Observation) -> ActionChunk:
        """Return a chunk that continues the remainder of the previous one."""
        chunk = self.policy.act(replace(observation, chunk=self._remainder))
        remainder = chunk.actions[self.contract.execute :]
        self._remainder = remainder if len(remainder) else None
        return chunk
