"""What a new nano learns before Stage I proper, and what it learns beside it.

A pretrained backbone can see, read a list and compute before it is fine-tuned; nano starts from nothing.
First its eye learns to find things (`eye.py`). Then the language model learns, from conversations that show
no picture but tell what is in it, what follows from that - ways, distances, order - at a fraction of
the cost; then to tell what the eye has found. Some told conversations stay in Stage I proper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blm.backbone import Backbone, build_nano
from blm.backbone.eye import ConvVision
from blm.corpora import Conversation
from blm.corpora.questions import read_scan
from blm.training.eye import scanned, teach_eye
from blm.training.loop import LoopConfig
from blm.training.sft import Stage1Config, TrainingSource, train_stage1
from blm.types import Message

EYE = LoopConfig(steps=3000, batch_size=32, lr=3e-3, clip=5.0, title="nano's eye")
TELLING = LoopConfig(steps=700, batch_size=8, lr=2e-3, muon=0.02, title="nano's telling")
DRILL = LoopConfig(steps=1000, batch_size=8, lr=2e-3, muon=0.02, title="nano's drill")
FINDING = ("scan", "point", "box", "metric_position")
"""Kinds that say what and where things are."""
TOLD_SHARE = 0.25
"""Share of told conversations among those of Stage I proper."""


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """What a new nano learns before Stage I proper. Finding comes first: mixed with all other questions from
    the beginning it was not learnt within the runs in docs/LOG.md."""

    eye: LoopConfig = EYE
    """The eye alone."""
    telling: LoopConfig = TELLING
    """The language model: what follows from what is told."""
    drill: LoopConfig = DRILL
    """The same: only the turns that say where things are."""


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
    if source := told_source([rows for rows, _ in corpora]):
        train_stage1(
            backbone, [source], Stage1Config(loop=schooling.telling, vision_scale=0.0), out / "telling"
        )
    drill, seen = schooling.drill, schooling.drill.steps * schooling.drill.batch_size
    drills = [
        (root, [row.select(turns).messages for row in rows if (turns := finding(row))])
        for rows, root in corpora
    ]
    sources = [
        TrainingSource(name=root.name, conversations=found[:seen], root=root, weight=float(len(found)))
        for root, found in drills
        if found
    ]
    often = seen > sum(len(found) for _, found in drills)
    train_stage1(
        backbone, sources, Stage1Config(loop=drill, vision_scale=0.0, cache_features=often), out / "drill"
    )
    return backbone


def finding(row: Conversation) -> list[int]:
    """The turns of a conversation that say what and where things are."""
    return [turn for turn, kind in enumerate(row.kinds) if kind.startswith(FINDING)]


def is_nano(backbone: Backbone) -> bool:
    """Whether a backbone has nano's eye."""
    return isinstance(getattr(backbone.model.base_model, "vision_tower", None), ConvVision)


def for_nano(sources: Sequence[tuple[Sequence[Conversation], Path, float]]) -> list[TrainingSource]:
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
    weight = TOLD_SHARE / (1 - TOLD_SHARE) * sum(source.weight for source in rest)
    said = told_source([rows for rows, _, _ in sources], weight)
    return [*rest, said] if said else rest


def told_source(corpora: Iterable[Iterable[Conversation]], weight: float = 1.0) -> TrainingSource | None:
    """All that is told of these conversations; None if nothing is."""
    said = [found.messages for rows in corpora for row in rows if (found := told(row)) is not None]
    return TrainingSource(name="told", conversations=said, weight=weight) if said else None


def without_scans(row: Conversation) -> Conversation:
    """What is left for Stage I proper: the drill has taught the scans, a fifth of all tokens."""
    rest = [turn for turn, kind in enumerate(row.kinds) if not kind.startswith("scan")]
    return row.select(rest) if rest else row


def told(row: Conversation) -> Conversation | None:
    """The turns whose answers follow from a thought, with what the scans say about places from the robot in
    place of pictures; None if it has none."""
    answers = [message.text for message in row.messages if message.role == "assistant"]
    both = list(zip(row.kinds, answers, strict=True))
    scans = [read_scan(text) for kind, text in both if kind.startswith("scan_") and kind != "scan_step"]
    places = {name: place[2:] for scan in scans for name, place in scan.items() if len(place) == 5}
    turns = [n for n, (_, text) in enumerate(both) if text.startswith("<think>")]
    if not (places and turns):
        return None
    said = ", ".join(f"{name} {places[name]}" for name in sorted(places))
    chosen = row.select(turns)
    words = [Message(m.role, (m.text,)) for m in chosen.messages]
    first = next(index for index, message in enumerate(words) if message.role == "user")
    words[first] = Message("user", ("\n".join(filter(None, (said, words[first].text))),))
    return Conversation(id=row.id, group=row.group, source="told", kinds=chosen.kinds, messages=tuple(words))
