"""Commands for corpora: build, convert, curate, validate, replay, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import tyro
from rich.console import Console
from rich.table import Table

from blm.cli.command import CliCommand, OutFolder, split_flags
from blm.corpora import SceneCorpusConfig
from blm.types import BlmError, lookup, require_numbers

if TYPE_CHECKING:
    from blm.corpora import CurationReport, EvaluationSet, Source
    from blm.corpora.curation.steps import Length
    from blm.corpora.format.validate import Validation

console = Console()
SHOWN = 3
"""Default number of rows printed for each fault."""


@dataclass(frozen=True, kw_only=True)
class BuildFlags:
    """Flags of `blm corpus build` that are not fields of the config. They are parsed first."""

    workers: int = 2


@dataclass(frozen=True, kw_only=True)
class BuildCorpus(CliCommand):
    """Generate questions about simulated scenes and recorded episodes into the corpus folder OUT.

    Run the same command again to resume an interrupted build.

    The flag --workers N sets the number of worker processes (default 2; 0: only the main process).

    Example: blm corpus build OUT --robots panda --tasks push_cube --cameras base --image-size 112
    --scenes 100 --first-seed 10000
    """

    out: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT", help_behavior_hint="(required)")
    ] = None
    """Corpus folder to write; it must not exist."""
    config: Annotated[SceneCorpusConfig, tyro.conf.arg(name="")]
    flags: tyro.conf.Suppress[BuildFlags] = field(default_factory=BuildFlags)

    @classmethod
    def parse(cls, name: str, arguments: Sequence[str]) -> Self:
        flags, rest = split_flags(BuildFlags, name, arguments)
        return replace(super().parse(name, rest), flags=flags)

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora import build_scene_corpus

        if self.out is None:
            raise BlmError("name the folder to write: blm corpus build OUT [flags]; --help shows the flags")
        count = build_scene_corpus(self.config, self.out, workers=self.flags.workers)
        console.print(f"{count} conversations: {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class CurateCorpora(CliCommand):
    """Curate several corpora together.

    Writes one corpus folder OUT/<source> per source, and OUT/curation.json.

    Example: blm corpus curate OUT corpora/scenes corpora/llava=0.5 --evaluation corpora/held_out
    """

    out: OutFolder
    """Folder to write; it must not exist."""
    sources: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="SOURCE [SOURCE ...]", help_behavior_hint="(required)"),
    ]
    """Corpus folders, each as FOLDER or FOLDER=WEIGHT. A source is named after its folder."""
    evaluation: tuple[Path, ...] = ()
    """Corpus folders for evaluation.
    Training conversations that share a group or a question with them are dropped."""
    benchmarks: tuple[str, ...] = ()
    """Published benchmarks for evaluation, each as NAME=FOLDER of its data."""
    max_length: int | None = None
    """Maximum length of a conversation, in characters or, with --backbone, in tokens."""
    backbone: str | None = None
    """Name or folder of the model whose tokenizer measures --max-length."""
    max_pixels: int | None = None
    """Maximum number of pixels of an image."""
    max_pictures: int | None = None
    """Maximum number of images in a conversation."""
    hash_distance: int = 6
    """Maximum distance between the perceptual hashes of duplicate images [of 256 bits]."""
    max_per_kind: int | None = None
    """Maximum number of questions of one kind."""
    balance: Literal["none", "kind", "question"] = "kind"
    """Keep equal numbers of yes and no answers, per question kind or per question text."""
    general: tuple[str, ...] = ()
    """Names of the sources with general dialogues, which training replays to limit forgetting."""
    replay: float = 0.0
    """Fraction of the training examples that come from the --general sources, in [0, 1)."""
    seed: int = 0
    """Seed for the choice of the conversations that balancing drops."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora import CurationConfig, curate_sources, write_curated

        if self.out.exists():
            raise BlmError(f"folder '{self.out}' exists; move it away or name another one")
        config = CurationConfig(
            max_length=self.max_length,
            max_pixels=self.max_pixels,
            max_pictures=self.max_pictures,
            hash_distance=self.hash_distance,
            max_per_kind=self.max_per_kind,
            balance=self.balance,
            general=self.general,
            replay=self.replay,
            seed=self.seed,
        )
        evaluation = [_corpus_set(folder) for folder in self.evaluation]
        evaluation += [_benchmark_set(text) for text in self.benchmarks]
        sources = [_source(text) for text in self.sources]
        length = _token_length(self.backbone) if self.backbone else None
        entries, report = curate_sources(sources, config, evaluation=evaluation, length=length)
        print_curation(report)
        write_curated(entries, report, self.out)
        console.print(f"{report.kept} conversations: {self.out}", soft_wrap=True)


def _token_length(backbone: str) -> Length:
    from blm.backbone import Backbone
    from blm.corpora.format.validate import count_tokens

    return partial(count_tokens, backbone=Backbone.load(backbone))


def _corpus_set(folder: Path) -> EvaluationSet:
    from blm.corpora import EvaluationSet, read_corpus

    questions = [question for row in read_corpus(folder) for question in row.questions()]
    return EvaluationSet(name=folder.name, questions=questions, root=folder)


def _benchmark_set(text: str) -> EvaluationSet:
    from blm.corpora import EvaluationSet
    from blm.evaluation.digital import BENCHMARKS

    name, sign, folder = text.partition("=")
    benchmark = lookup("benchmark", name, BENCHMARKS)
    if not sign:
        raise BlmError(f"benchmark '{name}' needs the folder of its data: {name}=FOLDER")
    return EvaluationSet(name=name, questions=benchmark.load(Path(folder)), root=Path(folder))


def _source(text: str) -> Source:
    from blm.corpora import Source

    folder, sign, weight = text.rpartition("=")
    if not sign:
        return Source(name=Path(text).name, folder=Path(text))
    try:
        return Source(name=Path(folder).name, folder=Path(folder), weight=float(weight))
    except ValueError:
        raise BlmError(
            f"weight '{weight}' of source '{folder}' is not a number; give FOLDER=WEIGHT"
        ) from None


def print_curation(report: CurationReport) -> None:
    """Print the conversations that each step dropped, the yes shares, and the sources."""
    table = Table("step", "rows", "turns", "dropped for", box=None, title="Curation", title_justify="left")
    for step in report.steps:
        rows = f"{step.rows_in} -> {step.rows_out}"
        turns = f"{step.turns_in} -> {step.turns_out}"
        table.add_row(step.name, rows, turns, "" if step.reasons else "-")
        for reason, dropped in step.reasons.items():
            table.add_row("", "", str(dropped.count), f"{reason}: {dropped.examples[0]}")
    console.print(table)
    if report.yes_no:
        table = Table("kind", "before", "after", box=None, title="Share of yes", title_justify="left")
        for kind, counts in report.yes_no.items():
            table.add_row(kind, *(_format_yes_share(*counts[when]) for when in ("before", "after")))
        console.print(table)
    table = Table(
        "source", "kept", "turns", "weight", "share", box=None, title="Sources", title_justify="left"
    )
    for name, part in report.sources.items():
        kept = f"{part.kept} of {part.read}"
        table.add_row(name, kept, str(part.turns), f"{part.weight:g}", f"{part.share:.1%}")
    console.print(table)


def _format_yes_share(yes: int, no: int) -> str:
    """Return "60% of 10" for counts of yes and no."""
    return f"{yes / (yes + no):.0%} of {yes + no}" if yes + no else "-"


@dataclass(frozen=True, kw_only=True)
class ValidateCorpus(CliCommand):
    """Check every conversation of a corpus before training.

    The exit status is 1 if a conversation has a fault.

    Example: blm corpus validate corpora/scenes --backbone nano
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Corpus folder."""
    backbone: str | None = None
    """Name or folder of the model to train; adds checks of tokens, placeholders and answers."""
    max_tokens: int | None = None
    """Maximum length of a conversation [tokens of the backbone]."""
    shown: int = SHOWN
    """Number of rows to print for each fault; 0 prints all."""

    def __post_init__(self) -> None:
        require_numbers(self, max_tokens=(1, 10**9), shown=(0, 10**9))

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora import validate_corpus

        backbone = None
        if self.backbone is not None:
            from blm.backbone import Backbone

            backbone = Backbone.load(self.backbone)
        result = validate_corpus(self.folder, backbone=backbone, max_tokens=self.max_tokens)
        print_validation(result, self.shown)
        raise SystemExit(not result.clean)


def print_validation(result: Validation, shown: int = SHOWN) -> None:
    """Print the number of faulty rows for each reason, and at most `shown` of them (0: all)."""
    good = result.rows - len(result.faults)
    console.print(f"{result.folder}: {good} of {result.rows} rows are good", soft_wrap=True)
    table = Table("rows", "reason", "where", box=None)
    table.columns[2].overflow = "fold"
    for reason, count in result.counts.items():
        places = [f"{f.where}  {f.detail}" for f in result.faults if f.reason == reason]
        table.add_row(str(count), reason, "\n".join(places[: shown or None]))
        if shown and count > shown:
            table.add_row("", "", f".. and {count - shown} more")
    if result.faults:
        console.print(table)


# --- replay and report ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReplayCorpus(CliCommand):
    """Write a replay corpus: general dialogues that the base model answers itself.

    Replayed in Stage I, they limit forgetting.

    Example: blm corpus replay OUT --backbone smol --count 1000
    """

    out: OutFolder
    """Corpus folder to write. Run the same command again to resume."""
    backbone: str = "smol"
    """Name or folder of the base model."""
    count: int = 200
    """Number of conversations to generate."""
    seed: int = 0
    """Seed for the choice of prompts and for sampling."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.model import check_device
        from blm.backbone import Backbone
        from blm.corpora.curation.replay import build_replay

        check_device(self.device)
        backbone = Backbone.load(self.backbone, device=self.device)
        unfinished = build_replay(backbone, self.out, self.count, seed=self.seed)
        dropped = f"{unfinished} incomplete answers dropped"
        console.print(f"{self.count} conversations ({dropped}): {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class ReportCorpus(CliCommand):
    """Count the questions of every kind.

    The column "blind" is the accuracy of answers that are predicted from the question's text alone.

    Example: blm corpus report corpora/train corpora/held_out
    """

    train: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TRAIN")]
    """Corpus folder to count."""
    held_out: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(metavar="[HELD_OUT]", help_behavior_hint="(optional)"),
    ] = None
    """Corpus folder whose questions are answered with the most frequent answers of TRAIN."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.corpora import read_corpus
        from blm.corpora.scenes.report import describe

        table = Table(box=None)
        for heading in ("kind", "questions", "texts", "answers", "blind", "commonest"):
            table.add_column(heading, justify="left" if heading in ("kind", "commonest") else "right")
        held_out = read_corpus(self.held_out) if self.held_out else ()
        for kind in describe(read_corpus(self.train), held_out):
            common = ", ".join(f"{answer} {number}" for answer, number in [*kind.answers.items()][:SHOWN])
            blind = "-" if kind.blind is None else f"{kind.blind:.0%}"
            numbers = (kind.questions, kind.texts, len(kind.answers))
            table.add_row(kind.kind, *map(str, numbers), blind, common[:48])
        Console(width=max(console.width, 120)).print(table)
