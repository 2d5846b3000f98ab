"""Evaluate a policy that LeRobot trained on the suite. LeRobot runs it in its own environment.

    sh scripts/lerobot.sh                                        # once
    python examples/evaluate_lerobot.py outputs/act --robots panda --tasks push_cube --episodes 10

Prints the success rate of each cell with its interval. `blm eval physical --model lerobot:FOLDER`
does the same. For a policy of a dataset with other names or units, give --mapping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from blm.app.lerobot_policies import PYTHON, lerobot_process
from blm.cli.physical import print_result
from blm.evaluation import PhysicalProtocol, evaluate_physical


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    robots: tuple[str, ...] = ("panda",),
    tasks: tuple[str, ...] = ("push_cube",),
    episodes: int = 10,
    mapping: Path | None = None,
    device: str = "cpu",
    out: Path = Path("results/lerobot"),
) -> None:
    """Write out/result.json and a video of each cell."""
    process = lerobot_process(
        f"lerobot:{folder}", robots=robots, mapping=mapping, python=PYTHON, device=device
    )
    with process:  # the policy and its process are shared by all workers, and end with the block
        contract = process.contract
        protocol = PhysicalProtocol.named(
            "suite24", contract, robots=tuple(contract.action_spaces), tasks=tasks, episodes=episodes
        )
        print_result(evaluate_physical(process.make_policy, protocol, out))
    print(f"result: {out / 'result.json'}")


if __name__ == "__main__":
    tyro.cli(main)
