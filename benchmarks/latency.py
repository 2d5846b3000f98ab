"""Latency of one decision by parts, and the effect of optimisations.

    python benchmarks/latency.py [--checkpoint FOLDER] [--repeats 50] [--threads 1] [--device cpu]
    python benchmarks/latency.py --recipe smol --batches 1
    python benchmarks/latency.py --shape qwen2_5_vl_3b --device cuda

With --shape, weights are random and there are two cameras of 224 px. All variants are timed in
turn, in one run. Parts: image processing and prompt, the tapped blocks of the backbone, the bridge,
one denoising step, and the rest (transforms, copies). Variants: all blocks instead of the tapped
ones; keys and values of the intent tokens recomputed in each step; a compiled denoising step
(`--compile`); batches; and, except with --shape, control prompts in the order text_first, which are
read whole, or without their cached text. Medians and 99th percentiles are printed; a ratio is the
median of the ratios of neighbouring repeats, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from transformers import AutoModelForImageTextToText

from blm.app.recipes import RECIPES
from blm.backbone.backbone import Backbone
from blm.backbone.prefix_cache import PrefixCache
from blm.backbone.prompt import PromptOrder, control_prompt
from blm.backbone.published_shapes import shape_of
from blm.evaluation.results import this_machine
from blm.policy.network import PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.types import ImageArray

BATCHES = (1, 8, 32)
INSTRUCTION = "Pick up the red cube and move it to the green goal."


class Decision:
    """The parts of a decision with nano's shapes, on arbitrary images and states."""

    def __init__(
        self, backbone: Backbone, network: PolicyNetwork, layer: int, cameras: tuple[str, ...]
    ) -> None:
        self.backbone, self.network, self.layer, self.cameras = backbone, network.eval(), layer, cameras
        self.side = 112
        self.compiled: Callable[..., Any] | None = None
        """The denoising step, if it is to be timed compiled too."""
        self.prefixes: PrefixCache | None = None
        """The cache of texts, if it is to be timed too."""

    def prompts(self, count: int) -> dict[str, Any]:
        return self.backbone.place(self.read(count, "pictures_first"))

    def read(self, count: int, order: PromptOrder) -> dict[str, Any]:
        """Return the inputs of prompts on the CPU."""
        rng = np.random.default_rng(0)

        def picture() -> ImageArray:
            return rng.integers(0, 256, (self.side, self.side, 3), np.uint8)

        views = [{camera: picture() for camera in self.cameras} for _ in range(count)]
        prompts = [control_prompt(INSTRUCTION, "panda", view, order=order) for view in views]
        return self.backbone.read(prompts, side="right")

    @torch.no_grad()
    def tap(self, inputs: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        tapped = self.backbone.tap(inputs, layer)
        return tapped.hidden, tapped.mask


class RandomDecision(Decision):
    """The same with random weights in a published shape, on precomputed patches."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, cameras: int = 2) -> None:
        config, recipe = shape_of(name), RECIPES[name]()
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model = AutoModelForImageTextToText.from_config(config)
            torch.set_default_dtype(torch.float32)
            network = PolicyNetwork(recipe.stage2.policy, config.get_text_config().hidden_size, 4)
        super().__init__(Backbone(model, None), network, recipe.stage2.layer, ())
        self.count, self.device, self.dtype, self.config = cameras, device, dtype, config

    def prompts(self, count: int) -> dict[str, Any]:
        side = 224 // 14
        tokens = (side // 2) ** 2
        image = self.config.image_token_id
        row = [151644, *([151652, *[image] * tokens, 151653] * self.count), *range(100, 160)]
        ids = torch.tensor([row] * count, device=self.device)
        patches = torch.randn(
            count * self.count * side**2, 3 * 2 * 14 * 14, device=self.device, dtype=self.dtype
        )
        grid = torch.tensor([[1, side, side]] * (count * self.count), device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == image).int(),
        }


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Return the duration of a call [ms] and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin), result


@torch.no_grad()
def once(decision: Decision, count: int, device: str) -> dict[str, float]:
    """Return the duration [ms] of each part of one decision for `count` observations.

    Also those of the other variants.
    """
    network, config = decision.network, decision.network.config
    parts = dict[str, float]()
    parts["prompt and pictures"], inputs = timed(lambda: decision.prompts(count), device)
    parts["tap"], (hidden, mask) = timed(lambda: decision.tap(inputs, decision.layer), device)
    parts["tap, all blocks"], _ = timed(lambda: decision.tap(inputs, decision.backbone.num_layers), device)
    parts["bridge"], intent = timed(lambda: network.bridge(hidden, mask), device)
    state = torch.zeros(count, config.max_dim, device=device)
    robot = torch.zeros(count, dtype=torch.long, device=device)
    noise = torch.randn(count, config.horizon, config.max_dim, device=device)
    tau = torch.zeros(count, device=device)
    parts["keys and values"], memory = timed(lambda: network.dit.cache_intent(intent), device)
    step = lambda kept: network.velocity(noise, tau, intent, state, robot, kept)  # noqa: E731
    step(memory)  # warm up the processor's caches first, for both variants
    parts["denoising step"], _ = timed(lambda: step(memory), device)
    parts["denoising step, keys anew"], _ = timed(lambda: step(None), device)
    if decision.compiled is not None:
        fast = lambda: decision.compiled(noise, tau, intent, state, robot, memory)  # noqa: E731
        fast()
        parts["denoising step, compiled"], _ = timed(fast, device)
    dims = torch.ones(count, config.max_dim, dtype=torch.bool, device=device)
    parts["policy"], _ = timed(lambda: network.sample(hidden, mask, state, robot, noise, dims), device)
    parts["decision"] = parts["prompt and pictures"] + parts["tap"] + parts["policy"]
    if decision.prefixes is not None:
        parts |= text_first(decision, decision.prefixes, count, device)
        for name in ("whole text", "cached text"):
            parts[f"decision, {name}"] = (
                parts["prompt and pictures, text first"] + parts[f"tap, {name}"] + parts["policy"]
            )
    return parts


def text_first(decision: Decision, prefixes: PrefixCache, count: int, device: str) -> dict[str, float]:
    """Return the durations [ms] for prompts with the text first, with and without a prefix cache."""
    parts = dict[str, float]()
    parts["prompt and pictures, text first"], inputs = timed(
        lambda: decision.read(count, "text_first"), device
    )
    parts["tap, whole text"], _ = timed(lambda: decision.backbone.tap(inputs, decision.layer), device)
    parts["tap, cached text"], _ = timed(lambda: prefixes.tap(inputs), device)
    return parts


def ratio(rows: list[dict[str, float]], over: str, under: str) -> dict[str, Any]:
    values = np.array([row[over] / row[under] for row in rows])
    rng = np.random.default_rng(0)
    medians = np.median(values[rng.integers(0, len(values), (2000, len(values)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"ratio": float(np.median(values)), "interval_95": [float(low), float(high)]}


def main(
    checkpoint: Path | None = None,
    shape: str | None = None,
    recipe: Literal["nano", "smol"] = "nano",
    batches: tuple[int, ...] = BATCHES,
    repeats: int = 50,
    threads: int = 1,
    device: str = "cpu",
    compile: bool = False,
) -> None:
    """Print one JSON object."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if shape is not None:
        decision: Decision = RandomDecision(shape, device, dtype)
    elif checkpoint is not None:
        policy = CheckpointPolicy.load(checkpoint, device=device)
        decision = Decision(policy.backbone, policy.network, policy.tap.layer, policy.contract.cameras)
    else:
        backbone, settings = Backbone.load(recipe, device=device), RECIPES[recipe]()
        backbone.freeze()
        torch.manual_seed(0)
        network = PolicyNetwork(settings.stage2.policy, backbone.hidden_size, 4).to(device)
        decision = Decision(backbone, network, settings.stage2.layer, settings.cameras)
        decision.side = settings.image_size
    if shape is None:
        decision.prefixes = PrefixCache(decision.backbone, decision.layer)
    if compile:
        mode = "reduce-overhead" if device == "cuda" else None  # CUDA graphs
        decision.compiled = torch.compile(decision.network.velocity, mode=mode)
    found = dict[str, dict[str, Any]]()
    for count in batches:
        rows = [once(decision, count, device) for _ in range(repeats + 3)][3:]  # the first repeats warm up
        found[f"batch {count}"] = {
            "median_ms": {name: float(np.median([row[name] for row in rows])) for name in rows[0]},
            "p99_ms": {name: float(np.quantile([row[name] for row in rows], 0.99)) for name in rows[0]},
            "all blocks over tapped": ratio(rows, "tap, all blocks", "tap"),
            "keys anew over once": ratio(rows, "denoising step, keys anew", "denoising step"),
        }
        if decision.prefixes is not None:
            for part in ("tap", "decision"):
                found[f"batch {count}"][f"{part}: whole text over cached text"] = ratio(
                    rows, f"{part}, whole text", f"{part}, cached text"
                )
        if compile:
            found[f"batch {count}"]["compiled over eager"] = ratio(
                rows, "denoising step, compiled", "denoising step"
            )
    name = torch.cuda.get_device_name() if device == "cuda" else this_machine().processor
    about = {"device": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}
    weights = shape or str(checkpoint or f"untrained {recipe}")
    print(
        json.dumps({"weights": weights, "compiled": compile, "repeats": repeats, **about, **found}, indent=1)
    )


if __name__ == "__main__":
    tyro.cli(main)
