"""The corpus format: one folder with `corpus.jsonl` and the pictures it names.

A line is one conversation in the OpenAI content-part form:
`{"id", "group", "source", "kinds": [...], "messages": [{"role", "content": [{"type": "text", "text"} |
{"type": "image_url", "image_url": {"url": "images/ab12.png"}}]}, ...]}`. Urls are paths relative to the
folder. `kinds` names the question type of each assistant turn. Only this module reads and writes the format.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import PIL.Image

from blm.types import BlmError, Image, Message, Question, Scorer

CORPUS_FILE = "corpus.jsonl"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A dialogue with its reference answers in the assistant turns."""

    id: str
    group: str
    """Conversations about the same scene share a group: 'scene/<robot>/<task>/<seed>'."""
    source: str
    kinds: tuple[str, ...]
    """One per assistant turn."""
    messages: tuple[Message, ...]

    def questions(self) -> Iterator[Question]:
        """Ask every turn on its own: the first turn's pictures, that turn's text, no earlier answers."""
        pictures = next(m for m in self.messages if m.role == "user").images
        asked = [m.text for m in self.messages if m.role == "user"]
        answers = [m.text for m in self.messages if m.role == "assistant"]
        for turn, (kind, text, answer) in enumerate(zip(self.kinds, asked, answers, strict=True)):
            yield Question(
                id=f"{self.id}/{turn}",
                kind=kind,
                messages=(Message("user", (*pictures, text)),),
                answer=answer,
                group=self.group,
                scorer=scorer_of(kind),
                options=options_of(text) if scorer_of(kind) == "choice" else (),
            )


def scorer_of(kind: str) -> Scorer:
    """How answers of a question kind are judged: told by its name."""
    for beginning in ("point", "box", "metric"):
        if kind.startswith(beginning):
            return beginning
    return "choice" if kind.endswith("_choice") else "exact"


def options_of(question: str) -> tuple[str, ...]:
    """The options of a multiple choice: its lines "(A) ...", "(B) ..."."""
    return tuple(re.findall(r"^\([A-Z]\) (.+)$", question, re.MULTILINE))


def write_corpus(folder: Path, conversations: Iterable[Conversation]) -> int:
    """Write a corpus folder in one step and return the number of conversations.

    Pictures in memory are stored as PNG under a name made of their content, so equal ones are stored once.
    Raises BlmError when `folder` exists: a corpus is never overwritten.
    """
    if folder.exists():
        raise BlmError(f"corpus folder '{folder}' exists; remove it or name another one")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "images").mkdir(parents=True)
    count = 0
    with (temporary / CORPUS_FILE).open("w") as file:
        for conversation in conversations:
            file.write(json.dumps(_to_row(conversation, temporary)) + "\n")
            count += 1
    temporary.replace(folder)
    return count


def read_corpus(folder: Path) -> list[Conversation]:
    """Read a corpus. Raises BlmError naming file, line and rule for a row that breaks the format."""
    path = folder / CORPUS_FILE
    if not path.exists():
        raise BlmError(
            f"'{folder}' is not a corpus folder: {CORPUS_FILE} is missing; make one with `blm corpus`"
        )
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(_from_row(json.loads(line)))
        except (KeyError, TypeError, json.JSONDecodeError, BlmError) as error:
            raise BlmError(f"{path}:{number}: not a valid conversation: {error!r}") from error
    return rows


def _to_row(conversation: Conversation, folder: Path) -> dict[str, Any]:
    messages = [
        {"role": m.role, "content": [_part_to_json(part, folder) for part in m.content]}
        for m in conversation.messages
    ]
    return {
        "id": conversation.id,
        "group": conversation.group,
        "source": conversation.source,
        "kinds": list(conversation.kinds),
        "messages": messages,
    }


def _part_to_json(part: str | Image, folder: Path) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.pixels is None:
        return {"type": "image_url", "image_url": {"url": str(part.path)}}
    name = f"images/{hashlib.sha256(part.pixels.tobytes()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        PIL.Image.fromarray(part.pixels).save(folder / name, compress_level=1)
    return {"type": "image_url", "image_url": {"url": name}}


def _from_row(row: dict[str, Any]) -> Conversation:
    messages = []
    for message in row["messages"]:
        if message["role"] not in ROLES:
            raise BlmError(f"role '{message['role']}' is not one of {', '.join(ROLES)}")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append(Message(message["role"], tuple(_part_from_json(part) for part in parts)))
    turns = sum(m.role == "assistant" for m in messages)
    if len(row["kinds"]) != turns:
        raise BlmError(f"{len(row['kinds'])} kinds for {turns} assistant turns")
    return Conversation(
        id=row["id"],
        group=row["group"],
        source=row["source"],
        kinds=tuple(row["kinds"]),
        messages=tuple(messages),
    )


def _part_from_json(part: dict[str, Any]) -> str | Image:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] == "image_url":
        return Image(path=part["image_url"]["url"])
    raise BlmError(f"content part of type '{part['type']}'; valid: text, image_url")
