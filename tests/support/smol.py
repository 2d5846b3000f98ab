"""A tiny model of the `smol` class."""

from __future__ import annotations

from transformers import LlamaConfig

from blm.backbone import Backbone, smol

LETTERS = sorted({chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"})

TOKENS = [
    smol.PAD_TOKEN,
    "<|im_start|>",
    smol.END_TOKEN,
    *(f"<free_{i}>" for i in range(13)),
    smol.FREE_TOKEN,
]


def tiny_smol(image_size: int = 64) -> Backbone:
    """The real eye, projector, processor and template around a random language model of two blocks."""
    tokenizer = smol.make_tokenizer([*TOKENS, *LETTERS, "he", "12"], ["h e", "1 2"])
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
    return Backbone(*smol.assemble(tokenizer, text, image_size, seed=0))
