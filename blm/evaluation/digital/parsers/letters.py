"""Letters that stand alone in an answer, and what the words around them make of them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from blm.evaluation.digital.parsers.phrases import any_of
from blm.evaluation.digital.parsers.text import plain

_OPEN, _CLOSE = r"(\[{<「『【〔《〈⟨“‘„«\"'", r")\]}>」』】〕》〉⟩”’“»\"'"
_IN_BRACKETS = re.compile(
    rf"(?<![^\W\d_])(?<![{_OPEN}])[{_OPEN}](?:\s*[{_OPEN}])*+\s*([A-Za-z])\s*[{_CLOSE}](?:\s*[{_CLOSE}])*"
)
_LETTER = r"(?:\([A-Z]\)|(?<![A-Za-zÀ-ÿ0-9'’])[A-Z](?![A-Za-zÀ-ÿ0-9]|['’][A-Za-zÀ-ÿ]|-\w))"
_MENTION = re.compile(_LETTER)
_AND = r"(?i:\b(?:and/or|and|or|nor|then|und|oder|noch|y|o|u|et|ou|ni)\b)"
_JOIN = (
    rf"\s*(?:,\s*(?:and |or |nor |then )?|/|&|\||->|→|[.,?]?\s*\(?{_AND}"
    r"|和|或者?|、|还是|と|か|または|와|과|또는)"
    r"\s*(?:(?:maybe|perhaps|possibly|even|option|rather) |选)?"
)
JOIN = re.compile(_JOIN)
"""Joins two letters to a list: neither of them is the answer."""
_LIST = rf"{_LETTER}(?:{_JOIN}(?:option )?{_LETTER})*+"
_TO_BE = r"(?:is|are|was|were|seems?|looks?|ist|sind|es|son|est|sont)"
_ADVERBS = r"(?:(?:both|all|clearly|already|obviously|really|definitely|probably|also|the|an?)\s+)*"
_REJECTING = any_of(
    r"\b(?:not|cannot|neither|nor|never|rather than|instead of|except|unlike|over)\b",
    r"\b(?:(?:any|every)thing but|all but)\b",
    r"\b(?:rul(?:e|ed|ing) out|eliminat\w+|exclud\w+|discard\w*|reject\w*)(?: options?)?\b",
    r"\b(?:no es|non|nicht|weder|pas)\b|n['’]t\b|不是|不选|不可能是|并非|排除",
)
_BETWEEN = any_of(
    "be|is|the|that|it|it['’]s|answer|option|choice|letter|correct|think|believe|clearly|really|definitely",
    "la|die|l['’]option",
)
_WRONG = any_of(
    r"wrong|incorrect|false|impossible|ruled out|out\b|eliminated|excluded|invalid|unlikely|done\b",
    "falsch|incorrect[ao]|fau(?:x|sse)",
)
_IS_NOT = any_of(
    rf"(?:is|are|was|were|does|do|can|could|would|will|has|have|ist|sind)\s+{_ADVERBS}not\b|cannot\b",
    r"(?:is|are|was|were|does|do|ca|can|could|would|wo|has)n['’]t\b|ist nicht|no es|n['’]est pas",
)
_CJK_WRONG = any_of(
    "(?:都|也|이|가|은|는|は|が|も)?\\s*(?:不|错|아니|아닌|아닙|間違|誤|(?:では|じゃ)(?:な|あり))",
    "より|중에?서",
)
REJECTED = (
    re.compile(rf"(?i:{_REJECTING}(?:\s+{_BETWEEN})*)\s*{_LIST}"),
    re.compile(rf"{_LIST}(?:\s*,)?\s+(?i:(?:{_TO_BE}\s+)?{_ADVERBS}{_WRONG})"),
    re.compile(rf"{_LIST}\s+(?i:{_IS_NOT})"),
    re.compile(rf"{_LIST}\s*\?\s*(?i:no|nope|nein|non|i don['’]t think so)\b"),
    re.compile(rf"{_LIST}\s*(?:选项|번|項)?\s*{_CJK_WRONG}"),
)
"""Forms that reject all letters in them: "not A or B", "A is wrong", "A can't be", "A? No"."""
_LEADING_WORDS = """
    a the my it's its it that that's this is was be would could should must has have to so therefore thus
    hence then but and well ok okay hmm hm oh yes right sure i i'd i'm i'll am will think thinking believe
    guess guessing say saying choose choosing pick picking select selecting suppose feel mean go going with
    lean leaning towards seem seems look looks appears like likely most more very probably perhaps maybe
    possibly surely definitely certainly clearly obviously undoubtedly without doubt pretty quite fairly
    absolutely simply just only confident answer answers option choice letter selection response final
    correct best selected one leaves remains corresponds now instead rather on reflection let let's me us
    here assistant vote for actually
    la el es creo pienso que sería opción opcion respuesta correcta correcto por tanto yo diría elijo
    selecciono escojo probablemente posiblemente seguramente quizás quizá tal vez sino
    le c'est je pense crois choisis dirais serait bonne réponse reponse est l'option donc probablement
    sûrement peut être mais
    die der das ist es ich denke glaube würde wähle sagen antwort richtige korrekte richtig korrekt lautet
    also lösung wahrscheinlich vermutlich vielleicht wohl dass bin mir sicher sondern
    é a resposta correta il risposta corretta è
"""
_LEADING = frozenset(_LEADING_WORDS.split())
"""Words that may stand before a letter in its clause without making it anything but the answer."""
_ANSWER_IS = re.compile(
    any_of(
        r"(?i:\b(?:answer|option|choice|subtask|action|step|respuesta|opción|réponse|antwort)\b[^()]*?"
        r"\b(?:is|be|es|est|ist|lautet)\b[\s:]*"
        r"(?:(?:(?:most |very )?likely|probably|clearly|definitely|option|letter)\s*"
        r"|(?:the|la|die|l['’]option)\s*)*)",
        r"(?i:\b(?:choose|select|pick|go(?:ing)? with)\s+(?:option |choice |answer |letter )?)",
        r"(?:答案|正解|正确选项|选择|정답|답은|答え|(?<!可能)选)[^A-Z]{0,4}",
    )
    + "$"
)
"""Declares the letter that follows it in the same clause to be the answer."""
_LABEL = re.compile(r"\b(?:answer|choice|option)[\"']?\s*[=:]\s*[\"']?$", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"\b(?:so|but|therefore|thus|hence|sondern|sino|mais)\b"
    r"(?!.*\b(?:maybe|perhaps|possibly|could|might)\b)[^.;!?\n]*$",
    re.IGNORECASE,
)
"""A clause that concludes or contrasts: its letter outweighs the ones before."""
_ANSWER = any_of(
    "correct|right|best|true|better|(?:most|more) (?:likely|plausible)",
    r"(?:correct |right |best |most \w+ )?(?:answer|option|choice)",
    "richtig|korrekt|richtige antwort|correct[ao]|(?:respuesta|opción) correcta",
    "correcte|exacte|bonne réponse",
)
_IS_ANSWER = re.compile(
    any_of(
        r"\s*(?i:(?:is|would be|seems|looks|appears|ist|es|est)\s+(?:to be )?"
        rf"(?:(?:the|a|my|la|die|very|clearly|definitely|now|indeed)\s+)*{_ANSWER}\b)",
        r"\s*(?i:(?:fits|matches|makes|seems) (?:best|better|more sense|the most sense)\b)",
        r"\s*(?i:(?:richtig|korrekt) ist\b)",
        r"\s*(?:选项)?(?:是)?(?:正确|が正しい|対)",
    )
)
"""Claims that the letter before it is the answer."""
_REASON = re.compile(
    any_of(
        r"\s*(?i:because|since|as|due to|given|rather than|instead of|over|and not|not|option|to me|here)\b",
        r"\s*(?i:it is|i (?:think|guess|believe|suppose|would say)|for sure|with (?:high|low|full|\d+))\b",
        r"\s*(?i:seems|fits|matches|makes sense)\b",
        r"\s*(?i:(?:is|looks) (?:very |quite )?(?:likely|plausible|possible))\b",
        r"\s*(?i:is|sí|ja)(?=\W*$)",
        r"\s*(?i:wählen|porque|ya que|weil|denn|da|parce|car|puisque)\b",
        r"\s*[:,()]|\s*[–—-]\s",
    )
)
"""May follow a letter that is the answer."""
_STOP = re.compile(
    r"[;,:!?\n。！？，、；：]|\.(?=\s|\.|$)|\s[–—-]\s|—|\b(?:so|but|therefore|thus|hence|sondern|sino|mais)\b"
)
_SMALL_LETTERS = (
    re.compile(r"^\W*[a-z](?=\W*$)"),
    re.compile(r"^[a-z](?=[.):]\s)", re.MULTILINE),
    re.compile(r"(?i:\b(?:answer|option|choice)\b)[^.;\n]{0,30}?\s[a-z](?=\s*[.!]?\s*$)", re.MULTILINE),
)
"""A small letter, at the end of the match, that is an option's."""
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CONTEXT = 200
"""Characters before and behind a letter that are looked at."""


@dataclass(frozen=True)
class Mention:
    """A letter that stands alone in a text."""

    letter: str
    start: int
    end: int
    bracketed: bool
    lead: str
    """Text before the letter."""
    before: str
    """The same from the clause's start on."""
    after: str
    """Text behind the letter."""
    rest: str
    """The same up to the clause's end."""

    @property
    def declared(self) -> bool:
        """Whether the words around the letter say that it is the answer."""
        if self.article:
            return False
        declares = _ANSWER_IS.search(self.before) or _LABEL.search(self.lead)
        concludes = self.bare and _CONCLUDES.search(self.lead)
        return bool(declares or concludes or _IS_ANSWER.match(self.after))

    @property
    def bare(self) -> bool:
        """Whether the clause holds nothing but introducing words, the letter and a reason."""
        written = _MENTION.sub("", self.before) if _CJK.search(self.before) else self.before
        words = re.findall(r"[A-Za-zÀ-ÿ]+(?:'[A-Za-zÀ-ÿ]+)?", written.lower().replace("’", "'"))
        if self.article or not all(word in _LEADING for word in words):
            return False
        follows = not re.search(r"\w", self.rest) or _REASON.match(self.after)
        label = self.bracketed and not self.before.strip()
        return bool(follows or label or _CJK.match(self.after.strip(" )")))

    @property
    def article(self) -> bool:
        """Whether an A is the word: one without brackets that another word follows."""
        return (
            self.letter in "AI"
            and not self.bracketed
            and bool(re.match(r"\s+[a-zà-ÿ]", self.after))
            and not (_REASON.match(self.after) or _IS_ANSWER.match(self.after))
        )


def canonical(text: str) -> str:
    """Return the text with letters in any brackets or quotes as "(X)" and labels as capitals."""
    text = _IN_BRACKETS.sub(lambda found: f"({found[1].upper()})", plain(text))
    for pattern in _SMALL_LETTERS:
        text = pattern.sub(lambda found: found[0][:-1] + found[0][-1].upper(), text)
    return text


def find_mentions(text: str, letters: Sequence[str]) -> list[Mention]:
    """Return all letters that stand alone; I is a pronoun unless there are so many options."""
    stops = [stop.span() for stop in _STOP.finditer(text)]
    starts, ends = [0, *(end for _, end in stops)], [*(start for start, _ in stops), len(text)]
    found = []
    for match in _MENTION.finditer(text):
        letter = match[0].strip("()")
        if letter == "I" and "I" not in letters:
            continue
        start = starts[bisect_right(starts, match.start()) - 1]
        end = ends[bisect_left(ends, match.end())]
        found.append(
            Mention(
                letter=letter,
                start=match.start(),
                end=match.end(),
                bracketed="(" in match[0],
                lead=text[max(match.start() - _CONTEXT, 0) : match.start()],
                before=text[start : match.start()],
                after=text[match.end() : match.end() + _CONTEXT],
                rest=text[match.end() : end],
            )
        )
    return found
