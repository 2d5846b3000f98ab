import json
from dataclasses import replace

import numpy as np
import pytest

from blm.datasets.transforms import (
    MIN_HALF_RANGE,
    ActionTransform,
    Normalize,
    RobotTransforms,
    action_chunks,
    fit_transforms,
    implausible_ranges,
)
from blm.types import ActionKind, ActionSpace, BlmError, ContractError

N, H, D = 200, 5, 4
SPACE = ActionSpace(
    robot="toy",
    names=("a", "b", "c", "gripper"),
    units=("rad", "rad", "rad", "opening"),
    low=(-3.0, -3.0, -3.0, 0.0),
    high=(3.0, 3.0, 3.0, 1.0),
)
ARM = (True, True, True, False)
MIXED = replace(
    SPACE,
    kind="per_dimension",
    kinds=("absolute_eef_position", "delta_eef_position", "absolute_eef_rotation", "gripper"),
)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(N, D)).astype(np.float32)
    chunks = (states[:, None] + rng.normal(size=(N, H, D)) * np.arange(1, H + 1)[:, None] * 0.2).astype(
        np.float32
    )
    chunks[..., 2] = states[:, None, 2]  # a joint that never moves
    return states, chunks, np.ones((N, H), dtype=bool)


@pytest.mark.parametrize("relative", [True, False])
def test_round_trip_leaves_inputs_unchanged(data, relative):
    states, chunks, inside = data
    transforms = fit_transforms(SPACE, states, chunks, inside, relative)
    before = states.copy(), chunks.copy()
    wild = chunks * 7 + 3  # far outside of the fitted range: nothing is clipped
    for values in (chunks, wild):
        there = transforms.actions.forward(values, states)
        np.testing.assert_allclose(transforms.actions.inverse(there, states), values, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(transforms.state.inverse(transforms.state.forward(states)), states, atol=1e-6)
    np.testing.assert_array_equal(states, before[0])
    np.testing.assert_array_equal(chunks, before[1])


def test_relative_actions_subtract_the_arm_and_not_the_gripper():
    state, actions = np.array([1.0, 2.0, 3.0, 0.5]), np.array([[1.5, 2.0, 2.0, 0.25]])
    assert SPACE.offsets_allowed == ARM
    plain = Normalize(np.full(D, -1.0), np.full(D, 1.0))
    moved = ActionTransform(plain, relative=ARM).forward(actions, state)
    np.testing.assert_array_equal(moved, [[0.5, 0.0, -1.0, 0.25]])
    np.testing.assert_array_equal(
        ActionTransform(plain, relative=(False,) * 4).forward(actions, state), actions
    )


def test_ranges_are_per_step_and_joint_and_map_to_plus_minus_one(data):
    states, chunks, inside = data
    transforms = fit_transforms(SPACE, states, chunks, inside, True)
    there = transforms.actions.forward(chunks, states)
    low, high = np.quantile(there[..., :2], [0.002, 0.998], axis=0)
    np.testing.assert_allclose(low, -1, atol=1e-5)
    np.testing.assert_allclose(high, 1, atol=1e-5)


def test_a_constant_joint_is_safe_and_the_gripper_keeps_its_own_range(data):
    states, chunks, inside = data
    transforms = fit_transforms(SPACE, states, chunks, inside, True)
    there = transforms.actions.forward(chunks, states)
    np.testing.assert_allclose(there[..., 2], 0, atol=1e-6)
    opening = np.zeros((1, H, D))
    assert transforms.actions.forward(opening, np.zeros((1, D)))[0, 0, -1] == -1
    one_floor = transforms.actions.inverse(np.ones((1, H, D)), np.zeros((1, D)))[0, 0, 2]
    assert one_floor == pytest.approx(MIN_HALF_RANGE)


def test_frames_beyond_the_episode_do_not_touch_the_statistics(data):
    states, chunks, inside = data
    inside[: N // 2, 2:] = False
    poisoned = np.where(inside[..., None], chunks, 1e6).astype(np.float32)
    a, b = (fit_transforms(SPACE, states, c, inside, True) for c in (chunks, poisoned))
    assert a.to_json() == b.to_json()
    with pytest.raises(BlmError, match="no training episode has 5 steps"):
        fit_transforms(SPACE, states, chunks, inside & (np.arange(H) < 4), True)


def test_json_round_trip_is_exact(data):
    states, chunks, inside = data
    transforms = fit_transforms(SPACE, states, chunks, inside, True)
    again = RobotTransforms.from_json(json.loads(json.dumps(transforms.to_json())))
    np.testing.assert_array_equal(
        again.actions.forward(chunks, states), transforms.actions.forward(chunks, states)
    )


def test_action_chunks_stop_at_the_end_of_their_episode():
    actions = np.arange(7.0)[:, None]  # episodes: rows 0..3 and 4..6
    frames, ends = np.array([0, 2, 6]), np.array([4, 4, 7])
    chunks, inside = action_chunks(actions, frames, ends, 3)
    np.testing.assert_array_equal(chunks[..., 0], [[0, 1, 2], [2, 3, 3], [6, 6, 6]])
    np.testing.assert_array_equal(inside, [[1, 1, 1], [1, 1, 0], [1, 0, 0]])


def test_degrees_and_percent_are_refused_by_name(data):
    states, chunks, inside = data
    degrees, percent = np.array([1.0, 57.3, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 100.0])
    for scale, message in (
        (degrees, r"b goes from -.* rad; are these degrees"),
        (percent, r"gripper .* convert"),
    ):
        with pytest.raises(BlmError, match=message):
            fit_transforms(SPACE, states * scale, chunks * scale, inside, True)
    assert list(implausible_ranges(SPACE, states, chunks)) == []


def test_only_absolute_positions_become_relative_to_the_state(data):
    states, chunks, inside = data
    shifted = states + np.array([5.0, 5.0, 5.0, 0.0], dtype=np.float32)
    together = chunks + np.array([5.0, 0.0, 0.0, 0.0], dtype=np.float32)
    here, there = (
        fit_transforms(MIXED, s, c, inside, True) for s, c in ((states, chunks), (shifted, together))
    )
    assert here.relative == (True, False, False, False)
    for low in ("low", "high"):  # moving the origin of the position changes nothing; deltas stay deltas
        mine, theirs = (getattr(one.normalize_actions, low) for one in (here, there))
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    values = here.actions.forward(chunks, states)
    np.testing.assert_allclose(here.actions.inverse(values, states), chunks, atol=1e-5)
    assert RobotTransforms.from_json(json.loads(json.dumps(here.to_json()))).relative == here.relative


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "per_dimension"},
        {"kinds": MIXED.kinds},
        {"kind": "per_dimension", "kinds": MIXED.kinds[:3]},
        {"kind": "per_dimension", "kinds": (*MIXED.kinds[:3], "torque")},
    ],
)
def test_kinds_of_dimensions_are_complete_and_known(fields):
    with pytest.raises(BlmError, match=r"per_dimension|torque.*Valid: absolute_eef_position"):
        replace(SPACE, **fields)


def test_action_spaces_travel_with_their_kinds():
    assert ActionSpace.from_json(json.loads(json.dumps(MIXED.to_json()))) == MIXED
    assert "kinds" not in SPACE.to_json()  # as in older files
    assert SPACE.dimension_kinds == (*("absolute_joint_position",) * 3, "gripper")
    with pytest.raises(ContractError, match="per_dimension"):
        SPACE.require_same(MIXED, "there")


@pytest.mark.parametrize("kind", ["absolute_eef_position", "absolute_eef_rotation", "delta_eef_rotation"])
def test_a_rare_motion_of_a_dimension_that_stands_still_stays_small(kind: ActionKind) -> None:
    """A tool that points down but in one frame of a thousand: 2 cm or 1 degree is no value of hundreds."""
    frames, motion = 2000, {"absolute_eef_position": 0.02}.get(kind, 0.0175)
    space = ActionSpace(
        robot="other",
        names=("still", "gripper"),
        units=("m", "opening"),
        low=(-np.inf, 0.0),
        high=(np.inf, 1.0),
        kind="per_dimension",
        kinds=(kind, "gripper"),
        rotation="matrix_6d",
    )
    states = np.zeros((frames, 2), np.float32)
    chunks = np.zeros((frames, H, 2), np.float32)
    states[::1000, 0] = chunks[::1000, :, 0] = motion
    transforms = fit_transforms(space, states, chunks, np.ones((frames, H), bool), False)
    assert np.abs(transforms.actions.forward(chunks, states)[..., 0]).max() <= 20
    assert np.abs(transforms.state.forward(states)[..., 0]).max() <= 20
    back = transforms.actions.inverse(transforms.actions.forward(chunks, states), states)
    np.testing.assert_allclose(back, chunks, atol=1e-7)
