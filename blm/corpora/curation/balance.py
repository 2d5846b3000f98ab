"""Which turns to drop so that no question kind and no answer has more than its share.

Turns are chosen by a hash of the seed and of what the turn says: the choice depends neither on order nor on
what else there is, and what was kept is kept again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from blm.corpora.format.messages import Conversation, end_of_pictures, spoken

Balance = Literal["none", "kind", "question"]
Turn = tuple[int, int]
"""Number of the conversation and of its turn."""


def normalise(text: str) -> str:
    """Lower case, words only: what makes two texts the same for duplicates and leaks."""
    return " ".join(re.findall(r"[\w+-]+", text.lower()))


def stem_of(kind: str) -> str:
    """'success_positive' and 'success_negative' -> 'success'."""
    return kind.removesuffix("_positive").removesuffix("_negative")


def yes_or_no(answer: str) -> str | None:
    """'Yes.' -> 'yes'; None for another answer."""
    plain = normalise(answer)
    return plain if plain in ("yes", "no") else None


def over_cap(rows: Sequence[Conversation], most: int | None, seed: int) -> set[Turn]:
    """Return the turns beyond `most` of each kind."""
    kinds: dict[str, list[Turn]] = {}
    for turn, kind, _ in _turns(rows) if most is not None else ():
        kinds.setdefault(kind, []).append(turn)
    return _surplus(rows, ((turns, most or 0) for turns in kinds.values()), seed)


def unbalanced(rows: Sequence[Conversation], balance: Balance, seed: int) -> set[Turn]:
    """Return the turns of the more frequent of yes and no that have no partner with the other.

    Partners have the same stem, or with "question" the same stem and words. A stem that is answered by only
    one of the two cannot be balanced and stays; words that are always answered alike then go.
    """
    parts: list[tuple[list[Turn], int]] = []
    for yes, no in yes_no_turns(rows).values() if balance != "none" else ():
        if yes and no:
            sides = [_by_words(rows, side, balance) for side in (yes, no)]
            for words in {*sides[0], *sides[1]}:
                pair = [side.get(words, []) for side in sides]
                parts += [(turns, min(map(len, pair))) for turns in pair]
    return _surplus(rows, parts, seed)


def _by_words(rows: Sequence[Conversation], turns: Sequence[Turn], balance: Balance) -> dict[str, list[Turn]]:
    if balance == "kind":
        return {"": list(turns)}
    found: dict[str, list[Turn]] = {}
    for number, turn in turns:
        found.setdefault(normalise(_asked(rows[number], turn)), []).append((number, turn))
    return found


def yes_no_turns(rows: Sequence[Conversation]) -> dict[str, tuple[list[Turn], list[Turn]]]:
    """Return stem -> turns answered yes, and no, for the stems that are answered by nothing else."""
    stems: dict[str, tuple[list[Turn], list[Turn]]] = {}
    other: set[str] = set()
    for turn, kind, answer in _turns(rows):
        stem, side = stem_of(kind), yes_or_no(answer)
        if side is None:
            other.add(stem)
        else:
            stems.setdefault(stem, ([], []))[side == "no"].append(turn)
    return {stem: sides for stem, sides in sorted(stems.items()) if stem not in other}


def _turns(rows: Sequence[Conversation]) -> Iterator[tuple[Turn, str, str]]:
    for number, row in enumerate(rows):
        answers = (message for message in row.messages if message.role == "assistant")
        for turn, (kind, answer) in enumerate(zip(row.kinds, answers, strict=True)):
            yield (number, turn), kind, spoken(answer.text)


def _surplus(rows: Sequence[Conversation], parts: Iterable[tuple[list[Turn], int]], seed: int) -> set[Turn]:
    """Return, of each list of turns, all but so many; those of the lowest rank stay."""
    dropped: set[Turn] = set()
    for turns, most in parts:
        if len(turns) > most:
            dropped |= set(sorted(turns, key=lambda turn: _rank(rows[turn[0]], turn[1], seed))[most:])
    return dropped


def _rank(row: Conversation, turn: int, seed: int) -> bytes:
    """A random number of a turn, by what it says and not its place: dropping others renumbers it."""
    answers = [message for message in row.messages if message.role == "assistant"]
    said = f"{seed}\0{row.id}\0{row.kinds[turn]}\0{_asked(row, turn)}\0{answers[turn].text}"
    return hashlib.sha256(said.encode()).digest()


def _asked(row: Conversation, turn: int) -> str:
    """The words of a question behind its last picture: those before it may come from a dropped turn."""
    user = [message for message in row.messages if message.role == "user"][turn]
    return "".join(part for part in user.content[end_of_pictures(user) :] if isinstance(part, str))
