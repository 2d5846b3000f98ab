"""Closed-loop validation of a policy while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from blm.evaluation import PhysicalProtocol, evaluate_physical
from blm.io import remove_own, work_folder
from blm.policy.policy import CheckpointPolicy
from blm.training.policy.train import ClosedLoopValidation
from blm.types import Policy, PolicyContract


def closed_loop_validation(
    out: Path, tasks: Sequence[str], episodes: int, workers: int
) -> ClosedLoopValidation:
    """Return a callback that validates a policy on `episodes` episodes of each robot and task.

    It returns the success rate under "success"; results are kept in `out`/driven/STEP. On a GPU the
    policy in training itself answers all workers; on the CPU, each worker loads a copy of it.
    """

    def validate(step: int, policy: CheckpointPolicy) -> dict[str, float]:
        folder = out / "driven" / f"{step:08d}"
        if policy.device != "cpu":
            return evaluate(lambda: policy, policy.contract, folder)
        weights = work_folder(out / "driven/.weights", "a policy in training", {})
        policy.save(weights / "policy", {}, proved=True)  # each worker hashes what it loads
        metrics = evaluate(
            partial(CheckpointPolicy.load, weights / "policy", actions_only=True), policy.contract, folder
        )
        remove_own(weights)
        return metrics

    def evaluate(make: Callable[[], Policy], contract: PolicyContract, folder: Path) -> dict[str, float]:
        protocol = PhysicalProtocol.for_validation(contract, tasks=tasks, episodes=episodes)
        result = evaluate_physical(make, protocol, folder, workers=workers, videos_per_cell=0)
        return {"success": result.summary.overall.success_once.rate}

    return validate
