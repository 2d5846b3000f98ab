"""An image-text-to-text model of transformers and its processor: prompts in, hidden states H_k out.

Shapes: B conversations, L prompt positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blm.backbone.families import arrange_pictures
from blm.backbone.hashing import hash_tensors
from blm.backbone.prompt import question_prompt, to_chat
from blm.media import load_pixels
from blm.types import BlmError, Message

Inputs = dict[str, Tensor]
"""Keyword arguments of the model's forward, as its processor makes them."""


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states after block k at the prompt positions."""

    hidden: Tensor
    """[B, L, d], before the final normalisation."""
    mask: Tensor
    """[B, L] bool, False at padding."""


class MultimodalModel:
    """A multimodal language model without its generation: prompt, encode, tap hidden states,
    freeze, hash.

    `tap` may run in one thread while another thread generates text with the same model.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self._path = _decoder_path(model)
        self._processing = threading.Lock()
        self._features_per_row = dict[tuple[int, ...], Fraction]()
        """Size of a row of `pixel_values` -> number of picture features for each row."""

    @property
    def decoder(self) -> Any:
        """The language model inside: embeddings, blocks (`.layers`) and final norm."""
        return self.model.get_submodule(".".join(self._path))

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks of the language model."""
        return len(self.decoder.layers)

    @property
    def hidden_size(self) -> int:
        """d, the width of a hidden state."""
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
        """Return arguments for the tokenizer that prevent a second begin token before rendered
        text."""
        begin = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if begin and text.startswith(begin) else {}

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return a conversation as text by the model's own chat template, with one placeholder per
        picture.

        With `prompt` the text ends with the header of the assistant's turn. Raises BlmError if a
        message contains the placeholder.
        """
        for message in messages:
            if self.processor.image_token in message.text:
                raise BlmError(
                    f"text of the {message.role} contains '{self.processor.image_token}', which is reserved"
                )
        return self.processor.apply_chat_template(
            to_chat(messages), tokenize=False, add_generation_prompt=prompt
        )

    def process(
        self, texts: Sequence[str], images: Sequence[np.ndarray], *, side: Literal["left", "right"] = "left"
    ) -> Inputs:
        """Tokenise rendered texts, padded on `side`, and process their pictures, in reading order.

        The result is on the CPU. Raises BlmError when the numbers of placeholders and picture
        features differ.
        """
        with self._processing:  # a call sets the padding of the fast tokenizer, so threads take turns
            inputs = dict(
                self.processor(
                    text=list(texts),
                    images=arrange_pictures(self.processor, texts, images) or None,
                    padding=True,
                    padding_side=side,
                    return_tensors="pt",
                    **self.special_token_arguments(texts[0]),
                )
            )
        if "pixel_values" in inputs and inputs["pixel_values"].ndim == 5:
            inputs["pixel_values"] = _without_missing_pictures(inputs["pixel_values"])
            inputs.pop("pixel_attention_mask", None)  # all ones: each picture fills its square
        self.check(inputs)
        return inputs

    def check(self, inputs: Inputs) -> None:
        """Raise BlmError if placeholders and picture features differ in number, or exceed the
        context."""
        placeholders = int((inputs["input_ids"] == self.placeholder_id).sum())
        features = self._count_features(inputs) if "pixel_values" in inputs else 0
        if placeholders != features:
            raise BlmError(
                f"{placeholders} image placeholders but {features} image features: a picture is missing, "
                "extra, or was cut by truncation"
            )
        length, limit = inputs["input_ids"].shape[1], self.decoder.config.max_position_embeddings
        if length > limit:
            raise BlmError(
                f"a prompt has {length} tokens, the context holds {limit}: use fewer pictures or words"
            )

    @torch.no_grad()
    def _count_features(self, inputs: Inputs) -> int:
        """Return how many features the model computes from pictures.

        The model is asked once for each size of pictures, with one picture; the number is
        proportional to the rows of `pixel_values`: pictures, or for Qwen-VL patches.
        """
        pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
        size = tuple(pixels.shape[1:])
        if size not in self._features_per_row:
            rows = 1 if grid is None else int(grid[0].prod())
            picture = {"pixel_values": pixels[:rows]} | ({} if grid is None else {"image_grid_thw": grid[:1]})
            base: Any = self.model.base_model
            ask = type(base).get_image_features  # of the class: past a cache of the instance
            output = ask(base, **self.place(picture), return_dict=True)
            count = sum(part.shape[:-1].numel() for part in output.pooler_output)
            self._features_per_row[size] = Fraction(count, rows)
        return int(self._features_per_row[size] * len(pixels))

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        side: Literal["left", "right"] = "left",
        root: Path | None = None,
    ) -> Inputs:
        """Return the model inputs of prompts that end where the answer begins, on the model's
        device.

        Image paths are relative to `root`. Raises BlmError as `render` and `process` do, for
        pictures that cannot be read, and when a prompt is longer than the context.
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
        images = [load_pixels(image, root) for c in conversations for m in c for image in m.images]
        return self.process(texts, images, side=side)

    def place(self, inputs: Inputs) -> Inputs:
        """Move inputs to the model's device, and convert pictures and features to its precision."""
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def position_ids(self, inputs: Inputs) -> Tensor:
        """Return the position ids [B, L] of left-padded prompts, or [3, B, L] for M-RoPE with
        pictures.

        They are passed explicitly, so that no call depends on positions that the model kept from
        another.
        """
        mask = inputs["attention_mask"]
        if "image_grid_thw" not in inputs:
            return (mask.cumsum(-1) - 1).clamp_min(0)
        ids = inputs["input_ids"]
        model: Any = self.model.base_model
        positions, _ = model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self.placeholder_id).long(),
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=mask,
        )
        return positions

    @torch.no_grad()
    def tap(self, inputs: Inputs, layer: int) -> HiddenStates:
        """Return H_k, the output of block `layer` (from 1); later blocks and the final norm do not
        run.

        Where a model adds picture features between blocks (Qwen3-VL's DeepStack), they are
        included: H_k is the input of block k + 1. Raises BlmError for a layer that the model does
        not have.
        """
        if not 1 <= layer <= self.num_layers:
            raise BlmError(f"layer {layer} is outside 1 .. {self.num_layers}, the blocks of this model")
        hidden = _truncated(self.model, self._path, layer)(**inputs, use_cache=False).last_hidden_state
        return HiddenStates(hidden, inputs["attention_mask"].bool())

    def freeze(self) -> None:
        """Switch to evaluation mode, and stop gradients of all parameters."""
        self.model.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Return the sha256 of all parameters and buffers in their present precision, by sorted
        name."""
        digest = hashlib.sha256()
        hash_tensors(digest, {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
        return digest.hexdigest()

    @staticmethod
    def probe_prompts() -> list[tuple[Message, ...]]:
        """Return two fixed prompts, one with a picture, whose logits prove that the model is
        unchanged."""
        ramp = np.arange(112, dtype=np.uint8)
        picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :] * 2, np.uint8(64)), axis=-1)
        return [question_prompt("What is in the picture?", [picture]), question_prompt("What can you do?")]

    @torch.no_grad()
    def probe_logits(self) -> Tensor:
        """Return the next-token logits [2, V] after the two probe prompts."""
        return torch.cat(
            [
                self.model(**self.encode([prompt])).logits[:, -1].float().cpu()
                for prompt in self.probe_prompts()
            ]
        )


def _decoder_path(model: PreTrainedModel) -> tuple[str, ...]:
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and {"layers", "norm"} <= module._modules.keys():
            return tuple(name.split("."))
    raise BlmError(
        f"{type(model).__name__} has no language model with 'layers' and 'norm'; it cannot be tapped"
    )


def _truncated(model: nn.Module, path: Sequence[str], layer: int) -> nn.Module:
    """Return a view of model.<path[0]> with blocks 1 .. layer only and no final norm.

    Modules on the path are shallow copies; all others, and every parameter, are shared. The model
    itself does not change, so another thread may generate with it.
    """
    top = view = shallow_copy(model.get_submodule(path[0]))
    for name in path[1:]:
        view._modules[name] = shallow_copy(view.get_submodule(name))
        view = view.get_submodule(name)
    layers = view.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    view._modules |= {"layers": layers[:layer], "norm": nn.Identity()}
    return top


def _without_missing_pictures(pixels: Tensor) -> Tensor:
    """[B, max pictures, 3, height, width], zeros where a conversation has fewer -> [N, 1, 3,
    height, width].

    Idefics3 and SmolVLM drop the zeros themselves; without them batches have one layout for all
    models.
    """
    flat = pixels.flatten(0, 1)
    return flat[flat.flatten(1).any(1)][:, None]


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a view of a module whose children and attributes can be replaced without changing the
    module."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    return view
