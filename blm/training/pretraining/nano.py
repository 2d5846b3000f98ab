"""Pretraining of nano, before Stage I.

A pretrained backbone can recognise objects, read lists and compute before it is fine-tuned; nano
starts from random weights. First its vision tower learns to localise objects (`vision_tower.py`).
Then the language model is trained on the grounding drill (the objects in an image and their
positions, one image at a time) and on text-only scenes: conversations that list the positions of
objects in words instead of showing images, and ask for distances, directions and order. Text-only
scenes are also a part of Stage I.
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
from blm.training.pretraining.vision_tower import ScannedView, all_scanned_views, pretrain_vision_tower
from blm.training.sft.tokenize_corpora import without_scan_turns
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Message, require_numbers

VISION_TOWER_LOOP = LoopConfig(steps=3000, batch_size=32, lr=3e-3, clip=5.0, title="nano's eye")
GROUNDING_DRILL_LOOP = LoopConfig(steps=1500, batch_size=8, lr=2e-3, muon=0.02, title="nano's drill")
GROUNDING_KINDS = ("scan", "point", "box")
"""Kinds of questions about the objects in a view and their positions; named KIND_VIEW."""
EXTRA_COMPARISONS = 4
"""Number of comparisons added to a text-only scene.

To select the smallest of several numbers and to name its object, a small model needs far more
examples than scenes have questions (docs/LOG.md).
"""
TEXT_ONLY_SHARE = 0.25
"""Share of text-only scenes in the grounding drill and in Stage I."""


@dataclass(frozen=True, kw_only=True)
class NanoPretrainingConfig:
    """Pretraining of a new nano backbone.

    Localisation comes first: mixed with all other questions from the beginning, it was not learnt
    within the runs in docs/LOG.md.
    """

    eye: LoopConfig = VISION_TOWER_LOOP
    """Pretraining of the vision tower alone."""
    drill: LoopConfig = GROUNDING_DRILL_LOOP
    """Pretraining of the language model, on the grounding drill and on text-only scenes."""
    pack_length: int = 0
    """Length of packed sequences in the drill [tokens], as in Stage I; 0 pads instead.
    Its rows are short and text-only scenes are long, so that padding is more than half of a batch."""

    again: bool = False
    """Also pretrain a nano that was trained before, from the weights that it has.
    By default, only a new one is."""

    def __post_init__(self) -> None:
        require_numbers(self, pack_length=(0, 10**9))


def pretrain_nano(
    corpora: Sequence[tuple[Sequence[Conversation], Path]],
    config: NanoPretrainingConfig,
    out: Path,
    *,
    seed: int = 0,
) -> Backbone:
    """Return a pretrained nano, with a tokenizer trained on the texts of these corpora.

    `corpora` are conversations and the folder of their images. Without scan turns in them the
    weights stay random. Resumes a killed run in `out`.
    """
    views, vocabulary = all_scanned_views(corpora)
    texts = (m.text for rows, _ in corpora for row in rows for m in row.messages)
    backbone = build_nano(texts, seed=seed, **vocabulary)
    _pretrain(backbone, corpora, views, config, out)
    return backbone


def pretrain_again(
    backbone: Backbone,
    corpora: Sequence[tuple[Sequence[Conversation], Path]],
    config: NanoPretrainingConfig,
    out: Path,
) -> None:
    """Pretrain a nano in place, from its present weights; see `pretrain_nano`.

    Raises BlmError for scan turns with names that its vision tower does not have.
    """
    _pretrain(backbone, corpora, all_scanned_views(corpora)[0], config, out)


def _pretrain(
    backbone: Backbone,
    corpora: Sequence[tuple[Sequence[Conversation], Path]],
    views: Sequence[ScannedView],
    config: NanoPretrainingConfig,
    out: Path,
) -> None:
    """Pretrain in place the vision tower on `views`, then the language model; without views neither."""
    if not views:
        return
    pretrain_vision_tower(backbone, views, config.eye, out / "eye")
    drills = [(root, [one for row in rows for one in grounding_drill(row)]) for rows, root in corpora]
    sources = [
        TrainingSource.of_rows(root.name, found, root, weight=float(len(found)))
        for root, found in drills
        if found
    ]
    if not sources:
        return
    sources = add_text_only_scenes(sources, [rows for rows, _ in corpora], config.drill)
    count = config.drill.steps * config.drill.batch_size  # no more than training will use
    sources = [source.first(count) for source in sources]
    drill = Stage1Config(
        loop=config.drill, vision_scale=0.0, pack_length=config.pack_length, supervise_attention=1.0
    )
    train_stage1(backbone, sources, drill, out / "drill")


def grounding_drill(row: Conversation) -> Iterator[Conversation]:
    """Yield a conversation per image with objects, of the turns about them and their positions."""
    images, answers = row.media, [m.text for m in row.messages if m.role == "assistant"]
    scans = [turn for turn, kind in enumerate(row.kinds) if kind.startswith("scan_") and kind != "scan_step"]
    for image, scan in zip(images, scans, strict=False):
        view = row.kinds[scan].removeprefix("scan")
        kinds = [f"{kind}{view}" for kind in GROUNDING_KINDS]
        turns = [turn for turn, kind in enumerate(row.kinds) if kind in kinds]
        if read_scan(answers[scan]):
            chosen = row.select(turns)
            first, *rest = (Message(m.role, (m.text,)) for m in chosen.messages)
            yield replace(chosen, messages=(Message("user", (image, first.text)), *rest))


def is_nano(backbone: Backbone) -> bool:
    """Return whether a backbone has nano's vision tower."""
    return isinstance(getattr(backbone.model.base_model, "vision_tower", None), ConvVision)


def nano_sources(
    sources: Sequence[tuple[Sequence[Conversation], Path, float]], loop: LoopConfig
) -> list[TrainingSource]:
    """Return the sources of Stage I for a pretrained nano.

    These are conversations without scan turns, and text-only scenes. `sources` are conversations,
    the folder of their images, and their weight.
    """
    without_scans = [
        TrainingSource.of_rows(root.name, [without_scan_turns(row) for row in rows], root, weight=weight)
        for rows, root, weight in sources
    ]
    return add_text_only_scenes(without_scans, [rows for rows, _, _ in sources], loop)


def add_text_only_scenes(
    sources: Sequence[TrainingSource], corpora: Iterable[Sequence[Conversation]], loop: LoopConfig
) -> list[TrainingSource]:
    """Add a source of text-only scenes, as many as training with `loop` uses.

    They are drawn from all conversations.
    """
    rows = [row for rows in corpora for row in rows]
    loop = loop.counted(len(rows))
    order = np.random.default_rng(loop.seed).permutation(len(rows))
    scenes = (scene.messages for index in order if (scene := text_only_scene(rows[index])) is not None)
    conversations = list(islice(scenes, ceil(TEXT_ONLY_SHARE * loop.steps * loop.batch_size)))
    if not conversations:
        return list(sources)
    weight = TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE) * sum(source.weight for source in sources)
    return [*sources, TrainingSource(name="told", conversations=conversations, weight=weight)]


def text_only_scene(row: Conversation) -> Conversation | None:
    """Return turns with positions in words instead of images, or None.

    These are the turns whose answers follow from a thought. The first question begins with the
    positions [cm from the robot] that the scan turns list; further comparisons of these positions
    are added. None if the conversation has no such turns or positions.
    """
    answers = [message.text for message in row.messages if message.role == "assistant"]
    both = list(zip(row.kinds, answers, strict=True))
    scans = [read_scan(text) for kind, text in both if kind.startswith("scan_") and kind != "scan_step"]
    places = {name: place[2:] for scan in scans for name, place in scan.items() if len(place) == 5}
    turns = [n for n, (_, text) in enumerate(both) if text.startswith("<think>")]
    if not (places and turns):
        return None
    listed = ", ".join(f"{name} {places[name]}" for name in sorted(places))
    chosen, more = row.select(turns), _compared(row.id, places)
    words = [Message(m.role, (m.text,)) for m in chosen.messages]
    first = next(index for index, message in enumerate(words) if message.role == "user")
    words[first] = Message("user", ("\n".join(filter(None, (listed, words[first].text))),))
    return Conversation(
        id=row.id,
        group=row.group,
        source="told",
        kinds=chosen.kinds + tuple(turn.kind for turn in more),
        messages=(*words, *to_messages((), more, thoughts=True)),
    )


def _compared(name: str, places: Mapping[str, tuple[int, ...]]) -> list[QuestionTurn]:
    """Draw comparisons of positions [cm], seeded by the name of the conversation.

    Things without a colour (the gripper, a mark on the table) are reference points: objects are
    compared by their distance from them.
    """
    metres = {thing: np.array(place) / 100 for thing, place in places.items()}
    objects = {thing: place for thing, place in metres.items() if " " in thing}
    marks = metres.items()
    groups = by_kind(f for mark, place in marks for f in comparisons(mark, {**objects, mark: place}))
    if not groups:
        return []
    rng = np.random.default_rng(crc32(name.encode()))
    sampler = QuestionSampler(rng, choice=0.0)
    kinds = rng.choice(sorted(groups), EXTRA_COMPARISONS)
    return [sampler.phrase(groups[kind][int(rng.integers(len(groups[kind])))]) for kind in kinds]
