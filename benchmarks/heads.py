"""The per-robot layers of the 7B recipe, forward and backward: samples grouped by robot, or gathered.

    python benchmarks/heads.py [--samples 32] [--repeats 5]

Prints one JSON object: the time and the added peak memory of a pass over state encoder, action
encoder and action decoder, with `Runs` and with one gathered matrix per sample, and the ratios.
Each form runs in a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time

import torch

from blm.app.recipes import qwen2_5_vl_7b
from blm.evaluation.results import this_machine
from blm.policy.heads import ActionEncoder, IndexedMLP, runs_of

ROBOTS = 4


def passes(form: str, samples: int, repeats: int) -> tuple[float, float]:
    """Return the median time of a pass [s], and the peak memory that the passes add [MiB]."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = qwen2_5_vl_7b().stage2.policy
    dim, width = config.max_dim, config.width
    encode_state = IndexedMLP(ROBOTS, dim, width, width)
    encode_action = ActionEncoder(ROBOTS, dim, width)
    decode = IndexedMLP(ROBOTS, width, width, dim)
    modules = (encode_state, encode_action, decode)
    for p in (p for module in modules for p in module.parameters()):
        p.grad = torch.zeros_like(p)
    rows = sorted(number % ROBOTS for number in range(samples))
    index = runs_of(rows) if form == "runs" else torch.tensor(rows)
    state, actions = torch.randn(samples, 1, dim), torch.randn(samples, config.horizon, dim)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        tokens = encode_action(actions, torch.rand(samples), index) + encode_state(state, index)
        decode(tokens, index).square().mean().backward()
        times.append(time.perf_counter() - begin)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return statistics.median(times[1:]), added / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--samples", type=int, default=32, help="samples of a pass; the recipe has 256 a step"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured passes of each form")
    chosen = parser.parse_args()
    found = {}
    for form in ("gathered", "runs"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[form] = pool.apply(passes, (form, chosen.samples, chosen.repeats))
    (slow, much), (fast, little) = found["gathered"], found["runs"]
    report = {
        "samples": chosen.samples,
        "seconds": {"gathered": slow, "runs": fast, "ratio": slow / fast},
        "added_peak_mib": {"gathered": much, "runs": little, "ratio": much / little},
        "machine": this_machine().to_json(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
