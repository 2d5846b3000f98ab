"""Steps of the real work, whose tensors are counted: training in both stages, and acting.

Each function runs the modules of training and serving once. Their weights may have no values (see
`tracking`); then the result is an estimate, without taking the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from blm.app.memory.tracking import TensorMemory, quiet, strip_values
from blm.backbone import Backbone, Inputs
from blm.backbone.pooling import tap_pooled
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig
from blm.training.loop.optimizers import Optimizers
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.pack import ExampleBatch
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.train import Stage1Config, choose_trained, without_placeholder_checks
from blm.training.sft.vision_attention import use_batched_vision_attention


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of tensors of a training step, by kind; they add up to the peak."""

    frozen: int
    """Weights that are not trained, and buffers."""
    trained: int
    """Weights that are trained."""
    gradients: int
    moments: int
    average: int
    """Exponential moving average of the weights."""
    batch: int
    """One micro-batch."""
    activations: int
    """Everything else at the peak: tensors for the backward pass, and temporary ones."""

    @property
    def peak(self) -> int:
        return sum(vars(self).values())

    @property
    def state(self) -> int:
        """Bytes of a checkpoint of the run, of which the loop keeps a copy in host memory."""
        return self.trained + self.moments + self.average


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; memory that they share counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def choose_without_values(backbone: Backbone, config: Stage1Config) -> None:
    """Freeze parts and add adapters, as Stage I does, to a backbone without values."""
    with quiet():
        choose_trained(backbone, config, exact=False)
    strip_values(backbone.model)


def stage1_step(
    backbone: Backbone, config: Stage1Config, batch: ExampleBatch, *, mixed: bool
) -> TrainingMemory:
    """Measure an optimizer step of Stage I; `backbone` has passed `choose_trained`.

    `mixed`: the loss runs under bfloat16 autocast, as on CUDA.
    """
    model = backbone.model
    with TensorMemory() as memory:
        memory.add([*model.parameters(), *model.buffers()])
        loss_model = MaskedLossModel(backbone, cached=config.cache_features).train()
        if config.checkpoint_blocks:
            model.activation_checkpointing_enable()
        optimizer = _optimizer(model, config.loop, config.learning_rate)
        inputs = size_of(batch.inputs.values())
        memory.add(batch.inputs.values())

        def loss() -> Tensor:
            with _autocast(mixed):
                sums = loss_model(batch)
                return sums.loss_sum / sums.tokens

        batched = use_batched_vision_attention(backbone)
        with use_prefix_attention(backbone), batched, without_placeholder_checks():
            _update(optimizer, loss, config.loop, memory)
        if config.checkpoint_blocks:
            model.activation_checkpointing_disable()
    return _training_memory(model, optimizer, memory, batch=inputs)


def stage2_step(
    network: PolicyNetwork, decay: float, config: LoopConfig, batch: PolicyBatch, *, mixed: bool
) -> TrainingMemory:
    """Measure an optimizer step of Stage II on given hidden states; `decay` is that of the moving
    average."""
    with TensorMemory() as memory:
        memory.add([*network.parameters(), *network.buffers()])
        with quiet():
            ema = Ema(network, decay)
        memory.add(ema.module.parameters())
        optimizer = _optimizer(network, config, lambda name: config.lr)
        tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        memory.add(tensors)

        def loss() -> Tensor:
            with _autocast(mixed):
                losses = network.loss(batch.to(batch.hidden.device), cast(PolicyNetwork, ema.module))
                return losses["loss"]

        _update(optimizer, loss, config, memory)
        ema.update(network, 0)
    average = size_of([*ema.module.parameters(), *ema.module.buffers()])
    return _training_memory(network, optimizer, memory, batch=size_of(tensors), average=average)


def tap(backbone: Backbone, inputs: Inputs, layer: int, pool: int = 1) -> int:
    """Return the bytes beside the weights, inputs included, at the peak of tapping H_k."""
    with TensorMemory() as memory:
        weights = [*backbone.model.parameters(), *backbone.model.buffers()]
        memory.add(weights)
        before = memory.live
        memory.add(inputs.values())
        tap_pooled(backbone, inputs, layer, pool)
        return memory.peak - before


@torch.no_grad()
def act(backbone: Backbone, network: PolicyNetwork, inputs: Inputs, layer: int, pool: int = 1) -> int:
    """Return the bytes beside the weights, inputs included, at the peak of choosing actions."""
    config, count = network.config, len(inputs["input_ids"])
    state, robot = torch.zeros(count, config.max_dim), torch.zeros(count, dtype=torch.long)
    noise = torch.zeros(count, config.horizon, config.max_dim)
    dims = torch.ones(count, config.max_dim, dtype=torch.bool)
    with TensorMemory() as memory:
        memory.add([*backbone.model.parameters(), *backbone.model.buffers(), *network.parameters()])
        before = memory.live
        memory.add(inputs.values())
        tapped = tap_pooled(backbone, inputs, layer, pool)
        network.sample(tapped.hidden, tapped.mask, state, robot, noise, dims)
        return memory.peak - before


def _autocast(mixed: bool) -> AbstractContextManager[None]:
    """Return the precision of the loss: tensors without values are on the CPU, whose autocast
    converts the same operators as that of CUDA."""
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


def _optimizer(module: nn.Module, loop: LoopConfig, rate: Callable[[str], float]) -> Optimizers:
    return Optimizers(
        module,
        rate,
        lr=loop.lr,
        muon=loop.muon,
        betas=loop.betas,
        weight_decay=loop.weight_decay,
    )


def _update(
    optimizer: Optimizers, loss: Callable[[], Tensor], config: LoopConfig, memory: TensorMemory
) -> None:
    """Take one step as `run_loop` does; with accumulation, gradients exist in later passes."""
    memory.add(optimizer.state().values())
    with quiet():
        for _ in range(min(config.accumulate, 2)):
            loss().backward()
    parameters: Sequence[Tensor] = list(optimizer.names.values())
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step(1.0)


def _training_memory(
    module: nn.Module, optimizer: Optimizers, memory: TensorMemory, *, batch: int, average: int = 0
) -> TrainingMemory:
    trained = list(optimizer.names.values())
    weights = size_of(trained)
    frozen = size_of([*module.parameters(), *module.buffers()]) - weights
    gradients = size_of(p.grad for p in trained if p.grad is not None)
    moments = size_of(optimizer.state().values())
    static = frozen + weights + gradients + moments + average + batch
    return TrainingMemory(
        frozen=frozen,
        trained=weights,
        gradients=gradients,
        moments=moments,
        average=average,
        batch=batch,
        activations=max(0, memory.peak - static),
    )
