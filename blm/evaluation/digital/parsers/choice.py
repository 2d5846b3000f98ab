"""Reading the letter of an option from a final answer, or None. Nothing is guessed.

Every letter that stands alone is a mention. A mention counts where it is declared ("the answer is
B", "C is correct", "选D") or makes up a clause with nothing but introducing words ("I think it's
B", "es la C porque .."). Rejected letters ("not A", "A is wrong") do not count, and a correction
withdraws what was said before it. Two letters of equal standing are None. "A" before a word is an
article. An option's own words stand for its letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from blm.evaluation.digital.parsers.letters import JOIN, REJECTED, Mention, canonical, find_mentions
from blm.evaluation.digital.parsers.phrases import CONDITION, NEGATION, REFUSAL, after_correction, clauses
from blm.evaluation.digital.parsers.text import normalise
from blm.evaluation.digital.parsers.yes_no import read_yes_no

_ONE_LETTER = re.compile(r"\W*([A-Z])(?:\W+\1)*\W*")
_MAX_EXTRA_WORDS = 8
"""A sentence around an option's words has at most this many words more than the option."""


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter of the option that the answer names, in upper case, or None.

    `text` is a `final_answer`. Without `options`, the valid letters are A to H.
    """
    letters = [chr(ord("A") + index) for index in range(len(options) or 8)]
    said = after_correction(canonical(text))
    if CONDITION.search(said):
        return None
    if same := _ONE_LETTER.fullmatch(said):
        return same[1] if same[1] in letters else None
    mentions = find_mentions(said, letters)
    rejected = [match.span() for form in REJECTED for match in form.finditer(said)]
    kept = [m for m in mentions if not any(start <= m.start < end for start, end in rejected)]
    joined = _joined(said, kept)
    answers = _answers([m for m in kept if m not in joined])
    answers = answers or ([] if REFUSAL.search(said) else [m for m in kept if m.bracketed])
    if answers:
        found = {m.letter for m in answers}
        return found.pop() if len(found) == 1 and found <= {*letters} else None
    if joined or len(kept) < len(mentions):
        return None
    words = [normalise(option) for option in options]
    if sorted(words) == ["no", "yes"] and (word := read_yes_no(text)):
        return letters[words.index(word)]
    return _by_words(said, words)


def _joined(text: str, mentions: Sequence[Mention]) -> list[Mention]:
    """Return the letters of a list, as in "A or B" and "A, B"."""
    pairs = [
        (a, b)
        for a, b in pairwise(mentions)
        if a.letter != b.letter and JOIN.fullmatch(text[a.end : b.start])
    ]
    return [mention for pair in pairs for mention in pair]


def _answers(mentions: Sequence[Mention]) -> list[Mention]:
    """Return the last declared letter and the bare ones after it; without one, all that may answer."""
    declared = [m for m in mentions if m.declared]
    bare = [m for m in mentions if m.bare and not m.declared]
    if declared:
        return [declared[-1], *(m for m in bare if m.start > declared[-1].start)]
    return [*bare, *(m for m in mentions if m.bracketed)] if bare else []


def _by_words(text: str, words: Sequence[str]) -> str | None:
    """Return the option whose words are the answer, or the only one that a short answer affirms."""
    said = normalise(text)
    found = [index for index, option in enumerate(words) if option == said]
    if not found and (not REFUSAL.search(text) or any(map(REFUSAL.search, words))):
        affirmed = {index for clause in clauses(text) for index in _affirmed(clause, words)}
        found = sorted(affirmed) or _affirmed(text, words)  # an option may have a comma
    if len(found) != 1 or len(said.split()) > len(words[found[0]].split()) + _MAX_EXTRA_WORDS:
        return None
    return chr(ord("A") + found[0])


def _affirmed(clause: str, words: Sequence[str]) -> list[int]:
    """Return the options in a clause that does not negate them; of nested ones only the longest."""
    said = normalise(clause)
    inside = [i for i, option in enumerate(words) if option and re.search(rf"\b{re.escape(option)}\b", said)]
    longest = [i for i in inside if not any(words[i] != words[j] and words[i] in words[j] for j in inside)]
    return [i for i in longest if not NEGATION.search(said.replace(words[i], " ", 1))]
