"""One class that drives any image-text-to-text model of transformers: answer, tap H_k, freeze, save.

Shapes: B conversations, L prompt positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Idefics3Processor,
    PreTrainedModel,
    SmolVLMProcessor,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from blm.backbone.generation.generator import Generation
from blm.backbone.generation.prefill import shallow
from blm.backbone.nano.model import SAMPLE_TEXTS, make_nano
from blm.backbone.prompt import question_prompt, to_chat
from blm.backbone.saving import save_folder
from blm.backbone.smol import make_smol
from blm.io import settled
from blm.media import load_pixels
from blm.types import BlmError, Message, Sampling, lookup

Inputs = dict[str, Tensor]
RELEASED = Path(__file__).parents[1] / "releases"
"""Weights that ship with the package."""


@dataclass(frozen=True)
class Tapped:
    """Hidden states after block k at the prompt positions."""

    hidden: Tensor
    """[B, L, d], with no final normalisation."""
    mask: Tensor
    """[B, L] bool, False at padding."""


class Backbone:
    """A model and its processor. `tap` may run in one thread while `answer` runs in another."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self._path = _decoder_path(model)
        self._processing = threading.Lock()

    @classmethod
    def load(
        cls, name_or_folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Backbone:
        """Load a folder, or a name of BACKBONES ("nano" is made fresh and untrained).

        Raises UnknownNameError for what is neither.
        """
        source: str | Callable[[], Backbone] = str(name_or_folder)
        if not settled(Path(name_or_folder)).is_dir():
            source = lookup("backbone", str(name_or_folder), BACKBONES)
        if isinstance(source, str):
            model = AutoModelForImageTextToText.from_pretrained(source)
            for p in model.parameters():  # tensors of a file lie as they come; aligned, their sums are
                p.data = p.data.clone()  # the same bits in every process
            backbone = cls(model, _load_processor(source))
        else:
            backbone = source()
        backbone.model.to(device=device, dtype=dtype)
        return backbone

    @property
    def decoder(self) -> Any:
        """The language model inside: embeddings, blocks (`.layers`) and final norm."""
        return self.model.get_submodule(".".join(self._path))

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the text of a conversation by the model's own chat template, one placeholder per picture.

        With `prompt` it ends where the assistant begins. Raises BlmError if a text contains the placeholder.
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
        """Tokenise rendered texts, padded on `side`, and their pictures, in reading order; on the CPU.

        Raises BlmError when placeholders and picture features differ.
        """
        with self._processing:  # a fast tokenizer changes its padding state and may not be shared meanwhile
            inputs = dict(
                self.processor(
                    text=list(texts),
                    images=list(images) or None,
                    padding=True,
                    padding_side=side,
                    return_tensors="pt",
                )
            )
        if "pixel_values" in inputs and inputs["pixel_values"].ndim == 5:
            inputs["pixel_values"] = _one_picture_a_row(inputs["pixel_values"])
            inputs.pop("pixel_attention_mask", None)  # all ones: each picture fills its square
        self.check(inputs)
        return inputs

    def check(self, inputs: Inputs) -> None:
        """Raise BlmError unless placeholders are as many as picture features, and the context holds all."""
        config = self.model.config
        placeholders = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        if "image_grid_thw" in inputs:
            merged = config.vision_config.spatial_merge_size**2
            features = int(inputs["image_grid_thw"].prod(-1).sum()) // merged
        elif "pixel_values" in inputs:
            *count, _, height, width = inputs["pixel_values"].shape
            side, merged = config.vision_config.patch_size, getattr(config, "scale_factor", 1) ** 2
            features = math.prod(count) * ((height // side) * (width // side) // merged)
        else:
            features = 0
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

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        side: Literal["left", "right"] = "left",
        root: Path | None = None,
    ) -> Inputs:
        """Return what the model reads for prompts that end where the answer begins, on its device.

        Image paths are read below `root`. Raises BlmError as `render` and `process` do, for bad pictures, and
        when a prompt is longer than the context.
        """
        return self.place(self.read(conversations, side=side, root=root))

    def read(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        side: Literal["left", "right"] = "left",
        root: Path | None = None,
    ) -> Inputs:
        """Return what `encode` does, on the CPU and in full precision."""
        texts = [self.render(messages, prompt=True) for messages in conversations]
        images = [load_pixels(image, root) for c in conversations for m in c for image in m.images]
        return self.process(texts, images, side=side)

    def place(self, inputs: Inputs) -> Inputs:
        """Move inputs to the model's device, and pictures to its precision."""
        return {
            name: value.to(
                self.model.device,
                self.model.dtype if value.is_floating_point() else None,
                non_blocking=self.model.device.type == "cuda",
            )
            for name, value in inputs.items()
        }

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the greedy answer to one conversation."""
        return self.answer_batch([messages], max_tokens=max_tokens)[0]

    def answer_batch(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128) -> list[str]:
        """Return the greedy answers; each stops at the model's end token or after `max_tokens`."""
        return [text for text, _ in self.complete(conversations, max_tokens=max_tokens)]

    def complete(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128, seed: int | None = None
    ) -> list[tuple[str, bool]]:
        """Return the answers, and whether each came to its end within `max_tokens`.

        Greedy; with a seed drawn from the model's own distribution.
        """
        sampling = Sampling(max_tokens=max_tokens)
        how = [sampling] * len(conversations)
        if seed is not None:
            seeds = np.random.default_rng(seed).integers(2**63, size=len(conversations)).tolist()
            how = [replace(sampling, temperature=1.0, repetition_penalty=1.0, seed=own) for own in seeds]
        generation = Generation(self)
        answers = generation.start(conversations, how)
        while generation.running:
            generation.step()
        return [(generation.text(answer).strip(), answer.ended == "stop") for answer in answers]

    @torch.no_grad()
    def tap(self, inputs: Inputs, layer: int) -> Tapped:
        """Return H_k, the output of block `layer` (1-based); later blocks and the final norm do not run.

        Models that add picture features between blocks (Qwen3-VL's DeepStack) have them in: H_k is what block
        k + 1 reads. Raises BlmError for a layer that the model does not have.
        """
        if not 1 <= layer <= self.num_layers:
            raise BlmError(f"layer {layer} is outside 1 .. {self.num_layers}, the blocks of this model")
        hidden = _truncated(self.model, self._path, layer)(**inputs, use_cache=False).last_hidden_state
        return Tapped(hidden, inputs["attention_mask"].bool())

    def freeze(self) -> None:
        self.model.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """Return the sha256 of all parameters and buffers in their present precision, by sorted name."""
        digest = hashlib.sha256()
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def probe_prompts() -> list[tuple[Message, ...]]:
        """Return two fixed prompts, one with a picture."""
        ramp = np.arange(112, dtype=np.uint8)
        picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :] * 2, np.uint8(64)), axis=-1)
        return [question_prompt("What is in the picture?", [picture]), question_prompt("What can you do?")]

    @torch.no_grad()
    def probe_logits(self) -> Tensor:
        """Return the logits [2, V] after the two probe prompts: a proof of frozenness."""
        return torch.cat(
            [
                self.model(**self.encode([prompt])).logits[:, -1].float().cpu()
                for prompt in self.probe_prompts()
            ]
        )

    def save(self, folder: Path) -> None:
        """Write a transformers folder in one step, in the place of one that this wrote. Raises BlmError."""
        save_folder(folder, self.write_into)

    def write_into(self, folder: Path) -> None:
        """Write the stock transformers files into a folder that is there."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build_nano(
    texts: Iterable[str] = SAMPLE_TEXTS,
    *,
    seed: int = 0,
    things: Sequence[str] = (),
    steps: Sequence[str] = (),
    views: Sequence[str] = (),
) -> Backbone:
    """Return an untrained nano; its tokenizer is trained on `texts`, best those that it will be taught.

    Its eye has maps for `things`, and tells `steps` and `views` apart.
    """
    return Backbone(*make_nano(texts, seed=seed, things=things, steps=steps, views=views))


def build_smol(*, image_size: Literal[128, 224] = 128, seed: int = 0) -> Backbone:
    """Return smol with its pretrained parts and a fresh projector. Raises BlmError without its packages."""
    return Backbone(*make_smol(image_size, seed=seed))


BACKBONES: dict[str, str | Callable[[], Backbone]] = {
    "nano": build_nano,
    "blm-nano": str(RELEASED / "blm-nano/backbone"),
    "smol": build_smol,
    "qwen2_5_vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl_2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3_vl_4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_8b": "Qwen/Qwen3-VL-8B-Instruct",
    "smolvlm_256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm_500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm2_256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2_500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2_2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
"""Name -> builder, folder of the package, or Hugging Face hub id."""


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

    Modules on the path are shallow copies; all others, and every parameter, are shared. The model itself is
    not touched, so another thread may be generating with it.
    """
    top = view = shallow(model.get_submodule(path[0]))
    for name in path[1:]:
        view._modules[name] = shallow(view.get_submodule(name))
        view = view.get_submodule(name)
    layers = view.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    view._modules |= {"layers": layers[:layer], "norm": nn.Identity()}
    return top


def _one_picture_a_row(pixels: Tensor) -> Tensor:
    """[B, most pictures, 3, height, width], zeros where a conversation has fewer -> [N, 1, 3, height, width].

    Idefics3 and SmolVLM drop such zeros themselves; without them batches are alike for all models.
    """
    flat = pixels.flatten(0, 1)
    return flat[flat.flatten(1).any(1)][:, None]


def _load_processor(source: str) -> Any:
    """Load a processor that reads pictures; without torchvision, one that has no video part, which needs it.

    We give videos as frames, so nothing is lost but the video settings of a folder saved again. SmolVLM gets
    the processor of Idefics3, which it descends from: they read pictures alike, but SmolVLM's own asks for
    num2words and a video part. Both would cut a picture into up to 17 tiles of 64 or more tokens; that is
    switched off, as for frames of videos, so a picture costs the same whatever its size.
    """
    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(source))]
    if kind is SmolVLMProcessor:
        kind = Idefics3Processor
    if "video_processor" in kind.get_attributes() and not is_torchvision_available():
        kind = without_video(kind)
    processor = kind.from_pretrained(source)
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = False
    return processor


def without_video(kind: Any) -> Any:
    """Return the processor class `kind` with an image processor and a tokenizer only, under the same name.

    transformers reads the parts of a processor off the signature of its constructor.
    """

    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
