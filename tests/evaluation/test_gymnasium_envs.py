"""The ids of `gymnasium.make`: all cells, their variants, vector environments and refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from blm.evaluation.conditions import Condition
from blm.gymnasium_ids import ROBOT_IDS, TASK_IDS, environments
from blm.robots import ROBOTS
from blm.tasks import SUITE24, TASKS, Env
from blm.types import BlmError, UnknownNameError

SMALL = {"cameras": ("base",), "image_size": 32}


def test_every_robot_and_task_has_an_id():
    assert sorted(ROBOT_IDS) == sorted(ROBOTS)
    assert sorted(TASK_IDS) == sorted(SUITE24)
    made = environments()
    assert {(a["robot"], a["task"]) for a in made.values()} == {(r, t) for r in ROBOTS for t in TASKS}
    assert set(made) <= set(gymnasium.registry), "registered when blm.tasks is imported"


def test_gymnasium_imports_the_module_that_an_id_names():
    code = (
        "import sys, gymnasium; assert not any(m.startswith('blm') for m in sys.modules); "
        "print(gymnasium.make('blm.tasks:blm/PickCube-Panda-v0', cameras=('base',), image_size=32))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PickCube-Panda-v0" in done.stdout


def test_an_id_makes_the_environment_of_the_suite():
    env = gymnasium.make("blm/PickCubeWords-WidowXAI-v0", **SMALL)
    assert isinstance(env.unwrapped, Env)
    assert (env.unwrapped.embodiment, env.unwrapped.task) == ("widowxai", "words_pick_cube")
    seen, info = env.reset(seed=3)
    own, same = Env("widowxai", "words_pick_cube", **SMALL).reset(seed=3)
    np.testing.assert_array_equal(seen["pixels"]["base"], own["pixels"]["base"])
    assert info["instruction"] == same["instruction"]


@pytest.mark.parametrize("name", ["blm/PushCube-XArm6-v0", "blm/PushCubePlus-XArm6-v0"])
def test_gymnasiums_checker_passes(name):
    plus = {"axis": "light", "level": 3} if "Plus" in name else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|we recommend using a symmetric).*")  # advice
        env = gymnasium.make(name, render_mode="rgb_array", **plus, **SMALL)
        check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.render().shape == (480, 480, 3)


def test_a_perturbed_episode_is_that_of_the_protocol():
    env = gymnasium.make("blm/StackCubePlus-Panda-v0", axis="background", level=5, **SMALL)
    plain = Env("panda", "stack_cube", **SMALL)
    for seed in (1, 2):
        seen, _ = env.reset(seed=seed)
        wanted = Condition(axis="background", level=5).reset_options("panda", "stack_cube", seed)
        expected, _ = plain.reset(seed=seed, options=wanted)
        np.testing.assert_array_equal(seen["pixels"]["base"], expected["pixels"]["base"])
        assert env.unwrapped.variation == wanted["variation"]
    first = [env.reset(seed=5), env.reset()][1][0]
    again = [env.reset(seed=5), env.reset()][1][0]
    np.testing.assert_array_equal(first["pixels"]["base"], again["pixels"]["base"])


def test_conditions_without_levels():
    env = gymnasium.make("blm/PushCubePlus-Panda-v0", axis="control", condition="blank", **SMALL)
    assert env.reset(seed=0)[1]["instruction"] == ""


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_give_the_episodes_of_single_ones(mode):
    envs = gymnasium.make_vec("blm/PullCube-Panda-v0", num_envs=2, vectorization_mode=mode, **SMALL)
    try:
        seen, _ = envs.reset(seed=[4, 7])
        after, rewards, *_ = envs.step(envs.action_space.sample())
        assert seen["pixels"]["base"].shape == after["pixels"]["base"].shape == (2, 32, 32, 3)
        assert rewards.shape == (2,)
        single = Env("panda", "pull_cube", **SMALL)
        for row, seed in enumerate((4, 7)):
            np.testing.assert_array_equal(
                seen["pixels"]["base"][row], single.reset(seed=seed)[0]["pixels"]["base"]
            )
    finally:
        envs.close()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("blm/PushCubePlus-Panda-v0", {}, "ids with Plus need axis and level"),
        ("blm/PushCube-Panda-v0", {"axis": "light", "level": 1}, "and others take none"),
        ("blm/PushCubePlus-Panda-v0", {"axis": "lights", "level": 1}, "unknown axis 'lights'"),
        ("blm/PushCubePlus-Panda-v0", {"axis": "light", "level": 6}, "unknown level of axis 'light' '6'"),
        ("blm/PushCube-Panda-v0", {"cameras": ("top",)}, "unknown camera 'top'"),
        ("blm/PushCube-Panda-v0", {"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_what_does_not_exist_is_refused(name, arguments, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((BlmError, UnknownNameError), match=message):
            gymnasium.make(name, **arguments)
