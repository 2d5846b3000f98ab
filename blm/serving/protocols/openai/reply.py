"""Chat replies in OpenAI's format: text up to a stop string, reasoning split off, JSON."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "length"]
Reasoning = Literal["inline", "separate", "hidden"]
"""Destination of <think>..</think>: the content, `reasoning_content`, or nowhere."""
THINK_START, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class ChoiceDelta:
    """New text of one choice since the previous delta."""

    index: int
    content: str
    reasoning: str
    finish: Finish | None


class VisibleText:
    """The final part of a growing text: the text to send, up to a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.sent, self.tokens = stops, "", 0
        self.finish: Finish | None = None

    def add(self, text: str, tokens: int, ended: Finish | None) -> str:
        """Take the whole text so far and return the new part to send.

        No stop string begins in the text that was sent, so the search starts at its end. The stop
        string that is complete first ends the text, so that the reply does not depend on the sizes
        of the pieces in which the text arrives.
        """
        self.tokens = tokens
        text = text.lstrip()
        found = [(start, stop) for stop in self.stops if (start := text.find(stop, len(self.sent))) >= 0]
        if found:
            start, _ = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            text = text[:start]
            self.finish = "stop"
        elif ended:
            text, self.finish = text.rstrip(), ended
        else:
            # hold back an incomplete UTF-8 character, and white space that may end the text
            text = text.rstrip("\ufffd").rstrip()
            text = text[: len(text) - max((overlap(text, stop) for stop in self.stops), default=0)]
        new = text[len(self.sent) :]
        self.sent += new
        return new


class ReasoningSplitter:
    """Splits a streamed text into its reasoning `<think>..</think>` and its content."""

    def __init__(self, reasoning: Reasoning) -> None:
        self.reasoning = reasoning
        self.content = self.thinking = ""
        self._rest, self._place = "", "content" if reasoning == "inline" else "start"

    def add(self, text: str, ended: bool) -> tuple[str, str]:
        """Take new text; return the new parts of content and reasoning."""
        self._rest += text
        content = thinking = ""
        if self._place == "start" and self._decided(ended):
            thinks = self._rest.startswith(THINK_START)
            self._place = "thinking" if thinks else "content"
            self._rest = self._rest.removeprefix(THINK_START)
        if self._place == "thinking":
            thinking, mark, after = self._rest.partition(THINK_END)
            kept = 0 if mark or ended else overlap(thinking, THINK_END)
            self._rest = after if mark else thinking[len(thinking) - kept :]
            thinking = thinking[: len(thinking) - kept]
            self._place = "between" if mark else "thinking"
        if self._place == "between":
            self._rest = self._rest.lstrip()
            self._place = "content" if self._rest else "between"
        if self._place == "content":
            content, self._rest = self._rest, ""
        thinking = "" if self.reasoning == "hidden" else thinking
        self.content, self.thinking = self.content + content, self.thinking + thinking
        return content, thinking

    def _decided(self, ended: bool) -> bool:
        """Return whether it is known if the text begins with <think>."""
        return ended or not THINK_START.startswith(self._rest) or self._rest == THINK_START


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest proper prefix of `mark` with which `text` ends."""
    at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while at >= 0 and not mark.startswith(text[at:]):
        at = text.find(mark[0], at + 1)
    return len(text) - at if at >= 0 else 0


class ChoiceState:
    """The stream state of one choice of a reply, as content and reasoning."""

    def __init__(self, index: int, stops: Sequence[str], reasoning: Reasoning) -> None:
        self.index, self.text, self.split = index, VisibleText(stops), ReasoningSplitter(reasoning)

    @property
    def finish(self) -> Finish | None:
        return self.text.finish

    def add(self, text: str, tokens: int, ended: Finish | None) -> ChoiceDelta:
        """Take the whole text so far and return the new part to send."""
        new = self.text.add(text, tokens, ended)
        content, thinking = self.split.add(new, self.finish is not None)
        return ChoiceDelta(self.index, content, thinking, self.finish)


class ReplyFormat:
    """Builds the JSON of one reply: a completion, or the chunks of a stream."""

    def __init__(self, model: str, fingerprint: str | None) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def completion(self, choices: Sequence[ChoiceState], prompt_tokens: int) -> dict[str, Any]:
        """Return a reply that is not streamed."""
        rows = []
        for choice in choices:
            message: dict[str, str | None] = {"role": "assistant", "content": choice.split.content}
            if choice.split.reasoning == "separate":
                message["reasoning_content"] = choice.split.thinking or None
            rows.append(
                {"index": choice.index, "message": message, "finish_reason": choice.finish, "logprobs": None}
            )
        return {
            **self.head,
            "object": "chat.completion",
            "choices": rows,
            "usage": usage(choices, prompt_tokens),
        }

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk that opens a choice with its role."""
        return self._chunk([_choice(index, {"role": "assistant", "content": ""})])

    def chunks(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return the chunks of a delta: its text, then its finish reason."""
        parts = {"reasoning_content": delta.reasoning, "content": delta.content}
        added = [self._chunk([_choice(delta.index, {name: text})]) for name, text in parts.items() if text]
        return added + ([self._chunk([_choice(delta.index, {}, delta.finish)])] if delta.finish else [])

    def usage_chunk(self, choices: Sequence[ChoiceState], prompt_tokens: int) -> dict[str, Any]:
        """Return the last chunk of a stream with `include_usage`."""
        return self._chunk([]) | {"usage": usage(choices, prompt_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def usage(choices: Sequence[ChoiceState], prompt_tokens: int) -> dict[str, int]:
    """Return the token counts; completion tokens include those of the reasoning."""
    generated = sum(choice.text.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def _choice(index: int, delta: dict[str, Any], finish: Finish | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
