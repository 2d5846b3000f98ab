"""Add an arm to a trained checkpoint: the policy gets new rows for it, and nothing else changes.

    python examples/add_robot.py --checkpoint demo/stage2/checkpoint --dataset data/my_robot

The dataset must be of a robot that the checkpoint does not have, with the checkpoint's cameras and
rate.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from safetensors.torch import load_file

from blm.policy.policy import CheckpointPolicy
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2


def main(
    checkpoint: Path,
    dataset: Path,
    out: Path = Path("runs/more_robots"),
    steps: int = 2000,
    batch_size: int = 64,
) -> None:
    """Write out/checkpoint, and print which weights are new."""
    before = CheckpointPolicy.load(checkpoint)
    config = PolicyTrainingConfig(
        datasets=(dataset,),
        backbone=str(checkpoint / "backbone"),
        intents=HiddenStateConfig(layer=before.tap.layer, cameras=before.contract.cameras, stride=2),
        policy=before.network.config,
        loop=LoopConfig(steps=steps, batch_size=batch_size, lr=2e-3, log_every=50),
        cache=out / "intents",
        execute=before.contract.execute,
        start=checkpoint,
        only_new=True,
    )
    made = train_stage2(config, out, {"example": "add_robot.py"})
    old, new = (load_file(folder / "policy.safetensors") for folder in (checkpoint, made))
    grown = [name for name in old if new[name].shape != old[name].shape]
    same = all(bool((new[name][: len(old[name])] == old[name]).all()) for name in old)
    print(f"robots: {', '.join(CheckpointPolicy.load(made).contract.action_spaces)}")
    print(f"{len(grown)} of {len(old)} weights have a new row; all others unchanged: {same}")
    print(f"checkpoint: {made}")


if __name__ == "__main__":
    tyro.cli(main)
