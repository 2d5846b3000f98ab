"""Memory and time of Stage I's parts for large models, before and after, as ratios of one run.

    python benchmarks/stage1_memory.py [--tokens 384] [--vocabulary 151936] [--pictures 32]

loss: a step of loss and gradients of a tiny Qwen2.5-VL with Qwen's vocabulary, all logits at once
over chunks of tokens; each in a process of its own, whose peak memory is compared with that before
the step. attention: calls of attention in the vision tower for pictures of one size, a call for
each picture or window over batched ones, and the time of both. features: bytes of host memory that
a process holds for the cached features of all pictures, in memory over memory-mapped.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from blm.backbone import Backbone, build_nano
from blm.evaluation.results import this_machine
from blm.training.sft import loss as stage1_loss
from blm.training.sft.feature_cache import FeatureFiles, FeatureShard
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.vision_attention import use_batched_vision_attention

WIDTH = 64
"""Hidden size of the tiny model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    tokens: int = 384
    """Number of masked tokens of a step."""
    vocabulary: int = 151_936
    """Size of the vocabulary; the default is Qwen's."""
    chunk: int = 32
    """Number of tokens of a chunk."""
    pictures: int = 32
    """Number of pictures in a pass of the vision tower."""
    steps: int = 3
    """Number of repetitions; the fastest counts."""
    part: str = ""
    """For internal use: measure the loss, "whole" or "chunks", in this process only."""


def tiny_qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return a random model: one block, pictures of 112 px, windows of 56 px."""
    text: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": WIDTH}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
    vision: dict[str, Any] = {"depth": 8, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH, "window_size": 56, "fullatt_block_indexes": [3, 7]}
    torch.manual_seed(0)
    ids: dict[str, Any] = {
        "image_token_id": 10,
        "video_token_id": 11,
        "vision_start_token_id": 12,
        "vision_end_token_id": 13,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def fastest(work: Callable[[], object], steps: int) -> float:
    """Return the shortest time of a call [s]."""
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure_loss(options: Options) -> dict[str, float]:
    """Return tokens/s and the growth of the peak memory [MB] of the loss in this process."""
    model = tiny_qwen(options.vocabulary)
    backbone = Backbone(model, build_nano().processor)
    hidden = torch.randn(options.tokens, WIDTH, requires_grad=True)
    targets = torch.randint(0, options.vocabulary, (options.tokens,))
    with torch.no_grad():
        output = model.base_model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    losses = MaskedLossModel(backbone)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step() -> None:
        losses._sums(output, hidden, targets)[0].backward()

    at_once = options.chunk * options.vocabulary if options.part == "chunks" else 10**12
    with mock.patch.object(stage1_loss, "LOGITS_AT_ONCE", at_once):
        seconds = fastest(step, options.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tokens_per_s": options.tokens / seconds, "peak_mb": peak / 1024}


def in_a_process(options: Options, part: str) -> dict[str, float]:
    """Measure the loss in a process of its own: the peak memory of a process never falls."""
    words = [f"--{name}={value}" for name, value in asdict(options).items() if name != "part"]
    command = [sys.executable, __file__, *words, f"--part={part}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure_attention(options: Options) -> dict[str, float]:
    """Return calls of attention and seconds of a pass of the vision tower, one by one and batched."""
    backbone = Backbone(tiny_qwen(256), build_nano().processor)
    tower = backbone.model.base_model.visual.eval()
    grid = torch.tensor([[1, 16, 16]] * options.pictures)
    patches = torch.randn(len(grid) * 256, 3 * 2 * 14 * 14)
    found: dict[str, float] = {}
    outputs = []
    for name, context in (("single", nullcontext()), ("batched", use_batched_vision_attention(backbone))):
        with context, torch.no_grad():
            with mock.patch.object(
                F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
            ) as calls:
                outputs.append(tower(patches, grid_thw=grid).pooler_output)
            found[f"calls_{name}"] = calls.call_count
            found[f"seconds_{name}"] = fastest(lambda: tower(patches, grid_thw=grid), options.steps)
    found["largest_difference"] = float((outputs[0] - outputs[1]).abs().max())
    return found


def measure_features(options: Options, folder: Path) -> dict[str, float]:
    """Return the resident memory [MB] that features of 256 MB take, in memory and mapped."""
    count, values = 200, 256 * 1280
    pictures = {str(number): (0, number * values) for number in range(count)}
    np.save(folder / "0.npy", np.ones(count * values, np.float32))
    facts: dict[str, Any] = {"sha256": "", "bytes": 0, "sample_sha256": ""}
    shard = FeatureShard(examples=[], layouts=[[("tower_features", (256, 1280))]], pictures=pictures, **facts)
    before = resident()
    files = FeatureFiles(folder, {"0.npy": shard}, torch.float32)
    for step in range(4):
        files.read([str(number) for number in range(step * 8, step * 8 + 8)])
    mapped = resident() - before
    before = resident()
    held = files.read(list(pictures))
    found = {"in_memory_mb": (resident() - before) / 2**20, "mapped_mb": mapped / 2**20}
    del held
    return found


def resident() -> int:
    """Return the anonymous memory of this process [bytes], without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(options: Options) -> None:
    """Print one JSON object."""
    torch.set_num_threads(1)
    if options.part:
        print(json.dumps(measure_loss(options)))
        return
    whole, chunks = (in_a_process(options, part) for part in ("whole", "chunks"))
    with tempfile.TemporaryDirectory() as folder:
        features = measure_features(options, Path(folder))
    attention = measure_attention(options)
    result = {
        "loss": {
            "whole": whole,
            "chunks": chunks,
            "speed_ratio": chunks["tokens_per_s"] / whole["tokens_per_s"],
            "memory_ratio": whole["peak_mb"] / chunks["peak_mb"],
        },
        "attention": attention
        | {
            "calls_ratio": attention["calls_single"] / attention["calls_batched"],
            "speed_ratio": attention["seconds_single"] / attention["seconds_batched"],
        },
        "features": features | {"ratio": features["in_memory_mb"] / max(features["mapped_mb"], 0.1)},
        "options": asdict(options),
        "machine": this_machine().to_json() | {"load": os.getloadavg()[0]},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
