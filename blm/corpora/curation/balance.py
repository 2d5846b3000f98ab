"""Select turns to drop, so that no question kind and no answer exceeds its share.

Turns are ranked by a hash of the seed and of their text. The choice therefore depends neither on
their order nor on other turns, and curating the result again keeps everything.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from blm.corpora.format.messages import Conversation, end_of_pictures, without_thought
from blm.types import base_kind

Balance = Literal["none", "kind", "question"]
TurnIndex = tuple[int, int]
"""Index of a conversation, and index of a turn in it."""


def normalise(text: str) -> str:
    """Return the words of a text in lower case; texts with equal words count as duplicates."""
    return " ".join(re.findall(r"[\w+-]+", text.lower()))


def yes_or_no(answer: str) -> str | None:
    """Return 'yes' or 'no' for an answer such as 'Yes.', and None for other answers."""
    plain = normalise(answer)
    return plain if plain in ("yes", "no") else None


def over_cap(rows: Sequence[Conversation], most: int | None, seed: int) -> set[TurnIndex]:
    """Return the surplus turns beyond `most` of each kind."""
    kinds: dict[str, list[TurnIndex]] = {}
    for turn, kind, _ in _turns(rows) if most is not None else ():
        kinds.setdefault(kind, []).append(turn)
    return _surplus(rows, ((turns, most or 0) for turns in kinds.values()), seed)


def unbalanced(rows: Sequence[Conversation], balance: Balance, seed: int) -> set[TurnIndex]:
    """Return the surplus turns of the more frequent answer of yes and no.

    Turns are balanced within their base kind or, with "question", within their base kind and
    question text. A base kind with only one of the two answers cannot be balanced and stays. With
    "question", question texts that always have the same answer are dropped.
    """
    parts: list[tuple[list[TurnIndex], int]] = []
    for yes, no in yes_no_turns(rows).values() if balance != "none" else ():
        if yes and no:
            sides = [_by_words(rows, side, balance) for side in (yes, no)]
            for words in {*sides[0], *sides[1]}:
                pair = [side.get(words, []) for side in sides]
                parts += [(turns, min(map(len, pair))) for turns in pair]
    return _surplus(rows, parts, seed)


def _by_words(
    rows: Sequence[Conversation], turns: Sequence[TurnIndex], balance: Balance
) -> dict[str, list[TurnIndex]]:
    if balance == "kind":
        return {"": list(turns)}
    found: dict[str, list[TurnIndex]] = {}
    for number, turn in turns:
        found.setdefault(normalise(_question_words(rows[number], turn)), []).append((number, turn))
    return found


def yes_no_turns(rows: Sequence[Conversation]) -> dict[str, tuple[list[TurnIndex], list[TurnIndex]]]:
    """Return base kind -> (turns answered yes, turns answered no), for yes/no kinds."""
    stems: dict[str, tuple[list[TurnIndex], list[TurnIndex]]] = {}
    other: set[str] = set()
    for turn, kind, answer in _turns(rows):
        stem, side = base_kind(kind), yes_or_no(answer)
        if side is None:
            other.add(stem)
        else:
            stems.setdefault(stem, ([], []))[side == "no"].append(turn)
    return {stem: sides for stem, sides in sorted(stems.items()) if stem not in other}


def _turns(rows: Sequence[Conversation]) -> Iterator[tuple[TurnIndex, str, str]]:
    """Yield index, kind and answer of each turn that is learnt."""
    for number, row in enumerate(rows):
        answers = (message for message in row.messages if message.role == "assistant")
        for turn, (kind, answer) in enumerate(zip(row.kinds, answers, strict=True)):
            if answer.loss:
                yield (number, turn), kind, without_thought(answer.text)


def _surplus(
    rows: Sequence[Conversation], parts: Iterable[tuple[list[TurnIndex], int]], seed: int
) -> set[TurnIndex]:
    """Return the turns of each list beyond its maximum; those with the lowest ranks are kept."""
    dropped: set[TurnIndex] = set()
    for turns, most in parts:
        if len(turns) > most:
            dropped |= set(sorted(turns, key=lambda turn: _rank(rows[turn[0]], turn[1], seed))[most:])
    return dropped


def _rank(row: Conversation, turn: int, seed: int) -> bytes:
    """Return a pseudo-random rank of a turn that depends on its text.

    It does not depend on the turn's index, because dropping other turns changes the index.
    """
    answers = [message for message in row.messages if message.role == "assistant"]
    content = f"{seed}\0{row.id}\0{row.kinds[turn]}\0{_question_words(row, turn)}\0{answers[turn].text}"
    return hashlib.sha256(content.encode()).digest()


def _question_words(row: Conversation, turn: int) -> str:
    """Return the text of a question after its last image."""
    user = [message for message in row.messages if message.role == "user"][turn]
    return "".join(part for part in user.content[end_of_pictures(user) :] if isinstance(part, str))
