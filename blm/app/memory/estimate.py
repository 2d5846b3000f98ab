"""Memory of each stage of a recipe: on each device, in the memory of the machine, and on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from blm.app.memory.outline import Outline, count_parameters
from blm.app.memory.tracking import TensorMemory, strip_values
from blm.app.memory.work import TrainingMemory, act, size_of, stage1_step, stage2_step, tap
from blm.app.recipe import Recipe
from blm.backbone import Backbone
from blm.training.policy.hidden_state_cache import cached_frame_bytes
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.sft.loss import LOGITS_AT_ONCE
from blm.training.sft.tokenize import TokenizedExample
from blm.types import BlmError, Sampling

STEPS_PER_DEMONSTRATION = 65
"""Average length of a demonstration [control steps]."""
WORKER_BYTES = 536 * 2**20
"""Resident memory of a process without a model [bytes], Python and libraries: 505 MiB measured for
training, 501 for a data worker, and 536 for one with a scene in MuJoCo (`benchmarks/memory.py`). The
libraries' pages, which processes share, count in each: 220 MiB."""
MEASURED_EXAMPLES = 16
"""Most conversations at which a step of Stage I is measured."""
TUNED = (
    "not counted: the recipe tunes the backbone in Stage II (stage2.tune). Add its trained weights with "
    "gradients, moments and average, and the activations of blocks 1..k; the cache holds vision features"
)
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
    cached: float
    """Bytes of a frame in the hidden-state cache."""
    stages: tuple[StageMemory, ...]
    uncounted: str = ""
    """What the recipe needs besides."""

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
    loaded = Loaded(backbone, outline.frozen_backbone(recipe.stage2.layer))
    stage2 = recipe.stage2
    frame = cached_frame_bytes(
        outline.pooled_tokens(backbone),
        backbone.hidden_size,
        precision=stage2.precision,
        dims=stage2.dims,
    )
    return MemoryEstimate(
        backbone=count_parameters(backbone.model),
        tapped=count_parameters(loaded.part.model),
        policy=count_parameters(outline.network(backbone.hidden_size)),
        tokens=int(outline.prompts(backbone, 1)["input_ids"].shape[1]),
        hidden=backbone.hidden_size,
        cached=frame,
        stages=(
            *_stage1(outline, shard=shard or recipe.stage1.training.loop.shard),
            *_stage2(outline, loaded, frame, shard=shard or stage2.loop.shard),
            *_use(outline, loaded),
        ),
        uncounted=TUNED if stage2.tune.on else "",
    )


@dataclass(frozen=True)
class Loaded:
    """The frozen backbone in the two forms in which it is loaded."""

    whole: Backbone
    part: Backbone
    """Vision tower, embeddings and blocks up to the tapped one: what actions need."""

    @property
    def whole_bytes(self) -> int:
        return _weights(self.whole)

    @property
    def part_bytes(self) -> int:
        return _weights(self.part)


def _weights(backbone: Backbone) -> int:
    return size_of([*backbone.model.parameters(), *backbone.model.buffers()])


def _stage1(outline: Outline, *, shard: bool) -> list[StageMemory]:
    recipe, config = outline.recipe, outline.recipe.stage1.training
    mixed = outline.mixed(config.loop)
    backbone = outline.stage1_backbone()
    steps, picture = _stage1_steps(outline, backbone)
    if shard and mixed and outline.processes > 1:  # autocast then finds weights that FSDP2 has converted
        strip_values(backbone.model, torch.bfloat16)
        again, _ = _stage1_steps(outline, backbone)
        steps = {name: replace(one, activations=again[name].activations) for name, one in steps.items()}
    first = next(iter(steps.values()))
    disk = {"checkpoints of the run": first.state * (config.loop.keep + 1)}
    disk["backbone"] = first.frozen + first.trained
    if picture:
        frames = recipe.corpus.scenes + _episodes(recipe) * recipe.corpus.frames_per_episode
        disk["vision features of scenes"] = len(recipe.cameras) * frames * picture
    return [
        StageMemory(
            stage=name,
            device=_training(outline, one, backbone.model, shard=shard, mixed=mixed),
            host={"checkpoint copy": one.state} | _processes(outline),
            disk=disk,
        )
        for name, one in steps.items()
    ]


def _stage1_steps(outline: Outline, backbone: Backbone) -> tuple[dict[str, TrainingMemory], int]:
    """Return the memory of a step on scene questions and, in a mixture, on the longest conversations
    that public corpora may have; and the bytes of the cached features of a picture."""
    example, picture = outline.scene_example(backbone)
    steps = {"Stage I": _stage1_step(outline, backbone, example)}
    if outline.recipe.stage1.mixture.public:
        example = outline.longest(backbone)
        name = f"Stage I, if all conversations have {len(example):,} tokens"
        steps[name] = _stage1_step(outline, backbone, example)
    return steps, picture


def _stage1_step(outline: Outline, backbone: Backbone, example: TokenizedExample) -> TrainingMemory:
    """Return the memory of a step on equal conversations; that of a large batch lies on the line
    through N and 2 N of them.

    N fills whole sequences, and gives logits that the loss splits into chunks of the same size as
    those of 2 N: N x is the number of chunks before rounding.
    """
    config = outline.recipe.stage1.training

    def measure(count: int) -> TrainingMemory:
        batch = outline.stage1_batch(backbone, example, count)
        return stage1_step(backbone, config, batch, mixed=outline.mixed(config.loop))

    count, together = outline.examples_per_pass, max(1, config.pack_length // len(example))
    if count <= MEASURED_EXAMPLES:
        return measure(count)
    vocabulary = len(backbone.model.get_input_embeddings().weight)
    x = int(example.loss_mask.sum()) * vocabulary / LOGITS_AT_ONCE
    sizes = range(together, MEASURED_EXAMPLES // 2 + 1, together)
    few = next((n for n in sizes if math.ceil(2 * n * x) == 2 * math.ceil(n * x)), together)
    low, high = measure(few), measure(2 * few)
    more = (count - few) / few
    return replace(
        low,
        batch=int(low.batch + more * (high.batch - low.batch)),
        activations=int(low.activations + more * (high.activations - low.activations)),
    )


def _training(
    outline: Outline, step: TrainingMemory, model: nn.Module, *, shard: bool, mixed: bool
) -> dict[str, int]:
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
    units = [[*part.parameters()] for part in model.modules() if type(part).__name__ in blocks]
    outside = [*{*model.parameters()} - {p for unit in units for p in unit}]

    def gathered(unit: Sequence[Tensor]) -> int:
        return sum(p.numel() * (2 if mixed else p.element_size()) for p in unit)

    def gradients(unit: Sequence[Tensor]) -> int:
        return gathered([p for p in unit if p.requires_grad])

    weights = 2 * max(map(gathered, units), default=0) + gathered(outside)  # the next block is prefetched
    whole = max(map(gradients, units), default=0) + gradients(outside)
    return parts | {"gathered weights": weights, "their gradients": whole}


def _stage2(outline: Outline, loaded: Loaded, frame: float, *, shard: bool) -> list[StageMemory]:
    recipe, settings = outline.recipe, outline.recipe.stage2
    network = outline.network(loaded.whole.hidden_size)
    tokens, mixed = outline.pooled_tokens(loaded.whole), outline.mixed(settings.loop)
    batch = outline.policy_batch(tokens, loaded.whole.hidden_size)
    step = stage2_step(network, settings.policy.ema, settings.loop, batch, mixed=mixed)
    training = _training(outline, step, network, shard=shard, mixed=mixed)
    whole, part = loaded.whole_bytes, loaded.part_bytes
    passes = _tap_bytes(outline, loaded.part, _hidden_states(recipe).batch_size)
    kept = 0  # closed-loop validation keeps the backbone, on the CPU the whole, to write it
    if settings.drive:
        kept = part if outline.on_cuda else whole
    prompt = size_of(outline.prompts(loaded.whole, 1).values())  # the pictures are smaller as uint8
    ahead = outline.processes * recipe.workers * 2 * 2 * len(batch.ids) * prompt
    states = 4 * len(batch.ids) * tokens * loaded.whole.hidden_size * 4  # of all frames, now and future
    copy = {"checkpoint copy": step.state}
    saved = {
        "checkpoints of the run": step.state * (settings.loop.keep + 1),
        "checkpoint": whole + step.average,
    }
    end = {"backbone": whole, "trained": step.trained, "gradients": step.gradients, "average": step.average}
    reading = {"backbone, read whole": whole * outline.processes} if outline.on_cuda else {}
    return [
        _cache_fill(
            outline,
            max(part, kept),
            passes,
            frame,
            values=tokens * loaded.whole.hidden_size,
            policy=step.trained,
        ),
        StageMemory(
            stage="Stage II, cached",
            device=({"backbone": kept} if kept else {}) | training,
            host=copy | _processes(outline),
            disk=saved,
        ),
        StageMemory(
            stage="Stage II, live",
            device={"backbone": part, "activations of the backbone": passes, "hidden states": states}
            | training,
            host={
                "data workers": outline.processes * recipe.workers * WORKER_BYTES,
                "their batches": ahead,
            }
            | copy
            | _processes(outline),
            disk=saved,
        ),
        StageMemory(
            stage="Stage II, last comparison of the backbone",
            device=end,
            host=reading | _processes(outline),
        ),
    ]


def _hidden_states(recipe: Recipe) -> HiddenStateConfig:
    return HiddenStateConfig(layer=recipe.stage2.layer, cameras=recipe.cameras)


def _cache_fill(
    outline: Outline, backbone: int, passes: int, frame: float, *, values: int, policy: int
) -> StageMemory:
    """Return the memory of filling the cache: frames of `values` numbers, of `frame` bytes on the disk.

    The policy waits on the device.
    """
    recipe, defaults = outline.recipe, _hidden_states(outline.recipe)
    copies = recipe.stage2.views + 1
    frames = _episodes(recipe) * STEPS_PER_DEMONSTRATION // recipe.stage2.stride * copies
    workers = 0 if outline.on_cuda else recipe.workers
    # a shard's hidden states, the same in one array, and what is stored
    shard = defaults.shard_frames * copies * int(2 * 4 * values + frame)
    host = {"shards in memory": max(1, workers) * shard * outline.processes}
    if workers:
        host["worker processes"] = workers * (backbone + passes + WORKER_BYTES)
    return StageMemory(
        stage="hidden-state cache",
        device={"backbone": backbone, "policy": policy} | ({} if workers else {"activations": passes}),
        host=host | _processes(outline),
        disk={"cache": int(frames * frame)},
    )


def _use(outline: Outline, loaded: Loaded) -> list[StageMemory]:
    """Return the memory of acting, chat and evaluation."""
    recipe, layer = outline.recipe, outline.recipe.stage2.layer
    network = outline.network(loaded.whole.hidden_size).eval().requires_grad_(False)
    policy = {"policy": size_of(network.parameters())}
    inputs = outline.prompts(loaded.whole, 1)
    activations = act(loaded.part, network, inputs, layer, recipe.stage2.pool)
    acting = {"backbone": loaded.part_bytes} | policy | {"activations": activations}
    whole = {"backbone": loaded.whole_bytes} | policy
    answering = _chat(loaded.whole, inputs)
    workers = recipe.workers * (WORKER_BYTES + (0 if outline.on_cuda else sum(acting.values())))
    one = {"process": WORKER_BYTES}
    return [
        StageMemory(stage="actions only (`blm serve --actions-only`)", device=acting, host=one),
        StageMemory(
            stage="actions and chat (`blm serve`)",
            device=whole | {"activations of an action": activations} | answering,
            host=one,
        ),
        StageMemory(
            stage="evaluation",
            device=acting if outline.on_cuda else {},
            host={"worker processes": workers} | one,
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
    layer, pool = outline.recipe.stage2.layer, outline.recipe.stage2.pool
    few, some = MEASURED_PROMPTS
    if count <= some:
        return tap(backbone, outline.prompts(backbone, count), layer, pool)
    low, high = (tap(backbone, outline.prompts(backbone, size), layer, pool) for size in MEASURED_PROMPTS)
    return low + (count - few) * (high - low) // (some - few)


def _processes(outline: Outline) -> dict[str, int]:
    return {"processes": outline.processes * WORKER_BYTES}


def _episodes(recipe: Recipe) -> int:
    return recipe.demonstrations.episodes * len(recipe.robots) * len(recipe.tasks)
