"""suite24-plus and the training distribution: fixed, graded, placeable, and apart in their textures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from blm.robots import ROBOTS
from blm.tasks import TASKS, Env
from blm.tasks.maniskill import ManiSkillEnv
from blm.tasks.randomization import NO_RANDOMIZATION, TEST_PATTERNS, TRAINING_PATTERNS, DomainRandomization
from blm.tasks.suite_plus import (
    AXES,
    DYNAMICS,
    LEVELS,
    dynamics,
    perturbation,
    table_hash,
)
from blm.tasks.variation import PLAIN, Variation
from blm.types import BlmError, UnknownNameError

CELLS = [*itertools.product(ROBOTS, TASKS)]
LOOKS = ("camera", "light", "background", "layout", "start", "sensors")


def test_a_perturbation_is_fixed_and_survives_json():
    for axis, level in itertools.product(AXES, LEVELS):
        one, again = (perturbation(axis, level, "panda", "pick_cube", 4) for _ in range(2))
        assert one == again == Variation.from_json(json.loads(json.dumps(one.to_json())))
        assert (one == PLAIN) == (axis == "language")
        drawn = {perturbation(axis, level, "panda", "pick_cube", seed) for seed in range(10)}
        assert (len(drawn) == 1) == (axis in ("start", "language"))
        touched = {"background": {"table", "wall"}, "start": {"arm_offset"}, "layout": {"clutter"}}
        assert set(one.to_json()) <= touched.get(axis, {axis})
    assert table_hash() == table_hash() and len(table_hash()) == 8


def amount(axis: str, level: int, seed: int) -> float:
    """How far a scene is from the plain one."""
    change = perturbation(axis, level, "panda", "stack_cube", seed)
    return {
        "camera": abs(change.camera.azimuth),
        "light": abs(change.light.brightness - 1) if level < 5 else 1.0,
        "background": float(level if change.table.pattern else max(level / 10, 0)),
        "layout": abs(change.clutter.scale - 1),
        "start": change.arm_offset,
        "sensors": change.sensors.pixel_noise,
    }[axis]


@pytest.mark.parametrize("axis", LOOKS)
def test_levels_are_graded_and_signs_vary(axis):
    for seed in range(6):
        sizes = [amount(axis, level, seed) for level in LEVELS]
        assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    if axis == "camera":
        turns = {
            round(np.degrees(perturbation(axis, 5, "panda", "pick_cube", s).camera.azimuth))
            for s in range(20)
        }
        assert turns == {-20, 20}
        moves = [
            np.linalg.norm(perturbation(axis, 5, "panda", "pick_cube", s).camera.offset) for s in range(20)
        ]
        np.testing.assert_allclose(moves, 0.08)


def test_the_hardest_backgrounds_are_in_no_training():
    assert not {*TRAINING_PATTERNS} & {*TEST_PATTERNS}
    training = DomainRandomization(amplitude=1.0, plain=0.0)
    drawn = [training.draw(np.random.default_rng(seed)) for seed in range(300)]
    patterns = {surface.pattern for one in drawn for surface in (one.table, one.wall)}
    assert patterns == {"", *TRAINING_PATTERNS}
    hardest = [perturbation("background", 5, robot, task, 0) for robot, task in CELLS]
    assert {surface.pattern for one in hardest for surface in (one.table, one.wall)} == {*TEST_PATTERNS}


def test_unknown_axes_levels_and_conditions_are_refused_by_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'camera'"):
        perturbation("camra", 1, "panda", "pick_cube", 0)
    for level in (0, 6):
        with pytest.raises(UnknownNameError, match=f"unknown level '{level}'"):
            perturbation("light", level, "panda", "pick_cube", 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'mass_half'"):
        dynamics("mass_hlf", "panda", "pick_cube", 0)
    with pytest.raises(UnknownNameError, match="pick_cube"):
        perturbation("light", 1, "panda", "pick_cub", 0)


def test_dynamics_change_dynamics_only_and_move_goals_clear_of_objects():
    for name in DYNAMICS:
        assert set(dynamics(name, "xarm6", "pick_cube", 1).to_json()) == {"dynamics"}
    for (robot, task), seed in itertools.product(CELLS, range(3)):
        moved = dynamics("moved_goal", robot, task, seed).dynamics
        assert np.linalg.norm(moved.move_goal_by) == pytest.approx(0.06)
    env = Env("panda", "stack_cube", cameras=())
    for seed in range(10):
        env.reset(seed=seed, options={"variation": dynamics("moved_goal", "panda", "stack_cube", seed)})
        things, by = env.objects(), env.variation.dynamics.move_goal_by
        gap = (things["lower"].position - things["cube"].position)[:2] + by
        assert np.linalg.norm(gap) > 0.0579


def start_all(cells, scenes):
    for robot, task in cells:
        env = Env(robot, task, cameras=())
        for axis, level, scene in itertools.product(LOOKS, LEVELS, range(scenes)):
            seed = 5 * (level - 1) + scene
            env.reset(seed=seed, options={"variation": perturbation(axis, level, robot, task, seed)})
            owners = env.model.geom_bodyid[env.data.contact.geom]
            assert not ((owners > 0) & (owners <= env.model.body("right_finger").id)).any()
            assert env.data.contact.dist.min(initial=0.0) > -1e-3
            assert not env.evaluate()["success"]


def test_some_scenes_of_every_task_start():
    start_all([(robot, task) for robot, task in zip(itertools.cycle(ROBOTS), TASKS, strict=False)], 1)


@pytest.mark.slow
def test_all_scenes_start_free_of_contact():
    start_all(CELLS, 5)


# --- the training distribution ---


def test_no_randomization_is_plain_and_amplitude_bounds_it():
    assert NO_RANDOMIZATION.draw(np.random.default_rng(0)) == PLAIN
    weak = DomainRandomization(amplitude=0.1, plain=0.0)
    drawn = [weak.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert max(abs(one.camera.azimuth) for one in drawn) <= 0.04
    assert all(0.9 < one.light.brightness < 1.05 for one in drawn)
    assert max(one.clutter.distractors for one in drawn) == 0
    assert max(one.arm_offset for one in drawn) <= 0.05
    assert min(one.sensors.jpeg_quality for one in drawn if one.sensors.jpeg_quality) >= 91


def test_the_share_of_plain_episodes_and_switches_hold():
    half = DomainRandomization(amplitude=1.0, plain=0.5)
    drawn = [half.draw(np.random.default_rng(seed)) for seed in range(400)]
    assert 0.4 < np.mean([one == PLAIN for one in drawn]) < 0.6
    parts = {
        "looks": {"light", "table", "wall", "robot_tint"},
        "cameras": {"camera"},
        "layout": {"clutter"},
        "sensors": {"sensors"},
        "start": {"arm_offset"},
    }
    everything = DomainRandomization(amplitude=1.0, plain=0.0)
    for seed, (part, fields) in itertools.product(range(20), parts.items()):
        off = {other: other == part for other in parts}
        alone = DomainRandomization(amplitude=1.0, plain=0.0, **off).draw(np.random.default_rng(seed))
        whole = everything.draw(np.random.default_rng(seed))
        assert set(alone.to_json()) <= fields
        assert all(getattr(alone, name) == getattr(whole, name) for name in fields)


def test_an_environment_draws_its_variation_from_the_seed():
    training = DomainRandomization(amplitude=1.0)
    env = Env("panda", "pick_cube", cameras=("base",), image_size=32, randomization=training)
    seen = []
    for seed in (*range(12), 0):
        env.reset(seed=seed)
        seen.append(env.variation)
        assert Variation.from_json(json.loads(json.dumps(env.variation.to_json()))) == env.variation
    assert seen[0] == seen[-1] and PLAIN in seen and len({str(one) for one in seen}) > 6
    env.reset(seed=1, options={"variation": PLAIN})
    assert env.variation == PLAIN


def test_misuse_is_refused():
    with pytest.raises(BlmError, match=r"amplitude is 1\.5"):
        DomainRandomization(amplitude=1.5)
    with pytest.raises(BlmError, match=r"randomization\.amplitude must be 0"):
        ManiSkillEnv("panda", "pick_cube", randomization=DomainRandomization(amplitude=1.0))
