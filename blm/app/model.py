"""`BLM`: one checkpoint, one copy of frozen weights, two methods: `answer` and `act`; and models by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from blm.backbone import BACKBONES, Backbone
from blm.backbone.generation.generator import Generation
from blm.backbone.vision_cache import cache_vision_features
from blm.policy.checkpoint import RELEASES, checkpoint_folder, checkpoint_kind
from blm.policy.policy import CheckpointPolicy
from blm.types import ActionChunk, BlmError, Message, Observation, Policy, PolicyContract, UnknownNameError


class BLM:
    """Answers questions and drives robots from one loaded checkpoint. It is a `Policy` and a `Chat`.

    A question about the frame that an action was just chosen for does not look at it again.
    """

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy = policy
        cache_vision_features(policy.backbone)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, device: str = "cpu") -> BLM:
        """Load a checkpoint folder, or a release by name.

        Raises UnknownNameError for what is neither, BlmError for a missing or altered file.
        """
        if not (folder := checkpoint_folder(name_or_folder)).is_dir():
            raise UnknownNameError("checkpoint", str(name_or_folder), [*RELEASES, "<a folder from Stage II>"])
        if (kind := checkpoint_kind(folder)) != "blm":
            raise BlmError(
                f"checkpoint '{folder}' is a {kind}: it has no chat; `blm serve` serves its actions"
            )
        check_device(device)
        return cls(CheckpointPolicy.load(folder, device=device))

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    @property
    def contract(self) -> PolicyContract:
        return self.policy.contract

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the greedy answer to a conversation; all blocks of the backbone run."""
        return self.backbone.answer(messages, max_tokens=max_tokens)

    def speaker(self) -> Generation:
        """Return what gives several answers at once, token by token."""
        return Generation(self.backbone)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next action chunk; only blocks 1..k of the backbone run."""
        return self.policy.act(observation)

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return a chunk for each observation, from one pass."""
        return self.policy.act_batch(observations)

    def reset(self) -> None:
        self.policy.reset()


Kind = Literal["blm", "diffusion_policy", "backbone"]


@dataclass(frozen=True)
class Model:
    """What a folder or name holds: a chat, a policy, or both."""

    chat: Backbone | None
    policy: Policy | None

    def speaker(self) -> Generation | None:
        """Return what gives several answers at once, or None without a chat."""
        return None if self.chat is None else Generation(self.chat)


@dataclass(frozen=True)
class Source:
    """A model that was found and not loaded yet."""

    kind: Kind
    where: str
    """Its folder, or a name of BACKBONES."""

    @property
    def has_policy(self) -> bool:
        return self.kind != "backbone"

    @property
    def has_chat(self) -> bool:
        return self.kind != "diffusion_policy"

    @property
    def warning(self) -> str:
        """What a user should know before using it; empty if nothing."""
        return UNTRAINED.get(self.where, "")

    def load(self, device: str = "cpu") -> Model:
        """Read the weights. Raises BlmError, in one line, for files that are missing, altered or foreign."""
        check_device(device)
        if self.kind == "diffusion_policy":
            from blm.baselines.diffusion_policy import DiffusionPolicy

            return Model(None, DiffusionPolicy.load(self.where, device=device))
        if self.kind == "blm":
            model = BLM.from_pretrained(self.where, device=device)
            return Model(model.backbone, model)
        try:
            backbone = Backbone.load(self.where, device=device)
        except BlmError:
            raise
        except Exception as error:  # transformers raises of many kinds for a folder or hub it cannot read
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            raise BlmError(f"cannot load '{self.where}': {type(error).__name__}: {reason}") from error
        cache_vision_features(backbone)
        return Model(backbone, None)


UNTRAINED = {
    "nano": "nano is untrained: its answers mean nothing before Stage I (`blm train stage1`)",
    "smol": "smol has not learned to see: its language is pretrained, what it says of pictures means nothing "
    "before Stage I (`blm train stage1`)",
}


def find_model(
    name_or_folder: str | Path,
    *,
    what: str = "checkpoint",
    others: Sequence[str] = ("<a folder of Stage I or II>",),
) -> Source:
    """Find a release, a checkpoint, a backbone (Stage I, or any of transformers) or a name of BACKBONES.

    Of the folder of a run, its last stage. Reads no weights. Raises UnknownNameError for what does not exist,
    calling it `what` and listing the choices and `others`; BlmError, saying what it holds, for a folder
    without a model.
    """
    name = str(name_or_folder)
    folder = checkpoint_folder(name)
    if not folder.is_dir():
        if name in BACKBONES:
            return Source("backbone", name)
        if folder.exists():
            raise BlmError(f"'{name}' is a file; give the folder of a checkpoint or backbone")
        raise UnknownNameError(what, name, {*RELEASES, *BACKBONES, *others})
    for inside in (".", "checkpoint", "stage2/checkpoint"):
        if (folder / inside / "manifest.json").is_file():
            return _checkpoint(folder / inside)
    for inside in (".", "backbone", "stage1/backbone"):
        if _is_backbone(folder / inside):
            return Source("backbone", str(folder / inside))
    if (folder / "meta/info.json").is_file():
        what = "it is a data set; train on it with `blm train stage2`"
    elif not any(folder.iterdir()):
        what = "it is empty"
    else:
        what = "a checkpoint has manifest.json, a backbone config.json with its model_type"
    raise BlmError(f"'{folder}' holds no model: {what}")


def _checkpoint(folder: Path) -> Source:
    kinds: dict[str, Kind] = {"blm": "blm", "diffusion_policy": "diffusion_policy"}
    kind = checkpoint_kind(folder)
    if kind not in kinds:
        raise BlmError(
            f"checkpoint '{folder}' is of kind '{kind[:40]}'; this program reads {', '.join(kinds)}"
        )
    return Source(kinds[kind], str(folder))


def _is_backbone(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def check_device(device: str) -> None:
    """Raise BlmError unless torch knows the device and this machine has it."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "", None
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
