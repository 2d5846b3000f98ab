"""Phrases that decide which part of an answer counts: corrections, negations, refusals, clauses."""

from __future__ import annotations

import re


def any_of(*forms: str) -> str:
    """Return a pattern for any of these patterns."""
    return f"(?:{'|'.join(forms)})"


CORRECTION = re.compile(
    r"(?:\b(?:i mean|i meant|scratch that|my (?:mistake|bad)|on second thought"
    r"|let me (?:correct (?:myself|that)|reconsider|rethink|think again)"
    r"|correction|korrektur|mejor dicho|corrección)\b"
    r"|(?<=[.,;:!?)\]}—–\n-])\s*(?:(?:oh|no|hmm+)\b[\s,.]*)?"
    r"(?:actually|wait|hold on|sorry|oops|hmm+|warte|moment|perdón|espera|pardon|attends)\b"
    r"|等等|更正)[\s,.:;!。，—–-]*",
    re.IGNORECASE,
)
"""Withdraws what was said before it; most of these words do so only at the start of a clause."""
_NO = re.compile(r"(?<=[.,;!?—–-])\s*(?:no|nope|nein|non|不|いや)\s*[,.:!—–-]+\s*", re.IGNORECASE)
_LEADING_NO = re.compile(r"\s*(?:no|nope|nein|non)\b[\s,.:!—–-]+", re.IGNORECASE)
REFUSAL = re.compile(
    r"\b(?:sorry|cannot|can['’]?t|unable to|not (?:able|possible) to|not sure|unsure|uncertain|unclear|"
    r"none of (?:the|these|them|those)|neither|not enough information|insufficient|unknown|as an ai|"
    r"(?:do|does|did)(?: not|n['’]t) (?:know|see|have)|no (?:correct|valid) (?:answer|option)|"
    r"(?:im)?possible to (?:tell|say|know|determine)|hard to (?:tell|say)|undetermined|n/a)\b"
    r"|无法|不知道|不清楚|不确定|알 수 없|모르|わかりません|分かりません|不明"
    r"|\bno (?:lo )?s[ée]\b|\bno puedo\b|\b(?:weiß|kann) (?:(?:ich|das|es) )*nicht\b|\bje ne (?:sais|peux)\b",
    re.IGNORECASE,
)
"""The answer may be refused; a reading then needs a declared answer."""
NEGATION = re.compile(
    r"\b(?:not|no|never|neither|none|nor|cannot|wrong|incorrect|without|\w+n['’]t|\w+n t"
    r"|nicht|kein\w*|nunca|tampoco|pas|jamais)\b|\b(?:rather than|instead of)\b",
    re.IGNORECASE,
)
CONDITION = re.compile(r"\b(?:otherwise|depends|depending)\b", re.IGNORECASE)
"""The answer holds under a condition only."""
_CLAUSE = re.compile(
    r"\s*(?:[;!?。！？，、;\n]|\.+(?=\s|$)|,(?!\d)|\s[–—-]+\s|—)\s*|\s+(?=(?:but|sondern|sino|mais)\b)",
    re.IGNORECASE,
)


def after_correction(text: str, *, no_corrects: bool = True) -> str:
    """Return what follows the last correction ("A. Actually, B"); the text itself without one.

    `no_corrects`: a "no" between two answers corrects the first one ("A... no, B").
    """
    found = [*CORRECTION.finditer(text), *(_NO.finditer(text) if no_corrects else ())]
    ends = [m.end() for m in found if text[: m.start()].strip(" \n.,") and text[m.end() :].strip(" \n.,!?")]
    if not ends:
        return text
    rest = text[max(ends) :]
    return _LEADING_NO.sub("", rest, count=1) if no_corrects and _LEADING_NO.match(rest) else rest


def clauses(text: str) -> list[str]:
    """Split a text at sentence ends, commas, dashes, line ends and "but"."""
    return [clause for clause in _CLAUSE.split(text) if clause.strip()]
