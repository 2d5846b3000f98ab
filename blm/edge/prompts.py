"""Control prompts of an exported policy: instruction and robot -> tokens, without transformers.

Shapes: B observations, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from blm.edge.folder import PromptTemplate
from blm.types import BlmError, Observation

MAX_KEPT = 256
"""Number of tokenized prompts that are kept: a robot's task stays the same for an episode."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts of a batch, padded on the right."""

    ids: NDArray[np.int64]
    """[B, L]"""
    mask: NDArray[np.int64]
    """[B, L] 1 at tokens, 0 at padding."""


class PromptEncoder:
    """Tokenizes control prompts. Thread-safe."""

    def __init__(self, template: PromptTemplate, tokenizer_file: Path, length: int | None = None) -> None:
        """With `length`, prompts are padded to that number of tokens, and longer ones refused."""
        self.template, self.length = template, length
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_file))
        picture = self._tokenizer.token_to_id(template.picture)
        if picture is None:
            raise BlmError(
                f"'{tokenizer_file}' has no token '{template.picture}', which stands for a picture"
            )
        self._picture: int = picture
        self._encode = lru_cache(MAX_KEPT)(self._encode_anew)

    def __call__(self, observations: Sequence[Observation]) -> TokenBatch:
        """Return the tokens of control prompts. Raises BlmError for a reserved token in an
        instruction, and for a prompt that is too long."""
        rows = [self._encode(o.robot, o.instruction) for o in observations]
        length = self.length or max(len(row) for row in rows)
        ids = np.full((len(rows), length), self.template.pad_token, np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        lengths = np.array([[len(row)] for row in rows])
        return TokenBatch(ids, (np.arange(length) < lengths).astype(np.int64))

    def _encode_anew(self, robot: str, instruction: str) -> tuple[int, ...]:
        for token in self.template.reserved:
            if token in instruction:
                raise BlmError(f"text of the user contains '{token}', which is reserved")
        before, between, after = self.template.parts
        text = f"{before}{robot}{between}{instruction}{after}"
        found = self._tokenizer.encode(text, add_special_tokens=self.template.special_tokens).ids
        pictures = self.template.picture_tokens
        ids = tuple(one for token in found for one in (pictures if token == self._picture else (token,)))
        most = min(self.length or self.template.context, self.template.context)
        if len(ids) > most:
            raise BlmError(
                f"a prompt has {len(ids)} tokens, this exported policy reads {most}; use fewer words"
            )
        return ids
