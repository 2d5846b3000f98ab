"""`nano`: a 2 M-parameter image-text-to-text model, small enough to train on two CPU cores.

It is a `LlavaForConditionalGeneration` with a convolutional vision tower (`vision_tower.py`). Only
the vision tower is our own class; it is registered with transformers' Auto classes on import.
Processor and folder are stock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from blm.backbone.nano.induction import EMBEDDED, init_induction_heads
from blm.backbone.nano.vision_tower import GRID, IMAGE_SIZE, ConvVision, ConvVisionConfig

IMAGE_TOKEN, PAD_TOKEN, END_TOKEN = "<image>", "<pad>", "<|end|>"
SPECIAL_TOKENS = (PAD_TOKEN, IMAGE_TOKEN, END_TOKEN, "<|system|>", "<|user|>", "<|assistant|>")
THOUGHT_TOKENS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message.role + '|>' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
SAMPLE_TEXTS = (
    "Robot: Panda. Views: base, wrist. Point to the object, the goal and the gripper. (512, 430)",
    "Task: push the blue cube to the target. What is the next primitive? approach grasp move place push hold",
    "Is there a red cube on the table? yes no What colour is the sphere? green How many objects are there?",
)
"""Texts for the tokenizer when no corpus is given."""

ROPE_BASE = 1e6

AutoConfig.register(ConvVisionConfig.model_type, ConvVisionConfig)
AutoModel.register(ConvVisionConfig, ConvVision)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, lossless for any text; each digit is a separate token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d|, (?=\d)| ?\p{L}+| ?[^\s\p{L}\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(THOUGHT_TOKENS))  # not special: thoughts are part of the decoded text
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD_TOKEN, END_TOKEN)],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def picture_processor(side: int) -> CLIPImageProcessorPil:
    """Return the stock processor that resizes images to `side` x `side` px, values in -1 .. 1."""
    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size=size,
        resample=2,
        crop_size=size,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def make_nano(
    texts: Iterable[str] = SAMPLE_TEXTS,
    *,
    seed: int = 0,
    things: Sequence[str] = (),
    steps: Sequence[str] = (),
    views: Sequence[str] = (),
    layers: int = 4,
    width: int = 192,
    vocab_size: int = 768,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained model and its processor, with a tokenizer trained on `texts`.

    Its vision tower has a heat map for each of `things`, and classifies `steps` and `views`.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    processor = LlavaProcessor(
        picture_processor(IMAGE_SIZE),
        tokenizer,
        patch_size=IMAGE_SIZE // GRID,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=EMBEDDED,
        attention_bias=True,  # for previous-token heads; see induction.py
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        bos_token_id=None,
        **ids,
    )
    config = LlavaConfig(
        vision_config=ConvVisionConfig(
            things=things,
            steps=steps,
            views=views,
            dilations=(1, 2, 4),
            pooled=True,
            compound=True,
            sharpness=4.0,
            step_scale=10.0,
        ),
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        **ids,
    )
    return untrained(config, seed=seed), processor


def untrained(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """Return a nano with random weights and induction heads, from which training starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        init_induction_heads(cast(LlamaModel, model.base_model.language_model))
    return model
