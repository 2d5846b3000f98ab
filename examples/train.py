"""Train bridge and policy on your own LeRobot dataset, with any backbone, and print their errors.

python examples/train.py --dataset data/my_robot --backbone demo/stage1/backbone --cameras base wrist
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from blm.datasets.lerobot import open_dataset
from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.types import Observation


def main(
    dataset: Path,
    backbone: str,
    cameras: tuple[str, ...],
    out: Path = Path("runs/mine"),
    layer: int = 3,
    steps: int = 2000,
    batch_size: int = 64,
    execute: int = 8,
) -> None:
    """Write out/checkpoint, and print the mean error of its first actions on recorded states."""
    data = open_dataset(dataset)
    print(
        f"{data.space.robot}: {data.num_episodes} episodes, {data.num_frames} frames, cameras {data.cameras}"
    )
    config = PolicyTrainingConfig(
        datasets=(dataset,),
        backbone=backbone,
        intents=HiddenStateConfig(layer=layer, cameras=cameras, stride=2),
        loop=LoopConfig(steps=steps, batch_size=batch_size, lr=2e-3, log_every=50),
        cache=out / "intents",
        execute=execute,
    )
    checkpoint = train_stage2(config, out, {"example": "train.py"})
    policy, errors = CheckpointPolicy.load(checkpoint), []
    for frame in np.linspace(0, data.num_frames - 2, 20).astype(int):
        seen = Observation(
            images={camera: data.frames([frame], camera)[0] for camera in cameras},
            state=data.states[frame],
            instruction=data.instructions[data.task_index[frame]],
            robot=data.space.robot,
        )
        errors.append(np.abs(policy.act(seen).actions[0] - data.actions[frame]))
    for name, unit, error in zip(data.space.names, data.space.units, np.mean(errors, axis=0), strict=True):
        print(f"  {name}: {error:.4f} {unit} mean absolute error over {len(errors)} frames")
    print(f"checkpoint: {checkpoint}")


if __name__ == "__main__":
    tyro.cli(main)
