"""Stage I: supervised fine-tuning of a backbone on conversations, with loss on the assistant's tokens only.

A weighted mixture of sources (own questions, general replay) is tokenised once, before training; pictures
are read one step ahead, or wait as features if the eye is frozen. The language head runs on answer positions
only.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from blm.backbone import Backbone
from blm.backbone.saving import require_free
from blm.io import write_json
from blm.training.loop.distributed import Part, Processes, wants_shards
from blm.training.loop.loop import LoopConfig, Piece, run_loop
from blm.training.policy.hidden_states import claim
from blm.training.sft.lora import Lora, add_adapters, merge_adapters
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, Place, Source
from blm.training.sft.pack import ExampleBatch, collate, pack, require_exact
from blm.training.sft.parameter_groups import PartName, freeze_parts, part_of
from blm.training.sft.prefix_attention import turned
from blm.training.sft.tokenize import Limits, Row, one_thread
from blm.training.sft.tokenize_corpora import Reader, TrainingSource
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    loop: LoopConfig
    vision_scale: float | None = None
    """Times `loop.lr` is the rate of the vision tower; 0 freezes it. By default 1, with LoRA 0."""
    projector_scale: float = 1.0
    """The same for what turns vision features into tokens."""
    language_scale: float = 1.0
    """The same for language model, embeddings and head; with LoRA for the adapters."""
    lora: Lora = field(default_factory=Lora)
    """Train adapters of the language model instead of its weights."""
    limits: Limits = field(default_factory=Limits)
    pack_length: int = 0
    """Rows share a sequence up to this length [tokens], once that is proved exact for the model; 0: each row
    has one for itself, padded."""
    cache_features: bool = False
    """See each picture once, before training; needs a frozen vision tower."""
    checkpoint_blocks: bool = False
    """Recompute blocks in the backward pass: less memory, the same gradients."""
    skip_bad: bool = False
    """Leave out conversations that cannot be used, and print each; else the first of them ends the run."""

    def __post_init__(self) -> None:
        require_numbers(
            self,
            vision_scale=(0, 1e6),
            projector_scale=(0, 1e6),
            language_scale=(0, 1e6),
            pack_length=(0, 10**9),
        )
        if self.lora.rank and self.vision_scale:
            raise BlmError("LoRA leaves the vision tower as it is; set vision_scale=0")

    @property
    def scales(self) -> dict[PartName, float]:
        vision = self.vision_scale if self.vision_scale is not None else float(not self.lora.rank)
        return {"vision": vision, "projector": self.projector_scale, "language": self.language_scale}

    def rate(self, name: str) -> float:
        """Return the peak learning rate of a parameter."""
        part = part_of(name)
        assert part is not None, name
        return self.loop.lr * self.scales[part]


def train_stage1(
    backbone: Backbone,
    sources: Sequence[TrainingSource],
    config: Stage1Config,
    out: Path,
    *,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
) -> Counter[str]:
    """Train `backbone` in place and save it to `out/backbone`; return what happened to the conversations.

    The counts are in `out/rows.json` too. With LoRA the adapters are in `out/adapter`, and merged into the
    backbone. `on_eval(steps done)` is called with the model in evaluation mode. Raises BlmError naming the
    conversation that cannot be used.
    """
    processes, model = Processes.join(backbone.model.device), backbone.model
    adapted = _choose_trained(backbone, config)
    read, counts = _read(backbone, sources, config, processes)
    schedule = MixtureSampler(
        read,
        rows_per_step=config.loop.batch_size,
        pack_length=config.pack_length,
        seed=config.loop.seed,
        world=processes.count * config.loop.accumulate,
    )
    if processes.first:
        claim(out / "inputs.json", _inputs(backbone, read, config), f"'{out}' holds another run")
        for name in ("backbone", "adapter"):
            require_free(out / name)
        write_json(out / "rows.json", dict(counts))
    sharded = processes.count > 1 and (config.loop.shard or wants_shards())
    answers = MaskedLossModel(backbone, sharded=sharded, cached=config.cache_features)
    if config.checkpoint_blocks:
        model.activation_checkpointing_enable()

    def next_batch(step: int, part: Part) -> Piece[ExampleBatch]:
        return _piece(backbone, read, schedule.groups(step, part.index))

    def loss(batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        found = answers.train()(batch)
        return found.loss_sum / found.tokens, {"token_accuracy": found.correct / found.tokens}

    def evaluate(step: int) -> Mapping[str, float]:
        answers.eval()
        return on_eval(step) if on_eval is not None else {}

    with turned(backbone), checked_before():
        run_loop(
            model, loss, next_batch, config.loop, out, learning_rate=config.rate, on_eval=on_eval and evaluate
        )
    if config.checkpoint_blocks:
        model.activation_checkpointing_disable()
    if adapted is not None:
        merge_adapters(backbone, adapted, out / "adapter" if processes.first else None)
    backbone.model.eval()
    if processes.first:
        backbone.save(out / "backbone")
    processes.wait()
    return counts


@contextmanager
def checked_before() -> Iterator[None]:
    """Switch off checks of transformers that read values back from the device in each step.

    They compare the numbers of placeholders and picture features, as `Backbone.check` did for each row.
    """
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _choose_trained(backbone: Backbone, config: Stage1Config) -> PeftModel | None:
    """Freeze what shall not train; return adapters, if wanted. Raises BlmError if rows cannot be packed."""
    adapted = None
    if config.lora.rank:
        projector = config.projector_scale > 0
        adapted = add_adapters(backbone, config.lora, projector=projector, seed=config.loop.seed)
    else:
        freeze_parts(backbone.model, config.scales)
    if config.pack_length:
        require_exact(backbone)
    return adapted


def _piece(
    backbone: Backbone, read: Sequence[Source], groups: Sequence[Sequence[Place]]
) -> Piece[ExampleBatch]:
    rows = [[read[source].rows[row] for source, row in group] for group in groups]
    ids = [f"{read[source].name} {row}" for group in groups for source, row in group]
    batch = pack(backbone, rows, tuple(range(len(ids))))
    return Piece(batch, ids, float(batch.loss_mask.sum()), batch.tokens, batch.loss_mask.numel())


def _read(
    backbone: Backbone, sources: Sequence[TrainingSource], config: Stage1Config, processes: Processes
) -> tuple[list[Source], Counter[str]]:
    """Tokenise all sources, and see their pictures if features are wanted; with counts of what happened."""
    with one_thread():
        reader = Reader(
            backbone,
            config.limits,
            processes,
            skip_bad=config.skip_bad,
            features=config.cache_features,
        )
        return [reader.read(source) for source in sources], reader.total()


def _inputs(backbone: Backbone, sources: Sequence[Source], config: Stage1Config) -> dict[str, object]:
    """What a run is made from, beside the loop's own config."""
    facts = asdict(config)
    for name in ("loop", "skip_bad", "checkpoint_blocks", "limits"):  # the loop compares its own; rows tell
        del facts[name]
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    facts["backbone"] = digest.hexdigest()
    for source in sources:
        digest = hashlib.sha256()
        for row in source.rows:
            digest.update(row.tokens.tobytes())
        facts[f"source {source.name}"] = [len(source.rows), source.weight, digest.hexdigest()]
    return facts


@torch.no_grad()
def held_out_loss(backbone: Backbone, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    """Return the mean loss [nats] and accuracy per answer token of rows, each right after true words only."""
    answers, sums = MaskedLossModel(backbone).eval(), torch.zeros(3, dtype=torch.float64)
    for begin in range(0, len(rows), batch_size):
        some = rows[begin : begin + batch_size]
        made = answers(collate(backbone, some, tuple(range(len(some)))))
        sums += torch.stack([value.cpu().double() for value in made])
    loss, tokens, correct = sums.tolist()
    return {"held_out_loss": loss / tokens, "held_out_accuracy": correct / tokens}
