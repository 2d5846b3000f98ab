"""A Qwen2.5-VL of any shape with random weights and a small tokenizer, built without downloads.

Memory and speed depend on shapes, not on values. So this backbone stands in for a published one in
memory estimates and speed measurements: model, images and prompts run through the same code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from blm.backbone.backbone import Backbone
from blm.backbone.nano.model import SAMPLE_TEXTS, train_tokenizer
from blm.backbone.processors import without_video

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("system user assistant", "You are a helpful assistant.") * 4
"""Words of the template, which Qwen's tokenizer has as tokens of their own."""
CHAT_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- for p in m.content -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
"""The part of Qwen's chat template for texts and images, with its default system prompt."""


def stand_in(
    shape: PretrainedConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    texts: tuple[str, ...] = SAMPLE_TEXTS,
) -> Backbone:
    """Return a backbone in the shape of `shape_of(name)`, on a device.

    The tokenizer is trained on `texts`: they become about as many tokens as with Qwen's own. Its
    special tokens have other ids than the published ones; the vocabulary keeps its size. On the
    device "meta" the weights take no memory.
    """
    tokenizer = train_tokenizer([*WORDS, *texts])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS), "eos_token": "<|im_end|>"}
    )
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config: Any = copy.deepcopy(shape)
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    config.text_config.eos_token_id, config.text_config.pad_token_id = ids["<|im_end|>"], 0
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    pictures = Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size)
    kind = without_video(Qwen2_5_VLProcessor)
    return Backbone(model, kind(pictures, tokenizer, chat_template=CHAT_TEMPLATE))
