"""Reading a length or a count from a final answer. A range, a bound and two values are None.

Lengths are in cm; the units are metric and imperial, in several languages, also summed ("1 m 20
cm"). Negated values do not count, a correction withdraws what was said before it, and the result
of a sum ("20 cm + 10 cm = 30 cm") or a conclusion ("so the distance is 30 cm") decides between
several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blm.evaluation.digital.parsers.numerals import NUMBER, to_number, with_digits
from blm.evaluation.digital.parsers.phrases import NEGATION, REFUSAL, after_correction, clauses

_UNITS: tuple[tuple[str, float], ...] = (
    (r"mm|mill?im[eèé]t(?:er|re|ro)n?s?", 0.1),
    (r"cm|[cz]ent[ií]m[eèé]t(?:er|re|ro)n?s?", 1.0),
    (r"dm|d[eé][cz]im[eèé]t(?:er|re|ro)n?s?", 10.0),
    (r"m|m[eèé]t(?:er|re|ro)n?s?", 100.0),
    (r"km|kilom[eèé]t(?:er|re|ro)n?s?", 100_000.0),
    (
        r"inch(?:es)?|in(?=\W*$|[.,;)]|\s*\(|\s+(?:away|apart|from|long|wide|high)\b)|pulgadas?|zoll|pouces?",
        2.54,
    ),
    (r"feet|foot|ft|pies?|pieds?", 30.48),
    (r"yards?|yds?", 91.44),
)
"""Names of a unit and its length [cm]; an inch is 2.54 cm by definition (1959)."""
_SIGNS: tuple[tuple[str, float], ...] = (
    (r"毫米|公厘|ミリ(?:メートル)?|밀리(?:미터)?", 0.1),
    (r"厘米|公分|センチ(?:メートル)?|센티(?:미터)?", 1.0),
    (r"分米", 10.0),
    (r"米|公尺|メートル|미터", 100.0),
    (r"\"|″|''|′′", 2.54),
    (r"['′](?=\s*\d+\s*(?:\"|″|''|′′))", 30.48),
)
"""The same for names that other letters may follow."""
_LENGTHS = [value for _, value in (*_UNITS, *_SIGNS)]
_GROUPS = [f"({names})(?![A-Za-zÀ-ÿ0-9/^])" for names, _ in _UNITS] + [f"({names})" for names, _ in _SIGNS]
_UNIT = "|".join(_GROUPS)
_UNNAMED_UNIT = re.sub(r"(?<!\\)\((?!\?)", "(?:", _UNIT)
_SIGNED = rf"(?<![A-Za-zÀ-ÿ0-9_.,/^])(?P<sign>[-+]\s?)?(?P<number>{NUMBER})"
_AMOUNT = re.compile(rf"{_SIGNED}(?:\s?-)?\s*(?:{_UNIT})", re.IGNORECASE)
_BARE = re.compile(rf"{_SIGNED}(?=\s*(?:$|[.,;!?)。](?:\s|$)|\n|(?:away|apart|from|or so|units?)\b))")
_COUNT = re.compile(rf"{_SIGNED}(?![A-Za-zÀ-ÿ0-9/%°:])(?!\s*(?:{_UNNAMED_UNIT}|%))")
_SCALAR = r"[-+]?\d+(?:\.\d+)?"
_VECTOR = re.compile(rf"[(\[]\s*({_SCALAR}(?:\s*,\s*{_SCALAR})+)\s*[)\]](?:\s*(?:{_UNIT}))?", re.IGNORECASE)
_SEVERAL = re.compile(
    rf"{NUMBER}\s*(?:{_UNNAMED_UNIT})?\s*(?:[-–—~]|\b(?:to|or|bis|oder|hasta|ou|by|x|à|a)\b|×|x(?=\s*\d)|至|到|或)\s*"
    rf"(?:about |roughly )?{NUMBER}"
    rf"|\b(?:between|entre|zwischen)\s+(?:about )?{NUMBER}.*?\b(?:and|y|und|et)\s+{NUMBER}",
    re.IGNORECASE | re.DOTALL,
)
"""A range, an alternative or a size."""
_BOUND = re.compile(
    r"(?:\b(?:more|less|greater|fewer|larger|smaller|longer|shorter|farther|further) than|\bat (?:least|most)"
    r"|\b(?:up to|over|under|below|above|within|beyond|exceed\w*|mindestens|höchstens|über|unter)"
    r"|\b(?:más|menos) de|\b(?:plus|moins) de|\bau moins|[<>≤≥]|至少|最多|超过|不到)"
    rf"\s*(?:about |roughly |approximately )?{NUMBER}|\d\s*\+(?!\s*\d)|(?<!more )\bor (?:more|less|fewer)\b"
    r"|以上|以下|이상|이하",
    re.IGNORECASE,
)
_ERROR = re.compile(rf"\s*(?:±|\+/-|\+-)\s*{NUMBER}")
_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|answer|distance|total|altogether|in all|overall|final|gap)\b|共|总|답|答",
    re.IGNORECASE,
)
_SUM = re.compile(r"\d\s*[-+×*/]\s*\d|\d[^,=]*\s[-+×*/]\s[^,=]*\d|\d\)")
_LISTED = re.compile(r"((?:there (?:are|is)|i (?:can )?(?:see|count))\b[^:]*):", re.IGNORECASE)
"""A count with what it counts behind it: "There are 3 cubes: one red, two blue"."""
_NOTHING = re.compile(
    r"(?:there (?:are|is)|i (?:see|count)|it has)?\s*"
    r"(?:no (?!idea|clue|answer|information|comment|one)\w+|none|nothing)\b",
    re.IGNORECASE,
)
_NUMBERED = re.compile(
    r"\b(?:cube|cup|object|item|image|picture|frame|figure|step|option|point|box|room|floor|year|in)\s+$|\d:$",
    re.IGNORECASE,
)
"""Before a number that names a thing, a year or a time."""
_CONTEXT = 200
"""Characters before a number in which its clause begins."""
_SAME = 0.02
"""Relative difference up to which two lengths are one, rounded in two units ("30 cm (12 in)")."""


@dataclass(frozen=True)
class _Value:
    """A number in a text."""

    value: float
    unit: float
    """Length of its unit [cm]; 1 without one."""
    start: int
    end: int


def read_metric(text: str) -> tuple[float, ...] | None:
    """Read a length or vector in cm: "12 cm", "5 inches", "(12, -3, 20) cm"; the default unit is cm.

    None for several different ones, ranges and bounds. Vectors take precedence over lengths,
    lengths with a unit over bare numbers.
    """
    said = _result(text)
    vectors = {_vector(found) for found in _VECTOR.finditer(said)}
    if vectors:
        return vectors.pop() if len(vectors) == 1 else None
    if _SEVERAL.search(said) or _BOUND.search(said):
        return None
    value = _decide(said, _amounts) if _amounts(said) else _decide(said, lambda part: _find(_BARE, part))
    return None if value is None else (round(value, 6),)


def read_count(text: str) -> str | None:
    """Read a number without a unit, in digits: "There are three red cubes" -> "3"."""
    said = _result(text)
    if _SEVERAL.search(said) or _BOUND.search(said):
        return None
    if listed := _LISTED.match(said):
        said = listed[1]
    numbers = _find(_COUNT, said)
    if not numbers and _NOTHING.match(said) and not REFUSAL.search(said):
        return "0"
    value = _decide(said, lambda part: _find(_COUNT, part))
    return None if value is None else f"{value:.15g}"


def _result(text: str) -> str:
    """Return the text behind corrections and the last equals sign, with digits."""
    said = _ERROR.sub("", with_digits(after_correction(text)))
    left, _, right = said.rpartition("=")
    result = right if _SUM.search(left) and re.search(r"\d", right) else said
    return re.sub(r"(?<!\w)\s*[~≈]", " ", result).strip()


def _vector(found: re.Match[str]) -> tuple[float, ...]:
    return tuple(round(float(number) * _length(found), 6) for number in found[1].split(","))


def _length(found: re.Match[str]) -> float:
    """Return the length of the matched unit [cm]; 1 without a unit."""
    names = found.groups()[-len(_LENGTHS) :]
    return next((length for name, length in zip(names, _LENGTHS, strict=True) if name), 1.0)


def _find(pattern: re.Pattern[str], text: str) -> list[_Value]:
    """Return the numbers that a pattern finds, without those that their clause negates."""
    found = []
    for match in pattern.finditer(text):
        value = to_number(match["number"])
        clause = clauses(text[max(match.start() - _CONTEXT, 0) : match.start()] + "#")[-1]
        if pattern is _COUNT and "/" in match["number"]:
            continue
        if pattern is not _AMOUNT and _NUMBERED.search(clause[:-1]):
            continue
        if value is None or not math.isfinite(value) or NEGATION.search(clause):
            continue
        unit = _length(match) if pattern is _AMOUNT else 1.0
        signed = -value if (match["sign"] or "").strip() == "-" else value
        found.append(_Value(signed * unit, unit, match.start(), match.end()))
    return found


def _amounts(text: str) -> list[_Value]:
    """Return the lengths with a unit; one in a smaller unit right behind is added ("1 m 20 cm")."""
    summed: list[_Value] = []
    for one in _find(_AMOUNT, text):
        last = summed[-1] if summed else None
        gap = re.fullmatch(r"\s*(?:and\s+)?", text[last.end : one.start]) if last else None
        if last and gap and 0 <= one.value < last.unit and one.unit < last.unit:
            summed[-1] = _Value(last.value + one.value, one.unit, last.start, one.end)
        else:
            summed.append(one)
    return summed


def _decide(text: str, find: Callable[[str], Sequence[_Value]]) -> float | None:
    """Return the only value, or the only one of the conclusion."""
    values = find(text)
    if not _same(values):
        values = [value for part in clauses(text) if _CONCLUDES.search(part) for value in find(part)]
    return values[0].value if values and _same(values) else None


def _same(values: Sequence[_Value]) -> bool:
    tolerance = 0.0 if all(value.unit == 1.0 for value in values) else _SAME
    return all(math.isclose(one.value, values[0].value, rel_tol=tolerance, abs_tol=1e-9) for one in values)
