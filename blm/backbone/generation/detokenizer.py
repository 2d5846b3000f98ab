"""Incremental detokenization of a growing answer."""

from __future__ import annotations

from typing import Any

HALF = "\ufffd"
"""The replacement character, which stands for bytes that are not (yet) a complete character."""
WINDOW = 64
"""Maximum number of tokens to decode again with each new one.

A character has at most four bytes, each of which may be a separate token; a longer run of
incomplete characters is not text.
"""


class Detokenizer:
    """Appends tokens to a text at a cost that does not grow with the text.

    A token's text may depend on the tokens before it (spaces, parts of a character), so a window of
    the last tokens is decoded with and without the new ones, and the difference is appended.
    Hugging Face's text-generation-inference does the same (`decode_token`).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens = list[int]()
        self._fixed = ""
        """Text of the tokens before `_read`."""
        self._start = self._read = 0
        """The window begins at `_start`; tokens from `_read` on are not in `_fixed` yet."""

    def text(self, tokens: list[int]) -> str:
        """Return the text of `tokens`, which must continue those of the last call."""
        for token in tokens[len(self._tokens) :]:
            self._tokens.append(token)
            self._fix()
        return self._fixed + self._added()

    def _fix(self) -> None:
        added = self._added()
        complete = added and not added.endswith(HALF)
        if complete or len(self._tokens) - self._start >= WINDOW:
            self._fixed += added
            self._start, self._read = self._read, len(self._tokens)
            if self._read - self._start >= WINDOW:
                self._start = self._read - 1

    def _added(self) -> str:
        """Return the text that the tokens from `_read` on add."""
        if self._read == len(self._tokens):
            return ""
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
