"""Turns of published rows: their roles, contents, thoughts and loss switches.

Rows have their turns as "messages" or "conversations" (role/content, from/value, or pairs of
human and assistant), as "prompt" and "completion", as "texts", as "query" and "response", or as
"instruction", "input" and "output". A content is a text, or a list of parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blm.corpora.converters.report import Tally
from blm.corpora.format.faults import RowError
from blm.corpora.format.loss import EXCLUDED, TRAINED, read_loss, read_row_loss
from blm.corpora.format.messages import check_text, settings_of, with_thought
from blm.corpora.format.unsupported import THOUGHTS, require_supported_turn

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
"""Role names in published rows -> our three roles."""
LISTS = ("messages", "conversations", "conversation", "texts", "dialog")
"""Keys of a row that hold a list of turns."""
PAIRS = (("instruction", "output"), ("query", "response"), ("question", "answer"))
"""Keys of a row that hold one question and its answer."""
PART_KINDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "thought",
    "thinking": "thought",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
"""Type of a content part -> what it is."""
TURN_USES = {
    **dict.fromkeys(("role", "from"), "role"),
    **dict.fromkeys(("content", "value"), "text and media"),
    **dict.fromkeys(THOUGHTS, "thought"),
    **dict.fromkeys((*TRAINED, *EXCLUDED), "loss"),
}


@dataclass(frozen=True)
class Medium:
    """A picture or video at its place in a turn."""

    kind: str
    """"image" or "video"."""
    value: Any = None
    """A reference, a mapping with "bytes", or the list of a video's frames; None for the next file
    of the row."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it is to be shown: `blm.corpora.format.messages.SETTINGS`."""


Part = str | Medium


@dataclass(frozen=True)
class Turn:
    """One turn of a row: a text that may have media tags, or a list of parts."""

    role: str
    content: str | tuple[Part, ...]
    loss: bool = True

    @property
    def media(self) -> list[Medium]:
        """The media among the parts."""
        return [] if isinstance(self.content, str) else [p for p in self.content if isinstance(p, Medium)]


def read_turns(row: Mapping[str, Any], tally: Tally) -> tuple[list[Turn], dict[str, str]]:
    """Return the turns of a row, and which of its keys they are from.

    Raises RowError for another shape, an unknown role or content, and unclear loss switches.
    """
    listed, uses = _listed(row)
    turns = []
    for turn in listed:
        turns.append(_turn(turn))
        tally.count(turn, TURN_USES, "turn.")
    if "completion" in uses:  # what is before the completion is its prompt, which is not trained
        prompts = len(listed) - _length(row["completion"])
        turns = [
            replace(turn, loss=turn.loss and (place >= prompts or turn.role != "assistant"))
            for place, turn in enumerate(turns)
        ]
    system = next((row[key] for key in ("system", "system_prompt") if row.get(key)), None)
    masked = read_row_loss(row, [turn.role for turn in turns])
    turns = [replace(turn, loss=turn.loss and kept) for turn, kept in zip(turns, masked, strict=True)]
    if system is not None:
        turns.insert(0, Turn("system", check_text(system)))
        uses |= dict.fromkeys(("system", "system_prompt"), "system turn")
    return turns, uses


def _listed(row: Mapping[str, Any]) -> tuple[list[Any], dict[str, str]]:
    """Return the turns of a row as mappings, and the keys that they are from."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        both = [*_as_turns(row["prompt"], "user"), *_as_turns(row["completion"], "assistant")]
        return both, {"prompt": "turns without loss", "completion": "turns"}
    key = next((key for key in LISTS if row.get(key) is not None), None)
    if key is not None:
        turns = row[key]
        if not isinstance(turns, list):
            raise RowError("malformed row", f"'{key}' is {type(turns).__name__}, no list of turns")
        return [turn for one in turns for turn in _pair(one)], {key: "turns"}
    for question, answer in PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            asked = [row[question], row.get("input") if question == "instruction" else None]
            texts = [check_text(text) for text in asked if text]
            turns = [*_history(row), {"role": "user", "content": "\n".join(texts)}]
            uses = {question: "question", answer: "answer", "input": "question", "history": "turns"}
            return [*turns, {"role": "assistant", "content": row[answer]}], uses
    wanted = (
        f"one of {', '.join(LISTS)}, or {', '.join('+'.join(pair) for pair in PAIRS)}, or prompt+completion"
    )
    raise RowError("malformed row", f"it has {', '.join(map(str, row)) or 'no fields'}; needed: {wanted}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


def _as_turns(value: Any, role: str) -> list[Any]:
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _history(row: Mapping[str, Any]) -> list[Any]:
    turns = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("malformed row", f"'history' has {str(pair)[:60]!r}, no question with its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _pair(turn: Any) -> list[Any]:
    """Return the two turns of a question with its answer, or the turn itself."""
    if isinstance(turn, Mapping) and "assistant" in turn and not {"role", "from", "content"} & turn.keys():
        question = next((key for key in ("user", "human") if key in turn), None)
        if question is not None:
            rest = {key: value for key, value in turn.items() if key not in (question, "assistant")}
            asked = {"role": "user", "content": turn[question]}
            return [asked, {"role": "assistant", "content": turn["assistant"], **rest}]
    return [turn]


def _turn(turn: Any) -> Turn:
    keys = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
    if not isinstance(turn, Mapping) or not set(keys) <= turn.keys():
        raise RowError("malformed row", f"a turn is {str(turn)[:60]!r}: from/value or role/content")
    name, content = (turn[key] for key in keys)
    if not isinstance(name, str) or name not in ROLES:
        raise RowError("unknown role", f"role {name!r}; valid: {', '.join(ROLES)}")
    require_supported_turn(turn)
    role = ROLES[name]
    loss = read_loss(turn) or role != "assistant"
    thought = "".join(check_text(turn[key]) for key in THOUGHTS if turn.get(key))
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        thought += "".join(text for kind, text in parts if kind == "thought" and isinstance(text, str))
        shown = tuple(part for kind, part in parts if kind != "thought")
        if thought and role == "assistant":
            shown = (with_thought(thought, ""), *shown)
        return Turn(role, shown, loss)
    text = check_text(content)
    return Turn(role, with_thought(thought, text) if role == "assistant" else text, loss)


def _part(part: Any) -> tuple[str, Part]:
    """Return what a content part is, and its text or medium."""
    if isinstance(part, str):
        return "text", check_text(part)
    name = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(name, str) or name not in PART_KINDS:
        raise RowError("unsupported content", f"a part of type {name!r}; valid: {', '.join(PART_KINDS)}")
    kind = PART_KINDS[name]
    if kind in ("text", "thought"):
        keys = (name, "text", "value", "content")
        return kind, check_text(next((part[key] for key in keys if part.get(key) is not None), None))
    settings = dict(settings_of(part))
    return kind, Medium(kind, _value(part, name, kind), settings)


def _value(part: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return the reference of a picture or video; None if the part names no file."""
    keys = (name, kind, f"{kind}_url", "value", "path", "url", "file", "base64", "data", "source", "bytes")
    key = next((key for key in keys if part.get(key)), None)
    value = None if key is None else part[key]
    if value is None and name.endswith("_url"):
        raise RowError("malformed row", f"a part of type {name} names no file")
    if key == "base64" or (key == "data" and isinstance(value, str) and not value.startswith("data:")):
        return f"data:;base64,{value}"
    if isinstance(value, Mapping) and not isinstance(value.get("bytes"), bytes):
        if "data" in value:  # Anthropic: {"type": "base64", "media_type", "data"}
            return f"data:;base64,{value['data']}"
        value = value.get("url") or value.get("path")
        if value is None:
            raise RowError("malformed row", f"a part of type {name} names no file")
    return value
