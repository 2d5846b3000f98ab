"""Curation as a fixed pipeline of named steps, with a report that accounts for every row.

Steps: schema, media, limits, duplicates, leaks, kinds, answers; then the shares of the sources.

The first five drop whole conversations. The last two drop single turns (a question with its answer;
see blm.corpora.curation.balance), and a conversation that loses its last turn is dropped. Nothing
else is changed, and curating the result again changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from blm.corpora.curation.balance import Balance, TurnIndex, normalise, over_cap, unbalanced
from blm.corpora.curation.report import (
    CurationReport,
    DropReasons,
    SourceReport,
    StepReport,
    answer_counts,
    count_turns,
    yes_no_shares,
)
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation, scan_corpus
from blm.corpora.format.perceptual_hash import SIDE, MediaHasher, NearDuplicateIndex, PictureHash
from blm.corpora.format.writing import write_corpus
from blm.io import new_folder, write_json
from blm.types import BlmError, Question, require_numbers

Length = Callable[[Conversation, Path], int]
"""Returns the length of a conversation whose media are in a folder, e.g. in tokens of a backbone."""


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Settings of a curation. None means no limit."""

    max_length: int | None = None
    """Maximum length of a conversation, in characters or in units of `length` (see
    `curate_sources`)."""
    max_pixels: int | None = None
    """Maximum number of pixels of an image."""
    max_pictures: int | None = None
    """Maximum number of images in a conversation."""
    hash_distance: int = 6
    """Maximum Hamming distance of the 256-bit perceptual hashes of near-duplicates.
    Near-duplicates must also have similar mean colours. Measured: JPEG of quality 80 changes up to
    4 bits, and scaling by 1.5 up to 6. None of 25,000 pairs of our different scenes and none of
    125,000 pairs of easy-VQA images is within this distance."""
    max_per_kind: int | None = None
    """Maximum number of turns of one question kind."""
    balance: Balance = "kind"
    """Keep as many yes as no answers, so that the text alone does not predict the answer.
    `kind` balances each yes/no kind (`<kind>_positive` and `<kind>_negative` count as one), and
    `question` each question text."""
    replay: float = 0.0
    """Fraction of general replay in the training mixture, in [0, 1)."""
    general: tuple[str, ...] = ()
    """Names of the sources that are general replay."""
    seed: int = 0
    """Seed for the choice of the turns that balancing drops."""

    def __post_init__(self) -> None:
        most = dict.fromkeys(("max_length", "max_pixels", "max_pictures", "max_per_kind"), (1, 10**15))
        require_numbers(self, **most, hash_distance=(0, SIDE - 1), seed=(0, 2**32 - 1))
        if not 0 <= self.replay < 1 or (self.replay > 0) != bool(self.general):
            raise BlmError(
                f"replay {self.replay} is a share in [0, 1) of the general sources {self.general}: give both"
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus folder and its weight."""

    name: str
    folder: Path
    weight: float = 1.0
    """Sampling weight of its turns, relative to a source of weight 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise BlmError(f"the weight of source '{self.folder}' is {self.weight}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SourcedConversation:
    """A conversation with its source."""

    conversation: Conversation
    source: Source
    where: str
    """file:line."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Evaluation questions, which must not leak into training."""

    name: str
    questions: Sequence[Question]
    root: Path | None = None
    """Folder of their images; if None, only their groups are compared."""


@dataclass
class _CurationState:
    """The remaining conversations, and the counts so far."""

    entries: list[SourcedConversation]
    steps: list[StepReport] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> list[Conversation]:
        return [entry.conversation for entry in self.entries]

    def filter(self, name: str, fault: Callable[[SourcedConversation], str | None]) -> None:
        """Drop entries for which `fault` returns "reason | detail" or raises RowError."""
        kept, reasons = [], DropReasons()
        for entry in track(self.entries, f"curating: {name}", console=Console(stderr=True)):
            try:
                reason = fault(entry)
            except RowError as error:
                reason = f"{error.reason} | {error.detail}"
            if reason:
                reasons.add(reason, entry.where)
            else:
                kept.append(entry)
        self._step(name, kept, reasons, reasons.rows)

    def drop_turns(self, name: str, reason: str, dropped: set[TurnIndex]) -> None:
        """Drop single turns, and conversations that lose all turns that are learnt.

        Later turns of a dialogue may refer to a dropped one: there it stays, as context without loss.
        """
        kept, reasons, emptied = [], DropReasons(), Counter[str]()
        for number, entry in enumerate(self.entries):
            row = entry.conversation
            turns = [turn for turn, learnt in enumerate(row.learnt) if learnt]
            left = [turn for turn in turns if (number, turn) not in dropped]
            for turn in turns:
                if turn not in left:
                    reasons.add(reason, f"{entry.where} turn {turn}")
            if len(left) == len(turns):
                kept.append(entry)
            elif left:
                gone = [turn for turn in turns if turn not in left]
                rest = row.select(left) if row.independent else row.without_loss(gone)
                kept.append(replace(entry, conversation=rest))
            else:
                emptied[reason] += 1
        self._step(name, kept, reasons, emptied)

    def _step(
        self, name: str, kept: list[SourcedConversation], reasons: DropReasons, rows: Counter[str]
    ) -> None:
        step = StepReport(
            name=name,
            rows_in=len(self.entries),
            rows_out=len(kept),
            turns_in=count_turns(self.rows),
            turns_out=count_turns(entry.conversation for entry in kept),
            reasons=reasons.report(),
        )
        self.steps.append(step)
        self.dropped += rows
        self.entries = kept


# --- the pipeline -------------------------------------------------------------------------------------------


def curate(
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    evaluation_groups: Iterable[str] = (),
    config: CurationConfig | None = None,
) -> tuple[list[Conversation], CurationReport]:
    """Curate one corpus in memory; by default without balancing.

    `evaluation_groups` are the groups of all evaluation sets: training on one of them would be a
    leak. Returns the kept conversations in their order, and the report.
    """
    source = Source(name=folder.name, folder=folder)
    entries = [
        SourcedConversation(conversation=row, source=source, where=f"{folder / CORPUS_FILE}: {row.id}")
        for row in conversations
    ]
    run = _CurationState(entries)
    kept, report = _pipeline(run, config or CurationConfig(balance="none"), (), set(evaluation_groups), None)
    return [entry.conversation for entry in kept], report


def curate_sources(
    sources: Sequence[Source],
    config: CurationConfig,
    *,
    evaluation: Sequence[EvaluationSet] = (),
    length: Length | None = None,
) -> tuple[list[SourcedConversation], CurationReport]:
    """Curate several corpora together.

    Duplicates are found across all corpora, and kinds are balanced over all of them.

    `length` measures a conversation for `max_length`, e.g. in tokens of a backbone; by default, in
    characters. Raises BlmError for sources with equal names, unknown general sources, and a folder
    that is not a corpus.
    """
    names = [source.name for source in sources]
    if len(set(names)) != len(names) or not set(config.general) <= set(names):
        raise BlmError(
            f"sources {names} need different names, and --general {config.general} must name some of them"
        )
    entries, reasons = [], DropReasons()
    for source in sources:
        for number, row in scan_corpus(source.folder):
            where = f"{source.folder / CORPUS_FILE}:{number}"
            if isinstance(row, RowError):
                reasons.add(f"{row.reason} | {row.detail}", where)
            else:
                entries.append(SourcedConversation(conversation=row, source=source, where=where))
    run = _CurationState(entries)
    step = StepReport(
        name="schema",
        rows_in=len(entries) + reasons.rows.total(),
        rows_out=len(entries),
        turns_in=count_turns(run.rows),
        turns_out=count_turns(run.rows),
        reasons=reasons.report(),
    )
    run.steps.append(step)
    run.dropped += reasons.rows
    groups = {question.group for part in evaluation for question in part.questions}
    return _pipeline(run, config, evaluation, groups, length)


def write_curated(entries: Sequence[SourcedConversation], report: CurationReport, out: Path) -> None:
    """Write one corpus folder per source, OUT/<source>, and OUT/curation.json, atomically.

    Media are hard-linked, or copied to another disk. Raises BlmError if `out` exists.
    """
    with new_folder(out) as work:
        for source in {entry.source.name: entry.source for entry in entries}.values():
            rows = (entry.conversation for entry in entries if entry.source.name == source.name)
            write_corpus(work / source.name, rows, media=source.folder)
        write_json(work / "curation.json", asdict(report))


def _pipeline(
    run: _CurationState,
    config: CurationConfig,
    evaluation: Sequence[EvaluationSet],
    groups: set[str],
    length: Length | None,
) -> tuple[list[SourcedConversation], CurationReport]:
    hashers: dict[Path, MediaHasher] = {}

    def hashes(entry: SourcedConversation) -> tuple[PictureHash, ...]:
        folder = entry.source.folder
        return hashers.setdefault(folder, MediaHasher(folder)).hashes(entry.conversation.media)

    def opened(entry: SourcedConversation) -> None:
        hashes(entry)

    read = run.entries
    run.filter("media", opened)
    run.filter("limits", lambda entry: _limit_reason(entry, config, hashes(entry), length))
    seen: NearDuplicateIndex[str] = NearDuplicateIndex(config.hash_distance)
    run.filter("duplicates", lambda entry: _duplicate_reason(entry, hashes(entry), seen))
    asked = _leak_index(evaluation, config.hash_distance)
    run.filter("leaks", lambda entry: _leak_reason(entry, hashes(entry), asked, groups))
    surplus = over_cap(run.rows, config.max_per_kind, config.seed)
    run.drop_turns("kinds", f"more than {config.max_per_kind} of its kind", surplus)
    surplus = unbalanced(run.rows, config.balance, config.seed)
    run.drop_turns("answers", "surplus of its answer", surplus)
    report = CurationReport(
        settings={**asdict(config), "evaluation": [part.name for part in evaluation]},
        kept=len(run.entries),
        dropped=dict(run.dropped),
        steps=tuple(run.steps),
        sources=_shares(read, run.entries, config),
        before=answer_counts([entry.conversation for entry in read]),
        answers=answer_counts(run.rows),
        yes_no=yes_no_shares([entry.conversation for entry in read], run.rows),
    )
    return run.entries, report


def _limit_reason(
    entry: SourcedConversation,
    config: CurationConfig,
    hashes: Sequence[PictureHash],
    length: Length | None,
) -> str | None:
    row, most = entry.conversation, config.max_length
    if most is not None and (long := (length or characters)(row, entry.source.folder)) > most:
        return f"longer than {most} | {long}"
    if config.max_pixels is not None and any(one.size > config.max_pixels for one in hashes):
        return f"a picture of more than {config.max_pixels} px | {max(one.size for one in hashes)}"
    if config.max_pictures is not None and len(hashes) > config.max_pictures:
        return f"more than {config.max_pictures} pictures | {len(hashes)}"
    return None


def characters(conversation: Conversation, folder: Path) -> int:
    """Return the length of a conversation in characters."""
    return sum(len(message.text) for message in conversation.messages)


def _duplicate_reason(
    entry: SourcedConversation, hashes: tuple[PictureHash, ...], seen: NearDuplicateIndex[str]
) -> str | None:
    key = tuple((message.role, normalise(message.text)) for message in entry.conversation.messages)
    if (first := seen.find(key, hashes)) is not None:
        return f"duplicate | of {first}"
    seen.add(key, hashes, entry.where)
    return None


def _leak_index(evaluation: Sequence[EvaluationSet], distance: int) -> NearDuplicateIndex[str]:
    index: NearDuplicateIndex[str] = NearDuplicateIndex(distance)
    for part in evaluation:
        hasher = MediaHasher(part.root) if part.root is not None else None
        for question in part.questions if hasher is not None else ():
            assert hasher is not None
            images = [image for message in question.messages for image in message.images]
            text = normalise(question.messages[-1].text)
            index.add(text, hasher.hashes(images), f"{part.name}: {question.id}")
    return index


def _leak_reason(
    entry: SourcedConversation,
    hashes: Sequence[PictureHash],
    asked: NearDuplicateIndex[str],
    groups: set[str],
) -> str | None:
    if entry.conversation.group in groups:
        return f"leak: its group is in an evaluation set | {entry.conversation.group}"
    by_picture = {id(image): one for image, one in zip(entry.conversation.media, hashes, strict=True)}
    for _, question, _ in entry.conversation.turns():
        pictures = tuple(by_picture[id(image)] for image in question.images)
        if (found := asked.find(normalise(question.text), pictures)) is not None:
            return f"leak: an evaluation set asks this about this picture | {found}"
    return None


def _shares(
    read: Sequence[SourcedConversation], kept: Sequence[SourcedConversation], config: CurationConfig
) -> dict[str, SourceReport]:
    """Return the reports of the sources.

    Shares are turns times weight, scaled to the share of replay.
    """
    sources = {entry.source.name: entry.source for entry in read}
    rows = {name: [e.conversation for e in kept if e.source.name == name] for name in sources}
    mass = {name: source.weight * count_turns(rows[name]) for name, source in sources.items()}
    general = sum(mass[name] for name in sources if name in config.general)
    special = sum(mass.values()) - general
    parts = (config.replay, 1 - config.replay) if general and special else (1.0, 1.0)
    return {
        name: SourceReport(
            read=sum(entry.source.name == name for entry in read),
            kept=len(rows[name]),
            turns=count_turns(rows[name]),
            weight=source.weight,
            share=parts[0] * mass[name] / (general or 1)
            if name in config.general
            else parts[1] * mass[name] / (special or 1),
        )
        for name, source in sources.items()
    }
