"""Model families: which of transformers' image-text-to-text models are refused, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from blm.backbone.prompt import PromptOrder, control_prompt, to_chat
from blm.types import BlmError

REFUSED: Mapping[str, str] = {
    "paligemma": (
        "it has no chat template, takes no prompt without a picture, and its prompts attend both ways"
    ),
}
"""`model_type` of a config -> the reason why the family cannot be a backbone."""
_IN_PIXELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose answers may count in pixels of the resized picture."""


def require_family(config: Any) -> None:
    """Raise BlmError for a config of a family that cannot be a backbone, and for one without
    vision."""
    kind = str(getattr(config, "model_type", type(config).__name__))
    if kind in REFUSED:
        raise BlmError(f"a model of the family '{kind}' cannot be a backbone: {REFUSED[kind]}")
    if getattr(config, "vision_config", None) is None:
        raise BlmError(
            f"a model of the family '{kind}' cannot be a backbone: it has no vision tower. Use a model that "
            "transformers loads with AutoModelForImageTextToText"
        )


def require_processor(processor: Any) -> None:
    """Raise BlmError for a processor that cannot render conversations with pictures."""
    name = type(processor).__name__
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        raise BlmError(f"the {name} of this model has no chat template; use an instruction-tuned model")
    if getattr(processor, "image_token", None) is None:
        raise BlmError(f"the {name} of this model has no placeholder for pictures (image_token)")


def require_rendered_order(processor: Any, family: str, order: PromptOrder) -> None:
    """Raise BlmError if a chat template cannot write control prompts in this order.

    Templates of LLaVA on the hub, for instance, write all pictures of a turn before its text.
    """
    if order == "pictures_first":  # what every template that we know does
        return
    blank = np.zeros((8, 8, 3), np.uint8)
    chat = to_chat(control_prompt("Push it.", "panda", {"base": blank, "wrist": blank}, order=order))
    rest = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for part in chat[0]["content"]:
        _, found, rest = rest.partition(part.get("text", processor.image_token))
        if not found:
            raise BlmError(
                f"a model of the family '{family}' with this chat template cannot read control prompts in "
                f"the order {order}, because the template moves the pictures in front of the text: use the "
                "order pictures_first, or a template that writes the parts of a message in their order"
            )


def one_tile_a_picture(processor: Any) -> None:
    """Switch off that a processor cuts large pictures into tiles, in place.

    A picture then costs the same number of tokens whatever its size, as frames of videos do.
    """
    if hasattr(processor.image_processor, "do_image_splitting"):  # Idefics3, SmolVLM
        processor.image_processor.do_image_splitting = False
    if hasattr(processor.image_processor, "crop_to_patches"):  # InternVL
        processor.image_processor.crop_to_patches = False
        processor.images_kwargs = {**processor.images_kwargs, "crop_to_patches": False}
    if "batch_num_images" in getattr(processor.image_processor, "model_input_names", ()):
        _never_alone(processor.image_processor)


def _never_alone(image_processor: Any) -> None:
    """Let LLaVA-OneVision's image processor prepare every picture as one of several, in place.

    It cuts a picture into tiles only if its conversation has no other one, so the features of a
    picture would depend on those beside it. Model and processor tell the two cases apart by the
    number of pictures of the conversation: a picture is the only one if it is 1.
    """
    kind = type(image_processor)

    def _preprocess(
        self: Any, images: Sequence[Any], batch_num_images: Sequence[int], **settings: Any
    ) -> Any:
        return kind._preprocess(self, images, [2] * len(images), **settings)

    members = {"_preprocess": _preprocess, "__module__": kind.__module__}
    image_processor.__class__ = type(kind.__name__, (kind,), members)


def seen_size(processor: Any, family: str, width: int, height: int) -> tuple[int, int]:
    """Return width and height to which a processor of Qwen-VL resizes a picture [px].

    Raises BlmError for other families, which crop or pad pictures, and whose authors do not let them
    answer in pixels.
    """
    if family not in _IN_PIXELS:
        raise BlmError(
            f"models of the family '{family}' do not count the pixels of a resized picture (only "
            f"{', '.join(_IN_PIXELS)} do): use --coordinates thousandths, unit or pixels:original"
        )
    part = processor.image_processor
    blank = np.zeros((height, width, 3), np.uint8)
    _, rows, columns = part(images=[blank], return_tensors="np")["image_grid_thw"][0].tolist()
    return columns * part.patch_size, rows * part.patch_size


def see_pictures_one_by_one(model: Any, family: str) -> None:
    """Let LLaVA-OneVision compute the features of each picture as one of several, in place.

    It then takes `pixel_values` alone, as other families do; see `one_tile_a_picture`.
    """
    if family != "llava_onevision":
        return
    base = model.base_model
    kind: Any = type(base)

    def get_image_features(
        self: Any, pixel_values: torch.Tensor, image_sizes: Any = None, **settings: Any
    ) -> Any:
        count = len(pixel_values)
        sizes = torch.ones(count, 2, dtype=torch.long)
        told = {"image_sizes": sizes, "batch_num_images": torch.full((count,), 2)}
        return kind.get_image_features(self, pixel_values, **{**settings, **told})

    if kind.__module__ != __name__:  # not yet changed
        members = {"get_image_features": get_image_features, "__module__": __name__}
        base.__class__ = type(kind.__name__, (kind,), members)


def arrange_pictures(processor: Any, texts: Sequence[str], images: Sequence[Any]) -> list[Any]:
    """Return pictures, in reading order, as the processor takes them: in one list, or for Gemma 3
    in one list for each text."""
    if "Gemma3Processor" not in (kind.__name__ for kind in type(processor).__mro__) or not images:
        return list(images)
    rest = iter(images)
    return [list(islice(rest, text.count(processor.image_token))) for text in texts]
