"""Drive one simulated episode with an exported policy, and prove that torch is not there.

    python benchmarks/episode.py nano-onnx [--robot panda] [--task push_cube] [--seed 0]

It needs the light set of packages (scripts/edge.txt), mujoco and gymnasium. The exit status is 1 if
torch was imported.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import tyro

from blm.app.pretrained import BLM
from blm.chunks import ChunkExecutor
from blm.tasks import Env
from blm.types import decision_seed

MAX_STEPS = 200


def main(
    folder: tyro.conf.Positional[Path], robot: str = "panda", task: str = "push_cube", seed: int = 0
) -> None:
    """Print whether the task was solved, and the time of a decision."""
    model = BLM.from_pretrained(folder, runtime="onnx")
    contract = model.contract
    env = Env(robot, task, cameras=(), image_size=contract.image_size)
    env.reset(seed=seed)
    executor, times, solved = ChunkExecutor(contract.execute, hold=env.state()), [], False
    while not solved and executor.step < MAX_STEPS:
        if executor.decision_due:
            observation = env.observation(decision_seed(seed, executor.step), contract.cameras)
            begin = time.perf_counter()
            executor.receive(model.act(observation).actions)
            times.append(1000 * (time.perf_counter() - begin))
        solved = bool(env.step(executor.next_action())[4]["is_success"])
    found = {
        "solved": solved,
        "steps": executor.step,
        "decisions": len(times),
        "median_ms": round(statistics.median(times), 1),
        "torch_imported": "torch" in sys.modules,
    }
    print(json.dumps(found))
    raise SystemExit(found["torch_imported"])


if __name__ == "__main__":
    tyro.cli(main)
