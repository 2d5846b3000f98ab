"""Evaluate your own policy server on the suite; it must use the OpenPI protocol.

    python examples/evaluate_server.py --address ws://127.0.0.1:8000 --robots panda --episodes 10

Prints the success rate of each cell with its interval, and the reasons of failures. Scenes, rules
and limits are the same for every policy, so results with equal protocols can be compared (`blm
compare`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tyro

from blm.cli.physical import print_result
from blm.evaluation import PhysicalProtocol, evaluate_physical
from blm.serving import RemotePolicy


def main(
    address: str,
    robots: tuple[str, ...] = ("panda",),
    tasks: tuple[str, ...] = ("push_cube", "pick_cube"),
    episodes: int = 10,
    max_steps: int = 200,
    out: Path = Path("results/server"),
) -> None:
    """Write out/result.json and a video of each cell."""
    make = partial(RemotePolicy, address)
    policy = make()
    protocol = PhysicalProtocol.named(
        "suite24", policy.contract, robots=robots, tasks=tasks, episodes=episodes, max_steps=max_steps
    )
    policy.close()
    print_result(evaluate_physical(make, protocol, out))
    print(f"result: {out / 'result.json'}")


if __name__ == "__main__":
    tyro.cli(main)
