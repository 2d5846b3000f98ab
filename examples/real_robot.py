"""Drive an arm from a policy server, safely. Any object with the methods of LeRobot's `Robot` will do.

    blm serve blm-nano &
    python examples/real_robot.py --address ws://127.0.0.1:8000 --robot panda --task push_cube

Here the arm is simulated; for yours replace `SimulatedRobot` by, for instance,
`lerobot.robots.so101_follower.SO101Follower(config)`, name its cameras, and give its units.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tyro

from blm.serving import RemotePolicy
from blm.serving.driving import Driver, Safety, StoppedError
from blm.tasks import Env


class SimulatedRobot:
    """A simulated arm behind the methods of LeRobot's `Robot`; `drop` is the share of reads that fail."""

    def __init__(self, robot: str, task: str, seed: int, image_size: int, drop: float = 0.0) -> None:
        cameras = ("base", "side", "wrist")
        self.env = Env(robot, task, cameras=cameras, image_size=image_size, terminate_on_success=False)
        self.env.reset(seed=seed)
        self.names, self.drop, self.solved = self.env.contract_space.names, drop, False
        self.chance = np.random.default_rng(seed)

    def connect(self) -> None:
        print(f"connected: {', '.join(self.names)}")

    def disconnect(self) -> None:
        self.env.close()

    def get_observation(self) -> dict[str, Any]:
        if self.chance.random() < self.drop:
            raise TimeoutError("the camera gave no frame")
        seen = self.env.observe()
        joints = zip(self.names, seen["agent_pos"].tolist(), strict=True)
        return {f"{name}.pos": value for name, value in joints} | seen["pixels"]

    def send_action(self, action: dict[str, Any]) -> None:
        target = np.array([action[f"{name}.pos"] for name in self.names], np.float32)
        self.solved |= bool(self.env.step(target)[4]["success"])


def main(
    address: str = "ws://127.0.0.1:8000",
    robot: str = "panda",
    task: str = "push_cube",
    seed: int = 0,
    seconds: float = 10.0,
    drop: float = 0.05,
    speed: float = 1.5,
    patience: float = 30.0,
) -> None:
    """Print what happened: chunks, clamped actions, lost frames, reconnections, latency."""
    connect = partial(RemotePolicy, address, timeout_s=5.0, deadline_ms=1000.0)
    policy = connect()
    size = policy.contract.image_size
    policy.close()
    arm = SimulatedRobot(robot, task, seed, size, drop)
    safety = Safety(speed=speed, patience_s=patience)
    driver = Driver(arm, connect, robot, arm.env.task_description, safety=safety)
    try:
        report = driver.run(seconds)
        print("solved" if arm.solved else "not solved")
    except StoppedError as stopped:
        report = driver.report
        print(f"STOPPED, and holding still: {stopped}")
    latency = f"{np.median(report.latencies_ms):.0f} ms" if report.latencies_ms else "-"
    print(
        f"{report.steps} steps, {report.chunks} chunks, {report.held} held, {report.clamped} clamped, "
        f"{report.unread} observations lost, {report.late} late, {report.reconnections} reconnections, "
        f"median answer {latency}"
    )


if __name__ == "__main__":
    tyro.cli(main)
