r"""From a model's raw text to the text of its answer: no reasoning, end tokens, tags, boxes or JSON.

The formats are those that vision-language models publish: `<think>` blocks, chat templates' end
tokens, `<answer>` tags, `\boxed{}`, GLM-4.1V's box tokens, JSON objects with an answer field, and
a last line "Answer: ..".
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from blm.evaluation.digital.parsers.phrases import CORRECTION

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_THINK = r"[<◁](?P<close>/?)(?:think|thinking|thought|reasoning)[>▷]"
_END = re.compile(
    r"<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|eot|end|return|user)\|>|</s>|\[EOS\]|\[/?INST\]"
    r"|<(?:end_of_turn|eos|end_of_utterance)>|<\|end▁of▁sentence\|>"
    r"|<\|im_start\|>|<start_of_turn>|\n[ \t]*#*[ \t]*(?:human|user)[ \t]*:",
    re.IGNORECASE,
)
"""Marks the end of the model's turn; what follows is not its answer."""
_START = re.compile(
    r"^\s*(?:<\|im_start\|>\s*assistant\b|<start_of_turn>\s*model\b|<\|assistant\|>|<\|begin_of_text\|>"
    r"|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<(?:s|bos|pad)>|assistant\s*:)\s*",
    re.IGNORECASE,
)
_CHANNEL = "<|channel|>"
_TAGGED = re.compile(
    r"<(answer|final_answer|ans|final|conclusion|option|choice|result|response)>(?P<xml>.*?)(?:</\1>|$)"
    r"|\[(answer|ans|final)\](?P<square>.*?)(?:\[/\3\]|$)"
    r"|<\|begin_of_box\|>(?P<box>.*?)(?:<\|end_of_box\|>|$)",
    re.DOTALL | re.IGNORECASE,
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_LATEX_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|rm|bf|boldsymbol)\s*\{([^{}]*)\}")
_TAG = re.compile(r"<\|/?[\w▁]{2,30}\|>|</?(?:[A-Za-z][A-Za-z_]{1,20}|[bipu])\s*/?>")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX_SIGN = re.compile(r"\\[,;:! ]|\\[()\[\]]|\$")
_LABEL_WORDS = (
    r"(?:final |correct |selected |best |richtige |正确|最终)?(?:answer|ans\.?|option|choice|antwort)"
    r"|final|respuesta(?: correcta| final)?|r[ée]ponse(?: correcte| finale)?|risposta|resposta"
    r"|(?:正确|最终)?答案(?:是|为)?|答え|正解|回答|答|정답|답변|답"
)
_LABEL = re.compile(
    rf"^[ \t*_#>-]*+(?:the |my )?(?:{_LABEL_WORDS})[ \t*_]*(?:[:=]|\s[–—-]\s)[ \t*_]*+(?P<rest>\S.*)$"
    rf"|^[ \t*_#]*+(?:the |my )?(?:{_LABEL_WORDS})[ \t*_:]*\n[\s*_]*+(?P<next>\S.*)$",
    re.MULTILINE | re.IGNORECASE,
)
_FENCE = re.compile(r"```[\w-]*\s*(.*?)```", re.DOTALL)
_ANSWER_FIELDS = (
    "final_answer",
    "answer",
    "choice",
    "option",
    "result",
    "response",
    "prediction",
    "selected",
)
_UNIT_FIELD = re.compile(r"_(mm|cm|dm|m|in|inches|ft|feet)$")
_MAX_ANSWER = 4_000
"""Longest text that the readers see [characters]; it bounds the time that they take."""
_MAX_JSON = 20_000
"""Longest text that is parsed as JSON [characters]."""


def final_answer(raw: str) -> str:
    r"""Return the answer without reasoning and wrapping; empty when the reasoning was cut off.

    The last tag, \boxed{}, line "Answer: .." or answer field of a JSON object counts, in this
    order and one inside the other; without any, all text after the reasoning.
    """
    text = _last_turn(without_reasoning(raw))
    while True:
        narrow = text
        for step in (_tagged, _boxed, _labelled, _field):
            narrow = step(narrow).strip(" \t\r\n*_$" + ("" if "```" in narrow else "`"))
        if len(narrow) >= len(text):
            return narrow
        text = narrow


def short_answer(raw: str) -> str:
    """Return the final answer for the readers; of a very long one only its beginning and its end."""
    text = final_answer(raw)
    half = _MAX_ANSWER // 2
    return text if len(text) <= _MAX_ANSWER else f"{text[: half - 1]}\n{text[-half:]}"


def without_reasoning(raw: str) -> str:
    """Return the text after the last closed reasoning block; empty when one was never closed."""
    text = unicodedata.normalize("NFKC", re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", raw))  # 1½ is not 11/2
    if _CHANNEL in text:  # the harmony format: all but the final channel is reasoning
        *_, channel = text.split(_CHANNEL)
        name, _, text = channel.partition("<|message|>")
        if name.strip() != "final":
            return ""
    tags = list(re.finditer(_THINK, text, re.IGNORECASE))
    if tags and not tags[-1]["close"]:
        return ""
    return text[tags[-1].end() :] if tags else text  # the prompt may have opened the first


def plain(text: str) -> str:
    """Return a text without markup: LaTeX commands, emphasis, tags, struck-out words."""
    text = _TAG.sub(" ", text)
    text = re.sub(r"~~.*?~~", " ", text, flags=re.DOTALL)
    text = _LATEX_FRACTION.sub(r"\1/\2", _LATEX_COMMAND.sub(r"\1", text))
    return re.sub(r"[*`]|_{2,}|(?<!\w)_|_(?!\w)", "", _LATEX_SIGN.sub(" ", text)).strip()


def normalise(text: str) -> str:
    """Return only the words and numbers of a text, in one form."""
    words = [_DIGITS.get(word, word) for word in re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower())]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words)  # an answer may be the letter A


def parse_json(text: str) -> Any:
    """Return the JSON value that a text is, also with Python's quotation marks; None if it is none."""
    text = text.strip()
    if text[:1] not in ("{", "[") or len(text) > _MAX_JSON:
        return None
    for written in (text, text.replace("'", '"')):
        try:
            return json.loads(written)
        except (ValueError, RecursionError):
            continue
    return None


def fenced(text: str) -> str:
    """Return the content of the only code block; without one, the text."""
    blocks = _FENCE.findall(text)
    return blocks[0].strip() if len(blocks) == 1 else text


def _last_turn(text: str) -> str:
    """Return the model's own turn: no start tokens, nothing behind the first end token."""
    while start := _START.match(text):
        text = text[start.end() :]
    for end in _END.finditer(text):
        if text[: end.start()].strip():
            return text[: end.start()]
    return _END.sub("", text)


def _tagged(text: str) -> str:
    found = list(_TAGGED.finditer(text))
    if not found:
        return text
    return next(found[-1][name] for name in ("xml", "square", "box") if found[-1][name] is not None)


def _boxed(text: str) -> str:
    r"""Return what the last \boxed{} holds; braces may nest."""
    found = list(_BOX.finditer(text))
    if not found:
        return text
    start, depth = found[-1].end(), 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return plain(text[start:index])
    return text[start:]


def _labelled(text: str) -> str:
    """Return the last line "Answer: ..", and what follows if it corrects the answer."""
    found = list(_LABEL.finditer(text))
    if not found:
        return text
    name = "rest" if found[-1]["rest"] is not None else "next"
    behind = text[found[-1].end() :]
    return text[found[-1].start(name) :] if CORRECTION.search(behind) else found[-1][name]


def _field(text: str) -> str:
    """Return the answer's field of a JSON object; a length keeps the unit of its name."""
    inner = fenced(text)
    value = parse_json(inner)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | dict):
        value = value[0]
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return text if value is None else inner
    fields = {str(name).lower(): content for name, content in value.items()}
    for name in _ANSWER_FIELDS:
        if name in fields:
            return _shown(fields[name])
    if len(fields) != 1:
        return inner
    [(name, content)] = fields.items()
    unit = _UNIT_FIELD.search(name)
    if not isinstance(content, int | float | str):
        return inner
    return f"{_shown(content)} {unit[1]}" if unit else _shown(content)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
