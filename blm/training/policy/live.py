"""Stage II without a hidden-state cache: prompts are prepared by workers, and tapped on the device.

A step has two parts. `LiveBatches` needs no weights and runs in worker processes: it draws the
samples, decodes their frames, and makes model inputs. `Tap` runs the backbone on the training
device, where the hidden states stay. Each distinct frame of a batch is tapped once, also if it is
the current frame of one sample and the future frame of another.

Preparing a picture (scaling, normalisation, patches) takes most of the time. Where the processor
does not resize, the device does it by a `PixelMap`, with the same bits, and workers send uint8
pictures; else the processor runs in the workers. Texts are tokenised once per instruction. Both are
compared with the processor's own output when training starts.

Shape legend: B samples, U distinct frames, L prompt positions, d hidden size, C cameras.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blm.backbone.backbone import Backbone
from blm.backbone.model import HiddenStates, Inputs, MultimodalModel
from blm.backbone.pixel_map import PixelMap, find_pixel_map
from blm.backbone.pooling import Pooling, make_pooling
from blm.backbone.prompt import PromptOrder, control_prompt, question_prompt
from blm.datasets.mixture import IndexArray
from blm.policy.network import ActionBatch, PolicyBatch
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.policy.hidden_states import HiddenStateConfig, observed_images
from blm.training.policy.sampler import WHOLE_BATCH, PolicyDataset, PolicySampler
from blm.types import BlmError, ImageArray


@dataclass(frozen=True, kw_only=True)
class PreparedPrompts:
    """Control prompts that are ready for the device, padded on the right."""

    inputs: Inputs
    """Inputs of the model on the CPU."""
    pictures: Tensor | None = None
    """uint8 [prompts * C, height, width, 3] for a `PixelMap`; None: `inputs` has `pixel_values`."""
    pooling: Pooling | None = None
    """Pooling of picture tokens; None: no pooling."""

    def pin_memory(self) -> PreparedPrompts:
        """Return a copy in pinned memory."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        pictures = None if self.pictures is None else self.pictures.pin_memory()
        pooling = None if self.pooling is None else self.pooling.pin_memory()
        return PreparedPrompts(inputs=inputs, pictures=pictures, pooling=pooling)


@dataclass(frozen=True, kw_only=True)
class LiveBatch(ActionBatch):
    """A training batch whose hidden states are still to be computed."""

    prompts: tuple[PreparedPrompts, ...]
    """Prompts of the U distinct frames, in the parts that the backbone runs one after another."""
    now: Tensor
    """[B] row of the frame of each sample among the U prompts."""
    future: Tensor
    """[B] row of the frame `future_steps` ahead."""

    def pin_memory(self) -> LiveBatch:
        """Return a copy in pinned memory."""
        return replace(super().pin_memory(), prompts=tuple(one.pin_memory() for one in self.prompts))


class PromptReader:
    """Makes the inputs of control prompts without the weights of a backbone.

    A copy in another process loads the processor again from `source`.
    """

    def __init__(
        self, backbone: Backbone, source: str, order: PromptOrder, *, pool: int = 1, by_map: bool = False
    ) -> None:
        """Pool squares of `pool` x `pool` picture tokens. With `by_map` a `PixelMap` processes the
        pictures, later."""
        self.source, self.order, self.pool, self.by_map = source, order, pool, by_map
        self.features_per_row = backbone.features_per_row
        self._backbone: Backbone | None = backbone
        self._texts = dict[tuple[str, str], Inputs]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_backbone": None, "_texts": {}}

    @property
    def backbone(self) -> Backbone:
        """The backbone, or in another process one without weights."""
        if self._backbone is None:
            self._backbone = Backbone.outline(self.source)
            self._backbone.features_per_row |= self.features_per_row
        return self._backbone

    def read(
        self, texts: Sequence[tuple[str, str]], pictures: Sequence[Mapping[str, ImageArray]]
    ) -> PreparedPrompts:
        """Prepare prompts of (instruction, robot) and the pictures of each camera, all of one size."""
        if not self.by_map:
            prompts = [
                control_prompt(*text, views, order=self.order)
                for text, views in zip(texts, pictures, strict=True)
            ]
            return self._prepared(self.backbone.read(prompts, side="right"))
        for text, views in zip(texts, pictures, strict=True):
            if text not in self._texts:
                blank = {camera: np.zeros_like(view) for camera, view in views.items()}
                prompt = control_prompt(*text, blank, order=self.order)
                inputs = self.backbone.read([prompt], side="right")
                self._texts[text] = {k: v for k, v in inputs.items() if k != "pixel_values"}
        pad = self.backbone.processor.tokenizer.pad_token_id
        inputs = _join([self._texts[text] for text in texts], pad)
        stacked = np.stack([view for views in pictures for view in views.values()])
        return self._prepared(inputs, torch.from_numpy(stacked))

    def _prepared(self, inputs: Inputs, pictures: Tensor | None = None) -> PreparedPrompts:
        pooling = None
        if self.pool > 1:
            counted = inputs if pictures is None else {**inputs, "pixel_values": pictures}
            pooling = make_pooling(self.backbone, counted, self.pool)
        return PreparedPrompts(inputs=self._positioned(inputs), pictures=pictures, pooling=pooling)

    def _positioned(self, inputs: Inputs) -> Inputs:
        """Add the positions of M-RoPE, which the model would compute on the device with some waits
        for it in each prompt."""
        if "image_grid_thw" not in inputs:
            return inputs
        return {**inputs, "position_ids": self.backbone.position_ids(inputs)}


def _join(prompts: Sequence[Inputs], pad_token: int) -> Inputs:
    """Return the inputs of a batch from those of single prompts, without pictures."""
    length = max(one["input_ids"].shape[1] for one in prompts)

    def rows(name: str, one: Inputs) -> Tensor:
        value = one[name]
        if value.shape != one["input_ids"].shape:
            return value
        filling = pad_token if name == "input_ids" else 0
        return F.pad(value, (0, length - value.shape[1]), value=filling)

    return {name: torch.cat([rows(name, one) for one in prompts]) for name in prompts[0]}


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Computes the hidden states of prepared prompts on the device of the backbone."""

    backbone: MultimodalModel
    layer: int
    pixel_map: PixelMap | None

    def inputs(self, prompts: PreparedPrompts) -> Inputs:
        """Return the inputs of the model; `tap` moves those that the host does not read."""
        inputs = prompts.inputs
        if prompts.pictures is None:
            return inputs
        assert self.pixel_map is not None
        pictures = prompts.pictures.to(self.backbone.model.device, non_blocking=True)
        return {**inputs, "pixel_values": self.pixel_map(pictures)}

    def _tap(self, prompts: PreparedPrompts) -> HiddenStates:
        device = self.backbone.model.device
        pooling = None if prompts.pooling is None else prompts.pooling.to(device)
        tapped = self.backbone.tap(self.inputs(prompts), self.layer)
        return tapped if pooling is None else pooling(tapped.hidden)

    def __call__(self, batch: LiveBatch) -> PolicyBatch:
        """Return the batch with H_k, on the device, in float32 and zero at padding."""
        device = self.backbone.model.device
        with torch.autocast(device.type, enabled=False):
            tapped = [self._tap(part) for part in batch.prompts]
        length = max(part.mask.shape[1] for part in tapped)
        missing = [length - part.mask.shape[1] for part in tapped]
        pairs = list(zip(tapped, missing, strict=True))
        mask = torch.cat([F.pad(part.mask, (0, few)) for part, few in pairs])
        hidden = torch.cat([F.pad(part.hidden.float(), (0, 0, 0, few)) for part, few in pairs])
        hidden = hidden.masked_fill(~mask[..., None], 0)
        moved = vars(batch.to(device))
        now, future = moved.pop("now"), moved.pop("future")
        del moved["prompts"]
        return PolicyBatch(
            hidden=hidden[now],
            mask=mask[now],
            future_hidden=hidden[future],
            future_mask=mask[future],
            **moved,
        )


class LiveBatches:
    """Makes the micro-batches of Stage II; a picklable function of (step, data shard)."""

    def __init__(self, sampler: PolicySampler, reader: PromptReader, config: HiddenStateConfig) -> None:
        self.sampler, self.reader, self.config = sampler, reader, config

    def __call__(self, step: int, shard: DataShard = WHOLE_BATCH) -> Microbatch[LiveBatch]:
        """Return the micro-batch. Raises BlmError, which names the sample, for a frame that cannot be
        read."""
        samples = self.sampler.sample(step, shard)
        vectors = self.sampler.vectors(samples)
        wanted = [np.stack([samples.datasets, samples.frames, samples.views], 1)]
        if self.sampler.policy.future_weight:
            later = self.sampler.future_frames(samples)
            wanted.append(np.stack([samples.datasets, later, np.zeros_like(later)], 1))
        frames, rows = np.unique(np.concatenate(wanted), axis=0, return_inverse=True)
        now, *future = np.split(rows.reshape(-1), len(wanted))
        batch = LiveBatch(
            prompts=tuple(
                self._read(frames[start : start + self.config.batch_size])
                for start in range(0, len(frames), self.config.batch_size)
            ),
            now=torch.from_numpy(now),
            future=torch.from_numpy(future[0] if future else now),
            **vars(vectors),
        )
        return Microbatch(batch, vectors.ids, weight=len(vectors.ids))

    def _read(self, frames: IndexArray) -> PreparedPrompts:
        """Prepare the prompts of [n, 3]: dataset, frame, view."""
        texts, pictures = [], []
        for number, frame, view in frames:
            dataset = self.sampler.datasets[number].dataset
            with _naming(f"sample '{dataset.folder}', frame {frame}"):
                views = observed_images(dataset, np.array([frame]), self.config, np.array([view]))
            pictures.append({camera: view[0] for camera, view in views.items()})
            texts.append((dataset.instructions[dataset.task_index[frame]], dataset.space.robot))
        names = ", ".join(f"'{self.sampler.datasets[n].dataset.folder}' {i}" for n, i, _ in frames)
        with _naming(f"one of the samples {names}"):
            return self.reader.read(texts, pictures)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Let an error name what could not be prepared."""
    try:
        yield
    except Exception as error:
        detail = str(error) if isinstance(error, BlmError) else f"{type(error).__name__}: {error}"
        raise BlmError(f"{what} cannot be prepared: {detail}") from error


@dataclass(frozen=True)
class Live:
    """The two parts of live training, which agree on who processes the pictures."""

    reader: PromptReader
    tap: Tap


def open_live(
    backbone: Backbone, source: str, datasets: Sequence[PolicyDataset], config: HiddenStateConfig
) -> Live:
    """Prepare live training, and compare the fast processing with the processor's own.

    `source` is the name or folder from which `backbone` was loaded.
    """
    side = datasets[0].dataset.image_size
    found = _find_exact(backbone, source, datasets, config)
    if found is None:  # count the features of such a picture here, with the weights
        blank = dict.fromkeys(config.views_of_prompt, np.zeros((side, side, 3), np.uint8))
        backbone.read([control_prompt("", "", blank)])
    model = backbone.model
    on_device = None if found is None else found.to(model.device, model.dtype)
    tap = Tap(backbone=backbone, layer=config.layer, pixel_map=on_device)
    reader = PromptReader(backbone, source, config.prompt, pool=config.pool, by_map=found is not None)
    return Live(reader, tap)


def _find_exact(
    backbone: Backbone, source: str, datasets: Sequence[PolicyDataset], config: HiddenStateConfig
) -> PixelMap | None:
    """Return the map of the processor, or None unless it and texts that are joined after
    tokenisation give the processor's own bits for prompts of different lengths."""
    side, cameras = datasets[0].dataset.image_size, config.views_of_prompt

    def process(pictures: Sequence[ImageArray]) -> Tensor:
        return backbone.read([question_prompt("", pictures)])["pixel_values"]

    found = find_pixel_map(process, side, side)
    if found is None:
        return None
    texts = sorted({(text, one.dataset.space.robot) for one in datasets for text in one.dataset.instructions})
    some = [min(texts, key=lambda text: len(text[0])), max(texts, key=lambda text: len(text[0]))]
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (2, len(cameras), side, side, 3), dtype=np.uint8)
    pictures = [dict(zip(cameras, one, strict=True)) for one in noise]
    own = PromptReader(backbone, source, config.prompt).read(some, pictures).inputs
    joined = PromptReader(backbone, source, config.prompt, by_map=True).read(some, pictures)
    assert joined.pictures is not None
    inputs = {**joined.inputs, "pixel_values": found(joined.pictures)}
    same = own.keys() == inputs.keys() and all(
        own[name].dtype == inputs[name].dtype and torch.equal(own[name], inputs[name]) for name in own
    )
    return found if same else None
