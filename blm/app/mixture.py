"""The mixture of Stage I: public corpora, scene questions and replay; their shares, and its length.

With n_i conversations of weight w_i in source i, and a share r of replay, an epoch has
N = sum_i w_i n_i / (1 - r) examples, the share of source i is (1 - r) w_i n_i / sum_j w_j n_j, and
e epochs are ceil(e N / batch size) steps. Weights are thus passes over a source per epoch, as the
lists of RoboBrain (`all`, `first:20%`) and ms-swift (`name#N`) state them, and a missing corpus
does not change how often the others are seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from blm.app.recipe import MixtureSettings, Stage1Settings
from blm.app.stage1 import TrainingCorpus, warn_of_lengths
from blm.backbone import Backbone
from blm.corpora import read_corpus
from blm.corpora.curation.replay import Pictures, build_replay
from blm.corpora.format.messages import Conversation
from blm.corpora.public import PlacedCorpus, require_sound
from blm.training.caches.processes import ProcessGroup
from blm.training.loop.distributed import Processes
from blm.training.run_inputs import run_together
from blm.types import BlmError

SCENES, REPLAY = "scenes", "replay"
HELD_OUT = 64
"""Maximum number of conversations of a source that are held out to measure its loss."""
HELD_OUT_SHARE = 0.05
"""Maximum fraction of a source's conversations that are held out."""
MAX_PICTURES = 20_000
"""Maximum number of pictures that replay asks about."""
SPARE = 8
"""Conversations of a source beyond those that are expected to be drawn: the count of each source
stays within a few examples of its share."""


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One source of a mixture."""

    name: str
    rows: int
    """Conversations that can be drawn."""
    weight: float
    """Passes over them per epoch; 0 for replay, whose share is given."""
    share: float
    """Share of the training examples."""
    examples: float
    """Expected number of training examples over all steps."""


@dataclass(frozen=True, kw_only=True)
class MixturePlan:
    """Shares and length of a training."""

    steps: int
    epochs: float
    """Passes over the mixture in these steps."""
    sources: tuple[PlannedSource, ...]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The sources of a training, and the conversations that are held out to measure their loss."""

    plan: MixturePlan
    corpora: tuple[TrainingCorpus, ...]
    held_out: tuple[TrainingCorpus, ...]
    missing: tuple[PlacedCorpus, ...]
    """Corpora of the recipe that are not there."""


def plan_mixture(
    sizes: Mapping[str, tuple[int, float]], replay: int, settings: Stage1Settings
) -> MixturePlan:
    """Return the plan for sources of these numbers of conversations and weights, and replay rows.

    Raises BlmError if there is nothing but replay.
    """
    mass = {name: rows * weight for name, (rows, weight) in sizes.items()}
    total, share = sum(mass.values()), settings.mixture.replay_share
    if not total:
        raise BlmError(
            "Stage I has nothing to train on: no scene questions, and all public corpora are missing"
        )
    loop = settings.training.loop
    if not loop.steps:
        raise BlmError(
            "the length of a mixture is stage1.epochs, and its maximum training.loop.steps; give both"
        )
    epoch = total / (1 - share)
    wanted = math.ceil(settings.epochs * epoch / loop.batch_size) if settings.epochs else loop.steps
    steps = max(1, min(wanted, loop.steps))
    examples = steps * loop.batch_size
    parts = {name: (1 - share) * part / total for name, part in mass.items()}
    planned = [
        PlannedSource(name=name, rows=rows, weight=weight, share=parts[name], examples=parts[name] * examples)
        for name, (rows, weight) in sizes.items()
    ]
    if share:
        planned.append(
            PlannedSource(name=REPLAY, rows=replay, weight=0.0, share=share, examples=share * examples)
        )
    return MixturePlan(steps=steps, epochs=examples / epoch, sources=tuple(planned))


def name_missing(settings: MixtureSettings) -> None:
    """Print the corpora that are missing: where to get them, and how to place them."""
    for corpus in settings.placed:
        if not corpus.present:
            Console(stderr=True).print(
                f"missing corpus '{corpus.name}' ({corpus.folder}): Stage I runs without it. To train on it, "
                f"{corpus.advice}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )


def read_mixture(
    backbone: Backbone, settings: Stage1Settings, scenes: TrainingCorpus | None, run: Path
) -> Mixture:
    """Read the public corpora, let the base model write replay, and plan the training.

    Only the conversations that the training draws are kept. `scenes` are the curated scene
    questions; None leaves them out. All processes call this, read the same, and write a part of
    replay each. Raises BlmError, in every process, for a corpus that is present but faulty.
    """
    processes = Processes.join(backbone.model.device)

    def read() -> list[TrainingCorpus]:
        found = [replace(scenes, weight=settings.mixture.scenes)] if scenes is not None else []
        for corpus in settings.mixture.placed:
            if corpus.present:
                require_sound(corpus)
                found.append(_with_rows(corpus, read_corpus(corpus.folder)))
        for one in found if processes.first else ():
            warn_of_lengths(backbone, one, settings.training)
        return found

    whole = run_together(processes, read)
    replay = _replay(backbone, settings, whole, run, processes)
    split = run_together(processes, lambda: [_split(one, run) for one in [*whole, *replay]])
    sizes = {one.name: (len(one.conversations), one.weight) for one, _ in split if one.name != REPLAY}
    count = len(split[-1][0].conversations) if replay else 0
    plan = plan_mixture(sizes, count, settings)
    seed = settings.training.loop.seed
    corpora = [
        replace(
            one, weight=source.share, conversations=_choose(one.conversations, source.examples, seed, number)
        )
        for number, ((one, _), source) in enumerate(zip(split, plan.sources, strict=True))
    ]
    return Mixture(
        plan=plan,
        corpora=tuple(corpora),
        held_out=tuple(held for _, held in split if held.conversations),
        missing=tuple(corpus for corpus in settings.mixture.placed if not corpus.present),
    )


def _with_rows(corpus: PlacedCorpus, rows: Sequence[Conversation]) -> TrainingCorpus:
    """Return a placed corpus with its conversations."""
    return TrainingCorpus(name=corpus.name, folder=corpus.folder, conversations=rows, weight=corpus.weight)


def print_plan(mixture: Mixture, batch_size: int) -> None:
    """Print the sources, the number of steps that follows from them, and missing corpora."""
    plan = mixture.plan
    table = Table("source", "rows", "weight", "share", "examples", box=None, title_justify="left")
    for source in plan.sources:
        weight = f"{source.weight:g}" if source.weight else "-"
        table.add_row(
            source.name, f"{source.rows:,}", weight, f"{source.share:.1%}", f"{source.examples:,.0f}"
        )
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"{plan.steps:,} steps of {batch_size} examples: {plan.epochs:.3g} epochs of the mixture",
        highlight=False,
    )
    if mixture.missing:
        names = ", ".join(corpus.name for corpus in mixture.missing)
        console.print(f"missing and left out: {names}", highlight=False, soft_wrap=True)


def _split(corpus: TrainingCorpus, run: Path) -> tuple[TrainingCorpus, TrainingCorpus]:
    """Return a corpus, and what is held out to measure its loss; the run holds out scenes already."""
    return (corpus, _held_out_scenes(run)) if corpus.name == SCENES else _hold_out(corpus)


def _held_out_scenes(run: Path) -> TrainingCorpus:
    """Return some of the run's held-out scene questions."""
    folder = run / "corpora/held_out"
    rows = read_corpus(folder)
    step = max(1, len(rows) // HELD_OUT)
    return TrainingCorpus(name=SCENES, folder=folder, conversations=rows[::step][:HELD_OUT])


def _hold_out(corpus: TrainingCorpus) -> tuple[TrainingCorpus, TrainingCorpus]:
    """Split off a few whole groups, which depend on the names of the groups only."""
    rows = corpus.conversations
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    room, held = min(HELD_OUT, int(HELD_OUT_SHARE * len(rows))), set[str]()
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest()):
        if sizes[group] <= room:
            held.add(group)
            room -= sizes[group]
        if not room:
            break
    kept, out = ([row for row in rows if (row.group in held) == side] for side in (False, True))
    return replace(corpus, conversations=kept), replace(corpus, conversations=out)


def _choose(rows: Sequence[Conversation], examples: float, seed: int, number: int) -> Sequence[Conversation]:
    """Return as many conversations as are drawn, at random; all of them if they are drawn anyway."""
    count = math.ceil(examples) + SPARE
    if count >= len(rows):
        return rows
    chosen = np.random.default_rng((seed, number)).permutation(len(rows))[:count]
    return [rows[int(place)] for place in np.sort(chosen)]


def _replay(
    backbone: Backbone,
    settings: Stage1Settings,
    corpora: Sequence[TrainingCorpus],
    run: Path,
    processes: Processes,
) -> list[TrainingCorpus]:
    """Return the conversations that the base model writes, once per run folder; [] without replay.

    It is also asked about pictures: those of the general corpus, or else those of the first source.
    """
    mixture = settings.mixture
    if not mixture.replay_share:
        return []
    folder = run / "replay"
    if not processes.gather_objects(folder.exists())[0]:
        seen = next((one for one in corpora if one.name == "general"), corpora[0]) if corpora else None
        seed = settings.training.loop.seed
        dropped = build_replay(
            backbone,
            folder,
            mixture.replay_rows,
            seed=seed,
            max_tokens=mixture.replay_tokens,
            pictures=_pictures(seen, seed) if seen is not None else None,
            group=ProcessGroup(processes),
        )
        Console(stderr=True, quiet=not processes.first).print(
            f"replay: {mixture.replay_rows:,} conversations by '{settings.backbone}'; {dropped:,} answers "
            f"were longer than {mixture.replay_tokens} tokens and dropped",
            highlight=False,
            soft_wrap=True,
        )
    rows = run_together(processes, lambda: read_corpus(folder))
    return [TrainingCorpus(name=REPLAY, folder=folder, conversations=rows)]


def _pictures(corpus: TrainingCorpus, seed: int) -> Pictures:
    names = sorted({str(image.path) for row in corpus.conversations for image in row.media})
    chosen = np.random.default_rng((seed, 2)).permutation(len(names))[:MAX_PICTURES]
    return Pictures(references=[names[int(place)] for place in chosen], root=corpus.folder)
