"""An image-text-to-text model of transformers and its processor: prompts in, hidden states H_k out.

Shapes: B conversations, L prompt positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blm.backbone.compilation import Compiler
from blm.backbone.families import arrange_pictures, see_pictures_one_by_one
from blm.backbone.precision import mixed_precision
from blm.backbone.prompt import question_prompt, to_chat
from blm.backbone.truncation import decoder_path, truncated
from blm.backbone.video import (
    Video,
    VideosAs,
    check_videos,
    grids_of,
    load_media,
    media_of,
    reads_videos,
    token_types,
    video_arguments,
)
from blm.backbone.vision_plan import plan_on_cpu
from blm.backbone.weights import Weights
from blm.types import BlmError, Message

Inputs = dict[str, Tensor]
"""Keyword arguments of the model's forward, as its processor returns them."""


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states after block k at the prompt positions."""

    hidden: Tensor
    """[B, L, d], before the final normalisation."""
    mask: Tensor
    """[B, L] bool, False at padding."""


class MultimodalModel(Weights):
    """A multimodal language model: prompt, encode, tap hidden states, freeze, hash.

    `tap` may run in one thread while another thread generates text with the same model.

    `videos_as` is the form in which consecutive frames of a video in a message reach the model.
    "video": as one video input, with the model family's own temporal patches and timestamps; this
    is the default for Qwen2.5-VL and Qwen3-VL, whose published scores on videos are measured in
    this form. "frames": as single images, the only form that other families support; use it for
    Qwen models that were trained with it.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        super().__init__(model)
        self.processor = processor
        self.videos_as: VideosAs = "frames"
        if reads_videos(processor, model.config.model_type):
            self.videos_as = "video"
        plan_on_cpu(model, model.config.model_type)
        see_pictures_one_by_one(model, model.config.model_type)
        self.template_options = dict[str, Any]()
        """Further arguments of the chat template, such as `enable_thinking`."""
        self._path = decoder_path(model)
        self._compiled = dict[int, nn.Module]()
        """Layer -> the model up to this layer, with compiled blocks."""
        self._processing = threading.Lock()
        self.features_per_row = dict[tuple[int, ...], Fraction]()
        """Size of a row of `pixel_values` -> number of picture features for each row."""

    @property
    def decoder(self) -> Any:
        """The language model inside: embeddings, blocks (`.layers`) and final norm."""
        return self.model.get_submodule(".".join(self._path))

    @property
    def num_layers(self) -> int:
        """Number of loaded transformer blocks of the language model."""
        return len(self.decoder.layers)

    @property
    def hidden_size(self) -> int:
        """Width d of a hidden state."""
        return self.decoder.config.hidden_size

    @property
    def placeholder_id(self) -> int:
        """The token that is replaced by one picture feature.

        For Gemma 3 it differs from the token of the rendered text (`processor.image_token`), which
        stands for a whole picture.
        """
        return int(self.model.config.image_token_id)

    @property
    def has_two_way_pictures(self) -> bool:
        """Whether the tokens of a picture attend to each other in both directions (Gemma 3).

        The model takes from `token_type_ids` which tokens these are.
        """
        names = self.processor.model_input_names
        return "token_type_ids" in names and "token_type_ids" in signature(self.model.forward).parameters

    def special_token_arguments(self, text: str) -> dict[str, bool]:
        """Return arguments for the tokenizer that prevent a second begin token before `text`."""
        begin = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if begin and text.startswith(begin) else {}

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return a conversation as text by the model's chat template.

        It has one placeholder per image or video. With `prompt` the text ends with the header of
        the assistant's turn. Raises BlmError if a message contains a placeholder.
        """
        for message in messages:
            for token in (self.processor.image_token, getattr(self.processor, "video_token", None)):
                if token is not None and token in message.text:
                    raise BlmError(f"text of the {message.role} contains '{token}', which is reserved")
        chat = to_chat(messages, self.videos_as)
        options = {"tokenize": False, "add_generation_prompt": prompt, **self.template_options}
        return self.processor.apply_chat_template(chat, **options)

    def process(
        self,
        texts: Sequence[str],
        images: Sequence[np.ndarray],
        *,
        videos: Sequence[Video] = (),
        side: Literal["left", "right"] = "left",
    ) -> Inputs:
        """Tokenise rendered texts, padded on `side`, and process their images and videos.

        Both are in reading order. The result is on the CPU. Raises BlmError when the numbers of
        placeholders and image features differ.
        """
        more = video_arguments(texts, videos, self.processor)
        with self._processing:  # a call sets the padding of the fast tokenizer, so threads take turns
            inputs = dict(
                self.processor(
                    text=list(texts),
                    images=arrange_pictures(self.processor, texts, images) or None,
                    padding=True,
                    padding_side=side,
                    return_tensors="pt",
                    **self.special_token_arguments(texts[0]),
                    **more,
                )
            )
        if "pixel_values" in inputs and inputs["pixel_values"].ndim == 5:
            inputs = _one_square_a_picture(inputs)
        self.check(inputs)
        return inputs

    def check(self, inputs: Inputs) -> None:
        """Raise BlmError if placeholders and features differ in number, or exceed the context."""
        placeholders = int((inputs["input_ids"] == self.placeholder_id).sum())
        features = self._count_features(inputs) if "pixel_values" in inputs else 0
        if placeholders != features:
            raise BlmError(
                f"{placeholders} image placeholders but {features} image features: an image is missing, "
                "extra, or was cut by truncation"
            )
        check_videos(self.processor, inputs)
        length, limit = inputs["input_ids"].shape[1], self.decoder.config.max_position_embeddings
        if length > limit:
            raise BlmError(
                f"a prompt has {length} tokens, the context holds {limit}; use fewer images or words"
            )

    def _count_features(self, inputs: Inputs) -> int:
        """Return the number of features that the model computes from images.

        It is proportional to the rows of `pixel_values`: images, or for Qwen-VL patches. The model
        is asked once for each image size.
        """
        pixels = inputs["pixel_values"]
        size = tuple(pixels.shape[1:])
        if size not in self.features_per_row:
            if self.model.device.type == "meta":  # an outline computes no features
                return int((inputs["input_ids"] == self.placeholder_id).sum())
            self.features_per_row[size] = _measure_features_per_row(self, inputs)
        return int(self.features_per_row[size] * len(pixels))

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        side: Literal["left", "right"] = "left",
        root: Path | None = None,
    ) -> Inputs:
        """Return the model inputs of prompts that end where the answer begins, on the device.

        Image paths are relative to `root`. Raises BlmError as `render` and `process` do, for images
        that cannot be read, and when a prompt is longer than the context.
        """
        return self.place(self.read(conversations, side=side, root=root))

    def read(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        side: Literal["left", "right"] = "left",
        root: Path | None = None,
    ) -> Inputs:
        """Return the inputs that `encode` returns, but on the CPU and in float32."""
        texts = [self.render(messages, prompt=True) for messages in conversations]
        media = [part for messages in conversations for part in media_of(messages, self.videos_as)]
        images, videos = load_media(media, root)
        return self.process(texts, images, videos=videos, side=side)

    def place(self, inputs: Inputs) -> Inputs:
        """Move inputs to the model's device, and convert images and features to its precision."""
        exact = ("second_per_grid_ts",)  # positions are computed from it
        return {
            name: value.to(
                self.model.device,
                self.model.dtype if value.is_floating_point() and name not in exact else None,
                non_blocking=self.model.device.type == "cuda",
            )
            for name, value in inputs.items()
        }

    def position_ids(self, inputs: Inputs) -> Tensor:
        """Return the position ids of left-padded prompts: [B, L], or [3, B, L] for M-RoPE.

        They are passed explicitly, so that no call depends on positions that the model stored in
        another call.
        """
        mask = inputs["attention_mask"]
        grids = grids_of(inputs)
        if not grids:
            return (mask.cumsum(-1) - 1).clamp_min(0)
        ids = inputs["input_ids"]
        model: Any = self.model.base_model
        positions, _ = model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=token_types(self.processor, ids),
            attention_mask=mask,
            **grids,
        )
        return positions

    @torch.no_grad()
    def tap(self, inputs: Inputs, layer: int) -> HiddenStates:
        """Return H_k, the output of block `layer`, counted from 1.

        Later blocks and the final norm do not run. Where a model adds image features between blocks
        (Qwen3-VL's DeepStack), they are included: H_k is the input of block k + 1. `inputs` are
        those of `encode`, or better, because a GPU then waits less often, of `read`. Raises
        BlmError for a layer that the model does not have.
        """
        self.require_layer(layer)
        grids = grids_of(inputs)  # the host reads them, for positions and lengths
        if grids and "position_ids" not in inputs:
            inputs = {**inputs, "position_ids": self.position_ids(inputs)}
        unread = (*grids, "mm_token_type_ids") if grids else ()
        inputs = {**self.place({n: x for n, x in inputs.items() if n not in unread}), **grids}
        view = self._compiled.get(layer) or truncated(self.model, self._path, layer)
        hidden = view(**inputs, use_cache=False).last_hidden_state
        return HiddenStates(hidden, inputs["attention_mask"].bool())

    def compile_tap(self, layer: int, compiler: Compiler) -> None:
        """Let `tap` compile blocks 1 .. `layer`, but not the vision tower. For frozen weights only:
        parameters that are replaced later are not seen."""
        self.require_layer(layer)
        self._compiled[layer] = truncated(self.model, self._path, layer, compiler)

    def require_layer(self, layer: int) -> None:
        """Raise BlmError for a layer that the model does not have, or that is not loaded."""
        if not 1 <= layer <= self.num_layers:
            which = "the blocks of this model"
            if self.absent is not None:
                which = f"the loaded blocks of the {self.absent.blocks} of this model"
            raise BlmError(f"layer {layer} is outside 1 .. {self.num_layers}, {which}")

    @staticmethod
    def probe_prompts() -> list[tuple[Message, ...]]:
        """Return two fixed prompts, one with an image, whose logits prove the model unchanged."""
        shown = [_probe_picture()]
        return [question_prompt("What is in the picture?", shown), question_prompt("What can you do?")]

    @torch.no_grad()
    def probe_logits(self) -> Tensor:
        """Return the next-token logits [2, V] after the two probe prompts."""
        self.require_whole()
        return torch.cat(
            [
                self.model(**self.encode([prompt])).logits[:, -1].float().cpu()
                for prompt in self.probe_prompts()
            ]
        )


def _probe_picture() -> np.ndarray:
    ramp = np.arange(112, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :] * 2, np.uint8(64)), axis=-1)


def blocks_up_to(model: MultimodalModel, layer: int) -> nn.Module:
    """Return a view of the model with blocks 1 .. `layer` only; it shares the weights."""
    return truncated(model.model, model._path, layer)


def tap_with_gradient(model: MultimodalModel, arguments: Mapping[str, Any], layer: int) -> Tensor:
    """Return H_k [B, L, d] as `MultimodalModel.tap` does; gradients flow into trained blocks.

    `arguments` of the model's forward are on its device and include position ids.
    """
    model.require_layer(layer)
    hidden: Tensor = blocks_up_to(model, layer)(**arguments, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def _measure_features_per_row(model: MultimodalModel, inputs: Inputs) -> Fraction:
    """Return how many features one row of `pixel_values` becomes, measured on the first image."""
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    rows = 1 if grid is None else int(grid[0].prod())
    image = {"pixel_values": pixels[:rows]} | ({} if grid is None else {"image_grid_thw": grid[:1]})
    base: Any = model.model.base_model
    ask = type(base).get_image_features  # of the class: past a cache of the instance
    with mixed_precision(model.model):
        output = ask(base, **model.place(image), return_dict=True)
    return Fraction(sum(part.shape[:-1].numel() for part in output.pooler_output), rows)


def _one_square_a_picture(inputs: Inputs) -> Inputs:
    """Return inputs whose `pixel_values` [B, max images, 3, height, width] become [N, 1, 3, height,
    width], one row for each image.

    Conversations with fewer images have zeros in the input, which Idefics3 and SmolVLM drop
    themselves; without them, batches have one layout for all models. What else describes pictures
    is left out: each fills its square, and is a single tile (Idefics3, LLaVA-OneVision).
    """
    flat = inputs["pixel_values"].flatten(0, 1)
    others = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")
    kept = {name: value for name, value in inputs.items() if name not in others}
    return {**kept, "pixel_values": flat[flat.flatten(1).any(1)][:, None]}
