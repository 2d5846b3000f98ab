"""Data share of live Stage II against a simulated device: do worker processes keep up with it?

    python benchmarks/live_training.py [--workers 0 1 2] [--step-seconds 0.5] [--batch-size 32]

Qwen2.5-VL's real processor, a tiny random model of its class, and a made data set of three 224 px
cameras. The device's part of a step (backbone, policy) is a sleep. Each sample needs the prompts of
its current and its future frame. One JSON: for each number of workers the data share of a step,
mean and largest, after the first steps; CPU milliseconds a prompt, by the fast way (frames decoded,
pictures left to the device) and by the processor in the worker; and from these the workers that the
given step needs if each has a core of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from gpu_setting import tiny_shape
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from blm.backbone.backbone import Backbone
from blm.backbone.stand_in import stand_in
from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode
from blm.evaluation.results import this_machine
from blm.policy.network import PolicyConfig
from blm.training.loop.batches import ByWorkers, open_batches
from blm.training.loop.distributed import DataShard
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.live import LiveBatches, PreparedPrompts, PromptReader, open_live
from blm.training.policy.sampler import PolicySampler, split
from blm.types import ActionSpace, Episode

CAMERAS, SIDE, LENGTH, DIM = ("base", "side", "wrist"), 224, 60, 8
WARM_UP = 4
"""Steps that are not measured; the first ones wait for the start of the workers."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Waiting of the training loop with a number of workers."""

    workers: int
    data_share: float
    """Share of the time of a step spent waiting for data."""
    largest: float
    prompts_per_s: float
    steps: int


def make_dataset(folder: Path, episodes: int = 6) -> Path:
    """Write a dataset of noisy moving squares, which are about as costly to decode as scenes."""
    names = (*(f"joint{i}" for i in range(DIM - 1)), "gripper")
    units, low = ("rad",) * (DIM - 1) + ("opening",), (-3.0,) * (DIM - 1) + (0.0,)
    space = ActionSpace(robot="arm", names=names, units=units, low=low, high=(3.0,) * (DIM - 1) + (1.0,))
    rng = np.random.default_rng(0)
    staged = []
    for seed in range(episodes):
        coarse = rng.integers(60, 160, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        images = np.repeat(coarse.repeat(8, 0).repeat(8, 1)[None], LENGTH, 0)
        for t in range(LENGTH):
            images[t, 20 + 2 * t : 60 + 2 * t, 30:70] = (200, 40, 40)
        walk = np.clip(np.cumsum(rng.normal(0, 0.03, (LENGTH + 1, DIM)), 0), 0, 1).astype(np.float32)
        episode = Episode(
            robot="arm",
            task="walk",
            seed=seed + 10_000,
            instruction="Pick up the red cube and move it to the green goal.",
            states=walk[:-1],
            actions=walk[1:],
            images=dict.fromkeys(CAMERAS, images),
        )
        stage_episode(folder / "staging", str(seed), episode)
        staged.append(folder / "staging" / str(seed))
    return finalize_dataset(
        staged, folder / "arm", space=space, cameras=CAMERAS, image_size=SIDE, provenance={}
    )


def make_backbone(folder: Path) -> Backbone:
    """Write and load a tiny Qwen2.5-VL whose processor has the settings of the released one."""
    backbone = stand_in(tiny_shape("qwen2_5_vl_3b"))
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    backbone.processor.image_processor = Qwen2VLImageProcessorPil(size=size)
    backbone.save(folder)
    return Backbone.load(folder)


def cpu_ms(make: LiveBatches, steps: int = 2) -> float:
    """Return the CPU time of this process for a prompt [ms], after one step of warm-up."""
    make(0)
    begin, prompts = time.process_time(), 0
    for step in range(1, 1 + steps):
        prompts += count(make(step).batch.prompts)
    return (time.process_time() - begin) / prompts * 1000


def count(parts: Sequence[PreparedPrompts]) -> int:
    """Return the number of prompts of a batch."""
    return sum(len(part.inputs["input_ids"]) for part in parts)


def share(make: LiveBatches, workers: int, step_seconds: float, steps: int) -> Share:
    """Run steps of a sleep each, and measure the waits."""
    waits, prompts = [], 0
    with open_batches(ByWorkers(make, workers), range(WARM_UP + steps), [DataShard()]) as batches:
        for (microbatch,), wait in batches:
            time.sleep(step_seconds)
            waits.append(wait)
            prompts += count(microbatch.batch.prompts)
    shares = [wait / (wait + step_seconds) for wait in waits[WARM_UP:]]
    seconds = sum(waits[WARM_UP:]) + steps * step_seconds
    rate = prompts * steps / (WARM_UP + steps) / seconds
    mean = sum(waits[WARM_UP:]) / seconds
    return Share(workers=workers, data_share=mean, largest=max(shares), prompts_per_s=rate, steps=steps)


def main(
    workers: tuple[int, ...] = (0, 1, 2), step_seconds: float = 0.5, batch_size: int = 32, steps: int = 12
) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        backbone = make_backbone(Path(scratch) / "backbone")
        dataset = open_dataset(make_dataset(Path(scratch)))
        policy = PolicyConfig()
        datasets = split([dataset], policy, stride=1, held_out=0.0, seed=0, robots=["arm"])
        config = HiddenStateConfig(layer=1, cameras=CAMERAS)
        sampler = PolicySampler(datasets, policy, batch_size=batch_size, seed=0, weights={})
        source = str(Path(scratch) / "backbone")
        begin = time.process_time()
        live = open_live(backbone, source, datasets, config)
        proof = time.process_time() - begin
        assert live.tap.pixel_map is not None, "Qwen's processor is a map at 224 px"
        make = LiveBatches(sampler, live.reader, config)
        slow = LiveBatches(sampler, PromptReader(backbone, source, config.prompt), config)
        cost = {"fast": cpu_ms(make), "processor in the worker": cpu_ms(slow)}
        batch = make(0).batch
        begin = time.process_time()
        for part in batch.prompts:
            live.tap.inputs(part)
        device_part = (time.process_time() - begin) / count(batch.prompts) * 1000
        result = {
            "data_share": [asdict(share(make, number, step_seconds, steps)) for number in workers],
            "cpu_ms_per_prompt": cost,
            "prompts_per_s_per_worker": {name: 1000 / ms for name, ms in cost.items()},
            "workers_needed": {name: 2 * batch_size * ms / 1000 / step_seconds for name, ms in cost.items()},
            "pixel_map_on_this_cpu_ms_per_prompt": device_part,
            "proof_at_the_start_cpu_s": proof,
            "bytes_per_step": sum(
                part.pictures.numel() for part in batch.prompts if part.pictures is not None
            ),
            "batch_size": batch_size,
            "step_seconds": step_seconds,
            "prompts_per_step_n": count(batch.prompts),
            "machine": this_machine().to_json(),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
