"""Tiny random folders of further model families: LLaVA, InternVL, Gemma 3, LLaVA-OneVision, PaliGemma.

Classes are those of the hub's models; templates follow theirs. See tests/support/backbones.py for
Qwen-VL, SmolVLM, Idefics3, nano and smol.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from blm.backbone import Backbone
from blm.backbone.families import one_tile_a_picture
from blm.backbone.nano.model import train_tokenizer
from blm.backbone.processors import without_video
from tests.support.backbones import MAKERS

BLOCKS = 4
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CHAT = (
    "{{ bos_token }}{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- for p in m.content -%}{{ 'PICTURE' if p.type == 'image' else p.text }}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)


def _tokenizer(names: dict[str, str], begin: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with named special tokens, and a begin token that it adds itself if there is
    one."""
    base = train_tokenizer(["What is in the picture?"])
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *names.values()]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token=base.pad_token,
        eos_token="<|im_end|>",
        bos_token=begin or None,
        extra_special_tokens=names,
        clean_up_tokenization_spaces=False,
    )
    if begin:
        from tokenizers.processors import TemplateProcessing

        own = (begin, tokenizer.convert_tokens_to_ids(begin))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[own]
        )
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, kind: str, **more: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"model_type": kind, **TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, **ids, **more}


def tiny_llava() -> Backbone:
    """LLaVA 1.5: a CLIP tower, of which the class token is left out, and a Llama that begins with a
    token."""
    tokenizer = _tokenizer({"image_token": "<image>", "begin": "<s>"}, "<s>")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        text_config=_text(tokenizer, "llama", bos_token_id=tokenizer.bos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("PICTURE", "<image>\\n"),
    )
    return Backbone(LlavaForConditionalGeneration(config), processor)


def tiny_internvl() -> Backbone:
    """InternVL as converted for transformers: pixel shuffle before the projector, Qwen2 behind."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(names)
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=_text(tokenizer, "qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config)
    template = CHAT.replace("{{ bos_token }}", "").replace("PICTURE", "<IMG_CONTEXT>\\n")
    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    processor = without_video(InternVLProcessor)(
        pictures, tokenizer, chat_template=template, image_seq_length=4
    )
    one_tile_a_picture(processor)
    return Backbone(model, processor)


def tiny_llava_onevision() -> Backbone:
    """LLaVA-OneVision: a SigLIP tower, a row break after each picture, Qwen2 behind."""
    tokenizer = _tokenizer({"image_token": "<image>", "video_token": "<video>"})
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config=_text(tokenizer, "qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    processor = without_video(LlavaOnevisionProcessor)(
        pictures,
        tokenizer,
        chat_template=CHAT.replace("{{ bos_token }}", "").replace("PICTURE", "<image>\\n"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    one_tile_a_picture(processor)
    return Backbone(LlavaOnevisionForConditionalGeneration(config), processor)


def tiny_gemma3() -> Backbone:
    """Gemma 3: pictures attend in both directions, three of four blocks in a window of 16 tokens."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "begin": "<bos>",
    }
    tokenizer = _tokenizer(names, "<bos>")
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    window = {"layer_types": kinds, "sliding_window": 16}
    text = _text(tokenizer, "gemma3_text", bos_token_id=tokenizer.bos_token_id, **window)
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = CHAT.replace("PICTURE", "<start_of_image>")
    processor = Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)
    return Backbone(model, processor)


def _config_only(config: Any) -> Callable[[Path], None]:
    return lambda folder: config.save_pretrained(folder)


FAMILIES: dict[str, Callable[[], Backbone]] = {
    "Qwen2.5-VL": MAKERS["qwen2.5"],
    "Qwen3-VL": MAKERS["qwen3"],
    "SmolVLM2": MAKERS["smolvlm2"],
    "Idefics3, SmolVLM": MAKERS["smolvlm"],
    "LLaVA": tiny_llava,
    "LLaVA-OneVision": tiny_llava_onevision,
    "InternVL": tiny_internvl,
    "Gemma 3": tiny_gemma3,
}
"""Families that are backbones."""
REFUSED_FAMILIES: dict[str, Callable[[Path], None]] = {
    "PaliGemma": _config_only(PaliGemmaConfig()),
}
"""Families that are refused, as writers of a folder: its config suffices."""
