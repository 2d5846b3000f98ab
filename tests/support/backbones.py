"""Tiny random models of every backbone family, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from blm.backbone import Backbone, build_nano, control_prompt, question_prompt
from blm.backbone.nano.model import train_tokenizer
from blm.backbone.processors import without_video
from blm.backbone.stand_in import SPECIAL_TOKENS
from blm.backbone.video import FrameProcessor, completed
from tests.support.smol import tiny_smol

QWEN_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{%- for p in m.content -%}"
    "{%- if p.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}{%- else -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)


def tiny_qwen(version: str) -> Backbone:
    """A random model of the real Qwen classes: 4 blocks, pictures of 56 px -> 4 tokens."""
    tokenizer = train_tokenizer(["What is in the picture?"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS), "eos_token": "<|im_end|>"}
    )
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    media = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    patch = 14 if version == "2.5" else 16
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": patch}
    torch.manual_seed(0)
    model: torch.nn.Module
    if version == "2.5":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **media)
        )
    else:
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, **media)
        )
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": (4 * patch) ** 2, "longest_edge": (4 * patch) ** 2}, patch_size=patch
    )
    kind = without_video(Qwen2_5_VLProcessor if version == "2.5" else Qwen3VLProcessor)
    processor = kind(pictures, tokenizer, chat_template=QWEN_TEMPLATE)
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    if version == "3":  # of all frames together
        size = {"shortest_edge": (8 * patch) ** 2, "longest_edge": 8 * (4 * patch) ** 2}
    processor.video_processor = FrameProcessor(completed({"size": size}, model.config.model_type))
    return Backbone(model, processor)


SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""As on the hub."""

SMOLVLM_TOKENS = ("<|im_start|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def tiny_smolvlm(name: str) -> Backbone:
    """A random model of the real classes: 4 blocks, pictures of 32 px -> 4 tokens, tiles switched off."""
    tokenizer = train_tokenizer(["What is in the picture?"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *SMOLVLM_TOKENS]})
    tokenizer.eos_token = "<end_of_utterance>"
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    settings = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2}
    settings |= {"pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model: torch.nn.Module
    pictures: SmolVLMImageProcessorPil | Idefics3ImageProcessorPil
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    if name == "smolvlm2":
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(text_config=text, vision_config=vision, **settings)
        )
        pictures = SmolVLMImageProcessorPil(**sizes, do_image_splitting=False)
    else:
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(text_config=text, vision_config=vision, **settings)
        )
        pictures = Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    return Backbone(
        model, Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    )


MAKERS: dict[str, Callable[[], Backbone]] = {
    "nano": build_nano,
    "qwen2.5": lambda: tiny_qwen("2.5"),
    "qwen3": lambda: tiny_qwen("3"),
    "smolvlm": lambda: tiny_smolvlm("smolvlm"),
    "smolvlm2": lambda: tiny_smolvlm("smolvlm2"),
    "smol": tiny_smol,
}


def picture(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PROMPTS = (
    control_prompt("push the cube.", "Panda", {"base": picture(0), "wrist": picture(1)}),
    question_prompt("What can you do? Say it in many words, please, and slowly."),
    question_prompt("What is it?", [picture(2, 60, 90)], system="Be brief."),
)
