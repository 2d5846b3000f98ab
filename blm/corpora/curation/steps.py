"""Curation as a visible pipeline: named steps in a fixed order, and a report that accounts for every row.

schema -> media -> limits -> duplicates -> leaks -> kinds -> answers, then the shares of the sources.

The first five drop whole conversations. The last two drop single turns (a question with its answer), see
blm.corpora.curation.balance; a conversation that loses its last turn is dropped. Nothing else is changed, and
curating what was kept changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from blm.corpora.curation.balance import Balance, Turn, normalise, over_cap, unbalanced
from blm.corpora.curation.report import (
    CurationReport,
    Reasons,
    SourceReport,
    StepReport,
    count_turns,
    spread_of,
    yes_no_shares,
)
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation, scan_corpus, write_corpus
from blm.corpora.format.pictures import SIDE, Gallery, Look, NearIndex
from blm.io import new_folder, write_json
from blm.types import BlmError, Question, require_numbers

Length = Callable[[Conversation, Path], int]
"""Length of a conversation whose media are in a folder: tokens of a backbone, for example."""


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """What is kept. Numbers of None mean no limit."""

    max_length: int | None = None
    """Longest conversation, in characters or in what `length` counts (see `curate_sources`)."""
    max_pixels: int | None = None
    """Largest picture [px]."""
    max_pictures: int | None = None
    """Most pictures in a conversation."""
    hash_distance: int = 6
    """Pictures whose 256-bit difference hashes differ in at most so many bits, and whose colours are the
    same, count as equal. Measured: JPEG of quality 80 moves up to 4 bits, scaling by 1.5 up to 6; none of
    25,000 pairs of different scenes of ours, and none of 125,000 of easy-VQA, is that near."""
    max_per_kind: int | None = None
    """Most turns of one question kind."""
    balance: Balance = "kind"
    """Keep as many yes as no, over each question kind that is answered by them (`<stem>_positive` and
    `<stem>_negative` are one), or over each wording of a question, so that the words alone tell nothing."""
    replay: float = 0.0
    """Share of general replay in what is drawn in training."""
    general: tuple[str, ...] = ()
    """Names of the sources that are general replay."""
    seed: int = 0

    def __post_init__(self) -> None:
        most = dict.fromkeys(("max_length", "max_pixels", "max_pictures", "max_per_kind"), (1, 10**15))
        require_numbers(self, **most, hash_distance=(0, SIDE - 1), seed=(0, 2**32 - 1))
        if not 0 <= self.replay < 1 or (self.replay > 0) != bool(self.general):
            raise BlmError(
                f"replay {self.replay} is a share in [0, 1) of the general sources {self.general}: give both"
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus folder."""

    name: str
    folder: Path
    weight: float = 1.0
    """How often its turns are drawn, beside those of a source of weight 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise BlmError(f"the weight of source '{self.folder}' is {self.weight}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One conversation, and where it came from."""

    conversation: Conversation
    source: Source
    where: str
    """file:line."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Questions that training must not have seen."""

    name: str
    questions: Sequence[Question]
    root: Path | None = None
    """Folder of their pictures; None: only their groups are compared."""


@dataclass
class _Run:
    """The conversations still in, and what was counted on the way."""

    entries: list[Entry]
    steps: list[StepReport] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> list[Conversation]:
        return [entry.conversation for entry in self.entries]

    def filter(self, name: str, fault: Callable[[Entry], str | None]) -> None:
        """Drop the entries for which `fault` names a reason."""
        kept, reasons = [], Reasons()
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

    def drop_turns(self, name: str, reason: str, dropped: set[Turn]) -> None:
        """Drop single turns, and conversations that have none left."""
        kept, reasons, emptied = [], Reasons(), Counter[str]()
        for number, entry in enumerate(self.entries):
            turns = range(len(entry.conversation.kinds))
            left = [turn for turn in turns if (number, turn) not in dropped]
            for turn in turns:
                if turn not in left:
                    reasons.add(reason, f"{entry.where} turn {turn}")
            if len(left) == len(turns):
                kept.append(entry)
            elif left:
                kept.append(replace(entry, conversation=entry.conversation.select(left)))
            else:
                emptied[reason] += 1
        self._step(name, kept, reasons, emptied)

    def _step(self, name: str, kept: list[Entry], reasons: Reasons, rows: Counter[str]) -> None:
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
    """Curate one corpus that was read already; by default without balancing.

    `evaluation_groups` are the groups of every evaluation set present: training on one of them would be a
    leak. Returns the kept conversations in their order, and the report.
    """
    source = Source(name=folder.name, folder=folder)
    entries = [
        Entry(conversation=row, source=source, where=f"{folder / CORPUS_FILE}: {row.id}")
        for row in conversations
    ]
    run = _Run(entries)
    kept, report = _pipeline(run, config or CurationConfig(balance="none"), (), set(evaluation_groups), None)
    return [entry.conversation for entry in kept], report


def curate_sources(
    sources: Sequence[Source],
    config: CurationConfig,
    *,
    evaluation: Sequence[EvaluationSet] = (),
    length: Length | None = None,
) -> tuple[list[Entry], CurationReport]:
    """Curate corpora together: doubles are found across them, and kinds are balanced over all.

    `length` measures a conversation for `max_length` (a backbone's tokens, say); by default its characters
    count. Raises BlmError for sources of equal names, general sources that are none, and a folder that is no
    corpus.
    """
    names = [source.name for source in sources]
    if len(set(names)) != len(names) or not set(config.general) <= set(names):
        raise BlmError(f"sources {names} need different names, general {config.general} must be among them")
    entries, reasons = [], Reasons()
    for source in sources:
        for number, row in scan_corpus(source.folder):
            where = f"{source.folder / CORPUS_FILE}:{number}"
            if isinstance(row, RowError):
                reasons.add(f"{row.reason} | {row.detail}", where)
            else:
                entries.append(Entry(conversation=row, source=source, where=where))
    run = _Run(entries)
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


def write_curated(entries: Sequence[Entry], report: CurationReport, out: Path) -> None:
    """Write OUT/<source>, one corpus folder a source, and OUT/curation.json, in one step.

    Media are linked, or copied where the disk cannot link. Raises BlmError when `out` exists.
    """
    with new_folder(out) as work:
        for source in {entry.source.name: entry.source for entry in entries}.values():
            rows = (entry.conversation for entry in entries if entry.source.name == source.name)
            write_corpus(work / source.name, rows, media=source.folder)
        write_json(work / "curation.json", asdict(report))


def _pipeline(
    run: _Run,
    config: CurationConfig,
    evaluation: Sequence[EvaluationSet],
    groups: set[str],
    length: Length | None,
) -> tuple[list[Entry], CurationReport]:
    galleries: dict[Path, Gallery] = {}

    def looks(entry: Entry) -> tuple[Look, ...]:
        folder = entry.source.folder
        return galleries.setdefault(folder, Gallery(folder)).looks(entry.conversation.media)

    def opened(entry: Entry) -> None:
        looks(entry)

    read = run.entries
    run.filter("media", opened)
    run.filter("limits", lambda entry: _over_limit(entry, config, looks(entry), length))
    seen: NearIndex[str] = NearIndex(config.hash_distance)
    run.filter("duplicates", lambda entry: _double(entry, looks(entry), seen))
    asked = _leak_index(evaluation, config.hash_distance)
    run.filter("leaks", lambda entry: _leak(entry, looks(entry), asked, groups))
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
        before=spread_of([entry.conversation for entry in read]),
        answers=spread_of(run.rows),
        yes_no=yes_no_shares([entry.conversation for entry in read], run.rows),
    )
    return run.entries, report


def _over_limit(
    entry: Entry,
    config: CurationConfig,
    looks: Sequence[Look],
    length: Length | None,
) -> str | None:
    row, most = entry.conversation, config.max_length
    if most is not None and (long := (length or characters)(row, entry.source.folder)) > most:
        return f"longer than {most} | {long}"
    if config.max_pixels is not None and any(look.size > config.max_pixels for look in looks):
        return f"a picture of more than {config.max_pixels} px | {max(look.size for look in looks)}"
    if config.max_pictures is not None and len(looks) > config.max_pictures:
        return f"more than {config.max_pictures} pictures | {len(looks)}"
    return None


def characters(conversation: Conversation, folder: Path) -> int:
    return sum(len(message.text) for message in conversation.messages)


def _double(entry: Entry, looks: tuple[Look, ...], seen: NearIndex[str]) -> str | None:
    key = tuple((message.role, normalise(message.text)) for message in entry.conversation.messages)
    if (first := seen.find(key, looks)) is not None:
        return f"duplicate | of {first}"
    seen.add(key, looks, entry.where)
    return None


def _leak_index(evaluation: Sequence[EvaluationSet], distance: int) -> NearIndex[str]:
    index: NearIndex[str] = NearIndex(distance)
    for part in evaluation:
        gallery = Gallery(part.root) if part.root is not None else None
        for question in part.questions if gallery is not None else ():
            assert gallery is not None
            images = [image for message in question.messages for image in message.images]
            text = normalise(question.messages[-1].text)
            index.add(text, gallery.looks(images), f"{part.name}: {question.id}")
    return index


def _leak(entry: Entry, looks: Sequence[Look], asked: NearIndex[str], groups: set[str]) -> str | None:
    if entry.conversation.group in groups:
        return f"leak: its group is in an evaluation set | {entry.conversation.group}"
    by_picture = {id(image): look for image, look in zip(entry.conversation.media, looks, strict=True)}
    for _, question, _ in entry.conversation.turns():
        pictures = tuple(by_picture[id(image)] for image in question.images)
        if (found := asked.find(normalise(question.text), pictures)) is not None:
            return f"leak: an evaluation set asks this about this picture | {found}"
    return None


def _shares(read: Sequence[Entry], kept: Sequence[Entry], config: CurationConfig) -> dict[str, SourceReport]:
    """Turns times weight, scaled so that the general sources together have the share of replay."""
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
