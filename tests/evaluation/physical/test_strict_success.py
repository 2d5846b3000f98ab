"""The strict verdict: success with the object at rest, and on the table where it is pushed or pulled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from blm.evaluation.physical.outcome import StepOutcome, judge, observe_step
from blm.evaluation.physical.success import SuccessSummary
from blm.tasks import Env

STEP = StepOutcome(
    success=True, goal=True, held=False, resting=True, position=np.zeros(3), opening=1.0, command=1.0
)


@pytest.mark.parametrize(
    ("success", "settled", "strict"),
    [
        ([True, True], [False, True], True),
        ([True, False], [False, True], False),  # it settled elsewhere
        ([True, True], [False, False], False),
        ([False, False], [True, True], False),
    ],
)
def test_the_rule_and_rest_must_hold_at_the_same_step(success, settled, strict):
    steps = [replace(STEP, success=a, settled=b) for a, b in zip(success, settled, strict=True)]
    outcome = judge(np.zeros(3), steps, prehensile=False)
    assert outcome.success_strict == strict and outcome.success_once == any(success)


@pytest.mark.parametrize(("task", "height"), [("pull_cube", 0.3), ("push_cube", 0.0), ("pull_cube", 0.0)])
def test_a_cube_that_flies_or_slides_over_the_target_has_not_settled(task, height):
    """It is thrown, or slides, through the target: ManiSkill's rule holds on the way."""
    env = Env("panda", task, cameras=())
    env.reset(seed=1)
    target = env.objects()["target"].position
    half = env.robot.workspace.cube_half
    joint = env.data.joint("cube")
    joint.qpos[:] = (*target[:2], half + height, 1, 0, 0, 0)
    joint.qvel[:] = (0, 0.5, 0, 0, 0, 0)
    action = np.array([*env.state()[:-1], 1.0], dtype=np.float32)
    info = env.step(action)[4]
    seen = observe_step(env, 1.0, info)
    assert info["success"] and not seen.settled
    for _ in range(60):
        info = env.step(action)[4]
    joint.qpos[:3], joint.qvel[:] = (*target[:2], half), 0
    for _ in range(10):
        info = env.step(action)[4]
    assert observe_step(env, 1.0, info).settled and info["success"]


def test_an_object_in_the_hand_settles_in_the_air():
    env = Env("panda", "pick_cube", cameras=())
    env.reset(seed=1)
    thing = env.named_objects()["cube"]
    lifted = replace(thing, position=thing.position + np.array([0, 0, 0.2]))
    assert env.task_spec.is_settled(lifted)
    assert not env.task_spec.is_settled(replace(lifted, speed=0.02))


def test_results_of_older_versions_have_no_strict_rate():
    rate = {"hits": 1, "n": 2, "rate": 0.5, "low": 0.1, "high": 0.9}
    value = {"n": 2, "success_once": rate, "success_at_end": rate, "reasons": {}, "act_ms": 1.0}
    old = SuccessSummary.from_json(value)
    assert old.success_strict is None and "success_strict" not in old.to_json()
    new = SuccessSummary.from_json({**value, "success_strict": rate})
    assert new.success_strict is not None and new.to_json()["success_strict"] == rate
