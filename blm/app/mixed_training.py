"""Stage I of a pretrained backbone on a mixture, with its losses by source and its retention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blm.app.mixture import Mixture, print_plan
from blm.app.recipe import Stage1Settings
from blm.app.retention import RetentionCheck, print_retention
from blm.app.stage1 import TrainingCorpus, prepare_stage1
from blm.backbone import Backbone
from blm.io import read_json, write_json
from blm.training.loop.distributed import Processes
from blm.training.sft.mixture_sampler import DrawnSource
from blm.training.sft.tokenize import TokenizedExample
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.training.sft.train import Stage1Config, held_out_loss, train_stage1

MIXTURE, RETENTION = "mixture.json", "retention.json"
"""Files of the stage's folder: what it trained on, and what it kept of the base's language."""


@dataclass(frozen=True, kw_only=True)
class TrainedSource:
    """What Stage I drew from one source, and how well it learnt it."""

    name: str
    rows: int
    """Conversations that could be drawn."""
    weight: float
    examples: int
    """Conversations that were drawn, with repetitions."""
    example_share: float
    token_share: float
    answer_token_share: float
    """Share of the tokens with loss."""
    loss_before: float | None
    """Loss per answer token on held-out conversations, before the training [nats]; None if the
    source is too small to hold some out."""
    loss_after: float | None


@dataclass(frozen=True, kw_only=True)
class MissingCorpus:
    """A corpus of the recipe that was not there."""

    name: str
    folder: str
    advice: str
    """Where to get it, and how to place it."""


@dataclass(frozen=True, kw_only=True)
class MixtureRecord:
    """What Stage I trained on; `mixture.json` in its folder."""

    steps: int
    batch_size: int
    epochs: float
    sources: Sequence[TrainedSource]
    missing: Sequence[MissingCorpus]


def train_on_mixture(
    backbone: Backbone, mixture: Mixture, settings: Stage1Settings, out: Path
) -> Counter[str]:
    """Train a pretrained backbone in place; print and store the sources and the retention.

    At every evaluation the log gets the loss of each source on held-out conversations, and the
    divergence from the base on text. All processes call this: each computes a part of the losses,
    and all of the retention, so that none waits for another; the first prints and writes. Returns
    the counts of conversations.
    """
    first = Processes.join(backbone.model.device).first
    loop = replace(settings.training.loop, steps=mixture.plan.steps)
    training = replace(settings.training, loop=loop)
    if first:
        print_plan(mixture, loop.batch_size)
    check = RetentionCheck(backbone, settings.backbone)
    held_out = {corpus.name: _tokenize(backbone, corpus, training) for corpus in mixture.held_out}
    before = _losses(backbone, held_out, loop.batch_size)
    after = dict[str, float]()

    def evaluate(step: int) -> dict[str, float]:
        after.update(_losses(backbone, held_out, loop.batch_size))
        text = check.text.measure(backbone)
        found = {f"loss of {name}": loss for name, loss in after.items()}
        return found | {"kl": text.kl, "perplexity": text.perplexity, "perplexity_base": text.perplexity_base}

    _, sources = prepare_stage1(backbone, mixture.corpora, training, settings.schooling, out)
    counts = train_stage1(backbone, sources, training, out, on_eval=evaluate)
    after = after or _losses(backbone, held_out, loop.batch_size)
    retention = check.compare(backbone, str(out / "backbone"))
    if first:
        drawn = {name: DrawnSource(**part) for name, part in read_json(out / "drawn.json").items()}
        record = _record(mixture, drawn, before, after)
        write_json(out / MIXTURE, asdict(replace(record, batch_size=loop.batch_size)))
        print_record(record)
        write_json(out / RETENTION, asdict(retention))
        print_retention(retention, Console(stderr=True))
    return counts


def _record(
    mixture: Mixture,
    drawn: Mapping[str, DrawnSource],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> MixtureRecord:
    totals = DrawnSource(
        examples=sum(part.examples for part in drawn.values()),
        tokens=sum(part.tokens for part in drawn.values()),
        answer_tokens=sum(part.answer_tokens for part in drawn.values()),
    )
    sources = [
        TrainedSource(
            name=source.name,
            rows=source.rows,
            weight=source.weight,
            examples=drawn[source.name].examples,
            example_share=drawn[source.name].examples / totals.examples,
            token_share=drawn[source.name].tokens / totals.tokens,
            answer_token_share=drawn[source.name].answer_tokens / totals.answer_tokens,
            loss_before=before.get(source.name),
            loss_after=after.get(source.name),
        )
        for source in mixture.plan.sources
    ]
    missing = [
        MissingCorpus(name=corpus.name, folder=str(corpus.folder), advice=corpus.advice)
        for corpus in mixture.missing
    ]
    plan = mixture.plan
    return MixtureRecord(steps=plan.steps, batch_size=0, epochs=plan.epochs, sources=sources, missing=missing)


def print_record(record: MixtureRecord) -> None:
    """Print what was drawn from each source, and its losses."""
    headings = ("source", "examples", "share", "of tokens", "of answer tokens", "loss before", "loss after")
    table = Table(*headings, box=None)
    for source in record.sources:
        shares = (source.example_share, source.token_share, source.answer_token_share)
        losses = (source.loss_before, source.loss_after)
        table.add_row(
            source.name,
            f"{source.examples:,}",
            *(f"{share:.1%}" for share in shares),
            *("-" if loss is None else f"{loss:.3f}" for loss in losses),
        )
    Console(stderr=True).print(table)


def _tokenize(backbone: Backbone, corpus: TrainingCorpus, config: Stage1Config) -> list[TokenizedExample]:
    processes = Processes.join(backbone.model.device)
    tokenizer = CorpusTokenizer(backbone, config.limits, processes, skip_bad=False)
    source = TrainingSource.of_rows(f"held-out {corpus.name}", corpus.conversations, corpus.folder)
    return list(tokenizer.tokenize(source).examples)


def _losses(
    backbone: Backbone, held_out: Mapping[str, Sequence[TokenizedExample]], batch_size: int
) -> dict[str, float]:
    """Return the loss of each source per answer token [nats]."""
    return {
        name: held_out_loss(backbone, examples, batch_size)["held_out_loss"]
        for name, examples in held_out.items()
    }
