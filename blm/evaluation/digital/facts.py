"""Score of an answer in free words: which key facts it states, which it lacks, and what is false.

Facts count, not form: "On the left there's a block that is red" states "left" and "red cube". An
answer is right only if it states every required fact and nothing that is known to be false, so an
answer that names an object which is not there is wrong, whatever else it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from blm.evaluation.digital.parsers.claims import OBJECT, Mention, Word, clauses, mentions
from blm.types import BlmError, KeyFacts

_YES = r"\W*(?:yes|yeah|yep|sure|certainly|of course|correct|indeed|absolutely)\b(?!\s+not\b)"
_NO = r"\W*(?:no|nope|not)\b"
_RELATION = re.compile(r"(.+) <(left|right)> (.+)")
_OPPOSITE = {"left": "right", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class FactCheck:
    """The key facts of a question in one answer."""

    found: tuple[str, ...]
    """Required facts that it states."""
    missing: tuple[str, ...]
    """Required facts that it does not state."""
    false: tuple[str, ...]
    """What it states against the truth: forbidden facts, things that are not there, and things that
    are there but denied."""

    @property
    def right(self) -> bool:
        return not self.missing and not self.false

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{name: tuple(facts) for name, facts in value.items()})


def check_facts(answer: str, facts: KeyFacts) -> FactCheck:
    """Return which of the facts an answer states. Raises BlmError for a thing of unknown name."""
    read = _Answer(answer, [_thing(name) for name in facts.things])
    stated = [fact for fact in facts.required if any(read.states(one) for one in fact.split("|"))]
    false = [fact for fact in facts.forbidden if any(read.asserts(one) for one in fact.split("|"))]
    false += [f"not {fact}" for fact in facts.required if read.contradicts(fact)]
    return FactCheck(
        found=tuple(stated),
        missing=tuple(fact for fact in facts.required if fact not in stated),
        false=tuple(dict.fromkeys([*false, *read.false_things()])),
    )


def _thing(name: str) -> Mention:
    found = [mention for clause in clauses(name) for mention in mentions(clause)]
    if len(found) != 1 or OBJECT in found[0].kinds:
        raise BlmError(f"key fact '{name}' is no thing; valid: a colour and a kind, such as 'red cube'")
    return found[0]


class _Answer:
    """An answer that has been read, and the things that are there."""

    def __init__(self, text: str, things: Sequence[Mention]) -> None:
        self.things = things
        leading = "yes" if re.match(_YES, text, re.I) else "no" if re.match(_NO, text, re.I) else ""
        rest = re.sub(rf"^(?:{_YES}|\W*no(?:pe)?\b(?=\s*[,.!;:-]))", "", text, count=1, flags=re.I)
        self.clauses = clauses(rest)
        self.mentions = [list(mentions(clause)) for clause in self.clauses]
        self.leading = leading
        self.empty = not clauses(text)

    def states(self, fact: str) -> bool:
        """Whether the answer states one fact, and does not deny it."""
        if fact in ("yes", "no"):
            return not self.empty and (self.leading or self._implied()) == fact
        if fact.startswith("#"):
            return self._number() == int(fact[1:])
        if relation := _RELATION.fullmatch(fact):
            return relation[2] in self._sides(relation[1], relation[3])
        wanted = [mention for clause in clauses(fact) for mention in mentions(clause)]
        if len(wanted) == 1 and OBJECT not in wanted[0].kinds:
            return any(self._names(mention, wanted[0]) for found in self.mentions for mention in found)
        phrase = fact.split()
        return any(_has_phrase(clause, phrase) for clause in self.clauses)

    def asserts(self, fact: str) -> bool:
        """Whether the answer states a fact expressly; a yes or no is not read between the lines."""
        return self.leading == fact if fact in ("yes", "no") else self.states(fact)

    def contradicts(self, fact: str) -> bool:
        """Whether the answer states the opposite of a relation."""
        relation = _RELATION.fullmatch(fact)
        return relation is not None and _OPPOSITE[relation[2]] in self._sides(relation[1], relation[3])

    def false_things(self) -> Iterator[str]:
        """Yield the things that are named but not there, and those that are there but denied."""
        for mention in (mention for found in self.mentions for mention in found):
            if OBJECT in mention.kinds and not mention.colors and mention.count is None:
                continue
            each = [replace(mention, colors=(color,)) for color in mention.colors] or [mention]
            there = [[thing for thing in self.things if one.fits(thing)] for one in each]
            for one, fitting in zip(each, there, strict=True):
                if not fitting and not mention.denied:
                    yield f"a {_name(one)}"
                elif fitting and mention.absent:
                    yield f"no {_name(one)}"
            known = {id(thing) for fitting in there for thing in fitting}
            if mention.count is not None and mention.count > len(known) > 0 and not mention.denied:
                yield f"{mention.count} {_name(mention)}"

    def _implied(self) -> str:
        """Return what an answer without a yes or no says: no if its first clause has a negation."""
        first = self.clauses[0] if self.clauses else []
        return "no" if any(word.denied for word in first) or _negates(first) else "yes"

    def _number(self) -> int | None:
        """Return the number of objects that the answer gives, or else its first number."""
        texts = [[word.text for word in clause] for clause in self.clauses]
        before = [
            m.count for found in self.mentions for m in found if OBJECT in m.kinds and m.count is not None
        ]
        numbers = [int(text) for clause in texts for text in clause if text.isdecimal()]
        return next(iter([*before, *numbers]), None)

    def _names(self, mention: Mention, thing: Mention) -> bool:
        """Whether a mention names this thing and no other."""
        vague = OBJECT in mention.kinds and not mention.colors
        if vague or mention.denied or not mention.fits(thing):
            return False
        if not thing.colors or (mention.colors and OBJECT not in mention.kinds):
            return True
        return sum(mention.fits(other) for other in self.things) <= 1

    def _sides(self, one: str, other: str) -> set[str]:
        """Return the sides of `other` on which the answer puts `one`."""
        first, second = _thing(one), _thing(other)
        sides = set[str]()
        for clause, found in zip(self.clauses, self.mentions, strict=True):
            references = set[int]()
            for place, word in enumerate(clause):
                if word.text not in _OPPOSITE:
                    continue
                before = [m for m in found if m.place < place and m.place not in references][-1:]
                after = [m for m in found if m.place > place][:1]
                of = any(after.text == "of" for after in clause[place + 1 : place + 3])
                references |= {m.place for m in after if of}
                if word.denied:
                    continue
                if before or not of:  # "cube left of ball", "on the left is the cube"
                    flipped = any(m.fits(second) and not m.fits(first) for m in before or after)
                else:  # "left of the ball"
                    flipped = any(m.fits(first) and not m.fits(second) for m in after)
                sides.add(_OPPOSITE[word.text] if flipped else word.text)
        return sides


def _negates(clause: Sequence[Word]) -> bool:
    return any(word.text in ("no", "not", "nothing", "none", "never", "neither") for word in clause)


def _has_phrase(clause: Sequence[Word], phrase: Sequence[str]) -> bool:
    """Whether the words of a phrase, or beginnings such as "mov*", stand together and are not denied."""
    kept = [word for word in clause if word.text not in ("a", "an", "the", ",")]
    parts = (kept[start : start + len(phrase)] for start in range(len(kept) - len(phrase) + 1))
    return any(
        not part[0].denied and all(_matches(word.text, form) for word, form in zip(part, phrase, strict=True))
        for part in parts
    )


def _matches(word: str, form: str) -> bool:
    return word.startswith(form[:-1]) if form.endswith("*") else word == form


def _name(mention: Mention) -> str:
    return " ".join([*mention.colors, mention.kinds[0]])
