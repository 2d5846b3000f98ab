"""Faults of corpus rows: all reasons with the rules that they violate, counts and summaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blm.types import BlmError

EXAMPLES = 3
"""Number of examples listed per reason in a summary."""
REASONS: dict[str, str] = {
    "malformed JSON": "a line is one JSON object in UTF-8",
    "truncated last line": "the file was cut while it was written; write it again",
    "malformed row": "a row has the keys and types that blm.corpora.format.messages documents",
    "unknown role": "a role is one of system, user, assistant",
    "roles out of order": "an optional system turn comes first, then user and "
    "assistant alternate, with an answer last",
    "empty question": "a user turn has a text or an image",
    "empty answer": "an assistant turn has a text and no image",
    "unclear loss switch": "a switch of a turn is true, false, 0 or 1 (all of a text is trained, or nothing)",
    "nothing to learn": "at least one answer counts in the loss",
    "unsupported setting": "a picture or video is shown as it is, or scaled as its settings say",
    "unclear coordinates": "points and boxes lie in their image, and there is one for each tag",
    "wrong number of kinds": "there is one kind for each assistant turn",
    "wrong media count": "the text has exactly one tag for each image or video",
    "duplicate id": "ids are unique",
    "media outside the folder": "a reference is a path below the corpus (or media) folder, not an address",
    "media missing": "every referenced image and video exists",
    "media unreadable": "every image and video can be decoded",
    "media too large": "an image has at most blm.media.MAX_PIXELS pixels",
    "time after the end": "a frame's time lies within its video",
    "unsupported content": "turns have text, images and videos, but no tools and no sound",
    "reserved token in text": "texts contain none of the backbone's special tokens",
    "placeholders differ from features": "the backbone computes one feature for each placeholder",
    "too long": "a conversation fits the token limit",
    "answer not learnt": "the chat template keeps every answer as a separate text",
}
"""Reason -> the rule that a row violates."""


class RowError(BlmError):
    """The fault of one row: one of `REASONS` and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # both, so that it can be unpickled from a worker process
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail} ({REASONS[self.reason]})"


@dataclass(frozen=True)
class Fault:
    """A faulty row: its place ("file:line"), the reason and a detail."""

    where: str
    reason: str
    detail: str


def count_faults(faults: Iterable[Fault]) -> dict[str, int]:
    """Return reason -> count, the most frequent first."""
    return dict(Counter(fault.reason for fault in faults).most_common())


def summarise(faults: Sequence[Fault], counts: Mapping[str, int] | None = None) -> str:
    """Return one line per reason: the count, the rule and the first places.

    `counts` are those of all faults, if `faults` are only the first of each reason.
    """
    lines = []
    for reason, count in (count_faults(faults) if counts is None else counts).items():
        places = [f"{f.where} ({f.detail})" for f in faults if f.reason == reason][:EXAMPLES]
        rest = ", .." if count > EXAMPLES else ""
        lines.append(f"  {count} x {reason} [{REASONS.get(reason, '')}]: {', '.join(places)}{rest}")
    return "\n".join(lines)
