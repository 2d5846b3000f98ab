"""Tokens of texts and conversations, counted beside the thread that runs the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blm.types import Message

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone


class BackboneTokenizer:
    """Tokenises as a backbone does. Its methods may run in several threads at once."""

    def __init__(self, backbone: Backbone) -> None:
        """`backbone` should have a processor of its own, which no action waits for.

        Texts have a tokenizer of their own: in a shared one, `process` changes the state of padding, which
        raises an error while another thread encodes.
        """
        self._backbone = backbone
        self._alone = copy.deepcopy(backbone.processor.tokenizer.backend_tokenizer)
        self._alone.no_padding()
        self._alone.no_truncation()

    @property
    def vocabulary(self) -> int:
        """Tokens are 0 .. this - 1."""
        return int(self._alone.get_vocab_size())

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text; with `special` also those that the tokenizer puts around any text."""
        return list(self._alone.encode(text, add_special_tokens=special).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return what the model reads of a conversation, pictures included.

        Raises BlmError as `Backbone.read` does.
        """
        return [int(token) for token in self._backbone.read([messages])["input_ids"][0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._alone.decode(list(tokens), skip_special_tokens=False))

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return each token as it stands in the vocabulary."""
        return [str(self._alone.id_to_token(token)) for token in tokens]
