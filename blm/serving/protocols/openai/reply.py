"""Replies in the OpenAI form: what of an answer may be sent, its thoughts apart, and the JSON around it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "length"]
Reasoning = Literal["inline", "separate", "hidden"]
"""Where thoughts go: into the text as the model wrote them, into `reasoning_content`, or nowhere."""
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"


@dataclass(frozen=True)
class Delta:
    """What one answer adds to what was sent."""

    index: int
    content: str
    reasoning: str
    finish: Finish | None


class AnswerText:
    """What of one answer may be sent: text that need not be taken back, up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.sent, self.tokens = stops, "", 0
        self.finish: Finish | None = None

    def add(self, text: str, tokens: int, ended: Finish | None) -> str:
        """Take the whole answer so far; return what is new to send.

        No stop string begins in what was sent, so the search goes on where that ends.
        """
        self.tokens, text = tokens, text.lstrip()
        cuts = [cut for stop in self.stops if (cut := text.find(stop, len(self.sent))) >= 0]
        if cuts:
            text, self.finish = text[: min(cuts)], "stop"
        elif ended:
            text, self.finish = text.rstrip(), ended
        else:
            text = text.rstrip("\ufffd").rstrip()  # half of a character, or space that may end the answer
            text = text[: len(text) - max((overlap(text, stop) for stop in self.stops), default=0)]
        new = text[len(self.sent) :]
        self.sent += new
        return new


class ThoughtSplitter:
    """Parts the thoughts `<think>..</think>` at the beginning of an answer from what follows."""

    def __init__(self, reasoning: Reasoning) -> None:
        self.reasoning = reasoning
        self.content = self.thoughts = ""
        self._rest, self._place = "", "content" if reasoning == "inline" else "start"

    def add(self, text: str, ended: bool) -> tuple[str, str]:
        """Take what is new of an answer; return what is new of its content and of its thoughts."""
        self._rest += text
        content = thoughts = ""
        if self._place == "start" and self._decided(ended):
            thinks = self._rest.startswith(THOUGHT_BEGINS)
            self._place = "thoughts" if thinks else "content"
            self._rest = self._rest.removeprefix(THOUGHT_BEGINS)
        if self._place == "thoughts":
            thoughts, mark, after = self._rest.partition(THOUGHT_ENDS)
            kept = 0 if mark or ended else overlap(thoughts, THOUGHT_ENDS)
            self._rest = after if mark else thoughts[len(thoughts) - kept :]
            thoughts = thoughts[: len(thoughts) - kept]
            self._place = "between" if mark else "thoughts"
        if self._place == "between":
            self._rest = self._rest.lstrip()
            self._place = "content" if self._rest else "between"
        if self._place == "content":
            content, self._rest = self._rest, ""
        thoughts = "" if self.reasoning == "hidden" else thoughts
        self.content, self.thoughts = self.content + content, self.thoughts + thoughts
        return content, thoughts

    def _decided(self, ended: bool) -> bool:
        """Whether it is clear if the answer begins with a thought."""
        return ended or not THOUGHT_BEGINS.startswith(self._rest) or self._rest == THOUGHT_BEGINS


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`; not the whole of it."""
    at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while at >= 0 and not mark.startswith(text[at:]):
        at = text.find(mark[0], at + 1)
    return len(text) - at if at >= 0 else 0


class AnswerInProgress:
    """One answer of a reply: its text up to a stop string, in content and thoughts."""

    def __init__(self, index: int, stops: Sequence[str], reasoning: Reasoning) -> None:
        self.index, self.text, self.split = index, AnswerText(stops), ThoughtSplitter(reasoning)

    @property
    def finish(self) -> Finish | None:
        return self.text.finish

    def add(self, text: str, tokens: int, ended: Finish | None) -> Delta:
        """Take the whole answer so far; return what is new to send."""
        new = self.text.add(text, tokens, ended)
        content, thoughts = self.split.add(new, self.finish is not None)
        return Delta(self.index, content, thoughts, self.finish)


class ChatReply:
    """The JSON of one reply, whole or in chunks."""

    def __init__(self, model: str, fingerprint: str | None) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, answers: Sequence[AnswerInProgress], prompt_tokens: int) -> dict[str, Any]:
        choices = []
        for answer in answers:
            message: dict[str, str | None] = {"role": "assistant", "content": answer.split.content}
            if answer.split.reasoning == "separate":
                message["reasoning_content"] = answer.split.thoughts or None
            choices.append(
                {"index": answer.index, "message": message, "finish_reason": answer.finish, "logprobs": None}
            )
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(answers, prompt_tokens),
        }

    def first_chunk(self, index: int) -> dict[str, Any]:
        return self._chunk([_choice(index, {"role": "assistant", "content": ""})])

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return what adds to one answer: text, then the reason of its end."""
        parts = {"reasoning_content": delta.reasoning, "content": delta.content}
        added = [self._chunk([_choice(delta.index, {name: text})]) for name, text in parts.items() if text]
        return added + ([self._chunk([_choice(delta.index, {}, delta.finish)])] if delta.finish else [])

    def usage_chunk(self, answers: Sequence[AnswerInProgress], prompt_tokens: int) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for its tokens."""
        return self._chunk([]) | {"usage": usage(answers, prompt_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def usage(answers: Sequence[AnswerInProgress], prompt_tokens: int) -> dict[str, int]:
    """Return the tokens read and made; those of thoughts are among the latter."""
    made = sum(answer.text.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


def _choice(index: int, delta: dict[str, Any], finish: Finish | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
