"""Speed-up from the hidden-state cache: Stage II samples/s with and without it.

    python benchmarks/intents.py [--repeats 5] [--steps 4] [--batch-size 32] [--threads 1]

It runs on a generated dataset with the untrained nano backbone: the speed depends on neither
weights nor images. Each repeat times both variants on the same batches, one after the other. The
interval of the ratio is a 95 % t-interval of its logarithm over the repeats.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

from blm.backbone.backbone import Backbone, build_nano
from blm.datasets.lerobot import finalize_dataset, open_dataset, stage_episode
from blm.evaluation.results import this_machine
from blm.policy.network import PolicyBatch, PolicyConfig, PolicyNetwork
from blm.training.loop.loop import LoopConfig
from blm.training.policy.add_robot import from_scratch
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hashed_backbone import HashedBackbone
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.open_data import make_sampler, open_datasets
from blm.training.policy.sampler import PolicySampler
from blm.types import ActionSpace, Episode

CAMERAS, SIDE, LENGTH, DIM = ("base", "side", "wrist"), 112, 60, 8
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t by number of repeats (one fewer degrees of freedom)."""


def make_dataset(
    folder: Path, episodes: int, *, cameras: tuple[str, ...] = CAMERAS, side: int = SIDE
) -> Path:
    """Write a dataset of moving squares and random walks in the format of real datasets."""
    rng = np.random.default_rng(0)
    names = (*(f"joint{i}" for i in range(DIM - 1)), "gripper")
    units, low = ("rad",) * (DIM - 1) + ("opening",), (-3.0,) * (DIM - 1) + (0.0,)
    space = ActionSpace(robot="arm", names=names, units=units, low=low, high=(3.0,) * (DIM - 1) + (1.0,))
    staged = []
    for seed in range(episodes):
        images = np.full((LENGTH, side, side, 3), 90, np.uint8)
        for t in range(LENGTH):
            images[t, 20 + t : 40 + t, 30:50] = (200, 40, 40)
        walk = np.clip(np.cumsum(rng.normal(0, 0.03, (LENGTH + 1, DIM)), 0), 0, 1).astype(np.float32)
        episode = Episode(
            robot="arm",
            task="walk",
            seed=seed,
            instruction="Pick up the red cube and move it to the green goal.",
            states=walk[:-1],
            actions=walk[1:],
            images=dict.fromkeys(cameras, images),
        )
        stage_episode(folder / "staging", str(seed), episode)
        staged.append(folder / "staging" / str(seed))
    return finalize_dataset(
        staged, folder / "arm", space=space, cameras=cameras, image_size=side, provenance={}
    )


def trainer(hidden_size: int) -> Callable[[PolicyBatch], None]:
    """Return a function that runs one Stage II step with the default (nano) policy."""
    torch.manual_seed(0)
    network = PolicyNetwork(PolicyConfig(), hidden_size, 1)
    teacher = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def step(batch: PolicyBatch) -> None:
        optimizer.zero_grad()
        network.loss(batch, teacher)["loss"].backward()
        optimizer.step()

    return step


def rate(sampler: PolicySampler, step: Callable[[PolicyBatch], None], steps: range, batch_size: int) -> float:
    begin = time.perf_counter()
    for number in steps:
        step(sampler(number))
    return len(steps) * batch_size / (time.perf_counter() - begin)


def main(repeats: int = 5, steps: int = 4, batch_size: int = 32, threads: int = 1, episodes: int = 8) -> None:
    """Print one JSON object with both rates, their ratio and its interval."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_nano().save(folder / "backbone")
        backbone = Backbone.load(folder / "backbone")
        cached = PolicyTrainingConfig(
            datasets=(make_dataset(folder, episodes),),
            backbone=str(folder / "backbone"),
            intents=HiddenStateConfig(layer=3, cameras=CAMERAS, workers=0),
            loop=LoopConfig(steps=1, batch_size=batch_size),
            cache=folder / "cache",
        )
        dataset, begin = open_dataset(folder / "arm"), time.perf_counter()
        start = from_scratch(cached.policy, backbone.hidden_size, ["arm"], seed=0)
        hashed = HashedBackbone.of(backbone, cached.backbone)
        samplers = {"cached": make_sampler(open_datasets(hashed, [dataset], cached, start, None), cached)}
        filling = time.perf_counter() - begin
        live = replace(cached, cache=None)
        samplers["live"] = make_sampler(open_datasets(hashed, [dataset], live, start, None), live)
        step = trainer(backbone.hidden_size)
        rates: dict[str, list[float]] = {name: [] for name in samplers}
        for repeat in range(-1, repeats):  # the first repeat warms up
            for name, sampler in samplers.items():
                value = rate(sampler, step, range(repeat * steps + steps, (repeat + 2) * steps), batch_size)
                rates[name] += [value] if repeat >= 0 else []
        tokens = samplers["cached"](0).hidden.shape[1]
    logs = np.log(np.array(rates["cached"]) / np.array(rates["live"]))
    half = T_975[repeats] * logs.std(ddof=1) / repeats**0.5
    result = {
        "ratio": float(np.exp(logs.mean())),
        "interval_95": [float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))],
        "samples_per_s": {name: float(np.mean(values)) for name, values in rates.items()},
        "filling_frames_per_s": dataset.num_frames / filling,
        "repeats": repeats,
        "samples_per_repeat": steps * batch_size,
        "tokens_per_frame": tokens,
        "threads": threads,
        "machine": this_machine().to_json(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
