"""The config of Stage II."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blm.backbone.precision import WeightDtype, require_attention
from blm.policy.network import PolicyConfig
from blm.training.loop.loop import LoopConfig
from blm.training.policy.backbone_tuning import BackboneTuning, require_tuning
from blm.training.policy.cotraining import LanguageCotraining, require_cotraining
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.sampler import require_weights
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig:
    """Stage II: datasets, backbone, policy and training loop."""

    datasets: tuple[Path, ...]
    """Dataset folders, at least one per robot: demonstrations and corrections."""
    mappings: tuple[Path, ...] = ()
    """Mappings of datasets of other programs (blm doctor DATASET --suggest writes one).
    One for all datasets, or one for each; - for a dataset that needs none."""
    backbone: str
    """Folder that Stage I wrote, or the name of a backbone."""
    intents: HiddenStateConfig
    """Hidden states H_k, which the bridge turns into intent tokens."""
    loop: LoopConfig
    """Training loop."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Bridge, diffusion transformer and losses."""
    cache: Path | None = None
    """Folder of the hidden-state caches, one per dataset; several runs can share it.
    Without a cache, H_k is computed for every batch."""
    start: Path | None = None
    """Checkpoint whose weights initialise the training; its robots may be a subset.
    By default, the weights are random."""
    only_new: bool = False
    """Train only the per-robot weights of robots that the checkpoint --start does not have."""
    new_backbone: bool = False
    """Allow another backbone than that of --start, of the same hidden size; the policy adapts to it,
    for example after a further Stage I."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Sampling weights of frames, as pairs of a robot's or task's name and a number.
    The default weight is 1; frames of weight 0 are never sampled."""
    execute: int = 8
    """Number of actions of a chunk to execute before the next observation.
    It is stored in the contract of the checkpoint."""
    held_out: float = 0.05
    """Fraction of each dataset's episodes that is held out for the validation loss, 0..0.9."""
    validation_batches: int = 8
    """Number of held-out batches per validation."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""
    dtype: WeightDtype | None = None
    """Precision of the frozen backbone; by default bfloat16 on CUDA and float32 elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation of the backbone in transformers: eager, sdpa, flash_attention_2, ..;
    by default the model's own."""
    tune: BackboneTuning = field(default_factory=BackboneTuning)
    """Training of the backbone, which is frozen by default."""
    cotrain: LanguageCotraining = field(default_factory=LanguageCotraining)
    """Language co-training of a backbone that is tuned."""

    def __post_init__(self) -> None:
        require_tuning(self.tune, self.loop, cache=self.cache, only_new=self.only_new)
        require_cotraining(self.cotrain, self.loop, tuned=self.tune.on)
        require_numbers(self, held_out=(0, 0.9), validation_batches=(0, 1_000_000))
        require_weights(self.weights)
        require_attention(self.attn_implementation)
        if self.only_new and self.start is None:
            raise BlmError("only_new needs a checkpoint to start from")
        if self.new_backbone and (self.start is None or self.only_new):
            raise BlmError("new_backbone needs a checkpoint to start from, all of whose weights are trained")
        if not 1 <= self.execute <= self.policy.horizon:
            raise BlmError(f"execute {self.execute} must lie in 1..horizon = {self.policy.horizon}")
        if self.intents.frames > 1 and self.intents.frame_steps != self.execute:
            raise BlmError(
                f"frame_steps {self.intents.frame_steps} must equal execute = {self.execute}, because a "
                f"policy of {self.intents.frames} frames remembers the observations of its decisions"
            )
        if self.tune.on and self.intents.pool > 1:
            raise BlmError(f"pool is {self.intents.pool}, but a tuned backbone (tune.kind) needs pool 1")
        stride, steps = self.intents.stride, self.policy.future_steps
        if steps % stride:
            raise BlmError(f"stride {stride} of the hidden states must divide future_steps = {steps}")
