"""A tiny model of the `smol` class."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from blm.backbone import Backbone
from blm.backbone.smol.gguf import END_TOKEN, FREE_TOKEN, PAD_TOKEN, make_tokenizer
from blm.backbone.smol.model import assemble, write_in_words
from blm.backbone.smol.vision_tower import SceneVisionConfig

LETTERS = sorted({chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"})

TOKENS = [
    PAD_TOKEN,
    "<|im_start|>",
    END_TOKEN,
    *(f"<free_{i}>" for i in range(13)),
    FREE_TOKEN,
]


def tiny_smol(image_size: int = 64, **vocabulary: Sequence[str]) -> Backbone:
    """The real eye, projector, processor and template around a random language model of two blocks."""
    tokenizer = make_tokenizer([*TOKENS, *LETTERS, "he", "12"], ["h e", "1 2"])
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    eye = SceneVisionConfig(image_size, text.hidden_size, slots=2, **vocabulary)  # type: ignore[arg-type]
    model, processor = assemble(tokenizer, text, eye, seed=0)
    write_in_words(model, tokenizer)
    return Backbone(model, processor)
