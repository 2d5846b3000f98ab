"""Memory of each stage of a recipe: on each device, in the memory of the machine, and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blm.app.memory.outline import Outline, count_parameters
from blm.app.memory.tracking import TensorMemory
from blm.app.memory.work import TrainingMemory, act, size_of, stage1_step, stage2_step, tap
from blm.app.recipe import Recipe
from blm.backbone import Backbone
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.types import BlmError, Sampling

STEPS_PER_DEMONSTRATION = 65
"""Average length of a demonstration [control steps]."""
WORKER_BYTES = 500 * 2**20
"""Resident memory of a worker process without a model [bytes]: Python, torch, MuJoCo and a scene."""
MEASURED_PROMPTS = (1, 3)
"""Batch sizes at which a pass of the backbone is measured; other sizes lie on the line through them."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one stage, by what holds them."""

    stage: str
    device: Mapping[str, int]
    """On each GPU, or on the CPU in each training process; the parts add up to the peak."""
    host: Mapping[str, int] = field(default_factory=dict)
    """In the memory of the machine, of all its processes, beside `device`."""
    disk: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes on each device."""
        return sum(self.device.values())


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Sizes of a recipe in parameters and tokens, and the memory of its stages."""

    backbone: int
    """Parameters of the whole backbone."""
    tapped: int
    """Parameters that are used for an action: vision tower, embeddings, blocks 1..k."""
    policy: int
    """Parameters of bridge, diffusion transformer and heads."""
    tokens: int
    """Tokens of a control prompt."""
    hidden: int
    """Size of a hidden state."""
    stages: tuple[StageMemory, ...]

    def stage(self, name: str) -> StageMemory:
        """Return the memory of one stage."""
        return next(stage for stage in self.stages if stage.stage == name)


def estimate_memory(recipe: Recipe, *, processes: int = 1, shard: bool = False) -> MemoryEstimate:
    """Return the sizes and the memory of a recipe that `processes` train together.

    `shard`: they shard weights and moments (FSDP2). Raises UnknownNameError for an unknown
    backbone, and BlmError for fewer than one process.
    """
    if processes < 1:
        raise BlmError(f"processes is {processes}; it must be 1 or more")
    outline = Outline(recipe, processes)
    backbone = outline.frozen_backbone()
    network = outline.network(backbone.hidden_size)
    tokens = int(outline.prompts(backbone, 1)["input_ids"].shape[1])
    stages = (
        _stage1(outline, shard=shard or recipe.stage1.training.loop.shard),
        *_stage2(outline, backbone, tokens, shard=shard or recipe.stage2.loop.shard),
        *_use(outline, backbone),
    )
    return MemoryEstimate(
        backbone=count_parameters(backbone.model),
        tapped=count_parameters(backbone.model) - _unused(backbone, recipe.stage2.layer),
        policy=count_parameters(network),
        tokens=tokens,
        hidden=backbone.hidden_size,
        stages=stages,
    )


def _unused(backbone: Backbone, layer: int) -> int:
    """Return the number of parameters that are not used for an action."""
    blocks = list(backbone.decoder.layers[layer:])
    head = backbone.model.get_output_embeddings()
    tied = head.weight is backbone.model.get_input_embeddings().weight
    return count_parameters(*blocks, *(() if tied else (head,)))


def _stage1(outline: Outline, *, shard: bool) -> StageMemory:
    recipe, config = outline.recipe, outline.recipe.stage1.training
    backbone, batch, picture = outline.stage1()
    step = stage1_step(backbone, config, batch, mixed=outline.on_cuda)
    scenes, episodes = recipe.corpus.scenes, _episodes(recipe)
    pictures = len(recipe.cameras) * (scenes + episodes * recipe.corpus.frames_per_episode)
    host = {"vision features": pictures * picture * outline.processes} if picture else {}
    saved = (step.trained + step.moments) * (config.loop.keep + 1)
    return StageMemory(
        stage="Stage I",
        device=_training(outline, step, backbone.model, shard=shard),
        host=host | _processes(outline),
        disk={"checkpoints of the run": saved, "backbone": step.frozen + step.trained},
    )


def _training(outline: Outline, step: TrainingMemory, model: nn.Module, *, shard: bool) -> dict[str, int]:
    """Return the bytes on one device; several processes shard the states, or average gradients."""
    parts = dict(vars(step))
    if not outline.on_cuda:
        parts["next batch"] = step.batch
    if outline.processes == 1:
        return parts
    if not shard:
        return parts | {"gradient buckets": step.gradients}
    for name in ("frozen", "trained", "gradients", "moments"):
        parts[name] = -(-parts[name] // outline.processes)
    blocks = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    units = [part for part in model.modules() if type(part).__name__ in blocks]
    largest = max((size_of(unit.parameters()) for unit in units), default=0)
    outside = {*model.parameters()} - {p for unit in units for p in unit.parameters()}
    return parts | {"gathered blocks": 2 * largest + size_of(outside)}  # the next block is prefetched


def _stage2(outline: Outline, backbone: Backbone, tokens: int, *, shard: bool) -> list[StageMemory]:
    recipe, settings = outline.recipe, outline.recipe.stage2
    network = outline.network(backbone.hidden_size)
    batch = outline.policy_batch(tokens, backbone.hidden_size)
    step = stage2_step(network, settings.policy.ema, settings.loop, batch, mixed=outline.on_cuda)
    training = _training(outline, step, network, shard=shard)
    weights = size_of([*backbone.model.parameters(), *backbone.model.buffers()])
    defaults = HiddenStateConfig(layer=settings.layer, cameras=recipe.cameras)
    passes = _tap_bytes(outline, backbone, defaults.batch_size)
    frame = frame_bytes(recipe, tokens, backbone.hidden_size)
    frames = _episodes(recipe) * STEPS_PER_DEMONSTRATION // settings.stride * (settings.views + 1)
    workers = 0 if outline.on_cuda else recipe.workers
    copies = workers * (weights + passes + WORKER_BYTES)
    rows = defaults.shard_frames * (settings.views + 1) * tokens * backbone.hidden_size
    shard_bytes = max(1, workers) * rows * (2 * 4 + 2)  # rows, all rows, and what is stored
    own = {"weights": weights} | ({"activations": passes} if not workers else {})
    saved = (step.trained + step.moments + step.average) * (settings.loop.keep + 1)
    return [
        StageMemory(
            stage="hidden-state cache",
            device=own,
            host=({"worker processes": copies} if workers else {})
            | {"shards in memory": shard_bytes * outline.processes}
            | _processes(outline),
            disk={"cache": frames * frame},
        ),
        StageMemory(
            stage="Stage II, cached",
            device=training,
            host=_processes(outline),
            disk={"checkpoints of the run": saved, "checkpoint": weights + step.average},
        ),
        StageMemory(
            stage="Stage II, live",
            device={"backbone": weights, "activations of the backbone": passes} | training,
            host=_processes(outline),
            disk={"checkpoints of the run": saved, "checkpoint": weights + step.average},
        ),
    ]


def _use(outline: Outline, backbone: Backbone) -> list[StageMemory]:
    """Return the memory of acting, chat and evaluation."""
    recipe = outline.recipe
    network = outline.network(backbone.hidden_size).eval().requires_grad_(False)
    weights = {
        "backbone": size_of([*backbone.model.parameters(), *backbone.model.buffers()]),
        "policy": size_of(network.parameters()),
    }
    inputs = outline.prompts(backbone, 1)
    acting = weights | {"activations": act(backbone, network, inputs, recipe.stage2.layer)}
    workers = recipe.workers * (WORKER_BYTES + (0 if outline.on_cuda else sum(acting.values())))
    return [
        StageMemory(stage="acting", device=acting, host={"process": WORKER_BYTES}),
        StageMemory(stage="chat", device=weights | _chat(backbone, inputs), host={"process": WORKER_BYTES}),
        StageMemory(
            stage="evaluation",
            device=acting if outline.on_cuda else {},
            host={"worker processes": workers, "process": WORKER_BYTES},
        ),
    ]


@torch.no_grad()
def _chat(backbone: Backbone, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Return the bytes of one prompt and its answer beside the weights."""
    length = inputs["input_ids"].shape[1]
    with TensorMemory() as memory:
        memory.add([*backbone.model.parameters(), *backbone.model.buffers()])
        before = memory.live
        output = backbone.model(**backbone.place(inputs), use_cache=True, logits_to_keep=1)
        kept = output.cache if "cache" in output else output.past_key_values  # before transformers 5.24
        cache = size_of(
            value for layer in kept.layers for value in (layer.keys, layer.values) if value is not None
        )
        peak = memory.peak - before
    longest = cache * (length + Sampling().max_tokens) // length
    return {"keys and values": longest, "activations": max(0, peak - cache)}


def _tap_bytes(outline: Outline, backbone: Backbone, count: int) -> int:
    """Return the bytes of tapping `count` prompts, beside the weights."""
    layer = outline.recipe.stage2.layer
    few, some = MEASURED_PROMPTS
    if count <= some:
        return tap(backbone, outline.prompts(backbone, count), layer)
    low, high = (tap(backbone, outline.prompts(backbone, size), layer) for size in MEASURED_PROMPTS)
    return low + (count - few) * (high - low) // (some - few)


def frame_bytes(recipe: Recipe, tokens: int, hidden_size: int) -> int:
    """Return the bytes of a frame in the hidden-state cache."""
    int8 = recipe.stage2.precision == "int8"
    return tokens * (hidden_size + 4 if int8 else 2 * hidden_size)


def _processes(outline: Outline) -> dict[str, int]:
    return {"processes": outline.processes * WORKER_BYTES}


def _episodes(recipe: Recipe) -> int:
    return recipe.demonstrations.episodes * len(recipe.robots) * len(recipe.tasks)
