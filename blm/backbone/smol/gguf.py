"""Reads SmolLM2 from a GGUF file: tokenizer, configuration and weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from blm.backbone.nano.model import IMAGE_TOKEN

FREE_TOKEN, PAD_TOKEN, END_TOKEN = "<empty_output>", "<|endoftext|>", "<|im_end|>"
"""SmolLM2 reserves the first for notebooks; here it becomes the image's placeholder, so no
embedding is added. Unlike in the GGUF file, padding is not the end token: the end token is trained
on, padding is not."""
SPECIAL_TOKENS = 17
"""Number of special tokens, the first of the vocabulary."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""SmolLM2's template without its default system prompt."""
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF name -> name in a Llama block of transformers."""


def read_gguf(path: Path) -> tuple[PreTrainedTokenizerFast, LlamaConfig, dict[str, Tensor]]:
    """Return tokenizer, configuration and float32 weights of a Llama model in a GGUF file.

    transformers can read GGUF, too, but parses the file three times (20 s), loses the rule that
    every digit is a token, and marks the model as quantised, which `save_pretrained` refuses.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    value = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    heads, key_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    tokenizer = make_tokenizer(value["tokenizer.ggml.tokens"], value["tokenizer.ggml.merges"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=value["llama.embedding_length"],
        intermediate_size=value["llama.feed_forward_length"],
        num_hidden_layers=value["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=value["llama.context_length"],
        rms_norm_eps=value["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": value["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights = {}
    for tensor in reader.tensors:
        array = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            array = _split_halves(array, heads if "attn_q." in tensor.name else key_heads)
        weights[_llama_name(tensor.name)] = array
    return tokenizer, config, weights


def make_tokenizer(tokens: list[str], merges: list[str]) -> PreTrainedTokenizerFast:
    """Return SmolLM2's byte-level BPE tokenizer, with FREE_TOKEN renamed to <image>.

    Every digit is a token.
    """
    names = [IMAGE_TOKEN if token == FREE_TOKEN else token for token in tokens]
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name in names[:SPECIAL_TOKENS] if name not in (PAD_TOKEN, END_TOKEN)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _llama_name(name: str) -> str:
    outer = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in outer:
        return outer[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def _split_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from x0 y0 x1 y1 .. to x0 x1 .. y0 y1 ..

    RoPE rotates neighbouring rows in GGUF, and the two halves of a head in transformers.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
