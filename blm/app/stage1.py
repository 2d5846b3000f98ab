"""Prepare Stage I: the backbone and its training sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console

from blm.backbone import Backbone
from blm.backbone.precision import WeightDtype, frozen_dtype
from blm.corpora.format.messages import Conversation
from blm.corpora.format.scan import CorpusFacts
from blm.corpora.format.validated import ValidatedCorpus
from blm.training.pretraining.nano import (
    NanoPretrainingConfig,
    is_nano,
    nano_sources,
    pretrain_again,
    pretrain_nano,
)
from blm.training.pretraining.smol import is_untaught, pretrain_smol
from blm.training.sft.tokenize_corpora import TrainingSource, check_lengths, without_scan_turns
from blm.training.sft.train import Stage1Config

NANO = "nano"
"""The backbone without released weights: it is pretrained on the corpora of Stage I."""


@dataclass(frozen=True, kw_only=True)
class TrainingCorpus:
    """Checked conversations of one corpus folder."""

    name: str
    """Name of the training source."""
    folder: Path
    """Folder that the paths of images are relative to."""
    conversations: Sequence[Conversation]
    weight: float = 1.0
    """Share of the training examples, relative to the other corpora."""
    validated: ValidatedCorpus | None = None
    """The corpus as it was validated for the backbone, whose rows the conversations are."""

    @classmethod
    def of_validated(cls, corpus: ValidatedCorpus, *, weight: float = 1.0) -> TrainingCorpus:
        """Return a validated corpus, whose conversations are read when they are used."""
        return cls(
            name=corpus.folder.name,
            folder=corpus.folder,
            conversations=corpus.open(),
            weight=weight,
            validated=corpus,
        )

    @cached_property
    def facts(self) -> CorpusFacts:
        """How its scenes varied, its control prompts, and its reserved scenes."""
        return CorpusFacts.of(self.conversations) if self.validated is None else self.validated.facts


def load_pretrained(
    name: str,
    config: Stage1Config,
    *,
    device: str = "cpu",
    dtype: WeightDtype | None = None,
    attn_implementation: str | None = None,
) -> Backbone | None:
    """Load the backbone that Stage I starts from, or return None for a fresh nano.

    Weights that `config` trains are float32; frozen ones have the precision of `frozen_dtype`.
    Raises UnknownNameError for a name that is neither a backbone nor a folder, and BlmError as
    `frozen_dtype` does.
    """
    if name == NANO:
        return None
    frozen = frozen_dtype(device, dtype)
    return Backbone.load(
        name, device=device, dtype=frozen, attn_implementation=attn_implementation, float32=config.trains
    )


def warn_of_lengths(backbone: Backbone, corpus: TrainingCorpus, config: Stage1Config) -> None:
    """Print a warning if conversations are too long to train on; see `check_lengths`."""
    source = TrainingSource.of_rows(corpus.name, corpus.conversations, corpus.folder)
    if warning := check_lengths(backbone, source, config.limits):
        Console(stderr=True).print(f"warning: {warning}", soft_wrap=True, highlight=False)


def prepare_stage1(
    backbone: Backbone | None,
    corpora: Sequence[TrainingCorpus],
    config: Stage1Config,
    schooling: NanoPretrainingConfig,
    out: Path,
    *,
    device: str = "cpu",
) -> tuple[Backbone, list[TrainingSource]]:
    """Return the backbone and the sources for `train_stage1`.

    Without a backbone, a nano gets a tokenizer of these corpora and is pretrained in `out`, as is
    the vision tower of a new smol, in place; an interrupted pretraining is continued.
    """
    pairs = [(corpus.conversations, corpus.folder) for corpus in corpora]
    if backbone is None:
        backbone = pretrain_nano(pairs, schooling, out, seed=config.loop.seed)
        backbone.model.to(device)
    elif is_nano(backbone) and schooling.again:
        pretrain_again(backbone, pairs, schooling, out)
    elif is_untaught(backbone):
        pretrain_smol(backbone, pairs, schooling.eye, out, seed=config.loop.seed)
        backbone.model.to(device)
    for corpus in corpora:
        backbone.record_prompts(corpus.facts.orders)
    backbone.record_training({kind for corpus in corpora for kind in corpus.facts.training})
    if is_nano(backbone):
        shares = [(corpus.conversations, corpus.folder, corpus.weight) for corpus in corpora]
        return backbone, nano_sources(shares, config.loop)
    return backbone, [_source(corpus) for corpus in corpora]


def _source(corpus: TrainingCorpus) -> TrainingSource:
    """Return a corpus without its scan turns, which are labels of vision towers."""
    if corpus.validated is not None:
        return TrainingSource.of_corpus(corpus.name, corpus.validated, weight=corpus.weight)
    rows = [without_scan_turns(row) for row in corpus.conversations]
    return TrainingSource.of_rows(corpus.name, rows, corpus.folder, weight=corpus.weight)
