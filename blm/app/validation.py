"""Closed-loop validation of a policy while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from blm.evaluation import PhysicalProtocol, evaluate_physical
from blm.io import remove_own, work_folder
from blm.policy.policy import CheckpointPolicy
from blm.training.policy.train import ClosedLoopValidation


def closed_loop_validation(
    out: Path, tasks: Sequence[str], episodes: int, workers: int
) -> ClosedLoopValidation:
    """Return a callback that validates a policy on `episodes` episodes of each robot and task.

    It returns the success rate under "success"; results are kept in `out`/driven/STEP.
    """

    def validate(step: int, policy: CheckpointPolicy) -> dict[str, float]:
        folder = out / "driven" / f"{step:08d}"
        weights = work_folder(out / "driven/.weights", "a policy in training", {})
        policy.save(weights / "policy", {})
        protocol = PhysicalProtocol.for_validation(policy.contract, tasks=tasks, episodes=episodes)
        make = partial(CheckpointPolicy.load, weights / "policy")
        result = evaluate_physical(make, protocol, folder, workers=workers, videos_per_cell=0)
        remove_own(weights)
        return {"success": result.summary.overall.success_once.rate}

    return validate
