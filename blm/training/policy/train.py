"""Stage II, policy training: bridge and policy on demonstrations, with a frozen backbone.

One policy is trained for several robots, each with one row in the indexed weights. With a
hidden-state cache the backbone is in memory only before the first step and after the last. The run
ends with a proof that the backbone has not changed. Options train parts of the backbone instead
(`backbone_tuning.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from blm.backbone.backbone import Backbone
from blm.backbone.partial import require_part
from blm.backbone.precision import WeightDtype, frozen_dtype, place_weights
from blm.datasets.lerobot import EpisodeDataset, open_mapped, stated_mappings
from blm.datasets.transforms import RobotTransforms
from blm.policy.checkpoint import require_free
from blm.policy.frozen import FrozenProof
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.distributed import Processes
from blm.training.loop.ema import Ema
from blm.training.loop.loop import require_precision
from blm.training.policy.add_robot import InitialPolicy, from_checkpoint, from_scratch
from blm.training.policy.backbone_tuning import (
    TrainedModule,
    TunedBackbone,
    TunedPolicy,
    in_use,
    network_of,
    tune_backbone,
)
from blm.training.policy.best_checkpoint import BestCheckpoint
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.cotraining import CotrainingSampler, cotraining_sampler
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_state_cache import describe
from blm.training.policy.open_data import open_codec, open_datasets
from blm.training.policy.policy_loop import run_policy_loop
from blm.training.policy.quantization import TokenCodec
from blm.training.policy.sampler import joint_contract, warn_of_reserved
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together
from blm.types import PolicyContract, joint_training

ClosedLoopValidation = Callable[[int, CheckpointPolicy], Mapping[str, float]]
"""(steps done, policy) -> metrics of closed-loop episodes: "success" (0..1), and others to log."""


def train_stage2(
    config: PolicyTrainingConfig,
    out: Path,
    provenance: Mapping[str, Any],
    *,
    validate: ClosedLoopValidation | None = None,
) -> Path:
    """Train a policy, log to `out/log.jsonl`, write and return the folder `out/checkpoint`.

    A killed run resumes. `out/best` is the checkpoint with the highest success in `validate` (which
    keeps the backbone in memory), or without it, with the lowest validation loss. `provenance` (the
    command, for instance) is stored in both, with that of the checkpoint to start from as "start".
    Raises BlmError if datasets and config do not match, and if the backbone has changed.
    """
    processes = Processes.join(config.device)
    require_precision(processes.device, config.loop.precision)
    config = replace(config, device=str(processes.device), tune=config.tune.in_folder(out))
    writes = config.tune.on or (validate is not None and config.device == "cpu")
    backbone = _load_backbone(config, writes=writes)
    frozen = FrozenProof.of(backbone)
    hashed = HashedBackbone(backbone, config.backbone, frozen.weights)
    datasets = open_mapped(config.datasets, config.mappings)
    contract = _contract(backbone, datasets, config)
    start = _start(hashed, contract, config)
    language = cotraining_sampler(backbone, config.cotrain, config.loop, processes, out)
    codec = open_codec(hashed, datasets, config, processes)
    inputs = _inputs(hashed, datasets, codec, start, config, language)
    facts = {**provenance, "loop": asdict(config.loop), "inputs": inputs, **start.origin}
    facts |= stated_mappings(datasets) | (warn_of_reserved(datasets) if processes.first else {})
    _prepare_folder(out, inputs, processes)
    opened = open_datasets(hashed, datasets, config, start, codec, processes)
    tuned = tune_backbone(hashed, config.intents.layer, config.tune, language, config.loop.seed)
    trained = start.network if tuned is None else TunedPolicy(start.network, tuned)
    policy = _PolicyAssembler(
        config=config,
        start=start,
        contract=start.extended(contract),
        transforms={**start.transforms(), **{one.dataset.space.robot: one.transforms for one in opened}},
        frozen=frozen,
        tuned=tuned,
    )

    def validate_weights(step: int, weights: TrainedModule) -> Mapping[str, float]:
        return validate(step, policy(weights, kept)) if validate is not None and processes.first else {}

    ema = Ema(trained, config.policy.ema)
    kept = backbone if config.cache is None or validate is not None else None
    del backbone, hashed
    with in_use(tuned):
        run_policy_loop(trained, ema, opened, config, out, validate_weights)
    whole = _proved_backbone(config, frozen, kept) if tuned is None else None
    if processes.first:
        _save(partial(policy, whole=whole), trained, cast(TrainedModule, ema.module), out, facts)
    processes.wait()
    return out / "checkpoint"


@dataclass(frozen=True, kw_only=True)
class _PolicyAssembler:
    """Makes a policy of trained weights and a backbone."""

    config: PolicyTrainingConfig
    start: InitialPolicy
    contract: PolicyContract
    transforms: Mapping[str, RobotTransforms]
    frozen: FrozenProof
    """Proof of the backbone before the training."""
    tuned: TunedBackbone | None

    def __call__(self, weights: TrainedModule, whole: Backbone | None) -> CheckpointPolicy:
        """Return the policy; `whole` is the frozen backbone, which a tuned one replaces."""
        network = network_of(weights)
        self.start.restore_old_rows(network)
        tuned = self.tuned
        backbone = tuned.merged(weights) if tuned is not None else cast(Backbone, whole)
        return CheckpointPolicy(
            backbone=backbone,
            frozen=self.frozen if tuned is None else FrozenProof.of(backbone),
            tap=self.config.intents.tap,
            network=network,
            transforms=self.transforms,
            contract=self.contract,
            tuning=self.start.tuning if tuned is None else tuned.record(),
        )


def _save(
    policy: Callable[[TrainedModule], CheckpointPolicy],
    trained: TrainedModule,
    averaged: TrainedModule,
    out: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write the checkpoint of the averaged weights, and that of the best ones."""
    policy(averaged).save(out / "checkpoint", facts, proved=True)
    best = BestCheckpoint(out)
    if best.facts:
        best.load(trained)
        policy(trained).save(out / "best", {**facts, **best.facts}, proved=True)


def _contract(
    backbone: Backbone, datasets: Sequence[EpisodeDataset], config: PolicyTrainingConfig
) -> PolicyContract:
    contract = joint_contract(
        datasets,
        config.policy,
        cameras=config.intents.cameras,
        execute=config.execute,
        frames=config.intents.frames,
    )
    known = [] if backbone.training == "unknown" else [backbone.training]
    return replace(contract, training=joint_training([contract.training, *known]))


def _prepare_folder(out: Path, inputs: Mapping[str, Any], processes: Processes) -> None:
    """Record the inputs of the run. Raises BlmError, in every process, if it may not write to
    `out`, or if the processes have different inputs."""

    def prepare() -> None:
        if processes.first:
            for name in ("checkpoint", "best"):
                require_free(out / name)
            require_same_inputs(out / "inputs.json", inputs, f"'{out}' holds another run")

    require_same_facts(processes, f"'{out}'", inputs)
    run_together(processes, prepare)


def _start(hashed: HashedBackbone, contract: PolicyContract, config: PolicyTrainingConfig) -> InitialPolicy:
    if config.start is None:
        width, robots = hashed.backbone.hidden_size, list(contract.action_spaces)
        start = from_scratch(config.policy, width, robots, config.loop.seed)
    else:
        start = from_checkpoint(
            CheckpointPolicy.load(config.start, actions_only=True),
            backbone=hashed,
            tap=config.intents.tap,
            config=config.policy,
            contract=contract,
            only_new=config.only_new,
            new_backbone=config.new_backbone,
        )
    start.network.to(config.device)
    start.freeze()
    return start


def _inputs(
    hashed: HashedBackbone,
    datasets: Sequence[EpisodeDataset],
    codec: TokenCodec | None,
    start: InitialPolicy,
    config: PolicyTrainingConfig,
    language: CotrainingSampler | None,
) -> dict[str, Any]:
    """Return all inputs that a run depends on, except the loop's config, for inputs.json."""
    tuning = {"tune": config.tune.facts()} if config.tune.on else {}
    cotraining = {"cotrain": language.facts()} if language is not None else {}
    return {
        "robots": list(start.robots),
        "intents": [describe(hashed, data, config.intents, codec) for data in datasets],
        "policy": config.policy.facts(),
        "weights": dict(config.weights),
        "held_out": config.held_out,
        "start": start.checkpoint.contract.revision if start.checkpoint is not None else "",
        "only_new": config.only_new,
        **({"new_backbone": True} if config.new_backbone else {}),
        **tuning,
        **cotraining,
    }


def _load_backbone(config: PolicyTrainingConfig, *, writes: bool) -> Backbone:
    """Load the part of the backbone that is tapped, or the whole if it is written: at the end, and
    for the workers of a closed-loop validation on the CPU."""
    backbone = Backbone.load(
        config.backbone,
        device=config.device,
        dtype=frozen_dtype(config.device, config.dtype),
        attn_implementation=config.attn_implementation,
        blocks=None if writes else config.intents.layer,
    )
    backbone.require_layer(config.intents.layer)
    backbone.require_taught(config.intents.prompt)
    backbone.freeze()
    return backbone


def _proved_backbone(config: PolicyTrainingConfig, frozen: FrozenProof, kept: Backbone | None) -> Backbone:
    """Return the whole backbone, on the device, after its one comparison with the frozen one.

    `kept` is the backbone, or the part of it, that was in memory during the training. A part is
    compared with the whole, which is then read into host memory, and makes room for it. Raises
    BlmError if either has changed.
    """
    if kept is not None and kept.absent is None:
        frozen.require(kept, "after Stage II")
        frozen.with_logits(kept).compare_logits(kept, "after Stage II")
        return kept
    whole = _load_backbone(replace(config, device="cpu", dtype=_dtype_name(config)), writes=True)
    frozen.require(whole, "after Stage II")
    if kept is not None:
        require_part(kept.model, whole.model, "after Stage II")
        kept.model.to("meta")
    place_weights(whole.model, config.device, whole.model.dtype)
    return whole


def _dtype_name(config: PolicyTrainingConfig) -> WeightDtype:
    is_short = frozen_dtype(config.device, config.dtype) is torch.bfloat16
    return "bfloat16" if is_short else "float32"
