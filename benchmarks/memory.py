"""Memory: estimates of `blm memory` against measurements, worker processes, and whole processes.

    python benchmarks/memory.py [--recipes nano smol ..] [--batch-sizes 8 32] [--device cpu] [--budget 12]
    python benchmarks/memory.py --recipes

estimates: for tiny models, what torch allocates on the CPU in Stage I (full and LoRA), Stage II from
a cache, acting and cache filling, beside the estimate. processes: resident memory of processes that
have loaded their libraries and a scene, but no model. recipes: the peak memory of Stage II with a
hidden-state cache, and the largest batch for the budget; `--recipes` without a name leaves them out.

Each number of a recipe comes from a separate process that runs two steps of the real training loop (AdamW,
moving average, a save at the end) with a recipe's policy on random hidden states in the shape of
its backbone: memory does not depend on their values, and the backbone is not loaded. On a CPU it is
the peak of the resident set, which includes the interpreter and its libraries (`idle`); on CUDA it
is torch's maximum of allocated memory. The largest batch is interpolated linearly from the two
sizes, for the memory of one device or process.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
import tyro
from measured_memory import Comparison, acting_memory, stage1_memory, stage2_memory

from blm.app.memory.estimate import estimate_memory
from blm.app.memory.table import GIB
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.evaluation.results import this_machine
from blm.policy.network import PolicyBatch, PolicyNetwork
from blm.training.loop.batches import Microbatch
from blm.training.loop.distributed import DataShard
from blm.training.loop.ema import Ema
from blm.training.loop.loop import LoopConfig, run_loop

T = TypeVar("T")


def random_batch(recipe: Recipe, size: int, tokens: int, hidden: int) -> PolicyBatch:
    """Return a batch as Stage II reads it from a cache: now and `future_steps` later."""
    policy, generator = recipe.stage2.policy, torch.Generator().manual_seed(0)
    chunk, robots = (size, policy.horizon, policy.max_dim), len(recipe.robots)
    seen = torch.ones(size, tokens, dtype=torch.bool)
    return PolicyBatch(
        hidden=torch.randn(size, tokens, hidden, generator=generator),
        mask=seen,
        future_hidden=torch.randn(size, tokens, hidden, generator=generator),
        future_mask=seen,
        state=torch.randn(size, policy.max_dim, generator=generator),
        actions=torch.randn(chunk, generator=generator),
        real=torch.ones(chunk, dtype=torch.bool),
        embodiment=torch.arange(size) % robots,
        noise=torch.randn(chunk, generator=generator),
        tau=torch.rand(size, generator=generator),
        ids=range(size),
    )


def resident() -> int:
    """Return the peak resident memory of this process so far [bytes]."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak(name: str, tokens: int, hidden: int, batch_size: int, device: str) -> tuple[int, int]:
    """Return the peak memory [bytes] before the network is created, and of two training steps."""
    torch.set_num_threads(1)
    recipe, idle = RECIPES[name](), resident()
    network = PolicyNetwork(recipe.stage2.policy, hidden, len(recipe.robots)).to(device)
    ema = Ema(network, recipe.stage2.policy.ema)
    teacher = cast(PolicyNetwork, ema.module)

    def loss(batch: PolicyBatch) -> tuple[torch.Tensor, dict[str, float]]:
        return network.loss(batch.to(device), teacher)["loss"], {}

    def next_batch(step: int, part: DataShard) -> Microbatch[PolicyBatch]:
        batch = random_batch(recipe, batch_size, tokens, hidden)
        return Microbatch(batch, batch.ids, weight=batch_size)

    with tempfile.TemporaryDirectory() as folder:
        config = LoopConfig(steps=2, batch_size=batch_size, title=f"{name} x {batch_size}")
        run_loop(network, loss, next_batch, config, Path(folder), ema=ema)
    return idle, torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident()


def estimates() -> dict[str, Comparison]:
    """Return the estimated and the measured bytes of each part."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = {f"Stage I, {name}": stage1_memory(name, folder / name) for name in ("full", "LoRA")}
        return {**found, "Stage II, cached": stage2_memory(folder), **acting_memory()}


def training_process() -> int:
    """Return the resident memory of a process that is ready to train [bytes]."""
    import blm.training.policy.train  # noqa: F401

    return resident()


def simulation_process() -> int:
    """Return the resident memory of a process that is ready to evaluate, with one scene [bytes]."""
    import blm.policy.policy  # noqa: F401
    from blm.tasks import Env

    env = Env("panda", "pick_cube", cameras=("base", "side", "wrist"), image_size=224)
    env.reset(seed=0)
    env.observation()
    env.close()
    return resident()


def alone(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process, because a child's peak begins with that of its parent.

    Functions that load a model must be called in this way.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def main(
    recipes: tuple[str, ...] = ("nano", "smol", "qwen2_5_vl_3b", "qwen2_5_vl_7b"),
    batch_sizes: tuple[int, int] = (8, 32),
    device: str = "cpu",
    budget: float = 12.0,
) -> None:
    """Print one JSON object: estimates in MiB, processes in MiB, peaks of recipes in GiB."""
    compared = {
        name: {
            "estimated_mib": round(one.estimated / 2**20, 2),
            "measured_mib": round(one.measured / 2**20, 2),
            "difference": round(one.difference, 4),
        }
        for name, one in alone(estimates).items()
    }
    processes = {
        "training_mib": alone(training_process) // 2**20,
        "simulation_mib": alone(simulation_process) // 2**20,
    }
    found = {}
    for name in recipes:
        made, peaks, idle = alone(estimate_memory, RECIPES[name]()), [], 0
        for size in batch_sizes:
            idle, most = alone(peak, name, made.tokens, made.hidden, size, device)
            peaks.append(most / GIB)
        slope = (peaks[1] - peaks[0]) / (batch_sizes[1] - batch_sizes[0])
        states = made.stage("Stage II, cached").device
        room = budget - peaks[0] + slope * batch_sizes[0]
        found[name] = {
            "policy_parameters": made.policy,
            "tokens_a_frame": made.tokens,
            "weights_moments_average_gib": round(
                sum(states[part] for part in ("trained", "gradients", "moments", "average")) / GIB, 3
            ),
            "estimated_peak_gib_at_the_recipe_s_batch": round(sum(states.values()) / GIB, 3),
            "idle_gib": round(idle / GIB, 3),
            "peak_gib": {size: round(most, 3) for size, most in zip(batch_sizes, peaks, strict=True)},
            f"largest_batch_in_{budget:g}_gib": max(0, int(room / slope)) if slope > 0 else None,
        }
        print(json.dumps({name: found[name]}), flush=True)
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    result = {"estimates": compared, "processes": processes, "recipes": found}
    print(json.dumps({**result, "gpu": gpu, "machine": this_machine().to_json()}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
