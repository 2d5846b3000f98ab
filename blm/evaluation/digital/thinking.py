"""Models that think before they answer: how they are told, and the tokens that they get for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from blm.types import Chat

Thinking = Literal["auto", "on", "off"]
"""Whether a model is to think before it answers; "auto": as its chat template has it."""
THINKING_TOKENS = 4096
"""Tokens for thinking where the model's generation config names no longest answer (our choice; Qwen3-VL's
authors let the thinking models write 32,768, Cosmos-Reason1's 4,096)."""
END_OF_THINKING = "</think>"


@runtime_checkable
class Thinker(Protocol):
    """A Chat that knows whether it thinks before it answers."""

    @property
    def thinks(self) -> bool: ...

    @property
    def longest_answer(self) -> int | None:
        """Longest answer by the model's own generation config [tokens]; None: not stated."""
        ...

    def set_thinking(self, on: bool) -> None:
        """Switch thinking on or off. Raises BlmError for a model that cannot do that."""
        ...


@dataclass(frozen=True)
class ThinkingMode:
    """How a model is asked in an evaluation."""

    thinks: bool = False
    """Whether the model thinks before it answers: an answer that is cut while it thinks is unread."""
    tokens: int = 0
    """Further tokens for thinking, beside those of the answer."""


AT_ONCE = ThinkingMode()
"""A model that answers at once."""


def thinking_mode(chat: Chat, wanted: Thinking) -> ThinkingMode:
    """Tell a model whether to think, and return how it will answer.

    An endpoint does not say whether its model thinks, so `wanted` decides; it is told by the
    request (`EndpointSettings.thinking`). Raises BlmError for a model that cannot do what is wanted.
    """
    if isinstance(chat, Thinker):
        if wanted != "auto":
            chat.set_thinking(wanted == "on")
        if not chat.thinks:
            return AT_ONCE
        return ThinkingMode(True, chat.longest_answer or THINKING_TOKENS)
    return ThinkingMode(True, THINKING_TOKENS) if wanted == "on" else AT_ONCE


def cut_while_thinking(text: str, *, truncated: bool, mode: ThinkingMode) -> bool:
    """Return whether a model was cut before it began to answer."""
    return truncated and mode.thinks and END_OF_THINKING not in text
