"""The shapes of published backbones, for uses that need no weights.

These are memory estimates, and speed with random weights. The numbers are those of config.json of
Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct on the Hugging Face hub.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from blm.types import lookup

_TOKENS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl_7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def known_shapes() -> tuple[str, ...]:
    """Return the names of the backbones of known shape."""
    return tuple(_TEXT)


def shape_of(name: str) -> Qwen2_5_VLConfig:
    """Return the config of a published backbone. Raises UnknownNameError for an unknown one."""
    text = lookup("backbone with a known shape", name, _TEXT)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **_TOKENS,
    )
