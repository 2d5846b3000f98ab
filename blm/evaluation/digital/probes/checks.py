"""Rules that an answer follows or breaks: its length, form, words, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

Rule = Callable[[str], bool]
"""Answer without surrounding space -> whether it follows the rule."""
MANY = 10_000
"""Maximum of a rule that has no maximum."""
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen", "twenty",
)  # fmt: skip
"""Numbers in words, from 0."""


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+(?:-[A-Za-z0-9']+)*", text)


def sentences(text: str) -> int:
    """Count the sentences: runs that end in . ! or ? before a space or the end, unlike "3.5"."""
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())
    return sum(bool(words(part)) for part in parts)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)


def correct_sum(text: str) -> bool:
    """Check that the answer is a sum of two whole numbers, a + b = c, and that it is correct."""
    found = re.fullmatch(r"(\d+) ?\+ ?(\d+) ?= ?(\d+)", text)
    return found is not None and int(found[1]) + int(found[2]) == int(found[3])


def bullets(count: int) -> Rule:
    """Check that exactly `count` lines begin with * or -, and that there are no other lines."""
    return lambda text: len(lines(text)) == count == sum(line[:2] in ("* ", "- ") for line in lines(text))


def marked(count: int, mark: str) -> Rule:
    """Check that there are exactly `count` lines, and that all of them begin with `mark`."""
    return lambda text: len(lines(text)) == count and all(line.startswith(mark) for line in lines(text))


def numbered(count: int) -> Rule:
    return lambda text: [line[:2] for line in lines(text)] == [f"{i}." for i in range(1, count + 1)]


def separated(count: int, mark: str) -> Rule:
    """Check that the answer is one line of `count` short parts with `mark` between them."""
    return lambda text: (
        len(text.split(mark)) == count and len(lines(text)) == 1 and count <= len(words(text)) <= 2 * count
    )


def line_count(count: int) -> Rule:
    return lambda text: len(lines(text)) == count


def paragraphs(count: int) -> Rule:
    return lambda text: len([part for part in re.split(r"\n\s*\n", text.strip()) if words(part)]) == count


def sentence_count(low: int, high: int = 0) -> Rule:
    """Check the number of sentences: exactly `low`, or from `low` to `high`."""
    return lambda text: low <= sentences(text) <= (high or low)


def word_count(low: int, high: int) -> Rule:
    return lambda text: low <= len(words(text)) <= high


def each_word(check: Rule, low: int = 1, high: int = MANY) -> Rule:
    """Check every word, and that there are `low` to `high` of them."""
    return lambda text: low <= len(words(text)) <= high and all(check(word) for word in words(text))


def starts(*beginnings: str) -> Rule:
    return lambda text: text.startswith(beginnings)


def ends(*endings: str) -> Rule:
    return lambda text: text.endswith(endings)


def wrapped(opening: str, closing: str) -> Rule:
    """Check that the whole answer is between two marks."""
    marks = len(opening) + len(closing)
    return lambda text: len(text) > marks and text.startswith(opening) and text.endswith(closing)


def matches(pattern: str) -> Rule:
    """Check that the whole answer has the form of a regular expression."""
    return lambda text: re.fullmatch(pattern, text) is not None


def equals(*answers: str) -> Rule:
    return lambda text: text.strip() in answers


def contains(*parts: str) -> Rule:
    """Check that one of these strings occurs, in this case."""
    return lambda text: any(part in text for part in parts)


def mentions(*wanted: str) -> Rule:
    """Check that every one of these words occurs, in any case."""
    return lambda text: {word.lower() for word in wanted} <= {word.lower() for word in words(text)}


def says(*phrases: str) -> Rule:
    """Check that one of these words or phrases occurs, in any case."""
    wanted = [" ".join(words(phrase.lower())) for phrase in phrases]
    return lambda text: any(f" {phrase} " in f" {' '.join(words(text.lower()))} " for phrase in wanted)


def at_least(count: int, known: str) -> Rule:
    """Check that at least `count` of the words of `known` occur, in any case."""
    wanted = {*known.split()}
    return lambda text: len(wanted & {word.lower() for word in words(text)}) >= count


def number(value: str) -> Rule:
    """Check that a whole number occurs, in digits or as a word."""

    def occurs_in(text: str) -> bool:
        plain = text.replace(",", "").lower()
        found = re.findall(r"\d+(?:\.\d+)?", plain)
        return value in found or (int(value) < len(_NUMBERS) and _NUMBERS[int(value)] in words(plain))

    return occurs_in


def occurs(wanted: str, low: int, high: int = MANY) -> Rule:
    """Check how often a word occurs, in any case."""
    return lambda text: low <= [word.lower() for word in words(text)].count(wanted) <= high


def avoids(*letters_or_words: str) -> Rule:
    """Check that none of these strings occurs, in any case, in a non-empty answer."""
    return lambda text: bool(words(text)) and not any(s.lower() in text.lower() for s in letters_or_words)


def is_json(kind: type, *keys: str) -> Rule:
    """Check that the whole answer is JSON of this kind; an object has exactly these keys."""

    def keeps(text: str) -> bool:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            return False
        return isinstance(value, kind) and (not isinstance(value, dict) or set(value) == set(keys))

    return keeps
