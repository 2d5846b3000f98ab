"""A backbone without its weights in a folder, from which other processes tokenise and check rows.

Worker processes need the tokenizer, the image processor and the config, but no weights: those of a
large model would fill the memory of a machine once for each worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from blm.backbone.backbone import PROMPTS_KEY, TRAINING_KEY, Backbone
from blm.backbone.saving import NOTE, save_folder
from blm.backbone.video import VideosAs

NO_EFFECT = {"dtype", "torch_dtype", "_name_or_path", "transformers_version", TRAINING_KEY, PROMPTS_KEY}
"""Keys of config files on which tokens do not depend."""
LAST_CALL = {"padding", "truncation"}
"""Keys of tokenizer.json that the last call of the tokenizer set."""


@dataclass(frozen=True)
class BackboneOutline:
    """Where a backbone's config and processor are; it is small, and can be sent to processes."""

    folder: Path
    videos_as: VideosAs
    features_per_row: tuple[tuple[tuple[int, ...], Fraction], ...]
    """`Backbone.features_per_row`, as far as the backbone has measured it."""
    digest: str
    """Hash of all that the tokens of a conversation depend on."""

    def load(self) -> Backbone:
        """Return the backbone without weights, on torch's meta device; a process loads it once."""
        return _load(self)


@lru_cache(1)
def _load(outline: BackboneOutline) -> Backbone:
    backbone = Backbone.outline(outline.folder)
    backbone.videos_as = outline.videos_as
    backbone.features_per_row |= dict(outline.features_per_row)
    # a model that is made from its config takes its end tokens from there
    backbone.model.generation_config = GenerationConfig.from_pretrained(outline.folder)
    return backbone


def save_outline(backbone: Backbone, folder: Path) -> BackboneOutline:
    """Write the config and the processor of a backbone to `folder`; return its outline.

    The folder may replace only one that this program wrote. The features of a picture are measured
    first, so that processes without weights can compare them with the placeholders.
    """

    def write(work: Path) -> None:
        backbone.model.config.save_pretrained(work)
        backbone.model.generation_config.save_pretrained(work)
        backbone.processor.save_pretrained(work)

    save_folder(folder, write)
    return describe_outline(backbone, folder)


def describe_outline(backbone: Backbone, folder: Path) -> BackboneOutline:
    """Return the outline of a backbone that `save_outline` wrote to `folder`."""
    if hasattr(backbone.model.base_model, "get_image_features"):
        backbone.read(backbone.probe_prompts()[:1])
    return BackboneOutline(
        folder=folder,
        videos_as=backbone.videos_as,
        features_per_row=tuple(sorted(backbone.features_per_row.items())),
        digest=_digest(folder, backbone.videos_as),
    )


def _digest(folder: Path, videos_as: VideosAs) -> str:
    digest = hashlib.sha256(videos_as.encode())
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name != NOTE:
            config = _relevant(json.loads(path.read_text()))
            digest.update(f"{path.name} {json.dumps(config, sort_keys=True)}".encode())
        elif path.suffix in (".jinja", ".model", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _relevant(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {key: _relevant(value) for key, value in config.items() if key not in NO_EFFECT | LAST_CALL}
