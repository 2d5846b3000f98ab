"""Curation as a visible pipeline: every dropped conversation is counted under its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blm.corpora.messages import Conversation
from blm.media import load_pixels
from blm.types import BlmError


@dataclass(frozen=True, kw_only=True)
class CurationReport:
    """What stayed, what went and why, and how the answers are spread."""

    kept: int
    dropped: dict[str, int]
    answers: dict[str, dict[str, int]]
    """Question kind -> answer -> count, over what was kept; pointing answers are not listed."""


def curate(
    conversations: Sequence[Conversation], folder: Path, *, evaluation_groups: Iterable[str] = ()
) -> tuple[list[Conversation], CurationReport]:
    """Drop conversations with unreadable pictures, doubles, and scenes that an evaluation set asks about.

    Returns the kept conversations in their order, and the report. `evaluation_groups` are the groups of every
    evaluation set present: training on one of them would be a leak.
    """
    forbidden = set(evaluation_groups)
    dropped: Counter[str] = Counter()
    seen: set[tuple[object, ...]] = set()
    kept = []
    for conversation in conversations:
        reason = _fault(conversation, folder, forbidden, seen)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(conversation)
    answers: dict[str, Counter[str]] = {}
    for question in (q for conversation in kept for q in conversation.questions()):
        if question.scorer != "point":
            answers.setdefault(question.kind, Counter())[question.answer] += 1
    spread = {kind: dict(counter.most_common()) for kind, counter in sorted(answers.items())}
    return kept, CurationReport(kept=len(kept), dropped=dict(dropped), answers=spread)


def _fault(
    conversation: Conversation, folder: Path, forbidden: set[str], seen: set[tuple[object, ...]]
) -> str | None:
    if conversation.group in forbidden:
        return "leak: its scene is in an evaluation set"
    content = tuple(
        part if isinstance(part, str) else part.path for m in conversation.messages for part in m.content
    )
    if content in seen:
        return "duplicate"
    seen.add(content)
    try:
        for message in conversation.messages:
            for image in message.images:
                load_pixels(image, folder)
    except BlmError:
        return "picture missing or unreadable"
    return None
