"""Reading yes or no, in several languages, from a final answer. Both at once are None."""

from __future__ import annotations

import re
from typing import Literal

from blm.evaluation.digital.parsers.phrases import CONDITION, REFUSAL, after_correction, clauses
from blm.evaluation.digital.parsers.text import plain

YesNo = Literal["yes", "no"]

_WORDS: dict[YesNo, str] = {
    "yes": r"yes|yeah|yep|yup|y|sure(?: thing)?|absolutely|certainly|definitely|of course|indeed"
    r"|affirmative|true|correct|right|possible|not (?:false|incorrect|wrong)|i (?:think|believe|guess) so"
    r"|sí|sì|si|claro|por supuesto|verdadero|correcto|ja|jawohl|natürlich|wahr|richtig"
    r"|oui|bien sûr|vrai|sim|да",
    "no": r"no|nope|nah|n|negative|false|untrue|incorrect|wrong|impossible|by no means"
    r"|not (?:true|correct|right|really|at all|possible|yet)|(?:not|nicht)(?=\W*$)"
    r"|i (?:don['’]?t|do not) (?:think|believe) so"
    r"|nein|falsch|non|faux|pas du tout|falso|não|нет",
}
_LEADING = (
    r"(?:(?>(?:so|then|therefore|thus|hence|but|and|well|ok|okay|the|my|final|correct|answer|statement|claim"
    r"|that|this|it|it['’]s|that['’]s|is|are|would be|must be|should be|i|i['’]d|would|will|say|think|believe"
    r"|guess|seems?|have to|am|sure|afraid|i['’]m|unfortunately|sadly|probably|likely|most|very|clearly"
    r"|still|here|certainly|definitely|absolutely|surely|perhaps|of course|in fact|in short|short|overall|a"
    r"|la respuesta|es|creo que|claro que|la réponse|est|c['’]est|je pense que|bien sûr que|die antwort|ist"
    r"|lautet|das|ich (?:denke|glaube)|natürlich|a resposta|é|[b-h])(?=[\s:()]))[\s:()]++)*"
)
"""Words that may stand before the word that answers, in its clause."""
_BREAK = (
    r"(?=\s*$|\s*(?:[,.:)!]|-(?!\w))"
    r"|\s+(?:it|they|he|she|we|you|i|there|this|that|the|because|since|as|from me)\b)"
)
_CLAUSE: dict[YesNo, re.Pattern[str]] = {
    word: re.compile(rf"\W*{_LEADING}(?:{words}){_BREAK}") for word, words in _WORDS.items()
}
_FIRST = re.compile(r"(yes|no)\b")
_SHORT = re.compile(
    r"(?:it|they|he|she|there|this|that)\s+(?:can|ca|does|do|is|are|will|has|have|could)"
    r"(?P<not>\s*not|n['’]t)?\W*"
)
_IDIOM = re.compile(
    r"\bno (?:problem|doubt|worries|question|issues?)(?: about (?:it|that))?\b"
    r"|\bno (?:idea|clue|comment|answer|information|one|lo sé|sé|se puede)\b"
    r"|\bwithout (?:a |any )?(?:doubt|question)\b"
    r"|\bno\.?\s*(?=\d)|\bnot (?:yes|no)\b|没有?问题\W*"
)
"""Holds a yes or no that does not answer."""
_QUOTED = re.compile(r"[\"“'‘](yes|no|true|false)[\"”'’]")
_CONCLUDES = re.compile(r"(?:so|therefore|thus|hence)\b")
_BOTH = re.compile(r"\b(?:yes|no)\s*(?:/|\||→|->|,?\s*\b(?:and|or|and/or)\b)\s*(?:yes|no)\b")
_CJK_WORDS: dict[YesNo, str] = {
    "no": r"不是|不对|没有|否|不可以|不能|不会|不|错误?|否定的|假"
    r"|아니요|아니오|아뇨|아닙니다|틀립니다|いいえ|違います",
    "yes": r"是的|是|对的|对|有|可以|能|会|正确|肯定的|真"
    r"|네|예|맞습니다|그렇습니다|はい|ええ|そうです|正しい",
}
_CJK_OPEN = r"不是(?![很不])|没有(?!办法)|是的|いいえ|はい|아니요|아니오"
"""These answer even without a break behind them; the others may begin another word."""
_CJK_ENDING = r"(?:です|だ|입니다|이에요|예요|요|的)?\s*(?:[,.!、。]|\s|$)"
_CJK_CLAUSE: dict[YesNo, re.Pattern[str]] = {
    word: re.compile(
        r"(?:答案(?:是|为)?:?|答えは|정답은|답은|我认为|我觉得)?\s*"
        rf"(?=(?:{'|'.join(_CJK_WORDS.values())}){_CJK_ENDING}|{_CJK_OPEN})(?:{words})"
    )
    for word, words in _CJK_WORDS.items()
}


def read_yes_no(text: str) -> YesNo | None:
    """Return yes or no from a final answer; None for both, neither and an unclear answer.

    True and correct are yes, false and incorrect are no. The word counts where it begins the
    answer or makes up a clause with introducing words ("I think the answer is no").
    """
    said = plain(text).lower().strip(" \t\n\"'“”([{")
    said = re.sub(r"\b(is|are|was)n['’]t\b", r"\1 not", after_correction(said, no_corrects=False))
    said = _IDIOM.sub(" ", _QUOTED.sub(r"\1", said)).strip()
    unsure = said.endswith("?") and REFUSAL.search(said)
    if unsure or _BOTH.search(said) or CONDITION.search(said):
        return None
    parts = clauses(said)
    if concluded := [word for part in parts if _CONCLUDES.match(part) for word in _read_clause(part)]:
        return concluded[-1]
    found = {word for part in parts for word in _read_clause(part)}
    if first := _FIRST.match(said):
        found.add("yes" if first[1] == "yes" else "no")
    if not found and (short := _SHORT.fullmatch(said)):
        return "no" if short["not"] else "yes"
    return found.pop() if len(found) == 1 else None


def _read_clause(clause: str) -> list[YesNo]:
    for patterns in (_CJK_CLAUSE, _CLAUSE):
        for word in _ORDER:
            if patterns[word].match(clause):
                return [word]
    return []


_ORDER: tuple[YesNo, YesNo] = ("no", "yes")
"""No first: in Chinese, its words contain those for yes."""
