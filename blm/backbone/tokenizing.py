"""Tokenization of texts and conversations in threads other than the model's."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from blm.backbone.model import MultimodalModel
from blm.types import Message


class BackboneTokenizer:
    """The tokenizer of a backbone. Its methods may run in several threads at once."""

    def __init__(self, backbone: MultimodalModel) -> None:
        """Use a `backbone` with a separate processor, so that no action waits for its lock.

        Texts are encoded by another copy of the tokenizer: `process` sets the padding of its own,
        which raises an error while another thread encodes.
        """
        self._backbone = backbone
        self._alone = copy.deepcopy(backbone.processor.tokenizer.backend_tokenizer)
        self._alone.no_padding()
        self._alone.no_truncation()

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._alone.get_vocab_size())

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text; with `special`, with start and end tokens."""
        return list(self._alone.encode(text, add_special_tokens=special).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, placeholders of images included.

        Raises BlmError as `Backbone.read` does.
        """
        return [int(token) for token in self._backbone.read([messages])["input_ids"][0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._alone.decode(list(tokens), skip_special_tokens=False))

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return the vocabulary entry of each token."""
        return [str(self._alone.id_to_token(token)) for token in tokens]
