"""Commands of corpora: build one from our scenes, convert a published one, curate, validate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console
from rich.table import Table

from blm.types import BlmError, lookup, require_numbers

if TYPE_CHECKING:
    from blm.corpora import CurationReport, EvaluationSet, Source
    from blm.corpora.curation.steps import Length
    from blm.corpora.format.validate import Validation

console = Console()
SHOWN = 3
"""Places printed for each reason."""


def build(command: str, arguments: list[str]) -> None:
    """`blm corpus build OUT`: questions about our own scenes and episodes."""
    from blm.corpora import SceneCorpusConfig, build_scene_corpus

    out = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--workers", type=int, default=2)
    own, rest = first.parse_known_args(arguments[0 if out is None else 1 :])
    usage = f"blm {command} OUT [--workers N]"
    config = tyro.cli(SceneCorpusConfig, args=rest, prog=usage, description=build.__doc__)
    if out is None:
        raise BlmError("name the folder to write first: blm corpus build OUT [flags]; --help shows the flags")
    count = build_scene_corpus(config, out, workers=own.workers)
    console.print(f"{count} conversations: {out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a published corpus; media are linked or copied into OUT. Without names: what there is."""

    name: tyro.conf.Positional[str] = ""
    """Converter."""
    source: tyro.conf.Positional[Path | None] = None
    """What it reads: a file or folder; for easy_vqa the name of a split."""
    out: tyro.conf.Positional[Path | None] = None
    """Corpus folder to write; must not exist."""
    frames: int = 8
    """Frames that a video becomes."""
    media: Path | None = None
    """Folder that media references are relative to; default: the source folder."""
    source_name: str = ""
    """Name of the source in the rows; default: the converter's."""
    untagged: Literal["refuse", "first"] = "refuse"
    """Rows with media but no tag: refuse them, or show the media before the first question."""
    cameras: tuple[str, ...] = ()
    """Of a robot dataset; default: its first."""
    skip_bad: bool = False
    """Leave out rows that cannot be converted, and print which."""


def convert(command: str, arguments: list[str]) -> None:
    """`blm corpus convert NAME SOURCE OUT`: a published corpus in the messages format."""
    from blm.corpora import CONVERTERS, ConverterConfig
    from blm.corpora import convert as run
    from blm.corpora.format.faults import summarise

    chosen = tyro.cli(Convert, args=arguments, prog=f"blm {command}")
    if not chosen.name:
        table = Table(box=None)
        for heading in ("name", "reads", "from"):
            table.add_column(heading, overflow="fold")
        for name, converter in CONVERTERS.items():
            table.add_row(name, converter.reads, converter.origin)
        console.print(table)
        return
    if chosen.source is None or chosen.out is None:
        raise BlmError(f"name the source and the folder to write: blm {command} NAME SOURCE OUT")
    settings = ConverterConfig(
        frames=chosen.frames,
        media=chosen.media,
        source=chosen.source_name,
        untagged=chosen.untagged,
        cameras=chosen.cameras,
    )
    done = run(chosen.name, chosen.source, chosen.out, settings, skip_bad=chosen.skip_bad)
    console.print(f"{done.written} of {done.read} rows: {chosen.out}", soft_wrap=True)
    if done.skipped:
        console.print(f"skipped:\n{summarise(done.skipped)}", highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Curate:
    """Curate corpora together; write OUT/<source>, one corpus folder each, and OUT/curation.json."""

    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist."""
    sources: tyro.conf.Positional[tuple[str, ...]]
    """Corpus folders, each as FOLDER or FOLDER=WEIGHT; a source is named after its folder."""
    evaluation: tuple[Path, ...] = ()
    """Corpus folders that are evaluated on: training may not share a group, or a question about a picture."""
    benchmarks: tuple[str, ...] = ()
    """Published benchmarks that are evaluated on, each as NAME=FOLDER of its data."""
    max_length: int | None = None
    """Longest conversation [characters; tokens of the backbone, if one is named]."""
    backbone: str | None = None
    """Name or folder of the model whose tokens are counted."""
    max_pixels: int | None = None
    """Largest picture [px]."""
    max_pictures: int | None = None
    """Most pictures in a conversation."""
    hash_distance: int = 6
    """Bits of 256 in which equal pictures may differ."""
    max_per_kind: int | None = None
    """Most questions of one kind."""
    balance: Literal["none", "kind", "question"] = "kind"
    """Keep as many yes as no: for each question kind answered so, or for each wording of a question."""
    general: tuple[str, ...] = ()
    """Names of the sources that are general replay."""
    replay: float = 0.0
    """Their share of what is drawn in training."""
    seed: int = 0
    """Of the choice of what to drop for balance."""


def curate(command: str, arguments: list[str]) -> None:
    """`blm corpus curate OUT SOURCE..`: the pipeline, its report, and the curated corpora."""
    from blm.corpora import CurationConfig, curate_sources, write_curated

    chosen = tyro.cli(Curate, args=arguments, prog=f"blm {command}")
    if chosen.out.exists():
        raise BlmError(f"folder '{chosen.out}' exists; move it away or name another one")
    same = ("max_length", "max_pixels", "max_pictures", "hash_distance", "max_per_kind", "balance")
    config = CurationConfig(**{name: getattr(chosen, name) for name in (*same, "general", "replay", "seed")})
    evaluation = [_corpus_set(folder) for folder in chosen.evaluation]
    evaluation += [_benchmark_set(text) for text in chosen.benchmarks]
    sources = [_source(text) for text in chosen.sources]
    length = _token_length(chosen.backbone) if chosen.backbone else None
    entries, report = curate_sources(sources, config, evaluation=evaluation, length=length)
    print_curation(report)
    write_curated(entries, report, chosen.out)
    console.print(f"{report.kept} conversations: {chosen.out}", soft_wrap=True)


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
        raise BlmError(f"weight '{weight}' of source '{folder}' is no number; give FOLDER=WEIGHT") from None


def print_curation(report: CurationReport) -> None:
    """Print what every step dropped and why, how yes and no stand, and the shares of the sources."""
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
            table.add_row(kind, *(share_of_yes(*counts[when]) for when in ("before", "after")))
        console.print(table)
    table = Table(
        "source", "kept", "turns", "weight", "share", box=None, title="Sources", title_justify="left"
    )
    for name, part in report.sources.items():
        kept = f"{part.kept} of {part.read}"
        table.add_row(name, kept, str(part.turns), f"{part.weight:g}", f"{part.share:.1%}")
    console.print(table)


def share_of_yes(yes: int, no: int) -> str:
    return f"{yes / (yes + no):.0%} of {yes + no}" if yes + no else "-"


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Check a whole corpus before training; exit status 1 if a row is wrong."""

    folder: tyro.conf.Positional[Path]
    """Corpus folder."""
    backbone: str | None = None
    """Name or folder of the model to be trained: checks tokens, placeholders and answers too."""
    max_tokens: int | None = None
    """Longest conversation, in tokens of the backbone."""
    shown: int = SHOWN
    """Places printed for each reason; 0: all."""

    def __post_init__(self) -> None:
        require_numbers(self, max_tokens=(1, 10**9), shown=(0, 10**9))


def validate(command: str, arguments: list[str]) -> None:
    """`blm corpus validate FOLDER`: counts per reason, with file and line."""
    from blm.corpora import validate_corpus

    chosen = tyro.cli(Validate, args=arguments, prog=f"blm {command}")
    backbone = None
    if chosen.backbone is not None:
        from blm.backbone import Backbone

        backbone = Backbone.load(chosen.backbone)
    result = validate_corpus(chosen.folder, backbone=backbone, max_tokens=chosen.max_tokens)
    print_validation(result, chosen.shown)
    raise SystemExit(not result.clean)


def print_validation(result: Validation, shown: int = SHOWN) -> None:
    """Print how many rows are wrong, for each reason, and where."""
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


# --- replay and report --------------------------------------------------------------------------------------


def replay(command: str, arguments: list[str]) -> None:
    """`blm corpus replay OUT`: general dialogues, answered by the base model itself."""

    def run(
        out: tyro.conf.Positional[Path],
        backbone: str = "smol",
        count: int = 200,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Write a replay corpus: what the base model says, so that training on it changes little.

        Args:
            out: Corpus folder to write; the same command again continues what was interrupted.
            backbone: The base: a name of BACKBONES, or a folder.
            count: Conversations.
            seed: Of the prompts and of the sampling.
            device: Torch device.
        """
        from blm.app.model import check_device
        from blm.backbone import Backbone
        from blm.corpora.curation.replay import build_replay

        check_device(device)
        unused = build_replay(Backbone.load(backbone, device=device), out, count, seed=seed)
        console.print(f"{count} conversations ({unused} answers were not whole): {out}", soft_wrap=True)

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def report(command: str, arguments: list[str]) -> None:
    """`blm corpus report TRAIN HELD_OUT`: every kind of question, and how much of it needs no picture."""

    def run(train: tyro.conf.Positional[Path], held_out: tyro.conf.Positional[Path | None] = None) -> None:
        """Print every kind of question; "blind" is what the question's text alone gets right.

        Args:
            train: Corpus folder.
            held_out: Corpus folder that is answered from the texts of the first.
        """
        from blm.corpora import read_corpus
        from blm.corpora.scenes.report import describe

        table = Table(box=None)
        for heading in ("kind", "questions", "texts", "answers", "blind", "commonest"):
            table.add_column(heading, justify="left" if heading in ("kind", "commonest") else "right")
        for kind in describe(read_corpus(train), read_corpus(held_out) if held_out else ()):
            common = ", ".join(f"{answer} {number}" for answer, number in [*kind.answers.items()][:SHOWN])
            blind = "-" if kind.blind is None else f"{kind.blind:.0%}"
            numbers = (kind.questions, kind.texts, len(kind.answers))
            table.add_row(kind.kind, *map(str, numbers), blind, common[:48])
        Console(width=max(console.width, 120)).print(table)

    tyro.cli(run, args=arguments, prog=f"blm {command}")
