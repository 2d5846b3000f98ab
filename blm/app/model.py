"""Loading of models by name, for chat, for actions, or for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from blm.app.pretrained import BLM as BLM
from blm.backbone import BACKBONES, Backbone
from blm.backbone.backbone import is_hub_id
from blm.backbone.compilation import CompileMode
from blm.backbone.generation.generator import Generation
from blm.backbone.precision import WeightDtype, frozen_dtype, require_attention
from blm.backbone.vision_cache import cache_vision_features
from blm.policy.checkpoint import RELEASES, checkpoint_folder, checkpoint_kind
from blm.types import BlmError, Policy, UnknownNameError

Kind = Literal["blm", "diffusion_policy", "backbone"]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model: a chat, a policy, or both."""

    chat: Backbone | None
    policy: Policy | None

    def generator(self) -> Generation | None:
        """Return a generator of several answers at once, or None for a model without chat."""
        return None if self.chat is None else Generation(self.chat)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found but whose weights are not loaded yet."""

    kind: Kind
    where: str
    """Folder of the model, a name of BACKBONES, or a hub id."""

    @property
    def has_policy(self) -> bool:
        """Whether the model controls robots."""
        return self.kind != "backbone"

    @property
    def has_chat(self) -> bool:
        """Whether the model answers questions."""
        return self.kind != "diffusion_policy"

    @property
    def warning(self) -> str:
        """Warning for users of an untrained backbone; empty for other models."""
        return UNTRAINED.get(self.where, "")

    def load(
        self,
        device: str = "cpu",
        *,
        dtype: WeightDtype | None = None,
        attn_implementation: str | None = None,
        actions_only: bool = False,
        compile: CompileMode = "none",
    ) -> LoadedModel:
        """Load the weights; `dtype` and `attn_implementation` are those of the backbone, as for
        `BLM.from_pretrained`.

        With `actions_only` the model does not chat, and what only chat needs is not loaded. Raises
        BlmError for missing, altered or unreadable files, for `actions_only` without a policy, and
        for `compile` without a checkpoint of Stage II.
        """
        check_device(device)
        require_attention(attn_implementation)
        if compile != "none" and self.kind != "blm":
            raise BlmError(f"'{self.where}' cannot be compiled: it is no checkpoint of Stage II")
        if actions_only and not self.has_policy:
            raise BlmError(f"'{self.where}' has no policy: it answers questions, and chooses no actions")
        if self.kind == "diffusion_policy":
            from blm.baselines.diffusion_policy import DiffusionPolicy

            return LoadedModel(None, DiffusionPolicy.load(self.where, device=device))
        if self.kind == "blm":
            model = BLM.from_pretrained(
                self.where,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                actions_only=actions_only,
                compile=compile,
            )
            return LoadedModel(None if actions_only else model.backbone, model)
        try:
            backbone = Backbone.load(
                self.where,
                device=device,
                dtype=frozen_dtype(device, dtype),
                attn_implementation=attn_implementation,
            )
        except BlmError:
            raise
        except Exception as error:  # transformers raises many kinds of errors for a folder or hub
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise BlmError(f"cannot load '{self.where}': {type(error).__name__}: {reason}") from error
        cache_vision_features(backbone)
        return LoadedModel(backbone, None)


UNTRAINED = {
    "nano": "nano is untrained: its answers are random before Stage I (`blm train stage1`)",
    "smol": "only the language model of smol is pretrained: its answers about images are random before "
    "Stage I (`blm train stage1`)",
}


def find_model(
    name_or_folder: str | Path,
    *,
    what: str = "checkpoint",
    others: Sequence[str] = ("<a folder of Stage I or II>", "<an id of the Hugging Face hub>"),
) -> ModelSource:
    """Find a release, a checkpoint, the folder of a backbone, a name of BACKBONES, or a hub id.

    For a run folder, this is the model of its last finished training stage. Reads no weights.
    Raises UnknownNameError for an unknown name; the message calls it a `what`, and lists the valid
    names and `others`. Raises BlmError, which describes the folder, for a folder without a model.
    """
    name = str(name_or_folder)
    folder = checkpoint_folder(name)
    if not folder.is_dir():
        if name in BACKBONES:
            return ModelSource("backbone", name)
        if folder.exists():
            raise BlmError(f"'{name}' is a file; give the folder of a checkpoint or backbone")
        if is_hub_id(name):
            return ModelSource("backbone", name)
        raise UnknownNameError(what, name, {*RELEASES, *BACKBONES, *others})
    for inside in (".", "checkpoint", "stage2/checkpoint"):
        if (folder / inside / "manifest.json").is_file():
            return _checkpoint(folder / inside)
    for inside in (".", "backbone", "stage1/backbone"):
        if _is_backbone(folder / inside):
            return ModelSource("backbone", str(folder / inside))
    if (folder / "meta/info.json").is_file():
        content = "it is a dataset; train on it with `blm train stage2`"
    elif not any(folder.iterdir()):
        content = "it is empty"
    else:
        content = "a checkpoint has manifest.json, a backbone config.json with a model_type"
    raise BlmError(f"'{folder}' holds no model: {content}")


def _checkpoint(folder: Path) -> ModelSource:
    kinds: dict[str, Kind] = {"blm": "blm", "diffusion_policy": "diffusion_policy"}
    kind = checkpoint_kind(folder)
    if kind not in kinds:
        raise BlmError(
            f"checkpoint '{folder}' is of kind '{kind[:40]}'; this program reads {', '.join(kinds)}"
        )
    return ModelSource(kinds[kind], str(folder))


def _is_backbone(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def check_device(device: str) -> None:
    """Raise BlmError unless torch supports the device and this machine has it."""
    try:
        kind = torch.device(device).type
        index = torch.device(device).index
    except RuntimeError:
        kind = ""
        index = None
    if kind == "cpu":
        return
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (index or 0) < count:
            return
        found = f"torch finds {count} CUDA GPUs" + (
            "" if torch.version.cuda else ", and is built without CUDA"
        )
    elif kind == "mps":
        if torch.backends.mps.is_available():
            return
        found = "torch finds no Apple GPU"
    else:
        found = "the choices are cpu, cuda, cuda:N and mps"
    raise BlmError(f"device '{device[:40]}' cannot be used: {found}")
