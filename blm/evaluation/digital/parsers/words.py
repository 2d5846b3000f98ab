"""Reading a short answer in words from a final answer: "I think the cube is red." -> "red"."""

from __future__ import annotations

import re

from blm.evaluation.digital.parsers.phrases import NEGATION, REFUSAL, after_correction, clauses
from blm.evaluation.digital.parsers.text import plain

_HEDGE = re.compile(
    r"(?:(?:i (?:think|believe|guess|suppose)|i(?:['’]d| would) (?:say|guess)|probably|perhaps|maybe"
    r"|most likely|likely|definitely|clearly|so|therefore|thus|hence|but|well|that(?!['’]))\b[\s,:]*)+",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"(?:it['’]s|that['’]s|there (?:is|are)|i (?:can )?see|the (?:image|picture) (?:shows|contains)|\w+:"
    r"|(?:it|this|that|(?:the|this|that|its|my)\s(?:[\w'’-]+\s){1,8}?)\s*"
    r"(?:is|are|was|looks?|seems?|appears?|would be|must be|should be)(?: to be| like)?)\s+"
    r"(?:(?:probably|most likely|likely|clearly|definitely)\s+)?",
    re.IGNORECASE,
)
_REASON = re.compile(
    r"(?<=\w)\s*,?\s*\b(?:because|since|as it|to me|i (?:think|guess|believe))\b.*$",
    re.IGNORECASE | re.DOTALL,
)
_ASIDE = re.compile(r"\s*\((?:not|rather than|instead of)\b[^)]*\)", re.IGNORECASE)
_PLACE = re.compile(r"(?:in|on|at|from|based on|looking at|according to)\b", re.IGNORECASE)
"""Begins a clause that says where the answer comes from."""
_CUT = re.compile(r"(?:the |my )?(?:final )?(?:answer|colou?r|shape) (?:is|of)?\W*$", re.IGNORECASE)
_OR = re.compile(r"\bor\b|/", re.IGNORECASE)
_MAX_WORDS = 4
"""A sentence around words is taken off only if at most this many remain; longer answers stay whole."""


def read_words(text: str) -> str | None:
    """Return the words that answer, without the sentence around them; None if there are none.

    None also for a refusal, two alternatives and words that are only negated. A long answer is
    returned as it is: whether its sentence is part of the answer is not known.
    """
    said = _REASON.sub("", _ASIDE.sub("", after_correction(plain(text)))).strip(" \t\n\"'“”‘’")
    if not said or _CUT.fullmatch(said):
        return None
    parts = clauses(said)
    parts = [part for part in parts[:-1] if not _PLACE.match(part)] + parts[-1:]
    affirmed = [bare for part in parts if (bare := _bare(part)) and not NEGATION.search(part)]
    if len(affirmed) != 1:
        return None if REFUSAL.search(said) or not affirmed else said
    short = len(affirmed[0].split()) <= _MAX_WORDS
    if REFUSAL.search(said) or (short and _OR.search(affirmed[0])):
        return None
    return affirmed[0] if short else said


def _bare(clause: str) -> str:
    """Return a clause without hedges, subject and verb."""
    said = clause[hedge.end() :] if (hedge := _HEDGE.match(clause)) else clause
    said = said[subject.end() :] if (subject := _SUBJECT.match(said)) else said
    return said.strip(" \t\n\"'“”‘’.!")
