"""Feature cache: vision features of the pictures of a corpus, computed once and memory-mapped.

    features/  spec.json  journal.jsonl  00000.npy 00001.npy ..  manifest.json

A shard holds the features of the pictures of some examples, one after another, in the precision of
the vision tower; equal pictures are stored once. All processes fill the cache together, and each
reads from the files what a step needs, so none holds the features in its memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone, Inputs
from blm.backbone.hashing import hash_tensors
from blm.backbone.video import Clip
from blm.backbone.vision_cache import content_key
from blm.io import replacing
from blm.jobs import Result, WorkUnit, run_units
from blm.media import locate
from blm.training.caches.files import ShardFile, describe_file, sample_sha256
from blm.training.caches.filling import Cache, fill_cache
from blm.training.caches.processes import finished_shards
from blm.training.loop.distributed import Processes
from blm.training.sft.tokenize import TokenizedExample, VisionInputs
from blm.training.sft.vision_attention import use_batched_vision_attention
from blm.training.sft.vision_features import (
    PictureFeatures,
    collect,
    encode_all,
    split_pictures,
    trained_projectors,
    vision_modules,
)

FORMAT = 1
EXAMPLES_PER_SHARD = 64
"""Examples with pictures in a shard; a process holds the features of one shard in memory."""
Layout = Sequence[tuple[str, Sequence[int]]]
"""Names and shapes of the tensors of a picture."""
Place = tuple[int, int, int]
"""Number of the shard of a picture, number of its layout there, and index of its first value."""


@dataclass(frozen=True, kw_only=True)
class FeatureShard(ShardFile):
    """A file of the cache, as the manifest describes it."""

    examples: Sequence[Sequence[str]]
    """Content keys of the pictures of each example."""
    layouts: Sequence[Layout]
    pictures: Mapping[str, tuple[int, int]]
    """Content key -> number of the layout and index of the first value; the pictures that are in no
    shard that was finished earlier."""


class FeatureFiles:
    """The memory-mapped files of a cache."""

    def __init__(self, folder: Path, shards: Mapping[str, FeatureShard], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._files = [np.load(folder / name, mmap_mode="r") for name in shards]
        self._layouts = [shard.layouts for shard in shards.values()]
        self._places: dict[str, Place] = {
            key: (number, *place)
            for number, shard in enumerate(shards.values())
            for key, place in shard.pictures.items()
        }

    def read(self, keys: Sequence[str]) -> VisionInputs:
        """Return the features of pictures, by their content keys."""
        return collect([self._picture(*self._places[key]) for key in keys])

    def _picture(self, shard: int, layout: int, begin: int) -> PictureFeatures:
        features: PictureFeatures = {}
        for name, shape in self._layouts[shard][layout]:
            stored = np.array(self._files[shard][begin : (begin := begin + prod(shape))])
            features[name] = torch.from_numpy(stored).view(self.dtype).reshape(*shape)
        return features


@dataclass(frozen=True)
class StoredFeatures:
    """The features of one example, which are read when it is used."""

    files: FeatureFiles
    keys: tuple[str, ...]

    def read(self) -> VisionInputs:
        return self.files.read(self.keys)


@dataclass(frozen=True, kw_only=True)
class CachedExamples:
    """Examples whose vision features are cached."""

    examples: list[list[TokenizedExample]]
    """Of each source."""
    pictures: int
    """Number of pictures in them."""
    distinct: int
    """Number of different pictures."""


def cache_features(
    backbone: Backbone, sources: Sequence[Sequence[TokenizedExample]], folder: Path, processes: Processes
) -> CachedExamples:
    """Return the examples of each source with cached features in place of pictures.

    Fills the cache `folder`, or the missing part of it. All of `processes` call this with the same
    examples, and each computes a part of the shards. Raises BlmError, in every process, unless the
    vision tower is frozen, if the folder holds a cache with another spec, or one that was altered,
    or if the processes see different files.
    """
    cache = Cache(
        name="feature cache",
        folder=folder,
        spec=_describe(backbone, sources),
        shard=FeatureShard,
        title="vision features",
    )

    def compute(units: Sequence[WorkUnit], journal: Path, title: str) -> None:
        write = _Filler(backbone, folder).write_shard
        with use_batched_vision_attention(backbone):
            run_units(write, units, journal=journal, workers=0, title=title)

    shards = fill_cache(cache, list(_units(sources, folder)), processes, compute)
    files = FeatureFiles(folder, shards, _feature_dtype(backbone))
    keys = [tuple(own) for shard in shards.values() for own in shard.examples]
    rest = iter(keys)
    examples = [
        [
            replace(one, processor_input=None, features=StoredFeatures(files, next(rest)))
            if one.processor_input is not None
            else one
            for one in source
        ]
        for source in sources
    ]
    distinct = len({key for own in keys for key in own})
    return CachedExamples(examples=examples, pictures=sum(map(len, keys)), distinct=distinct)


def _units(sources: Sequence[Sequence[TokenizedExample]], folder: Path) -> Iterator[WorkUnit]:
    """Yield one work unit per shard: the examples with pictures, in order."""
    shown = [one for source in sources for one in source if one.processor_input is not None]
    for number, begin in enumerate(range(0, len(shown), EXAMPLES_PER_SHARD)):
        name = f"{number:05d}.npy"
        yield WorkUnit(name, (folder / name, shown[begin : begin + EXAMPLES_PER_SHARD]))


class _Filler:
    """Writes the shards of one process."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        self.backbone = backbone
        finished = finished_shards(folder).values()
        self.stored = {key for shard in finished for key in shard["pictures"]}
        """Content keys of the pictures in finished shards, as far as this process knows."""

    def write_shard(self, payload: tuple[Path, Sequence[TokenizedExample]]) -> Result:
        """Compute the features of pictures that are in no finished shard, and write them."""
        path, examples = payload
        keys = list[list[str]]()
        missing = dict[str, Inputs]()
        for example in examples:
            split = split_pictures(example.vision_inputs(self.backbone))
            keys.append([content_key(picture) for picture in split])
            seen = zip(keys[-1], split, strict=True)
            missing |= {key: picture for key, picture in seen if key not in self.stored}
        layouts = list[Layout]()
        pictures = dict[str, tuple[int, int]]()
        values = list[np.ndarray]()
        end = 0
        dtype = _feature_dtype(self.backbone)
        for key, encoded in encode_all(self.backbone, missing).items():
            features = {name: value.to(dtype) for name, value in encoded.items()}
            layout: Layout = [(name, list(value.shape)) for name, value in features.items()]
            if layout not in layouts:
                layouts.append(layout)
            pictures[key] = (layouts.index(layout), end)
            values += map(_flat, features.values())
            end += sum(value.numel() for value in features.values())
        empty = _flat(torch.zeros(0, dtype=dtype))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate([empty, *values]))
        self.stored |= pictures.keys()
        return {"examples": keys, "layouts": layouts, "pictures": pictures, **describe_file(path)}


def _flat(values: Tensor) -> np.ndarray:
    """Return the values [n] in a type that numpy has: bfloat16 as the bits in int16."""
    values = values.contiguous().flatten()
    return (values.view(torch.int16) if values.dtype is torch.bfloat16 else values).numpy()


def _feature_dtype(backbone: Backbone) -> torch.dtype:
    """Return the precision of the frozen vision tower, in which its outputs are stored."""
    parameters = [p for module in vision_modules(backbone) for p in module.parameters()]
    return next((p.dtype for p in parameters if not p.requires_grad), backbone.model.dtype)


def _describe(backbone: Backbone, sources: Sequence[Sequence[TokenizedExample]]) -> dict[str, Any]:
    """Return all that the features depend on, for spec.json: frozen vision weights, the processing
    of images, and the examples."""
    projectors = trained_projectors(backbone)
    trained = {id(p) for projector in projectors for p in projector.parameters()}
    weights = hashlib.sha256()
    for module in vision_modules(backbone):
        stored = module.state_dict(keep_vars=True)
        hash_tensors(weights, {name: value for name, value in stored.items() if id(value) not in trained})
    processor = backbone.processor
    video = getattr(processor, "video_processor", None)
    return {
        "format": FORMAT,
        "vision_tower": weights.hexdigest(),
        "features": "inputs of the projector" if projectors else "outputs",
        "precision": str(_feature_dtype(backbone)),
        "image_processing": json.loads(processor.image_processor.to_json_string()),
        "video_processing": repr(getattr(video, "settings", None)),
        "examples": _hash_of_examples(sources),
    }


def _hash_of_examples(sources: Sequence[Sequence[TokenizedExample]]) -> str:
    """Return a hash of tokens and pictures; files are hashed by samples, once each."""
    digest, seen = hashlib.sha256(), dict[Path, str]()
    for example in (one for source in sources for one in source if one.processor_input is not None):
        source = example.processor_input
        assert source is not None
        digest.update(example.tokens.tobytes() + f"{source.max_pixels}".encode())
        for part in source.images:
            digest.update(f"{part.times}".encode() if isinstance(part, Clip) else b"image")
            for image in part.frames if isinstance(part, Clip) else (part,):
                if image.pixels is not None:
                    digest.update(f"{image.pixels.shape}".encode() + image.pixels.tobytes())
                elif image.path is not None and source.root is not None:
                    file = locate(image.path, source.root)
                    seen[file] = seen.get(file) or sample_sha256(file)
                    digest.update(f"{image.path} {seen[file]}".encode())
    return digest.hexdigest()
