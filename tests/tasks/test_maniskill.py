"""ManiSkill behind our interface.

The slow tests run inside the environment that scripts/maniskill.sh makes; without it they are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from blm.planner import maniskill as scripts
from blm.planner.arm_planner import PlanError
from blm.planner.demonstration import Perturbation, demonstrate, replay
from blm.robots import ROBOTS
from blm.tasks import TASKS, Env
from blm.tasks.maniskill import MANISKILL_TASKS, ManiSkillEnv, from_maniskill, require_maniskill, to_maniskill
from blm.tasks.scene import CAMERAS
from blm.types import BlmError, UnknownNameError

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-maniskill/bin/python"
INSIDE = importlib.util.find_spec("mani_skill") is not None
CLEAN = Perturbation(sigma=0.0, pulse=None, random_start=False, take_over=0)


def inside(test):
    """Mark a test that needs ManiSkill."""
    return pytest.mark.slow(pytest.mark.skipif(not INSIDE, reason="runs inside .venv-maniskill")(test))


# --- without ManiSkill ---


def test_actions_convert_and_convert_back():
    actions = np.random.default_rng(0).uniform(-3, 3, (100, 8)).astype(np.float32)
    actions[:, -1] = np.linspace(0, 1, 100)
    for action in actions:
        theirs = to_maniskill(action)
        assert theirs.dtype == np.float32
        np.testing.assert_array_equal(theirs[:-1], action[:-1])
        np.testing.assert_allclose(from_maniskill(theirs), action, atol=1e-7)
    assert to_maniskill(np.zeros(8))[-1] == -1  # closed
    assert to_maniskill(np.ones(8))[-1] == 1  # open


@pytest.mark.parametrize("task", MANISKILL_TASKS)
def test_names_are_those_of_our_tasks(task):
    counterpart = MANISKILL_TASKS[task]
    assert set(counterpart.objects) == {item.name for item in TASKS[task].items(ROBOTS["panda"])}
    env = Env("panda", task, cameras=())
    env.reset(seed=0)
    assert set(counterpart.flags) <= env.evaluate().keys()
    assert scripts.SEGMENTS.keys() == MANISKILL_TASKS.keys()


def test_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mani_skill", None)  # as if it were not installed
    with pytest.raises(BlmError, match=r"scripts/maniskill\.sh"):
        require_maniskill()
    with pytest.raises(BlmError, match=r"scripts/maniskill\.sh"):
        ManiSkillEnv("panda", "pick_cube")


def test_refuses_what_it_does_not_have():
    with pytest.raises(UnknownNameError, match="Valid: panda"):
        ManiSkillEnv("xarm6", "pick_cube")
    with pytest.raises(UnknownNameError, match="Did you mean 'pick_cube'"):
        ManiSkillEnv("panda", "pick_cub")
    with pytest.raises(BlmError, match="distractors"):
        ManiSkillEnv("panda", "pick_cube", distractors=2)


@pytest.mark.skipif(INSIDE, reason="numpy is older inside .venv-maniskill")
def test_expert_does_not_let_numpy_2_crash_the_planner():
    with pytest.raises(BlmError, match="numpy 2"):
        scripts.ManiSkillExpert(SimpleNamespace(task="pick_cube"), np.random.default_rng(0))


def test_the_core_does_not_load_it():
    code = "import sys, blm.planner, blm.evaluation.physical.evaluate; sys.exit('mani_skill' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(INSIDE, reason="starts the tests below from outside")
def test_in_its_own_environment():
    if not PYTHON.exists():
        pytest.skip("no .venv-maniskill here; scripts/maniskill.sh makes it")
    options = ["-m", "slow", "-W", "ignore", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [PYTHON, "-m", "pytest", *options, __file__], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


# --- with ManiSkill ---


@pytest.fixture(scope="module")
def env():
    env = ManiSkillEnv(
        "panda", "pick_cube", cameras=tuple(CAMERAS), image_size=224, terminate_on_success=False
    )
    yield env
    env.close()


@inside
def test_observations_match_the_contract(env):
    ours = Env("panda", "pick_cube", cameras=(), max_steps=1)
    observation, info = env.reset(seed=3, options={"phrasing": 1})
    assert info.keys() == ours.reset(seed=3)[1].keys()
    assert info["instruction"] == TASKS["pick_cube"].phrasings[1]
    assert env.observation_space.contains(observation)
    assert env.contract_space == ours.contract_space
    assert env.gripper_opening == pytest.approx(1.0, abs=1e-3)
    assert not env.is_grasping("cube")
    np.testing.assert_allclose(env.state()[:7], env.robot.home, atol=0.1)
    with pytest.raises(BlmError, match="random_starts"):
        env.reset(options={"arm": "random"})
    with pytest.raises(UnknownNameError, match="phrasing"):
        env.reset(options={"phrasin": 1})


@inside
def test_same_seed_same_episode_bit_for_bit(env):
    def episode(seed: int) -> list[np.ndarray]:
        observation, _ = env.reset(seed=seed)
        rng, seen = np.random.default_rng(seed), [observation]
        for _ in range(8):
            action = np.append(env.robot.home + rng.normal(0, 0.1, 7), rng.uniform()).astype(np.float32)
            seen.append(env.step(action)[0])
        return [np.concatenate([o["agent_pos"], o["pixels"]["base"].ravel()]) for o in seen]

    first, _, again = episode(1), episode(2), episode(1)
    np.testing.assert_array_equal(first, again)


@inside
def test_holds_the_targets_and_works_the_gripper(env):
    env.reset(seed=0)
    target = np.append(env.state()[:7] + 0.1, 0.0).astype(np.float32)
    for _ in range(30):
        env.step(target)
    np.testing.assert_allclose(env.state(), target, atol=0.01)


@inside
def test_tool_is_where_our_model_has_it(env):
    ours = Env("panda", "pick_cube", cameras=())
    ours.reset(seed=0)
    for seed in range(3):
        env.reset(seed=seed)
        ours.place_arm(env.state()[:7].astype(np.float64), opening=1.0)
        ours._refresh()
        (place, turn), (our_place, our_turn) = env.tcp(), ours.tcp()
        np.testing.assert_allclose(place, our_place, atol=5e-4)
        np.testing.assert_allclose(turn, our_turn, atol=2e-3)


@inside
@pytest.mark.parametrize("camera", CAMERAS)
def test_cameras_stand_where_ours_do(env, camera):
    """The red cube's centre is in the picture where our own camera would have it, within 3 px."""
    ours = Env("panda", "pick_cube", cameras=(), image_size=224)
    ours.reset(seed=0)
    seen = 0
    for seed in range(6):
        pixels = env.reset(seed=seed)[0]["pixels"][camera].astype(int)
        ours.place_arm(env.state()[:7].astype(np.float64), opening=1.0)
        ours._refresh()
        u, v, _ = ours.project(env.objects()["cube"].position[None], camera)[0]
        # The table is orange-brown: the cube is what has hardly any green or blue.
        rows, columns = np.nonzero(
            (pixels[..., 0] > 90) & (pixels[..., 1] < 0.2 * pixels[..., 0]) & (pixels[..., 2] < 60)
        )
        if len(rows) > 30 and rows.min() > 0 and rows.max() < 223 and columns.min() > 0:
            seen += 1
            middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
            assert np.hypot(middle[0] - u, middle[1] - v) < (8 if camera == "wrist" else 4), (seed, u, v)
    assert seen >= 2


@inside
def test_the_goal_is_in_the_pictures(env):
    pixels = env.reset(seed=0)[0]["pixels"]["base"].astype(int)
    assert ((pixels[..., 1] > 120) & (pixels[..., 0] < 60)).sum() > 50


@inside
@pytest.mark.parametrize("task", MANISKILL_TASKS)
def test_scripts_make_demonstrations_that_replay(task):
    env = ManiSkillEnv("panda", task, cameras=("base",), image_size=32, terminate_on_success=False)
    expert = scripts.ManiSkillExpert(env, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    episodes = (demonstrate(expert, seed, CLEAN, rng)[0] for seed in range(10_000, 10_003))
    episode = next(episode for episode in episodes if episode is not None)
    assert episode.success and episode.primitives[-1] == "hold"
    assert set(episode.primitives) == {*scripts.SEGMENTS[task], "hold"}
    assert replay(env, episode) == ""
    assert expert.planning_seconds > 0 and env.seconds["physics"] > 0 and env.seconds["rendering"] > 0
    env.close()


@inside
@pytest.mark.parametrize("task", MANISKILL_TASKS)
def test_our_success_rule_judges_as_theirs(task):
    """At every step of a demonstration and of its continuation with a wild arm, our rule on their state.

    One difference: ManiSkill's LiftPegUpright does not see a peg leaning sideways (towards y), ours does.
    """
    env = ManiSkillEnv("panda", task, cameras=(), terminate_on_success=False)
    expert, rng = scripts.ManiSkillExpert(env, np.random.default_rng(0)), np.random.default_rng(1)
    env.reset(seed=10_001)
    verdicts = set()
    while not expert.done:
        theirs = env.step(expert.act()[0])[4]["success"]
        verdicts.add(theirs)
        assert env.task_spec.success(env.task_state())["success"] == theirs
    for _ in range(60):
        action = np.append(env.state()[:7] + rng.normal(0, 0.15, 7), rng.uniform()).astype(np.float32)
        theirs, ours = env.step(action)[4]["success"], env.task_spec.success(env.task_state())["success"]
        assert theirs == ours or (theirs and task == "lift_peg_upright")
    assert verdicts == {False, True}
    env.close()


@inside
def test_a_script_without_a_plan_is_a_rejection(env, monkeypatch):
    script = importlib.import_module("mani_skill.examples.motionplanning.panda.solutions.pick_cube")
    monkeypatch.setattr(script, "solve", lambda env, seed=None: -1)
    expert = scripts.ManiSkillExpert(env, np.random.default_rng(0))
    env.reset(seed=0)
    with pytest.raises(PlanError, match="pick_cube: no plan") as error:
        expert.act()
    assert error.value.reason == "no_path"
    rejected = demonstrate(expert, 10_000, CLEAN, np.random.default_rng(0))
    assert rejected == (None, "planning_no_path")
    env.step(np.append(env.robot.home, 1.0).astype(np.float32))
    with pytest.raises(BlmError, match="start of an episode"):
        expert.act()
