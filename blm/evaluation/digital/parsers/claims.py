"""What an answer in free words claims: its words in one form, what it denies, the things it names.

Different words for one thing become one word (block and cube, sphere and ball, digits and number
words). A word counts as denied if it follows a negation in its clause ("I can't see a cat"), up to
a word that turns the sentence again ("no cat, but a red cube").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blm.tasks.spec import PALETTE

OBJECT = "object"
"""Kind of a thing that is named by its colour only ("the red one")."""
_KINDS = {
    "cube": ("cube",), "block": ("cube",), "brick": ("cube",), "box": ("cube", "bin"),
    "ball": ("ball",), "sphere": ("ball",), "orb": ("ball",),
    "cylinder": ("cylinder",), "tube": ("cylinder",),
    "bin": ("bin",), "tray": ("bin",), "container": ("bin",),
    "peg": ("peg",), "rod": ("peg",), "bar": ("peg",), "stick": ("peg",),
    "target": ("target",), "bullseye": ("target",), "disc": ("target",), "disk": ("target",),
    "circle": ("target",), "ring": ("target",), "goal": ("goal",),
    "object": (OBJECT,), "thing": (OBJECT,), "item": (OBJECT,),
}  # fmt: skip
"""Word -> the kinds of our scenes that it may name."""
_OTHERS = {
    "apple", "banana", "lemon", "tomato", "carrot", "egg", "bread", "cake", "pizza", "sandwich", "fruit",
    "vegetable", "food", "drink", "coffee", "cup", "mug", "glass", "bottle", "plate", "bowl", "spoon",
    "fork", "knife", "pan", "pot", "jar", "vase", "candle", "lamp", "clock", "book", "pen", "pencil",
    "notebook", "phone", "laptop", "keyboard", "mouse", "television", "cat", "dog", "bird", "fish", "horse",
    "animal", "person", "man", "woman", "child", "boy", "girl", "people", "chair", "sofa", "bed", "shelf",
    "car", "truck", "bicycle", "train", "tree", "flower", "plant", "cone", "pyramid", "triangle",
    "rectangle", "hexagon", "star", "doll", "scissors", "hammer", "screwdriver", "wrench", "bag", "hat",
    "shoe", "sock", "wheel", "umbrella", "guitar", "coin", "stone", "rock", "sponge", "towel", "bucket",
    "basket",
}  # fmt: skip
"""Common things that our scenes never show, which a model may invent."""
_COLORS = {
    **{color: color for color in PALETTE},
    "crimson": "red", "scarlet": "red", "violet": "purple", "lilac": "purple", "rose": "pink",
    "turquoise": "cyan", "teal": "cyan", "aqua": "cyan", "near": "near", "far": "far",
    **{c: c for c in ("black", "brown", "grey", "gray", "silver", "gold", "golden", "beige", "magenta")},
}  # fmt: skip
"""Word -> colour; the words that tell two targets apart count as colours of a target."""
_PLURALS = {"boxes": "box", "discs": "disc", "people": "person", "glasses": "glass", "knives": "knife"}
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_CONTRACTIONS = (
    (r"[’‘`]", "'"),
    (r"\bcannot\b", "can not"),
    (r"\b(?:can't|cant)\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"\b(do|does|did|is|are|was|has|have|could|would)n'?t\b", r"\1 not"),
    (r"'m\b", " am"),
    (r"'re\b", " are"),
    (r"'ve\b", " have"),
    (r"'ll\b", " will"),
    (r"\b(it|there|that|here|what|he|she|nothing)'s\b", r"\1 is"),
    (r"\blight[- ]blue\b", "cyan"),
    (r"\bright (now|next|there|here|above|below|away|behind)\b", r"\1"),
    (r"\ball right\b", "fine"),
)
_NEGATIONS = {"not", "no", "never", "none", "nothing", "neither", "nor", "without", "nobody"}
_TURNS = {
    "but", "only", "just", "however", "except", "besides", "instead", "although", "though", "than", "apart",
    "while", "whereas", "yet", "beyond", "aside",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_MODIFIERS = {
    *_ARTICLES, "small", "little", "tiny", "big", "large", "round", "square", "shiny", "plastic", "wooden",
    "solid", "bright", "dark", "light", "flat", "coloured", "colored", "other", "another", "single",
}  # fmt: skip
_LINKS = {"is", "are", "was", "in", "that", "which", "looks", ",", "(", "and", "both", "it"}
_SEEING = {"see", "find", "spot", "have", "any", "there", "is", "are", "here", "visible", "exist", *_ARTICLES}


@dataclass(frozen=True)
class Word:
    """One word of an answer, in one form."""

    text: str
    denied: bool
    """Whether a negation before it in its clause applies to it."""


@dataclass(frozen=True)
class Mention:
    """One mention of a thing."""

    kinds: tuple[str, ...]
    """The kinds that its noun may name."""
    colors: tuple[str, ...]
    denied: bool
    absent: bool
    """Whether the answer says that no such thing is there."""
    count: int | None
    """The number before it."""
    place: int
    """Index of its noun among the words of its clause."""

    def fits(self, other: Mention) -> bool:
        """Whether this mention may name that thing."""
        if OBJECT not in self.kinds and not {*self.kinds} & {*other.kinds}:
            return False
        if not self.colors or (not other.colors and OBJECT not in self.kinds):
            return True
        return bool({*self.colors} & {*other.colors})


def clauses(text: str) -> list[list[Word]]:
    """Split an answer into clauses of words, in one form, with commas and brackets as words."""
    plain = unicodedata.normalize("NFKC", text).lower()
    for pattern, plainer in _CONTRACTIONS:
        plain = re.sub(pattern, plainer, plain)
    parts = (re.findall(r"[^\W_]+|[,()]", part) for part in re.split(r"[.!?;:\n]+", plain))
    return [_with_denials(_one_form(part)) for part in parts if part]


def _one_form(raw: Sequence[str]) -> list[str]:
    words: list[str] = []
    for index, word in enumerate(raw):
        if word in ("one", "ones") and index and _is_pronoun(raw, index):
            words.append(OBJECT)
            continue
        single = _PLURALS.get(word) or (word[:-1] if word.endswith("s") and _is_noun(word[:-1]) else word)
        words.append(_DIGITS.get(single, _COLORS.get(single, single)))
    return words


def _is_noun(word: str) -> bool:
    return word in _KINDS or word in _OTHERS


def _is_pronoun(words: Sequence[str], index: int) -> bool:
    before, after = words[index - 1], words[index + 1 : index + 2]
    known = before in _COLORS or before in ("the", "this", "that", "which", "another", "other", "a", "an")
    return known and not (after and (_is_noun(after[0].rstrip("s")) or after[0] in _COLORS))


def _with_denials(texts: Sequence[str]) -> list[Word]:
    words: list[Word] = []
    negation = ""
    for index, text in enumerate(texts):
        before = texts[index - 1] if index else ""
        subject = text in ("there", "i", "it", "they", "you", "here")
        new = subject and before in (",", "and", "because", "so", "since")
        other = negation == "no" and text in _ARTICLES and before in (",", "and")  # "no cat and a cube"
        if text in _TURNS or new or other:
            negation = ""
        words.append(Word(text, bool(negation)))
        negation = negation or (text if text in _NEGATIONS else "")
    return words


def mentions(words: Sequence[Word]) -> Iterator[Mention]:
    """Yield the things that a clause names, in order; a list of colours before a noun names several."""
    texts = [word.text for word in words]
    for place, text in enumerate(texts):
        if not _is_noun(text) or (text == "goal" and _is_purpose(texts, place)):
            continue
        kinds = _KINDS.get(text, (text,))
        start, before = _colors_before(texts, place)
        colors = [*before, *_colors_after(texts, place)]
        marker = kinds in (("target",), ("goal",))
        colors = [color for color in colors if (color in ("near", "far")) == marker]
        number = texts[start - 1] if start else ""
        yield Mention(
            kinds=kinds,
            colors=tuple(dict.fromkeys(colors)),
            denied=words[place].denied,
            absent=words[place].denied and _is_absent(texts, start, place),
            count=int(number) if number.isdecimal() else None,
            place=place,
        )


def _is_purpose(texts: Sequence[str], place: int) -> bool:
    """Whether "goal" stands for a purpose."""
    return texts[max(0, place - 1)] in ("my", "your", "its", "our", "main") or [
        *texts[place + 1 : place + 3]
    ] == ["is", "to"]


def _colors_before(texts: Sequence[str], place: int) -> tuple[int, list[str]]:
    """Return where the words of a noun begin, and the colours among them: "a red and a green cube"."""
    colors: list[str] = []
    start = at = place
    while at > 0:
        before = texts[at - 1]
        joins = before in ("and", "or", ",") and bool(colors)
        if before in _COLORS:
            if colors and at > 1 and texts[at - 2] in ("is", "are", "was", "looks"):
                break  # "the ball is red and the green cube"
            colors.insert(0, before)
            start = at - 1
        elif before in _MODIFIERS:
            start = at - 1 if not joins and start == at else start
        elif not joins:
            break
        at -= 1
    return start, colors


def _colors_after(texts: Sequence[str], place: int) -> list[str]:
    """Return the colours that follow a noun: "cube that is red", "cubes are red and green"."""
    colors: list[str] = []
    for at in range(place + 1, len(texts)):
        if texts[at] in _COLORS:
            if _is_before_noun(texts, at):
                return colors
            colors.append(texts[at])
        elif texts[at] not in _LINKS or (texts[at] in (",", "and") and not colors and at > place + 1):
            return colors
    return colors


def _is_before_noun(texts: Sequence[str], place: int) -> bool:
    """Whether a colour belongs to a noun after it: "red ball", "red and green balls"."""
    at = place + 1
    while at < len(texts):
        joins = texts[at] in ("and", "or", ",") and texts[at + 1 : at + 2] and texts[at + 1] in _COLORS
        if not (texts[at] in _COLORS or texts[at] in _MODIFIERS - _ARTICLES or joins):
            return _is_noun(texts[at])
        at += 1
    return False


def _is_absent(texts: Sequence[str], start: int, place: int) -> bool:
    """Whether the negation before a thing denies that it is there: "no red cube", "not see a cat"."""
    for at in range(start - 1, -1, -1):
        if texts[at] in _NEGATIONS:
            after = texts[place + 1] if place + 1 < len(texts) else ""
            return after not in ("besides", "except", "other")
        if texts[at] not in _SEEING:
            return False
    return False
