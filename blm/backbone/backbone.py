"""The backbone, a multimodal model that loads, answers and saves itself, and its registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from blm.backbone.compact import copy_compact, expand, is_compact, read_facts
from blm.backbone.families import require_family, require_rendered_order, seen_size
from blm.backbone.generation.generator import Generation
from blm.backbone.model import MultimodalModel
from blm.backbone.nano.model import SAMPLE_TEXTS, make_nano
from blm.backbone.partial import load_first_blocks
from blm.backbone.precision import place_weights, require_attention, use_attention
from blm.backbone.processors import load_processor
from blm.backbone.prompt import PromptOrder
from blm.backbone.saving import save_folder, save_model
from blm.backbone.smol.model import make_smol
from blm.errors import shorten
from blm.io import recover_folder
from blm.types import BlmError, Message, Sampling, Training, joint_training, lookup

RELEASED = Path(__file__).parents[1] / "releases"
"""Weights that ship with the package."""


TRAINING_KEY = "scene_training"
"""Key of a model's config that states how its training scenes varied."""
PROMPTS_KEY = "control_prompts"
"""Key of a model's config that states the orders of the control prompts that it was taught."""


_SWITCH = "enable_thinking"
"""Variable of a chat template that switches thinking."""


class Backbone(MultimodalModel):
    """A multimodal model that answers conversations; the base class has its hidden states."""

    attn_implementation: str | None = None
    """Attention implementation that `load` was asked for; None: the model's default."""
    stored_dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    """Precision of the tensors in the folder that was loaded, by name."""
    compact: Path | None = None
    """The compact folder (`compact.py`) from which the backbone was loaded, if it was."""

    @property
    def training(self) -> Training:
        """Whether Stage I showed randomized scenes of our simulator; unknown if it showed none.

        The config of the model keeps it.
        """
        stated: Training = getattr(self.model.config, TRAINING_KEY, "unknown")
        return stated

    def record_training(self, scenes: Iterable[Training]) -> None:
        """Record the training scenes of Stage I, beside those of its earlier runs."""
        known = {self.training, *scenes} - {"unknown"}
        if known:
            setattr(self.model.config, TRAINING_KEY, joint_training(known))

    @property
    def taught_prompts(self) -> tuple[str, ...]:
        """Orders of the control prompts that Stage I taught (`PromptOrder`); none if it taught none,
        or an older version did.

        The config of the model keeps them.
        """
        return tuple(getattr(self.model.config, PROMPTS_KEY, ()))

    def record_prompts(self, orders: Collection[PromptOrder]) -> None:
        """Record the orders of the control prompts of Stage I, beside those of its earlier runs.

        Raises BlmError for an order that the chat template cannot write.
        """
        for order in orders:
            require_rendered_order(self.processor, self.model.config.model_type, order)
        if known := {*self.taught_prompts, *orders}:
            setattr(self.model.config, PROMPTS_KEY, sorted(known))

    def require_taught(self, order: PromptOrder) -> None:
        """Raise BlmError if Stage I taught control prompts, but none in this order."""
        if self.taught_prompts and order not in self.taught_prompts:
            raise BlmError(
                f"the prompt order is {order}, but Stage I taught this backbone control prompts in the order "
                f"{', '.join(self.taught_prompts)}: use that order, or train Stage I with a corpus of the "
                f"other (blm corpus build --prompt {order})"
            )

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height to which a picture is resized [px]. Raises BlmError for a family
        whose answers do not count in these pixels."""
        return seen_size(self.processor, self.model.config.model_type, width, height)

    @property
    def thinks(self) -> bool:
        """Whether the model thinks before it answers: its chat template opens its thoughts, or lets
        it by a switch (`enable_thinking`, on by default, as in Qwen3)."""
        if _SWITCH in (self.processor.chat_template or ""):
            return bool(self.template_options.get(_SWITCH, True))
        prompt = self.render([Message("user", ("?",))], prompt=True)
        return prompt.rfind("<think>") > prompt.rfind("</think>")

    @property
    def longest_answer(self) -> int | None:
        """Longest answer by the model's generation config [tokens]; None: not stated."""
        return getattr(self.model.generation_config, "max_new_tokens", None)

    def set_thinking(self, on: bool) -> None:
        """Switch thinking on or off. Raises BlmError for a model whose chat template has no switch,
        unless it does what is wanted in any case."""
        if _SWITCH in (self.processor.chat_template or ""):
            self.template_options[_SWITCH] = on
        elif self.thinks != on:
            does = "always thinks" if self.thinks else "never opens thoughts"
            raise BlmError(
                f"thinking cannot be switched {'on' if on else 'off'}: the chat template of this "
                f"{self.model.config.model_type} {does} and has no {_SWITCH}"
            )

    @classmethod
    def outline(cls, name_or_folder: str | Path) -> Backbone:
        """Load a backbone without its weights, on torch's meta device, to check settings in
        seconds.

        Only its config and processor are read. Raises as `load` does.
        """
        source = _source(name_or_folder)
        if not isinstance(source, str):
            return source()
        with _loading(source):
            config = AutoConfig.from_pretrained(source)
            require_family(config)
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
            return cls(model, load_processor(source))

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        float32: Callable[[str], bool] | None = None,
        blocks: int | None = None,
    ) -> Backbone:
        """Load a folder, a name of BACKBONES ("nano" is built with random weights), or an id of the
        Hugging Face hub ("Qwen/Qwen2.5-VL-3B-Instruct").

        `attn_implementation` is a name of ATTENTION_IMPLEMENTATIONS; None: the model's default.
        Parameters whose name `float32` accepts are float32 whatever `dtype` is.
        With `blocks` only what runs up to that block is loaded: later blocks and the head take no
        memory, `tap` and `fingerprint` return the same, and all that needs the rest raises
        BlmError. A model that is built ("nano", "smol") stays whole.

        Raises UnknownNameError for a name that is none of them, and BlmError for a model that
        cannot be loaded, cannot be a backbone, cannot use the attention implementation, or has
        fewer blocks.
        """
        require_attention(attn_implementation)
        source = _source(name_or_folder)
        if isinstance(source, str):
            model: PreTrainedModel
            absent = None
            with _loading(source):
                config = AutoConfig.from_pretrained(source)
                require_family(config)
                if blocks is None:
                    model = AutoModelForImageTextToText.from_pretrained(source)
                else:
                    model, absent = load_first_blocks(source, config, blocks)
            state = model.state_dict()
            stored = {name: value.dtype for name, value in state.items() if value.is_floating_point()}
            # tensors of a memory-mapped file may be unaligned; aligned copies give the same bits everywhere
            for p in model.parameters():
                p.data = p.data.clone()
            with _loading(source):
                processor = load_processor(source)
            backbone = cls(model, processor)
            backbone.stored_dtypes = stored
            backbone.absent = absent
            backbone.compact = _compact_folder(name_or_folder)
        else:
            backbone = source()
            if blocks is not None:
                backbone.require_layer(blocks)
        use_attention(backbone.model, attn_implementation)
        backbone.attn_implementation = attn_implementation
        place_weights(backbone.model, device, dtype, float32)
        return backbone

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the greedy answer to one conversation."""
        return self.answer_batch([messages], max_tokens=max_tokens)[0]

    def answer_batch(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128) -> list[str]:
        """Return the greedy answers, up to the end token or `max_tokens` tokens."""
        return [text for text, _ in self.complete(conversations, max_tokens=max_tokens)]

    def complete(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128, seed: int | None = None
    ) -> list[tuple[str, bool]]:
        """Return each answer, and whether it ended within `max_tokens`.

        Decoding is greedy without a `seed`; with one, answers are sampled at temperature 1.
        """
        sampling = Sampling(max_tokens=max_tokens)
        how = [sampling] * len(conversations)
        if seed is not None:
            seeds = np.random.default_rng(seed).integers(2**63, size=len(conversations)).tolist()
            how = [replace(sampling, temperature=1.0, repetition_penalty=1.0, seed=own) for own in seeds]
        generation = Generation(self)
        sequences = generation.start(conversations, how)
        while generation.running:
            generation.step()
        return [(generation.text(one).strip(), one.ended == "stop") for one in sequences]

    def save(self, folder: Path) -> None:
        """Write a transformers folder atomically; it may replace only a folder that `save` wrote.

        Raises BlmError for a folder of another origin.
        """
        save_folder(folder, self.write_into)

    def write_into(self, folder: Path) -> None:
        """Write the stock transformers files into an existing folder, or those of the compact folder
        that was loaded if no weight has changed. Raises BlmError for a backbone of which only a part
        is loaded."""
        self.require_whole()
        if self.compact is not None and read_facts(self.compact).weights == self.fingerprint():
            copy_compact(self.compact, folder)
            return
        save_model(self.model, folder, self.stored_dtypes)
        self.processor.save_pretrained(folder)


def build_nano(
    texts: Iterable[str] = SAMPLE_TEXTS,
    *,
    seed: int = 0,
    things: Sequence[str] = (),
    steps: Sequence[str] = (),
    views: Sequence[str] = (),
) -> Backbone:
    """Return an untrained nano, whose tokenizer is trained on `texts`.

    Use the texts of its training data. Its vision tower has a heat map for each of `things`, and
    classifies `steps` and `views`.
    """
    return Backbone(*make_nano(texts, seed=seed, things=things, steps=steps, views=views))


def build_smol(
    *,
    image_size: Literal[128, 224] = 128,
    seed: int = 0,
    things: Sequence[str] = (),
    steps: Sequence[str] = (),
    views: Sequence[str] = (),
) -> Backbone:
    """Return smol: pretrained parts, and an untrained projector and heads of the vision tower.

    It has a heat map for each of `things`, and classifies `steps` and `views`. Raises BlmError if
    its packages are not installed.
    """
    return Backbone(*make_smol(image_size, seed=seed, things=things, steps=steps, views=views))


BACKBONES: dict[str, str | Callable[[], Backbone]] = {
    "nano": build_nano,
    "blm-nano": str(RELEASED / "blm-nano/backbone"),
    "blm-nano-1": str(RELEASED / "blm-nano/backbone"),
    "blm-nano-2": str(RELEASED / "blm-nano-2/backbone"),
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


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""Owner and name of a model on the Hugging Face hub."""


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hugging Face hub id, OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name.split("/")


def _source(name_or_folder: str | Path) -> str | Callable[[], Backbone]:
    """Return a folder or hub id to load from, or a builder. Raises UnknownNameError for other
    names."""
    if (folder := _compact_folder(name_or_folder)) is not None:
        return str(expand(folder, load_base))
    name = str(name_or_folder)
    if recover_folder(Path(name_or_folder)).is_dir() or (name not in BACKBONES and is_hub_id(name)):
        return name
    return lookup("backbone", name, BACKBONES)


def _compact_folder(name_or_folder: str | Path) -> Path | None:
    """Return the folder of a compact backbone, or None if it is another backbone."""
    known = BACKBONES.get(str(name_or_folder))
    places = [Path(name_or_folder), *([Path(known)] if isinstance(known, str) else [])]
    folder = next((place for place in places if recover_folder(place).is_dir()), None)
    return folder if folder is not None and is_compact(folder) else None


def load_base(name: str, config: Any) -> tuple[PreTrainedModel, Any]:
    """Return the base model of a compact backbone with this config, and its processor."""
    if name == "smol":
        return make_smol(config.vision_config.image_size)
    base = Backbone.load(name)
    return base.model, base.processor


@contextmanager
def _loading(source: str) -> Iterator[None]:
    """Turn the errors of transformers about a folder or hub id into one BlmError."""
    try:
        yield
    except BlmError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        place = f"'{source}'"
        if not Path(source).is_dir():
            place += " is no folder, and as a model of the Hugging Face hub it"
        raise BlmError(f"{place} cannot be loaded: {shorten(error, 300, quote=False)}") from error
