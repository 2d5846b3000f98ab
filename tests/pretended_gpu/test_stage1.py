"""Stage I on a pretended GPU: the weights of the CPU, few synchronisations per step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from blm.backbone import Backbone
from blm.training.loop.loop import LoopConfig
from blm.training.sft.lora import Lora
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import Image, Message
from tests.support.backbones import picture
from tests.support.pretended_gpu import PretendedGpu, Sync, table
from tests.support.pretended_gpu.comparison import assert_same, every_family, log_rows, moved, twin

ON_PICTURES = {"qwen2.5": [3, 9], "qwen3": [13, 18], "smolvlm": [4, 4], "smolvlm2": [4, 4]}
"""Synchronisations of the last two steps with images, if not 1: vision towers of transformers read
sizes back, and copy indices of new sizes to the device."""
ON_FEATURES = {"qwen3": 11}
"""The same with cached features: DeepStack adds them between blocks under a boolean mask."""


def conversations(side: int) -> list[tuple[Message, ...]]:
    """Return conversations of different lengths; some have an image, some have two turns."""
    made = []
    for i in range(6):
        image = (Image(picture(i, side, side)),) if i % 3 else ()
        first = Message("user", (*image, "How many cubes?")), Message("assistant", (str(i),))
        more = Message("user", ("What colour is it?",)), Message("assistant", ("red" * (1 + i % 2),))
        made.append((*first, *more) if i % 2 else first)
    return made


def stage1(
    gpu: PretendedGpu, backbone: Backbone, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> list[list[Sync]]:
    """Train on CPU and GPU, compare weights and logs; return the synchronisations of each step."""
    monkeypatch.setattr(Backbone, "save", lambda self, folder: None)
    monkeypatch.setattr("blm.training.sft.prefix_attention.repeats_heads", lambda device: True)
    side = 112 if type(backbone.model).__name__.startswith("Llava") else 56
    sources = [TrainingSource(name="made", conversations=conversations(side))]
    loop = LoopConfig(steps=3, batch_size=3, log_every=1, save_every=100)
    config = Stage1Config(loop=loop, **changes)
    other = twin(backbone)
    train_stage1(backbone, sources, config, out / "cpu")
    with gpu.training_steps() as steps:
        train_stage1(moved(other), sources, config, out / "gpu")
    assert_same(other.model.state_dict().values(), backbone.model.state_dict().values())
    assert log_rows(out / "gpu") == log_rows(out / "cpu")
    return steps


@every_family
def test_stage_one_on_pictures(
    gpu: PretendedGpu, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    steps = stage1(gpu, backbone, tmp_path, monkeypatch)
    waits = ON_PICTURES.get(request.node.callspec.params["backbone"], [1, 1])
    assert [len(step) for step in steps] == waits, table(steps[-1])


@every_family
def test_stage_one_on_cached_features(
    gpu: PretendedGpu, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    frozen = {"vision_scale": 0.0, "projector_scale": 0.0, "cache_features": True}
    steps = stage1(gpu, backbone, tmp_path, monkeypatch, **frozen, pack_length=128)
    waits = ON_FEATURES.get(request.node.callspec.params["backbone"], 1)
    assert [len(step) for step in steps] == [waits, waits], table(steps[-1])


@pytest.mark.parametrize("backbone", ["nano"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"vision_scale": 0.0, "cache_features": True},  # a trained projector behind a cached tower
        {"lora": Lora(rank=2), "checkpoint_blocks": True},
    ],
    ids=["projector", "lora"],
)
def test_stage_one_in_other_settings(
    gpu: PretendedGpu,
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    with warnings.catch_warnings(action="ignore"):  # of peft and of checkpointing
        steps = stage1(gpu, backbone, tmp_path, monkeypatch, **changes)
    assert [len(step) for step in steps] == [1, 1], table(steps[-1])
