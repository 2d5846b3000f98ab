"""Control an arm with a policy server. The arm is any object with the methods of LeRobot's `Robot`.

    blm serve blm-nano &
    python examples/real_robot.py --address ws://127.0.0.1:8000 --robot panda --task push_cube

Here the arm is simulated. For a real one, replace `SimulatedRobot` by, for instance,
`lerobot.robots.so101_follower.SO101Follower(config)`, state its cameras and units, and take its
limits from its data sheet. Read docs/robot.md first: the loop does not know the arm's surroundings.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from blm.robots import ROBOTS
from blm.runtime import Arm, ArmLimits, Driver, RunLog, Safety, StoppedError
from blm.serving import RemotePolicy
from blm.tasks import Env

CAMERAS = ("base", "side", "wrist")


class SimulatedRobot:
    """A simulated arm with the methods of LeRobot's `Robot`.

    A fraction `drop` of its observations fails.
    """

    def __init__(self, robot: str, task: str, seed: int, image_size: int, drop: float = 0.0) -> None:
        self.env = Env(robot, task, cameras=(), image_size=image_size, terminate_on_success=False)
        self.env.reset(seed=seed)  # renders nothing: OpenGL belongs to the thread that connects and reads
        self.names, self.drop, self.solved = self.env.contract_space.names, drop, False
        self.chance = np.random.default_rng(seed)
        self.instruction = self.env.task_description

    def connect(self) -> None:
        print(f"connected: {', '.join(self.names)}")

    def disconnect(self) -> None:
        self.env.close()

    def get_observation(self) -> dict[str, Any]:
        if self.chance.random() < self.drop:
            raise TimeoutError("the camera returned no frame")
        joints = zip(self.names, self.env.state().tolist(), strict=True)
        pictures = {camera: self.env.picture(camera) for camera in CAMERAS}
        return {f"{name}.pos": value for name, value in joints} | pictures

    def send_action(self, action: dict[str, Any]) -> None:
        target = np.array([action[f"{name}.pos"] for name in self.names], np.float32)
        self.solved |= bool(self.env.step(target)[4]["success"])


def limits_of(robot: str, speed: float) -> ArmLimits:
    """Return the limits of the data sheets cited in `blm/robots`.

    Joint speeds are at most `speed` [rad/s].
    """
    spec = ROBOTS[robot]
    velocity = [min(speed, most) for most in spec.velocity_limits]
    return ArmLimits.of(spec.action_space, velocity=velocity, acceleration=spec.acceleration_limits)


def main(
    address: str = "ws://127.0.0.1:8000",
    robot: str = "panda",
    task: str = "push_cube",
    seed: int = 0,
    seconds: float = 10.0,
    drop: float = 0.05,
    speed: float = 1.5,
    max_hold_s: Annotated[float, tyro.conf.arg(aliases=("--patience",))] = 30.0,
    log: Path | None = None,
) -> None:
    """Print the counts, the latency and the result of a run."""
    connect = partial(RemotePolicy, address, timeout_s=5.0, deadline_ms=1000.0)
    policy = connect()
    size = policy.contract.image_size
    policy.close()
    simulated = SimulatedRobot(robot, task, seed, size, drop)
    driver = Driver(
        Arm(simulated, limits_of(robot, speed)),
        connect,
        simulated.instruction,
        safety=Safety(max_hold_s=max_hold_s),
        log=RunLog(log),
    )
    try:
        driver.run(seconds, seed=seed)
        print("solved" if simulated.solved else "not solved")
    except StoppedError as stopped:
        print(f"STOPPED; the arm holds its position: {stopped}")
    report = driver.report
    latency = f"{np.median(report.latencies_ms):.0f} ms" if report.latencies_ms else "-"
    print(
        f"{report.steps} steps, {report.chunks} chunks, {report.held} held, {report.clamped} clamped, "
        f"{report.unread} observations lost, {sum(report.dropped.values())} replies dropped, "
        f"{report.reconnections} reconnections, median latency {latency}"
    )


if __name__ == "__main__":
    tyro.cli(main)
