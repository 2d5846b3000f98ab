"""Numbers as people write them: separators, fractions, exponents, words, the Unicode minus."""

from __future__ import annotations

import re

from blm.evaluation.digital.parsers.text import plain

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ENGLISH = {word: value for value, word in enumerate(_ONES)}
_ENGLISH |= {word: 10 * value for value, word in enumerate(_TENS, start=2)}
_SMALL = "|".join(_ONES[1:10])
_ALONE = "|".join(sorted(_ONES, reverse=True))
_WORD = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})[- ]?(?P<one>{_SMALL})?|(?P<alone>{_ALONE}))\b"
    r"(?P<hundred>\s+hundred\b)?",
    re.IGNORECASE,
)
_FOREIGN = {
    "dos": 2, "tres": 3, "cuatro": 4, "cinco": 5, "seis": 6, "siete": 7, "ocho": 8, "nueve": 9, "diez": 10,
    "eins": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5, "sechs": 6, "sieben": 7, "acht": 8, "neun": 9,
    "zehn": 10, "deux": 2, "trois": 3, "quatre": 4, "cinq": 5, "sept": 7, "huit": 8, "neuf": 9, "dix": 10,
    "cero": 0, "null": 0, "zéro": 0, "uno": 1, "single": 1, "doce": 12, "quince": 15, "veinte": 20,
    "treinta": 30, "zwölf": 12, "fünfzehn": 15, "zwanzig": 20, "dreißig": 30, "onze": 11, "douze": 12,
    "quinze": 15, "vingt": 20, "trente": 30,
}  # fmt: skip
_FOREIGN_WORD = re.compile(rf"\b(?:{'|'.join(_FOREIGN)})\b", re.IGNORECASE)
_HAN = dict(zip("零一二三四五六七八九", range(10), strict=True)) | {"两": 2}
_KOREAN = {"한": 1, "하나": 1, "두": 2, "둘": 2, "세": 3, "셋": 3, "네": 4, "넷": 4, "다섯": 5, "여섯": 6}
_CJK_WORD = re.compile(
    rf"(?P<han>(?P<ten>[{''.join(_HAN)}]?十)?(?P<unit>[{''.join(_HAN)}])?)"
    r"(?<=.)(?=\s*(?:个|個|只|块|把|杯|つ|本|[.,。]|$|厘米|公分|米|毫米|分米|センチ|メートル))"
    rf"|(?<![가-힣])(?P<korean>{'|'.join(sorted(_KOREAN, reverse=True))})(?=\s*(?:개|$|[.,]|입니다))"
)
_FRACTIONS = (
    (re.compile(r"\b(\w+) and a half\b", re.IGNORECASE), r"\1 1/2"),
    (re.compile(r"\b(?:one |a )?half (?:of )?(?:an? |the )?(?=[a-z])", re.IGNORECASE), "1/2 "),
    (re.compile(r"\b(?:one |a )quarter (?:of )?(?:an? )?(?=[a-z])", re.IGNORECASE), "1/4 "),
    (re.compile(r"\bthree[- ]quarters (?:of )?(?:an? )?(?=[a-z])", re.IGNORECASE), "3/4 "),
    (re.compile(r"\ban? (?=(?:(?:centi|milli)?met(?:er|re)|foot|inch|yard)\b)", re.IGNORECASE), "1 "),
)
NUMBER = (
    r"(?<!\d)(?:\d{1,3}(?:,\d{3})+(?:\.\d++)?(?![\d,]\d)|\d{1,3}(?: \d{3})+(?![\d ]\d)"
    r"|\d++\s+\d++/\d++|\d++/\d++|(?:\d++(?:\.\d++)?|\.\d++)[eE][-+]?\d++|\d++,\d++(?!,?\d)"
    r"|\d*+\.\d++|\d++)"
)
"""A number without its sign, in any written form."""
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+")


def with_digits(text: str) -> str:
    """Return a plain text with number words as digits and with the hyphen as only minus sign."""
    text = re.sub(r"[−‐‑﹣]|(?:^|(?<=[\s(]))–(?=\d)", "-", plain(text)).replace("⁄", "/")
    text = re.sub(r"(?<![\w\"'])([\"'“”‘’])([^\"'“”‘’]*)[\"'“”‘’]", r"\2", text)
    for pattern, digits in _FRACTIONS:
        text = pattern.sub(digits, text)
    text = _WORD.sub(lambda found: _value(found), text)
    text = _FOREIGN_WORD.sub(lambda found: str(_FOREIGN[found[0].lower()]), text)
    text = _CJK_WORD.sub(lambda found: _cjk_value(found), text)
    return re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text, flags=re.IGNORECASE)


def _cjk_value(found: re.Match[str]) -> str:
    if found["korean"]:
        return str(_KOREAN[found["korean"]])
    if not found["han"]:
        return ""
    tens = 10 * _HAN.get(found["ten"][0], 1) if found["ten"] else 0
    return str(tens + (_HAN[found["unit"]] if found["unit"] else 0))


def _value(found: re.Match[str]) -> str:
    words = [found[name].lower() for name in ("tens", "one", "alone") if found[name]]
    return str(sum(_ENGLISH[word] for word in words) * (100 if found["hundred"] else 1))


def to_number(written: str) -> float | None:
    """Return the value of a text that `NUMBER` matches; None for a division by zero."""
    whole, _, part = written.rpartition(" ")
    if "/" in written:
        over, under = part.split("/")
        return (float(whole or 0) + float(over) / float(under)) if float(under) else None
    if _THOUSANDS.fullmatch(written):
        return float(re.sub("[, ]", "", written))
    if " " in written:
        return None
    return float(written.replace(",", ".")) if written.count(",") < 2 else None
