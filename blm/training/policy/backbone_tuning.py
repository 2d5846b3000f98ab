"""Tuning of the backbone in Stage II, with LoRA or of its last blocks. The default is a frozen one.

Gradients of the action loss flow from the bridge through the tap into blocks of the language model
up to the tapped one. Vision tower and projector stay frozen, and their features are cached
(`prompt_features.py`). The moving average that the checkpoint stores covers the tuned weights, too:
the averaged bridge is used with the hidden states that it was averaged with. It is also the teacher
of the future-prediction loss.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from blm.backbone import Backbone
from blm.backbone.hashing import hash_tensors
from blm.backbone.model import tap_with_gradient
from blm.backbone.precision import place_weights
from blm.policy.network import ActionBatch, PolicyBatch, PolicyConfig, PolicyNetwork
from blm.policy.tuning import TuningKind, TuningRecord
from blm.training.loop.distributed import DataShard, fsdp_requested
from blm.training.loop.loop import LoopConfig
from blm.training.policy.cotraining import CotrainingSampler, LanguageBatch, LanguageCotraining
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.sampler import WHOLE_BATCH, PolicySampler
from blm.training.sft.lora import Lora, add_adapters
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.pack import ExampleBatch, collate
from blm.training.sft.prefix_attention import known_padding, use_prefix_attention
from blm.training.sft.tokenize import TokenizedExample
from blm.training.sft.train import without_placeholder_checks
from blm.training.sft.vision_features import forward_arguments, vision_modules
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class BackboneTuning:
    """What Stage II trains of the backbone. The method of the paper keeps it frozen."""

    kind: Literal["frozen", "lora", "last_blocks"] = "frozen"
    """Train nothing of the backbone, LoRA adapters in its blocks up to the tapped one, or all
    weights of the last blocks before the tap."""
    lora: Lora = field(default_factory=lambda: Lora(rank=16))
    """Adapters of `lora`. Targets such as q_proj v_proj are faster than all linear layers."""
    blocks: int = 1
    """Number of blocks that `last_blocks` trains, the tapped one being the last."""
    lr: float = 1e-4
    """Peak learning rate of the backbone's part; AdamW steps it, also beside --loop.muon."""
    features: str | None = None
    """Folder of the cached vision features, which several runs can share; by default
    OUT/features."""
    checkpoint_blocks: bool = False
    """Activation checkpointing: recompute blocks in the backward pass to save memory."""

    def __post_init__(self) -> None:
        require_numbers(self, blocks=(1, 10_000), lr=(0, 1e3))
        if self.kind == "lora" and not self.lora.rank:
            raise BlmError("tune.lora.rank is 0, so no adapter is trained; give a rank such as 16")
        if self.lora.four_bit:
            raise BlmError("tune.lora.four_bit: only Stage I trains beside weights of 4 bits")

    def in_folder(self, out: Path) -> BackboneTuning:
        """Return this config with the folder of the vision features of a run in `out`."""
        return replace(self, features=self.features or str(out / "features"))

    def facts(self) -> dict[str, Any]:
        """Return what the result depends on, for inputs.json."""
        facts = asdict(self) | {"lora": self.lora.facts()}
        for name in ("features", "checkpoint_blocks", "blocks" if self.kind == "lora" else "lora"):
            del facts[name]
        return facts

    @property
    def on(self) -> bool:
        """Whether the backbone is trained."""
        return self.kind != "frozen"


def require_tuning(tune: BackboneTuning, loop: LoopConfig, *, cache: Path | None, only_new: bool) -> None:
    """Raise BlmError for settings that contradict the tuning of a backbone."""
    if not tune.on:
        return
    rule = f"tune.kind is {tune.kind}"
    if cache is not None:
        raise BlmError(
            f"{rule}, but a hidden-state cache ('{cache}') holds the states of a frozen backbone: leave out "
            "--cache; the vision features are cached instead (tune.features)"
        )
    if only_new:
        raise BlmError(
            f"{rule}, but only_new promises unchanged actions of the other robots, which read the same "
            "backbone: set tune.kind to frozen, or train all robots"
        )
    if loop.shard or fsdp_requested():
        raise BlmError(f"{rule}, which does not support sharded weights: set loop.shard to False (DDP)")


@dataclass(frozen=True)
class TunedBatch:
    """A training batch of Stage II whose hidden states are still to be computed."""

    actions: ActionBatch
    now: ExampleBatch
    """Prompts of the frames, with vision features."""
    future: ExampleBatch | None
    """Prompts of the frames that the future-prediction loss reads; None without that loss."""
    language: LanguageBatch | None = None
    """Conversations of the language loss; None in steps without."""
    share: float = 1.0
    """Share of these samples in all samples of the step."""

    @property
    def ids(self) -> Sequence[object]:
        """Names of the samples."""
        return self.actions.ids

    def to(self, device: torch.device | str) -> TunedBatch:
        """Return a batch with its actions on a device; prompts follow when they are read."""
        return replace(self, actions=self.actions.to(device))

    def pin_memory(self) -> TunedBatch:
        """Return a copy in pinned (page-locked) memory."""
        return TunedBatch(
            self.actions.pin_memory(),
            self.now.pin_memory(),
            self.future and self.future.pin_memory(),
            self.language and self.language.pin_memory(),
            self.share,
        )


@dataclass(frozen=True)
class TunedSampler:
    """Draws the batches of a tuned backbone: frames of demonstrations, and conversations."""

    backbone: Backbone
    frames: PolicySampler
    language: CotrainingSampler | None = None

    def __call__(self, step: int, shard: DataShard = WHOLE_BATCH) -> TunedBatch:
        """Return the batch of a data shard of a step."""
        samples = self.frames.sample(step, shard)
        now, future = self.frames.read(samples)
        actions = self.frames.vectors(samples)
        return TunedBatch(
            actions,
            self._collate(now),
            self._collate(future) if future else None,
            self.language(step, shard) if self.language is not None else None,
            len(actions.ids) / self.frames.mixture.batch_size,
        )

    def _collate(self, rows: list[TokenizedExample]) -> ExampleBatch:
        return collate(self.backbone, rows, tuple(range(len(rows))))


class TunedBackbone:
    """A backbone of which some weights are trained; `TunedPolicy` and its average share it."""

    def __init__(
        self,
        hashed: HashedBackbone,
        layer: int,
        config: BackboneTuning,
        conversations: CotrainingSampler | None,
        *,
        seed: int,
    ) -> None:
        """Choose the trained weights of a frozen backbone, and add adapters to it in place.

        `conversations` are those of co-training.
        Raises BlmError for LoRA targets that the language model does not have, and for more blocks
        than the tap has before it.
        """
        self.backbone = backbone = hashed.backbone
        self.layer, self.config = layer, config
        self.conversations = conversations
        self.before = hashed.weights
        self.first_block = 1
        names = [name for name, _ in backbone.model.named_parameters()]
        self.adapted: PeftModel | None = None
        if config.kind == "lora":
            self.adapted = add_adapters(backbone, config.lora, projector=False, seed=seed, blocks=layer)
        else:
            if config.blocks > layer:
                raise BlmError(f"tune.blocks is {config.blocks}, but the tap is after block {layer}")
            self.first_block = layer - config.blocks + 1
            for block in backbone.decoder.layers[layer - config.blocks : layer]:
                block.float().requires_grad_(True)  # trained in float32, whatever the others' precision
        self.names = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
        self.trained = [backbone.model.get_parameter(name) for name in self.names]
        self.language: MaskedLossModel | None = None
        if conversations is not None:
            self.language = MaskedLossModel(backbone, cached=conversations.config.cache_features)
        self.vision = vision_modules(backbone)
        adapted = {name.split(".lora_")[0] for name in self.names}
        self.others = [n for n in names if n not in self.names and n.rpartition(".")[0] not in adapted]
        self.others_hash = self._hash_of_others(backbone.model)
        if config.checkpoint_blocks:
            backbone.model.activation_checkpointing_enable()

    def __deepcopy__(self, memo: object) -> TunedBackbone:
        return self  # an average of the weights uses the same model

    def sampler(self, frames: PolicySampler, *, language: bool) -> TunedSampler:
        """Return the sampler of training batches, with conversations if `language` is set."""
        return TunedSampler(self.backbone, frames, self.conversations if language else None)

    @contextmanager
    def using(self, weights: nn.ParameterDict, *, training: bool) -> Iterator[None]:
        """Let the model compute with these weights, in training or evaluation mode."""
        self.backbone.model.train(training)
        for module in self.vision:
            module.eval()
        self._install(weights.values())
        try:
            yield
        finally:
            self._install(self.trained)

    def _install(self, parameters: Iterable[nn.Parameter]) -> None:
        for name, parameter in zip(self.names, parameters, strict=True):
            owner, _, leaf = name.rpartition(".")
            self.backbone.model.get_submodule(owner)._parameters[leaf] = parameter

    def hidden(self, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
        """Return H_k [B, L, d] of prompts, and their mask [B, L]; call it within `using`."""
        inputs = self.backbone.place(batch.inputs)
        arguments = forward_arguments(self.backbone, inputs)
        with known_padding(batch.padding > 0):
            hidden = tap_with_gradient(self.backbone, arguments, self.layer)
        return hidden, inputs["attention_mask"].bool()

    def merged(self, weights: nn.Module) -> Backbone:
        """Return a copy of the backbone with the weights of a `TunedPolicy`: a stock model in one
        precision.

        Raises BlmError if any weight that is not trained has changed.
        """
        assert isinstance(weights, TunedPolicy)
        with self.using(weights.backbone, training=False):
            tuned = copy.deepcopy(self.adapted if self.adapted is not None else self.backbone.model)
        model: Any = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
        if self.config.checkpoint_blocks:
            model.activation_checkpointing_disable()
        place_weights(model, self.backbone.model.device, self.backbone.model.dtype)
        if self._hash_of_others(model) != self.others_hash:
            raise BlmError("weights of the backbone that Stage II does not train have changed")
        result = copy.copy(self.backbone)
        result.model = model
        result.freeze()
        return result

    def _hash_of_others(self, model: nn.Module) -> str:
        """Return the hash of the parameters that are neither trained nor adapted."""
        digest = hashlib.sha256()
        hash_tensors(digest, {name: model.get_parameter(name) for name in self.others})
        return digest.hexdigest()

    def record(self) -> TuningRecord:
        """Return the record for the checkpoint."""
        cotrain = self.conversations.config if self.conversations is not None else LanguageCotraining()
        kind: TuningKind = "lora" if self.config.kind == "lora" else "last_blocks"
        return TuningRecord(
            kind=kind,
            first_block=self.first_block,
            last_block=self.layer,
            rank=self.config.lora.rank if kind == "lora" else 0,
            lr=self.config.lr,
            language_weight=cotrain.weight,
            corpora=tuple(Path(folder).name for folder in cotrain.corpora),
            before=self.before,
        )


class TunedPolicy(nn.Module):
    """The trained module: the policy network, and the trained weights of the backbone.

    A deep copy of it, the moving average, has weights of its own and shares the backbone.
    """

    def __init__(self, network: PolicyNetwork, tuned: TunedBackbone) -> None:
        super().__init__()
        self.network, self.tuned = network, tuned
        self.backbone = nn.ParameterDict()  # filled one by one: given a dict, it would sort the names
        for name, parameter in zip(tuned.names, tuned.trained, strict=True):
            self.backbone[name.replace(".", "/")] = parameter

    @property
    def config(self) -> PolicyConfig:
        """The config of the policy network."""
        return self.network.config

    def hidden(self, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
        """Return H_k [B, L, d] of prompts under these weights, and their mask [B, L]."""
        with self.tuned.using(self.backbone, training=self.training):
            return self.tuned.hidden(batch)

    def loss(self, batch: TunedBatch, teacher: TunedPolicy) -> dict[str, Tensor]:
        """Return the losses of `PolicyNetwork.loss`; with co-training also 'loss_language', which
        'loss' includes, and which is NaN in steps without language."""
        # the teacher is first: recomputed blocks must find the model in the mode of their forward
        future = None
        if batch.future is not None:
            with torch.no_grad():
                future = teacher.hidden(batch.future)
        now = self.hidden(batch.now)
        future = future or now
        complete = PolicyBatch(
            hidden=now[0], mask=now[1], future_hidden=future[0], future_mask=future[1], **vars(batch.actions)
        )
        losses = self.network.loss(complete, teacher.network)
        if self.tuned.conversations is None:
            return losses
        if batch.language is None:
            return {**losses, "loss_language": torch.full_like(losses["loss"], torch.nan).detach()}
        language = self._language_loss(batch.language) / batch.share
        weight = self.tuned.conversations.config.weight
        total = losses["loss"] + weight * language
        return {**losses, "loss": total, "loss_language": language}

    def _language_loss(self, batch: LanguageBatch) -> Tensor:
        """Return this part's share of the mean loss over all answer tokens of the step."""
        assert self.tuned.language is not None
        with self.tuned.using(self.backbone, training=self.training):
            return self.tuned.language(batch.examples).loss_sum / batch.answer_tokens


TrainedModule = PolicyNetwork | TunedPolicy
"""What Stage II trains: the policy network alone, or with weights of the backbone."""


def network_of(trained: TrainedModule) -> PolicyNetwork:
    """Return the policy network of a trained module."""
    return trained.network if isinstance(trained, TunedPolicy) else trained


def tune_backbone(
    hashed: HashedBackbone,
    layer: int,
    config: BackboneTuning,
    conversations: CotrainingSampler | None,
    seed: int,
) -> TunedBackbone | None:
    """Return the backbone to tune, or None for a frozen one; raises as `TunedBackbone` does."""
    return TunedBackbone(hashed, layer, config, conversations, seed=seed) if config.on else None


@contextmanager
def in_use(tuned: TunedBackbone | None) -> Iterator[None]:
    """Prepare a tuned model for training steps: its attention masks, and checks of transformers, do
    not wait for the device."""
    if tuned is None:
        yield
        return
    with use_prefix_attention(tuned.backbone), without_placeholder_checks():
        yield
