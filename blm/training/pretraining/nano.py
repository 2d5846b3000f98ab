"""What a new nano learns before Stage I proper, and what it learns beside it.

A pretrained backbone can see, read a list and compute before it is fine-tuned; nano starts from nothing.
First its eye learns to find things (`eye.py`). Then the language model is drilled: it tells what the eye has
found in one picture at a time, and, from conversations that show no picture but tell what is in it, what
follows from that - ways, distances, order. Some of these stay in Stage I proper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path
from zlib import crc32

import numpy as np

from blm.backbone import Backbone, build_nano
from blm.backbone.nano.vision_tower import ConvVision
from blm.corpora import Conversation
from blm.corpora.scenes.annotations import QuestionSampler, QuestionTurn, by_kind, to_messages
from blm.corpora.scenes.comparing import comparisons
from blm.corpora.scenes.questions import read_scan
from blm.training.loop.loop import LoopConfig
from blm.training.pretraining.vision_tower import scanned, teach_eye
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Message

EYE = LoopConfig(steps=3000, batch_size=32, lr=3e-3, clip=5.0, title="nano's eye")
DRILL = LoopConfig(steps=1500, batch_size=8, lr=2e-3, muon=0.02, title="nano's drill")
FINDING = ("scan", "point", "box")
"""Kinds that say what and where things are in a view: NAME_VIEW."""
COMPARED = 4
"""More comparisons in a told conversation: to choose the least of several numbers and say whose it is takes
a small model from scratch far more examples than scenes hold questions (docs/LOG.md)."""
TOLD_SHARE = 0.25
"""Share of told conversations in the drill and in Stage I proper."""


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """What a new nano learns before Stage I proper. Finding comes first: mixed with all other questions from
    the beginning it was not learnt within the runs in docs/LOG.md."""

    eye: LoopConfig = EYE
    """The eye alone."""
    drill: LoopConfig = DRILL
    """The language model: one picture at a time, and what is told."""


def taught_nano(
    corpora: Sequence[tuple[Sequence[Conversation], Path]], schooling: Schooling, out: Path, *, seed: int = 0
) -> Backbone:
    """Return a nano with a tokenizer of these corpora's texts, which finds the things that they scan.

    `corpora` are conversations and the folder of their pictures; without scans in them it stays untrained.
    Continues a killed schooling in `out`.
    """
    views = [view for rows, root in corpora for row in rows for view in scanned(row, root)]
    things = sorted({name for view in views for name in view.places or ()})
    steps, names = (sorted({getattr(view, kind) for view in views} - {""}) for kind in ("step", "name"))
    texts = (m.text for rows, _ in corpora for row in rows for m in row.messages)
    backbone = build_nano(texts, seed=seed, things=things, steps=steps, views=names)
    if not views:
        return backbone
    teach_eye(backbone, views, schooling.eye, out / "eye")
    views_alone = [(root, [one.messages for row in rows for one in alone(row)]) for rows, root in corpora]
    sources = [
        TrainingSource(name=root.name, conversations=found, root=root, weight=float(len(found)))
        for root, found in views_alone
        if found
    ]
    if not sources:
        return backbone
    sources = with_told(sources, [rows for rows, _ in corpora], schooling.drill)
    seen = schooling.drill.steps * schooling.drill.batch_size
    sources = [replace(source, conversations=source.conversations[:seen]) for source in sources]
    train_stage1(backbone, sources, Stage1Config(loop=schooling.drill, vision_scale=0.0), out / "drill")
    return backbone


def alone(row: Conversation) -> Iterator[Conversation]:
    """Each picture that shows something, with the turns that say what and where things are in it."""
    images, answers = row.media, [m.text for m in row.messages if m.role == "assistant"]
    scans = [turn for turn, kind in enumerate(row.kinds) if kind.startswith("scan_") and kind != "scan_step"]
    for image, scan in zip(images, scans, strict=False):
        view = row.kinds[scan].removeprefix("scan")
        kinds = [f"{finding}{view}" for finding in FINDING]
        turns = [turn for turn, kind in enumerate(row.kinds) if kind in kinds]
        if read_scan(answers[scan]):
            first, *rest = (Message(m.role, (m.text,)) for m in row.select(turns).messages)
            shown = Message("user", (image, first.text))
            yield replace(row, kinds=tuple(row.kinds[t] for t in turns), messages=(shown, *rest))


def is_nano(backbone: Backbone) -> bool:
    """Whether a backbone has nano's eye."""
    return isinstance(getattr(backbone.model.base_model, "vision_tower", None), ConvVision)


def for_nano(
    sources: Sequence[tuple[Sequence[Conversation], Path, float]], loop: LoopConfig
) -> list[TrainingSource]:
    """What a taught nano learns in Stage I proper, of conversations, the folder of their pictures, and their
    weight: all but the scans, and what can be told as well."""
    rest = [
        TrainingSource(
            name=root.name,
            conversations=[without_scans(row).messages for row in rows],
            root=root,
            weight=weight,
            places=[f"{root}, {row.id}" for row in rows],
        )
        for rows, root, weight in sources
    ]
    return with_told(rest, [rows for rows, _, _ in sources], loop)


def with_told(
    sources: Sequence[TrainingSource], corpora: Iterable[Sequence[Conversation]], loop: LoopConfig
) -> list[TrainingSource]:
    """Add what is told of these conversations, if anything is: as much, drawn from all, as `loop` reads."""
    rows = [row for rows in corpora for row in rows]
    order = np.random.default_rng(loop.seed).permutation(len(rows))
    found = (talk.messages for index in order if (talk := told(rows[index])) is not None)
    said = list(islice(found, ceil(TOLD_SHARE * loop.steps * loop.batch_size)))
    weight = TOLD_SHARE / (1 - TOLD_SHARE) * sum(source.weight for source in sources)
    more = [TrainingSource(name="told", conversations=said, weight=weight)] if said else []
    return [*sources, *more]


def without_scans(row: Conversation) -> Conversation:
    """What is left for Stage I proper: the drill has taught the scans, a fifth of all tokens."""
    rest = [turn for turn, kind in enumerate(row.kinds) if not kind.startswith("scan")]
    return row.select(rest) if rest else row


def told(row: Conversation) -> Conversation | None:
    """The turns whose answers follow from a thought, with what the scans say about places from the robot in
    place of pictures, and more comparisons of these places; None if it has none."""
    answers = [message.text for message in row.messages if message.role == "assistant"]
    both = list(zip(row.kinds, answers, strict=True))
    scans = [read_scan(text) for kind, text in both if kind.startswith("scan_") and kind != "scan_step"]
    places = {name: place[2:] for scan in scans for name, place in scan.items() if len(place) == 5}
    turns = [n for n, (_, text) in enumerate(both) if text.startswith("<think>")]
    if not (places and turns):
        return None
    said = ", ".join(f"{name} {places[name]}" for name in sorted(places))
    chosen, more = row.select(turns), _compared(row.id, places)
    words = [Message(m.role, (m.text,)) for m in chosen.messages]
    first = next(index for index, message in enumerate(words) if message.role == "user")
    words[first] = Message("user", ("\n".join(filter(None, (said, words[first].text))),))
    messages, kinds = (*words, *to_messages((), more, thoughts=True)), tuple(turn.kind for turn in more)
    return Conversation(
        id=row.id, group=row.group, source="told", kinds=chosen.kinds + kinds, messages=messages
    )


def _compared(name: str, places: Mapping[str, tuple[int, ...]]) -> list[QuestionTurn]:
    """Draw comparisons of places [cm], seeded by the conversation's name. What has no colour (the gripper,
    a mark on the table) is no object: others are compared by their distance from it."""
    metres = {thing: np.array(place) / 100 for thing, place in places.items()}
    objects = {thing: place for thing, place in metres.items() if " " in thing}
    marks = metres.items()
    groups = by_kind(f for mark, place in marks for f in comparisons(mark, {**objects, mark: place}))
    if not groups:
        return []
    rng = np.random.default_rng(crc32(name.encode()))
    sampler = QuestionSampler(rng, choice=0.0)
    kinds = rng.choice(sorted(groups), COMPARED)
    return [sampler.phrase(groups[kind][int(rng.integers(len(groups[kind])))]) for kind in kinds]
