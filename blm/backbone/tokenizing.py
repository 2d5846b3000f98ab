"""Tokens of texts and conversations, counted beside the thread that runs the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blm.media import load_pixels
from blm.types import Message

if TYPE_CHECKING:
    from blm.backbone.backbone import Backbone


class BackboneTokenizer:
    """Tokenises as a backbone does, with a processor of its own: a fast tokenizer may not be shared.

    Its methods may run in several threads at once.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = type(backbone)(backbone.model, copy.deepcopy(backbone.processor))
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

        Raises BlmError as `Backbone.encode` does.
        """
        text = self._backbone.render(messages, prompt=True)
        images = [load_pixels(image) for message in messages for image in message.images]
        return [int(token) for token in self._backbone.process([text], images)["input_ids"][0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._alone.decode(list(tokens), skip_special_tokens=False))

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return each token as it stands in the vocabulary."""
        return [str(self._alone.id_to_token(token)) for token in tokens]
