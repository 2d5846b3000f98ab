"""Puts the media of a row at their places in its turns.

A part without a file, and a tag `<image>` or `<video>` in a question, stand for the next file of
the row's list. Where the row says no other number of files, a tag inside a sentence is only a word
of the text: then tags count that begin a question or have a line of their own. Nothing is guessed:
if the numbers of places and files differ, the row is faulty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from blm.corpora.converters.turns import Medium, Part, Turn
from blm.corpora.format.faults import RowError

_TAG = re.compile(r"<(image|video)>")
_LINE = re.compile(r"^[ \t]*(?:<(?:image|video)>[ \t]*)+$", re.MULTILINE)
_START = re.compile(r"\A\s*(?:<(?:image|video)>\s*)+")
_INLINE = re.compile(r"<(img|image|video)>\s*[^<>\n]+\.[A-Za-z0-9]{2,4}\s*</\1>")
KINDS = ("image", "video")


def place_media(
    turns: Sequence[Turn], files: Mapping[str, Sequence[Any]], untagged: Literal["refuse", "first"]
) -> list[Turn]:
    """Return the turns with their media as parts; `files` maps "image" and "video" to lists.

    Raises RowError if the numbers of places and files differ, for media in other turns than
    questions, and for a path inside a text.
    """
    _require_plain(turns)
    queues = {kind: list(files.get(kind, ())) for kind in KINDS}
    if any(turn.media for turn in turns):  # parts show where the media are; tags are words
        missing = {
            kind: sum(m.kind == kind and m.value is None for t in turns for m in t.media) for kind in KINDS
        }
        for kind in KINDS:
            if missing[kind] != len(queues[kind]):
                raise RowError(
                    "wrong media count", f"{missing[kind]} parts for {len(queues[kind])} files of {kind}"
                )
        return [_with_files(turn, queues) for turn in turns]
    places = {kind: _places(turns, kind, len(queues[kind])) for kind in KINDS}
    count = sum(len(found) for found in places.values())
    if not count and any(queues.values()) and untagged == "first":
        return _shown_first(turns, [Medium(kind, file) for kind in KINDS for file in queues[kind]])
    for kind, found in places.items():
        if len(found) != len(queues[kind]):
            hint = "; --untagged first shows them first" if not count else ""
            raise RowError(
                "wrong media count", f"{len(found)} tags <{kind}> for {len(queues[kind])} files{hint}"
            )
    chosen = {place for found in places.values() for place in found}
    return [_with_tags(turn, number, chosen, queues) if count else turn for number, turn in enumerate(turns)]


Place = tuple[int, int]
"""Index of a turn, and index of a character in its text."""


def _text(turn: Turn) -> str:
    """Return the text of a turn without media."""
    return turn.content if isinstance(turn.content, str) else "".join(map(str, turn.content))


def _places(turns: Sequence[Turn], kind: str, wanted: int) -> list[Place]:
    """Return where tags of a kind stand for files: all of them, or else the ones beside the text."""
    texts = [(number, _text(turn)) for number, turn in enumerate(turns) if turn.role == "user"]
    every = [(number, tag.start()) for number, text in texts for tag in _TAG.finditer(text) if tag[1] == kind]
    if len(every) == wanted:
        return every
    beside = {(number, place) for number, text in texts for place in _beside(text)}
    return [place for place in every if place in beside]


def _beside(text: str) -> Iterator[int]:
    """Yield the places of tags that begin a text, end it, or have a line of their own."""
    for block in (*_START.finditer(text), *_LINE.finditer(text)):
        yield from (block.start() + tag.start() for tag in _TAG.finditer(block[0]))


def _with_files(turn: Turn, queues: Mapping[str, list[Any]]) -> Turn:
    if isinstance(turn.content, str):
        return turn
    parts = [
        replace(part, value=queues[part.kind].pop(0))
        if isinstance(part, Medium) and part.value is None
        else part
        for part in turn.content
    ]
    return replace(turn, content=tuple(parts))


def _shown_first(turns: Sequence[Turn], media: Sequence[Part]) -> list[Turn]:
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), 0)
    return [
        replace(turn, content=(*media, _text(turn).strip())) if number == first else turn
        for number, turn in enumerate(turns)
    ]


def _with_tags(turn: Turn, number: int, chosen: set[Place], queues: Mapping[str, list[Any]]) -> Turn:
    text, parts, begin = _text(turn), list[Part](), 0
    for tag in _TAG.finditer(text):
        if (number, tag.start()) in chosen:
            parts += [text[begin : tag.start()].strip(), Medium(tag[1], queues[tag[1]].pop(0))]
            begin = tag.end()
    return replace(turn, content=tuple(part for part in (*parts, text[begin:].strip()) if part != ""))


def _require_plain(turns: Sequence[Turn]) -> None:
    for turn in turns:
        if turn.role != "user" and turn.media:
            raise RowError("unsupported content", f"a picture or video in a turn of the {turn.role}")
        texts = [turn.content] if isinstance(turn.content, str) else turn.content
        for text in texts:
            if isinstance(text, str) and (found := _INLINE.search(text)):
                raise RowError(
                    "unsupported content", f"{found[0][:60]!r}: a file inside a text; list it under 'images'"
                )
