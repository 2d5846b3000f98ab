"""Access to the model under evaluation: batches, refused conversations, cached answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from blm.io import write_text
from blm.types import BlmError, Chat, Message


class AnswerError(BlmError):
    """One conversation has no answer (refused, too long); it counts as wrong."""


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    truncated: bool = False
    """Whether it was cut at the limit of its tokens."""


@runtime_checkable
class CompletesBatches(Protocol):
    """A Chat that answers several conversations at once, and says which answers came to their
    end."""

    def complete(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128
    ) -> Sequence[tuple[str, bool] | AnswerError]: ...


def answer_all(
    chat: Chat, conversations: Sequence[Sequence[Message]], max_tokens: int
) -> list[str | AnswerError]:
    """Ask every conversation, in one batch where the model supports it; return the texts."""
    said = complete_all(chat, conversations, max_tokens)
    return [one.text if isinstance(one, Answer) else one for one in said]


def complete_all(
    chat: Chat, conversations: Sequence[Sequence[Message]], max_tokens: int
) -> list[Answer | AnswerError]:
    """Ask every conversation, in one batch where the model supports it.

    Only models that say so (`CompletesBatches`) have truncated answers.
    """
    if isinstance(chat, CompletesBatches):
        found = chat.complete(conversations, max_tokens=max_tokens)
        return [one if isinstance(one, AnswerError) else Answer(one[0], not one[1]) for one in found]
    return [_answer_one(chat, messages, max_tokens) for messages in conversations]


def _answer_one(chat: Chat, messages: Sequence[Message], max_tokens: int) -> Answer | AnswerError:
    try:
        return Answer(chat.answer(messages, max_tokens=max_tokens))
    except AnswerError as error:
        return error


class AnswerCache:
    """A folder with one small file per answer, named by a hash of its inputs. Thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder, nothing is cached."""
        self.folder = folder

    @staticmethod
    def key(*parts: object) -> str:
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Answer | None:
        """Return the cached answer, or None. Raises BlmError for a damaged file."""
        if self.folder is None or not (file := self._file(key)).exists():
            return None
        try:
            kept = json.loads(file.read_text())
            return Answer(str(kept["answer"]), bool(kept.get("truncated", False)))
        except (ValueError, KeyError, TypeError) as error:
            raise BlmError(f"cached answer '{file}' is damaged ({error!r}); move it away") from error

    def put(self, key: str, answer: Answer) -> None:
        if self.folder is None:
            return
        write_text(self._file(key), json.dumps({"answer": answer.text, "truncated": answer.truncated}))

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"
