"""Language co-training in Stage II: the loss of Stage I as a second loss, on batches of corpora."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blm.backbone import Backbone
from blm.corpora.format.validate import clean_corpus
from blm.training.loop.distributed import DataShard, Processes
from blm.training.loop.loop import LoopConfig
from blm.training.pretraining.nano import is_nano, nano_sources
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, collate
from blm.training.sft.tokenize import TokenizationConfig, single_torch_thread
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.types import BlmError, require_numbers


@dataclass(frozen=True, kw_only=True)
class LanguageCotraining:
    """Language co-training in Stage II, which keeps a tuned backbone able to answer questions."""

    weight: float = 0.0
    """Weight of the language loss, relative to the loss of the actions; 0: no co-training."""
    corpora: tuple[str, ...] = ()
    """Corpus folders of Stage I: scene questions, general dialogues."""
    every: int = 1
    """Train on a batch of conversations in every n-th step."""
    batch_size: int = 8
    """Number of conversations in such a batch, over all processes and micro-batches."""
    cache_features: bool = True
    """Cache the vision features of all images of the corpora on disk, in OUT/language_features;
    without, the vision tower runs in every such step."""
    limits: TokenizationConfig = field(default_factory=TokenizationConfig)
    """Tokenization of the conversations."""

    def __post_init__(self) -> None:
        require_numbers(self, weight=(0, 1e6), every=(1, 10**9), batch_size=(1, 10**9))


@dataclass(frozen=True)
class LanguageBatch:
    """Conversations of one micro-batch."""

    examples: ExampleBatch
    answer_tokens: int
    """Number of answer tokens in all micro-batches of the step: the loss is a mean over them."""

    def pin_memory(self) -> LanguageBatch:
        """Return a batch in pinned (page-locked) memory."""
        return LanguageBatch(self.examples.pin_memory(), self.answer_tokens)


class CotrainingSampler:
    """The conversations of each step, as a function of step and seed."""

    def __init__(
        self,
        backbone: Backbone,
        sources: list[TokenizedSource],
        config: LanguageCotraining,
        *,
        seed: int,
        parts: int,
    ) -> None:
        """`parts` is the number of micro-batches of a step, over all processes."""
        self.backbone, self.sources, self.config = backbone, sources, config
        self.mixture = MixtureSampler(
            sources, examples_per_step=config.batch_size, pack_length=0, seed=seed, world_size=parts
        )

    def facts(self) -> dict[str, Any]:
        """Return what the co-training depends on, for inputs.json."""
        facts: dict[str, Any] = {}
        for source in self.sources:
            digest = hashlib.sha256()
            for example in source.examples:
                digest.update(example.tokens.tobytes())
            facts[source.name] = [len(source.examples), source.weight, digest.hexdigest()]
        config = self.config
        return {"weight": config.weight, "every": config.every, "batch_size": config.batch_size} | facts

    def __call__(self, step: int, shard: DataShard) -> LanguageBatch | None:
        """Return the conversations of a data shard; None in steps without language."""
        if step % self.config.every:
            return None
        turn = step // self.config.every
        chosen = [index for [index] in self.mixture.sequences(turn, shard.index)]
        whole = self.mixture.examples(turn)
        tokens = sum(int(self.sources[s].examples[i].loss_mask.sum()) for s, i in whole)
        examples = [self.sources[source].examples[index] for source, index in chosen]
        return LanguageBatch(collate(self.backbone, examples, tuple(range(len(examples)))), tokens)


def cotraining_sampler(
    backbone: Backbone, config: LanguageCotraining, loop: LoopConfig, processes: Processes, out: Path
) -> CotrainingSampler | None:
    """Read and tokenise the corpora; None without co-training. `out` is the folder of the run.

    Raises BlmError for a corpus or conversation that cannot be used.
    """
    if not config.weight:
        return None
    with single_torch_thread():
        tokenizer = CorpusTokenizer(backbone, config.limits, processes, skip_bad=False)
        sources = [tokenizer.tokenize(source) for source in _sources(backbone, config, loop)]
    if config.cache_features:
        examples = [source.examples for source in sources]
        cached = cache_features(backbone, examples, out / "language_features", processes)
        sources = [replace(one, examples=found) for one, found in zip(sources, cached.examples, strict=True)]
    parts = processes.count * loop.accumulate
    return CotrainingSampler(backbone, sources, config, seed=loop.seed, parts=parts)


def _sources(backbone: Backbone, config: LanguageCotraining, loop: LoopConfig) -> list[TrainingSource]:
    """Return the conversations as Stage I trains on them; for nano that includes its own forms."""
    folders = [Path(folder) for folder in config.corpora]
    rows = [(clean_corpus(folder, backbone=backbone), folder, 1.0) for folder in folders]
    if is_nano(backbone):
        return nano_sources(rows, loop)
    return [
        TrainingSource.of_rows(folder.name, conversations, folder, weight=weight)
        for conversations, folder, weight in rows
    ]


def require_cotraining(config: LanguageCotraining, loop: LoopConfig, *, tuned: bool) -> None:
    """Raise BlmError for settings of co-training that cannot have an effect."""
    if config.weight and not tuned:
        raise BlmError(
            "cotrain.weight is set, but the backbone is frozen, so a language loss would train nothing: "
            "set tune.kind to lora or last_blocks, or cotrain.weight to 0"
        )
    if config.weight and not config.corpora:
        raise BlmError("cotrain.weight is set without cotrain.corpora; name corpus folders of Stage I")
    if config.corpora and not config.weight:
        raise BlmError("cotrain.corpora are given, but cotrain.weight is 0; give a weight such as 0.1")
    if config.weight and loop.shard:
        raise BlmError("co-training does not support sharded weights: set loop.shard to False")
