"""Stage I: supervised fine-tuning of a backbone on conversations, with loss on the answers only.

A weighted mixture of sources (own questions, general replay) is tokenised once, before training.
Images are loaded one step ahead, or cached as vision features if the vision tower is frozen.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from blm.backbone import Backbone
from blm.backbone.outline import BackboneOutline, describe_outline, save_outline
from blm.backbone.precision import is_mixed
from blm.backbone.saving import require_free
from blm.io import write_json
from blm.jobs import MAX_WORKERS
from blm.training.loop.batches import ByWorkers
from blm.training.loop.distributed import DataShard, Processes, fsdp_requested, read_scalars
from blm.training.loop.loop import LoopConfig, require_precision, run_loop
from blm.training.run_inputs import require_same_facts, require_same_inputs, run_together
from blm.training.sft.examples import BatchMaker, LazyExamples, shows_video
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.lora import Lora, add_adapters, merge_adapters
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, collate, require_exact, require_maskable
from blm.training.sft.parameter_groups import PartName, freeze_parts, part_of, train_tower
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.supervised_attention import SupervisedAttention
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, single_torch_thread
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.training.sft.vision_attention import use_batched_vision_attention
from blm.training.sft.vision_features import trained_projectors
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Stage I: trained weights, their learning rates, and the form of the data."""

    loop: LoopConfig
    """Training loop."""
    vision_scale: float | None = None
    """Learning rate of the vision tower relative to --loop.lr; 0 freezes it.
    The default is 1, or 0 with LoRA, beside whose adapters the whole tower is trained."""
    projector_scale: float = 1.0
    """Learning rate of the projector relative to --loop.lr; 0 freezes it.
    The projector maps vision features to token embeddings."""
    language_scale: float = 1.0
    """Learning rate of the language model, its embeddings and its head, relative to --loop.lr.
    With LoRA, it applies to the adapters."""
    lora: Lora = field(default_factory=Lora)
    """LoRA: train low-rank adapters of the language model instead of its weights."""
    limits: TokenizationConfig = field(default_factory=TokenizationConfig)
    """Tokenization of the conversations."""
    pack_length: int = 0
    """Maximum length of the sequences into which several examples are packed [tokens].
    Packing is first verified to be exact for the model; 0 pads one example per sequence."""
    cache_features: bool = False
    """Encode each image once, before training; needs a frozen vision tower.
    The features are stored in OUT/features, from which all processes read."""
    supervise_attention: float = 0.0
    """Weight of the loss of supervised attention: where a nano attends to find the things whose
    positions it writes, and those that a control prompt with the order query_last asks for
    (`blm.training.sft.supervised_attention`). Its gradient is several times that of the answers, so a
    weight of 1 suits a nano that cannot find things yet, and a smaller one later training."""
    checkpoint_blocks: bool = False
    """Activation checkpointing: recompute blocks in the backward pass to save memory."""
    workers: int = 0
    """Number of processes that read and tokenise conversations while each process trains.
    With 0, conversations are tokenised before training and kept in memory; with more, they stay on
    disk, and any number of them can be trained on. The samples are the same to the last bit."""
    skip_bad: bool = False
    """Skip and report invalid conversations; by default, the first one stops the run."""

    def __post_init__(self) -> None:
        require_numbers(
            self,
            vision_scale=(0, 1e6),
            projector_scale=(0, 1e6),
            supervise_attention=(0, 1e6),
            language_scale=(0, 1e6),
            pack_length=(0, 10**9),
            workers=(0, MAX_WORKERS),
        )
        if self.lora.four_bit and self.loop.shard:
            raise BlmError("weights of 4 bits cannot be sharded: give lora.four_bit or loop.shard")
        if self.workers and self.cache_features:
            raise BlmError("cache_features keeps the conversations in memory, and workers do not: give one")

    def trains(self, name: str) -> bool:
        """Return whether a parameter of the backbone itself, not of an adapter, is trained."""
        part = part_of(name)
        return part is not None and self.scales[part] > 0 and not (self.lora.rank and part == "language")

    @property
    def scales(self) -> dict[PartName, float]:
        """Learning rates of the parts of the model, relative to `loop.lr`."""
        vision = self.vision_scale if self.vision_scale is not None else float(not self.lora.rank)
        return {"vision": vision, "projector": self.projector_scale, "language": self.language_scale}

    def learning_rate(self, name: str) -> float:
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
    """Train `backbone` in place, save it to `out/backbone`, and return counts of conversations.

    The counts of kept and dropped conversations are also written to `out/rows.json`, and what is
    drawn from each source to `out/drawn.json`. With LoRA the adapters are saved to `out/adapter`,
    and merged into the backbone. `on_eval(steps done)` is called with the model in evaluation mode.
    Raises BlmError naming a conversation that cannot be used.
    """
    processes, model = Processes.join(backbone.model.device), backbone.model
    require_precision(processes.device, config.loop.precision)
    _require_same_sources(processes, sources, out)
    adapted = choose_trained(backbone, config, exact=True)
    attention = SupervisedAttention(backbone) if config.supervise_attention else None
    outline = _outline(backbone, processes, out) if config.workers else None
    tokenized, counts = _tokenize(backbone, sources, config, processes, outline)
    config = replace(config, loop=config.loop.counted(sum(len(source.examples) for source in tokenized)))
    sampler = MixtureSampler(
        tokenized,
        examples_per_step=config.loop.batch_size,
        pack_length=config.pack_length,
        seed=config.loop.seed,
        world_size=processes.count * config.loop.accumulate,
    )
    _prepare_folder(out, processes, _run_inputs(backbone, tokenized, sources, config))
    if config.cache_features:
        tokenized = _with_cached_features(backbone, tokenized, out / "features", processes, counts)
    if processes.first:
        _write_counts(out, counts, sampler, config.loop.steps)
    sharded = processes.count > 1 and (config.loop.shard or fsdp_requested())
    _require_no_videos(tokenized if sharded else ())
    loss_model = MaskedLossModel(backbone, sharded=sharded, cached=config.cache_features)
    if config.checkpoint_blocks:
        model.activation_checkpointing_enable()
    next_batch = ByWorkers(BatchMaker(backbone, outline, tokenized, sampler), config.workers)

    def loss(batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        sums = loss_model.train()(batch)
        found, extra = attention(batch) if attention is not None else (0.0, {})
        total = sums.loss_sum / sums.tokens + config.supervise_attention * found
        return total, {"token_accuracy": sums.correct / sums.tokens, **extra}

    def evaluate(step: int) -> Mapping[str, float]:
        loss_model.eval()
        return on_eval(step) if on_eval is not None else {}

    rate, evaluation = config.learning_rate, on_eval and evaluate
    with _fast_attention(backbone), attention.watch() if attention is not None else nullcontext():
        run_loop(model, loss, next_batch, config.loop, out, learning_rate=rate, on_eval=evaluation)
    if config.checkpoint_blocks:
        model.activation_checkpointing_disable()
    _finish(backbone, adapted, out, processes)
    return counts


@contextmanager
def _fast_attention(backbone: Backbone) -> Iterator[None]:
    """Let the model compute what it attends to as training does."""
    with use_prefix_attention(backbone), use_batched_vision_attention(backbone), without_placeholder_checks():
        yield


def _write_counts(out: Path, counts: Counter[str], sampler: MixtureSampler, steps: int) -> None:
    """Write how many conversations are used, and what is drawn from each source."""
    write_json(out / "rows.json", dict(counts))
    drawn = sampler.drawn(steps)
    write_json(out / "drawn.json", {name: asdict(part) for name, part in drawn.items()})


def _finish(backbone: Backbone, adapted: PeftModel | None, out: Path, processes: Processes) -> None:
    """Merge adapters, round trained weights if frozen ones are bfloat16, and save the backbone."""
    if adapted is not None:
        merge_adapters(backbone, adapted, out / "adapter" if processes.first else None)
    if is_mixed(backbone.model):
        _round_as_stored(backbone)
    backbone.model.eval()
    if processes.first:
        backbone.save(out / "backbone")
    processes.wait()


def _round_as_stored(backbone: Backbone) -> None:
    """Round trained weights to the precision of the model from which training started.

    Beside bfloat16 weights they were rounded for every matrix product already (autocast).
    """
    for name, parameter in backbone.model.named_parameters():
        parameter.data = parameter.data.to(backbone.stored_dtypes.get(name, parameter.dtype))


@contextmanager
def without_placeholder_checks() -> Iterator[None]:
    """Switch off checks of transformers that read values back from the device in each step.

    They compare the numbers of placeholders and image features, which `Backbone.check` has already
    done for each example.
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


def _require_no_videos(sources: Sequence[TokenizedSource]) -> None:
    """Raise BlmError for examples with videos: sharded ranks must run the vision tower equally often.

    It runs once for images and once more for videos, so ranks whose batches differ would wait
    forever.
    """
    for source in sources:
        if shows_video(source.examples):
            raise BlmError(
                f"'{source.name}' has videos, which sharded training cannot read as videos: set "
                "cache_features, train without sharding, or set the backbone's videos_as to 'frames'"
            )


def choose_trained(backbone: Backbone, config: Stage1Config, *, exact: bool) -> PeftModel | None:
    """Freeze the parts with a scale of 0; add LoRA adapters, if configured, and return them.

    Raises BlmError for settings that this model cannot fulfil: packing, separated turns, cached
    features, parts and layers that it does not have. With `exact` packing is proven on the weights;
    without, an outline of the model suffices (`Backbone.outline`).
    """
    adapted = None
    if config.lora.rank:
        projector = config.projector_scale > 0
        adapted = add_adapters(backbone, config.lora, projector=projector, seed=config.loop.seed)
        train_tower(backbone.model, config.scales["vision"])
    else:
        freeze_parts(backbone.model, config.scales)
    for parameter in backbone.model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if config.pack_length or config.limits.separate_turns:
        require_maskable(backbone)
    if config.pack_length and exact:
        require_exact(backbone)
    if config.cache_features:
        trained_projectors(backbone)
    return adapted


def _tokenize(
    backbone: Backbone,
    sources: Sequence[TrainingSource],
    config: Stage1Config,
    processes: Processes,
    outline: BackboneOutline | None,
) -> tuple[list[TokenizedSource], Counter[str]]:
    """Tokenise all sources, and count the outcomes; with workers, rows of validated corpora stay on
    disk."""
    tokenizer = CorpusTokenizer(backbone, config.limits, processes, skip_bad=config.skip_bad)
    found, counts = list[TokenizedSource](), Counter[str]()
    with single_torch_thread():
        for source in sources:
            if outline is not None and source.corpus is not None:
                examples = LazyExamples(source.corpus, outline, config.limits)
                found.append(TokenizedSource(name=source.name, examples=examples, weight=source.weight))
                counts += Counter(source.corpus.outcomes)
            else:
                found.append(tokenizer.tokenize(source))
        return found, counts + tokenizer.total_counts()


def _outline(backbone: Backbone, processes: Processes, out: Path) -> BackboneOutline:
    """Return the outline of the backbone, which process 0 writes for all workers."""
    run_together(processes, lambda: save_outline(backbone, out / "outline") if processes.first else None)
    return describe_outline(backbone, out / "outline")


def _with_cached_features(
    backbone: Backbone,
    tokenized: Sequence[TokenizedSource],
    folder: Path,
    processes: Processes,
    counts: Counter[str],
) -> list[TokenizedSource]:
    """Return the sources with cached vision features; `counts` gets the numbers of pictures."""
    cached = cache_features(backbone, [source.examples for source in tokenized], folder, processes)
    counts |= {"pictures": cached.pictures, "distinct pictures": cached.distinct}
    return [replace(one, examples=found) for one, found in zip(tokenized, cached.examples, strict=True)]


def _require_same_sources(processes: Processes, sources: Sequence[TrainingSource], out: Path) -> None:
    """Raise BlmError, in every process, unless all of them read the same conversations."""
    if processes.count == 1:
        return
    facts = {}
    for source in sources:
        if source.corpus is not None:
            facts[f"corpus {source.name}"] = source.corpus.digest
            continue
        digest = hashlib.sha256()
        for conversation in source.conversations:
            for message in conversation:
                digest.update(f"{message.role}: {message.text}\n".encode(errors="surrogatepass"))
        facts[f"corpus {source.name}"] = digest.hexdigest()
    require_same_facts(processes, f"'{out}'", facts)


def _prepare_folder(out: Path, processes: Processes, inputs: Mapping[str, object]) -> None:
    """Record the inputs of the run. Raises BlmError, in every process, if the run may not write to
    `out`."""

    def prepare() -> None:
        if processes.first:
            require_same_inputs(out / "inputs.json", inputs, f"'{out}' holds another run")
            for name in ("backbone", "adapter"):
                require_free(out / name)

    run_together(processes, prepare)


def _run_inputs(
    backbone: Backbone,
    tokenized: Sequence[TokenizedSource],
    sources: Sequence[TrainingSource],
    config: Stage1Config,
) -> dict[str, object]:
    """Return the inputs of a run, for `inputs.json`.

    They exclude the loop's config, which the loop compares itself, and `limits`, which determine
    the tokens.
    """
    facts = asdict(config) | {"lora": config.lora.facts()}
    for name in ("loop", "skip_bad", "checkpoint_blocks", "limits", "workers"):
        del facts[name]
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    facts["backbone"] = digest.hexdigest()
    for source, given in zip(tokenized, sources, strict=True):
        if given.corpus is not None:
            facts[f"source {source.name}"] = [len(source.examples), source.weight, given.corpus.digest]
            continue
        digest = hashlib.sha256()
        for example in source.examples:
            digest.update(example.tokens.tobytes())
        facts[f"source {source.name}"] = [len(source.examples), source.weight, digest.hexdigest()]
    return facts


@torch.no_grad()
def held_out_loss(
    backbone: Backbone, examples: Sequence[TokenizedExample], batch_size: int
) -> dict[str, float]:
    """Return mean loss [nats] and accuracy per token of the answers, under teacher forcing.

    All processes call this with the same examples; each computes some of the batches.
    """
    processes = Processes.join(backbone.model.device)
    loss_model, sums = MaskedLossModel(backbone).eval(), torch.zeros(3, dtype=torch.float64)
    own = DataShard(processes.rank, processes.count)
    for begin in own.of(range(0, len(examples), batch_size)):
        some = examples[begin : begin + batch_size]
        result = loss_model(collate(backbone, some, tuple(range(len(some)))))
        sums += torch.stack([value.cpu().double() for value in result])
    (total,) = read_scalars(processes.sum({str(n): value for n, value in enumerate(sums.tolist())}))
    loss, tokens, correct = total.values()
    return {"held_out_loss": loss / tokens, "held_out_accuracy": correct / tokens}
