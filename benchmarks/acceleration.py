"""Joint accelerations in the suite: of the commanded targets, and of the simulated joints.

    python benchmarks/acceleration.py [--seeds 2]

The planner's trajectories respect the joints' acceleration limits. An environment receives targets
at the control rate, each held for a whole step, so a stiff simulated servo jerks at every step. For
each robot, this program prints the largest ratio of acceleration to limit over the expert's
episodes (all six tasks, validation seeds): of the targets, as second differences at the control
rate, and of the joints, at the physics rate.
"""

from __future__ import annotations

import argparse
import json

import mujoco
import numpy as np

from blm.evaluation.protocol import VALIDATION_SEEDS
from blm.evaluation.results import this_machine
from blm.planner.expert import Expert
from blm.robots import ROBOTS
from blm.tasks import SUITE24, Env


def ratios(robot: str, task: str, seed: int, steps: int = 200) -> tuple[float, float]:
    """Return the largest |acceleration| / limit over one episode, of targets and of joints."""
    limits = np.array(ROBOTS[robot].acceleration_limits)
    env = Env(robot, task, cameras=(), terminate_on_success=False)
    env.reset(seed=seed)
    expert = Expert(env, np.random.default_rng(seed))
    dofs = [int(env.model.joint(name).dofadr[0]) for name in env.contract_space.names[:-1]]
    joints, targets = 0.0, [env.state()[:-1].astype(float)] * 2

    def record(model: mujoco.MjModel, data: mujoco.MjData) -> None:
        nonlocal joints
        joints = max(joints, float(np.max(np.abs(data.qacc[dofs]) / limits)))

    mujoco.set_mjcb_control(record)
    try:
        for _ in range(steps):
            action, _ = expert.act()
            targets.append(np.asarray(action[:-1], float))
            env.step(action)
    finally:
        mujoco.set_mjcb_control(None)
        env.close()
    second = np.abs(np.diff(targets, n=2, axis=0)) * env.contract_space.rate_hz**2
    return float(np.max(second / limits)), joints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="episodes of each robot and task")
    seeds = VALIDATION_SEEDS[: parser.parse_args().seeds]
    for robot in ROBOTS:
        found = np.array([ratios(robot, task, seed) for task in SUITE24 for seed in seeds])
        worst = {"robot": robot, "episodes": len(found)}
        for name, column in zip(("targets", "joints"), found.T, strict=True):
            worst[name] = {"median": round(float(np.median(column)), 1), "max": round(float(column.max()), 1)}
        print(json.dumps(worst), flush=True)
    print(json.dumps({"machine": this_machine().to_json()}))


if __name__ == "__main__":
    main()
