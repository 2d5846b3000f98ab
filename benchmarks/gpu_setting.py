"""What `gpu.py` measures, and how: a backbone with its policy, clocks, latencies and rates."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig

from blm.app.memory.table import GIB
from blm.app.memory.tracking import strip_values
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.backbone import Backbone
from blm.backbone.prompt import control_prompt
from blm.backbone.published_shapes import shape_of
from blm.backbone.stand_in import stand_in
from blm.bridge import BridgeConfig
from blm.policy.network import PolicyConfig, PolicyNetwork

Numbers = dict[str, Any]
INSTRUCTION = "Pick up the red cube and move it to the green goal."
CAMERAS = ("base", "side", "wrist")
WORDS = ("the", "robot", "moves", "its", "gripper", "over", "a", "table", "with", "cubes", "and", "asks")


MOST_STEPS = 30
"""Most training steps of a measurement."""


class SkippedError(Exception):
    """The time of a part has run out before this measurement."""


@dataclass(frozen=True)
class Clock:
    """The end of the time of a part, on the monotonic clock [s]."""

    end: float

    @property
    def left(self) -> float:
        """Time left [s]."""
        return self.end - time.monotonic()

    def first(self, share: float) -> Clock:
        """Return a clock for this share of the time that is left."""
        return Clock(time.monotonic() + share * self.left)


@dataclass
class Setting:
    """What is measured: a backbone with its policy, and the sizes of the measurements."""

    recipe: Recipe
    shape: Any
    """Config of the backbone's model."""
    backbone: Backbone
    policy: PolicyConfig
    layer: int
    side: int
    """Width and height of the pictures [px]."""
    device: torch.device
    cameras: tuple[int, ...]
    folder: Path
    seed: int
    batches: tuple[int, ...] = (1, 8, 32)
    """Numbers of observations in a batch."""
    repeats: int = 200
    """Maximum number of repeats of a latency measurement."""
    stage2_batch: int = 64
    stage1_examples: int = 16
    pack_length: int = 4096
    episodes: int = 3
    compile_options: Numbers = field(default_factory=dict)
    """Arguments of torch.compile besides the mode."""
    compile_seconds: float = 0.0
    """Duration of the last compilation [s]: none is begun with less time."""
    workers: int = 2
    """Worker processes of live Stage II."""

    def outline(self, dtype: torch.dtype | None = None) -> Backbone:
        """Return a backbone without values, whose work shows how much memory the real one takes."""
        model = stand_in(self.shape, device="meta", texts=prompt_texts()).model
        return Backbone(strip_values(model, dtype or self.backbone.model.dtype), self.backbone.processor)

    def network_outline(self) -> PolicyNetwork:
        """Return a policy network without values."""
        with torch.device("meta"):
            network = PolicyNetwork(self.policy, self.backbone.hidden_size, len(self.recipe.robots))
        return strip_values(network)

    def source(self) -> Path:
        """Return a folder from which worker processes read config and processor."""
        folder = self.folder / "outline"
        if not folder.exists():
            self.backbone.model.config.save_pretrained(folder)
            self.backbone.processor.save_pretrained(folder)
        return folder

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def network(self) -> PolicyNetwork:
        """Return a policy network with random weights on the device."""
        with self.device:
            torch.manual_seed(self.seed)
            return PolicyNetwork(self.policy, self.backbone.hidden_size, len(self.recipe.robots))

    def images(self, count: int, cameras: int) -> list[dict[str, np.ndarray]]:
        """Return random pictures for `count` observations."""
        rng = np.random.default_rng(self.seed)
        size = (self.side, self.side, 3)
        return [
            {name: rng.integers(0, 256, size, np.uint8) for name in CAMERAS[:cameras]} for _ in range(count)
        ]

    def free(self) -> None:
        """Drop the models."""
        del self.backbone
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def full_setting(name: str, folder: Path, device: str, cameras: tuple[int, ...], seed: int) -> Setting:
    """Return the setting of a recipe's backbone and policy in their real shapes."""
    recipe, place = RECIPES[name](), torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    return Setting(
        recipe=recipe,
        shape=shape_of(name),
        backbone=_frozen(stand_in(shape_of(name), device=place, dtype=dtype, texts=prompt_texts())),
        policy=recipe.stage2.policy,
        layer=recipe.stage2.layer,
        side=recipe.image_size,
        device=place,
        cameras=cameras,
        folder=folder,
        seed=seed,
    )


def tiny_shape(name: str) -> Qwen2_5_VLConfig:
    """Return the shape of a published backbone, shrunk to a few hundred thousand parameters."""
    config = shape_of(name)
    text: Any = config.text_config
    vision: Any = config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size = 1024, 32, 48
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 3, 2, 1
    text.layer_types = ["full_attention"] * 3
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [2, 3, 3]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 48, 2
    vision.out_hidden_size, vision.fullatt_block_indexes, vision.window_size = 32, [1], 56
    return config


def tiny_setting(
    name: str, folder: Path, device: str, cameras: tuple[int, ...], seed: int, repeats: int = 2
) -> Setting:
    """Return the same with a backbone and a policy of a few hundred thousand parameters."""
    bridge = BridgeConfig(width=16, latents=3, blocks=1, heads=2)
    place = torch.device(device)
    torch.manual_seed(seed)
    return Setting(
        recipe=RECIPES[name](),
        shape=tiny_shape(name),
        backbone=_frozen(stand_in(tiny_shape(name), device=place, texts=prompt_texts())),
        policy=PolicyConfig(bridge=bridge, width=32, heads=2, horizon=6, future_steps=6),
        layer=2,
        side=56,
        device=place,
        cameras=cameras,
        folder=folder,
        seed=seed,
        batches=(1, 2),
        repeats=repeats,
        stage2_batch=4,
        stage1_examples=4,
        pack_length=512,
        episodes=1,
        workers=1,
        compile_options={} if place.type == "cuda" else {"backend": "eager"},
    )


def _frozen(backbone: Backbone) -> Backbone:
    backbone.freeze()
    return backbone


def prompt_texts() -> tuple[str, ...]:
    """Return texts in whose words the tokenizer of the stand-in is trained."""
    blank = np.zeros((2, 2, 3), np.uint8)
    pictures = dict.fromkeys(CAMERAS, blank)
    prompts = [control_prompt(INSTRUCTION, robot, pictures) for robot in ("panda", "arm")]
    return (*(message.text for prompt in prompts for message in prompt), " ".join(WORDS))


def shown(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def attempt(found: Numbers, name: str, clock: Clock, measure: Callable[[Clock], Numbers]) -> None:
    """Store the numbers of a measurement, or {"error": ..} if it fails, or {"skipped": reason}."""
    try:
        if clock.left <= 0:
            raise SkippedError("no time was left")
        found[name] = measure(clock)
    except SkippedError as reason:
        found[name] = {"skipped": str(reason)}
    except Exception as error:
        found[name] = {"error": shown(error)}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def latency(setting: Setting, clock: Clock, call: Callable[[], Any]) -> Numbers:
    """Return median and 99th percentile [ms] of a call, after one or two to warm up, and their number
    n; without time left, of one call."""
    milliseconds = []
    warm_up = min(2, setting.repeats)
    for turn in range(setting.repeats + warm_up):
        if turn > warm_up and clock.left < 0:
            break
        wait(setting)
        begin = time.perf_counter()
        call()
        wait(setting)
        if turn >= warm_up:
            milliseconds.append(1000 * (time.perf_counter() - begin))
    p50, p99 = np.quantile(milliseconds, [0.5, 0.99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "n": len(milliseconds)}


def rate(setting: Setting, clock: Clock, steps: Callable[[int], float]) -> Numbers:
    """Return units of work a second: `steps(number)` takes one step and returns its units."""
    steps(0)
    wait(setting)
    begin, done, number = time.perf_counter(), 0.0, 0
    while number < 1 or (number < min(MOST_STEPS, setting.repeats) and clock.left > 0):
        number += 1
        done += steps(number)
    wait(setting)
    return {"per_s": done / (time.perf_counter() - begin), "n": number}


def with_peak(
    setting: Setting, measure: Callable[[], Numbers], predict: Callable[[], int] | None = None
) -> Numbers:
    """Add to the numbers of a measurement the largest allocated memory of the GPU, and what
    `blm memory` computes for the same work [GiB]."""
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    found = measure()
    if setting.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated(setting.device) / GIB
    if predict is not None:
        found["predicted_peak_gib"] = predict() / GIB
    return found


def wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)
