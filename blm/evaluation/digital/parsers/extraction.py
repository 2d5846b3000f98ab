"""Answer extraction: from a model's raw text to its answer, or to None. Nothing is guessed.

The answer follows the reasoning. A letter counts where it is the whole answer, is a label at the
start or end of it, is declared ("the answer is (B)", "C is correct"), or is the only one in
brackets; two letters of equal standing, a denied letter and a refusal are parsed as None. "A"
before a word is an article. An option's own text stands for its letter. Places and lengths are
parsed in coordinates.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_THINK = r"[<◁](?P<close>/?)(?:think|thinking|thought|reasoning)[>▷]"
# in brackets or quotes; a capital, unless A or I is a word; a small letter that ends the line
_LETTER = (
    r"""(?:["'(\[](?P<b>[A-Za-z])["')\]]|(?P<u>[B-HJ-Z]|[AI](?!\s+[a-z]))(?![\w'’-])"""
    r"""|(?P<l>[a-z])(?=\s*[.!]?\s*$))"""
)
_ALTERNATIVE = re.compile(r"""\W*(?:and/or|and|or|/|,|&|\|)\s*["'(\[]?[A-Z]\b(?!['’])""")
_DENIAL = re.compile(r"\W*(?:(?:is|was|seems|looks) )?(?:isn['’]t|not|wrong|incorrect|false|ruled out)\b")
_NEGATION = re.compile(r"\b(?:not|no|never|neither|none|nor|cannot|wrong|incorrect|\w+n['’]t|\w+n t)\b")
_REFUSAL = re.compile(
    r"\b(?:sorry|cannot|can['’]?t|unable to|not possible to|none of (?:the|these|them|those)|neither|"
    r"not enough information|insufficient|no (?:correct|valid) (?:answer|option))\b",
    re.IGNORECASE,
)
_LONE = re.compile(
    r"""(?i:(?:(?:the |my )?(?:final |correct )?(?:option|choice|answer)\s*:?\s*)?)"""
    r"""["'(\[]?(?P<letter>[A-Za-z])["')\]]?\s*[.:!,]?"""
)
_START = re.compile(
    r"\((?P<a>[A-Za-z])\)|\[(?P<b>[A-Za-z])\]|(?P<c>[A-Za-z])[.):](?=\s|$)|(?P<d>[A-Z])(?=,\s|;\s|\n|\s[–—-]\s)"
)
_DECLARED = (
    re.compile(
        r"""(?i:\b(?:answer|option|choice)["']?\s*(?:is|would be|should be|must be|:|=)\s*)"""
        r"""(?P<not>not\b)?[\s:]*(?:(?:most |very )?(?:likely|probably|clearly|definitely) )?"""
        r"(?i:(?:option|choice|answer)\b)?[\s:]*" + _LETTER,
        re.MULTILINE,
    ),
    re.compile(
        r"\bI(?:['’]d)?\s+(?:would |will )?(?P<not>not |never )?(?:choose|select|pick|go with)\s+"
        r"(?:option |choice |answer )?" + _LETTER,
        re.MULTILINE,
    ),
    re.compile(
        r"""["'(\[]?\b(?P<u>[A-Z])["')\]]?\s+(?:is|seems|looks|appears|would be)\s+(?P<not>not )?"""
        r"(?:to be )?(?:(?:the|a|most|clearly|definitely) )*(?:correct|right|best|answer|likely|plausible)\b"
    ),
    re.compile(r"""答案(?:是|为|:)\s*(?P<not>不)?["'(\[]?(?P<u>[A-Z])"""),
)
_AMBIGUOUS = "?"
"""Result where letters contradict each other or a letter is denied: no later rule decides."""


def final_answer(raw: str) -> str:
    r"""Return the answer without the reasoning; empty when the reasoning was cut off.

    The last <answer> tag or \boxed{} counts; without one, the last line "Answer: ..."; without
    that, all text after the reasoning.
    """
    text = without_reasoning(raw)
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL | re.IGNORECASE)
    boxed = re.findall(r"\\boxed\{(?:\\text\{)?([^{}]*)\}", text)
    label = r"^[\s*_#]*(?:final )?answer[\s*_]*:[\s*_]*(.+)$"
    labelled = re.findall(label, text, re.MULTILINE | re.IGNORECASE)
    return [text, *labelled[-1:], *boxed[-1:], *tagged[-1:]][-1].strip(" \t\r\n*_`$")


def without_reasoning(raw: str) -> str:
    """Return the text after the last closed reasoning block; empty when one was never closed."""
    text = unicodedata.normalize("NFKC", raw)
    tags = list(re.finditer(_THINK, text, re.IGNORECASE))
    if tags and not tags[-1]["close"]:
        return ""
    return text[tags[-1].end() :] if tags else text  # the prompt may have opened the first


def normalise(text: str) -> str:
    """Return only the words and numbers of a text, in one form."""
    words = [_DIGITS.get(word, word) for word in re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower())]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words)  # an answer may be the letter A


def read_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Read yes or no: the first word, or the word after "the answer is". Both at once are None."""
    words = text.lower().strip(" \t\n*_`\"'([")
    found = re.match(r"(yes|no)\b(?!\s*[/|,]?\s*(?:and|or)?\s*(?:yes|no)\b)", words)
    declared = re.findall(r"\banswer (?:is|would be)[\s:\"'*]*(yes|no)\b", words)
    word = found[1] if found else declared[-1] if declared else None
    return "yes" if word == "yes" else "no" if word == "no" else None


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter of the option that the answer names, in upper case, or None.

    `text` is a `final_answer`. Without `options`, the valid letters are A to H.
    """
    plain = re.sub(r"[*`_]{1,3}", "", text).strip()
    letters = [chr(ord("A") + index) for index in range(len(options) or 8)]
    for read in (_whole, _at_start, _declared, _last_line):
        found = read(plain)
        if found is not None:
            return found if found in letters else None
    if not _REFUSAL.search(plain) and (found := _bracketed(plain)):
        return found if found in letters else None
    return _by_text(plain, options)


def _whole(text: str) -> str | None:
    found = _LONE.fullmatch(text)
    return found["letter"].upper() if found else None


def _at_start(text: str) -> str | None:
    """Read a letter at the start, as in "B. Pick it up", "(b) pick it up" and "B, because ..".

    None if several lines or an alternative follow.
    """
    found = _START.match(text)
    if found is None:
        either = re.match(r"[\"'(\[]?[A-Z][\"')\]]?(?=\s*(?:,|/|&|\||or\b|and\b))", text)
        return _AMBIGUOUS if either and _ALTERNATIVE.match(text[either.end() :]) else None
    letter = next(part for part in found.groups() if part).upper()
    labels = {
        next(part for part in match.groups() if part).upper()
        for line in text.splitlines()
        if (match := _START.match(line.strip()))
    }
    rest = text[found.end() :]
    if len(labels) > 1 or _ALTERNATIVE.match(rest) or _DENIAL.match(rest):
        return _AMBIGUOUS
    return letter


def _declared(text: str) -> str | None:
    """Return the last letter that is declared to be the answer."""
    found = [match for pattern in _DECLARED for match in pattern.finditer(text)]
    if not found:
        return None
    last = max(found, key=lambda match: match.end())
    letter = next(part for name, part in last.groupdict().items() if name != "not" and part).upper()
    if last["not"] or _ALTERNATIVE.match(text[last.end() :]):
        return _AMBIGUOUS
    return letter


def _last_line(text: str) -> str | None:
    """Return a letter that is alone on the last line, if no other line is a letter."""
    lone = {match["letter"].upper() for line in text.splitlines() if (match := _LONE.fullmatch(line.strip()))}
    last = _LONE.fullmatch(text.splitlines()[-1].strip()) if text else None
    if last is None:
        return None
    return last["letter"].upper() if len(lone) == 1 else _AMBIGUOUS


def _bracketed(text: str) -> str | None:
    """Return the only letter in round brackets, unless it is denied."""
    found = list(re.finditer(r"(?<!\w)\(([A-Z])\)(?!\w)", text))
    if len({match[1] for match in found}) != 1:
        return _AMBIGUOUS if found else None
    denied = any(
        _DENIAL.match(text[match.end() :]) or re.search(r"\b(?:not|n['’]t)\s+$", text[: match.start()])
        for match in found
    )
    return _AMBIGUOUS if denied else found[0][1]


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """Return the option whose words are the answer, or the only one in a short answer."""
    said, words = normalise(text), [normalise(option) for option in options]
    equal = [index for index, option in enumerate(words) if option == said]
    if len(equal) == 1:
        return chr(ord("A") + equal[0])
    inside = [i for i, option in enumerate(words) if option and re.search(rf"\b{re.escape(option)}\b", said)]
    inside = [i for i in inside if not any(words[i] in words[j] and words[i] != words[j] for j in inside)]
    if len(inside) != 1:
        return None
    rest = said.replace(words[inside[0]], " ", 1)
    long = len(rest.split()) > len(words[inside[0]].split()) + 8
    return None if long or _NEGATION.search(rest) else chr(ord("A") + inside[0])
