"""The tasks and their environment: rules, reproducibility, pictures, misuse."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from blm.robots import ROBOTS
from blm.tasks import SUITE24, TASKS, Env, ObjectState, TaskState, gl_backend
from blm.tasks.distractors import draw_distractors
from blm.tasks.spec import Region
from blm.tasks.suite import suite_version
from blm.types import BlmError, ContractError, UnknownNameError

CELLS = [(robot, task) for robot in ROBOTS for task in SUITE24]
CAMERAS = ("base", "side", "wrist")


def wander(env: Env, steps: int, seed: int = 0) -> list[np.ndarray]:
    """Random targets near home; returns everything observed, bit for bit."""
    rng, home, seen = np.random.default_rng(seed), np.array(env.robot.home), []
    for _ in range(steps):
        action = np.append(home + rng.normal(0, 0.15, len(home)), rng.uniform()).astype(np.float32)
        obs = env.step(action)[0]
        seen += [env.data.qpos.copy(), env.data.qvel.copy(), obs["agent_pos"], *obs["pixels"].values()]
    return seen


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def world(robot: str, speed: float = 0.0, **positions: tuple[float, float, float]) -> TaskState:
    upright = np.array([1.0, 0, 0, 0])
    half = (ROBOTS[robot].workspace.cube_half,) * 3
    objects = {name: ObjectState(name, "", "", np.array(at), upright, half) for name, at in positions.items()}
    return TaskState(ROBOTS[robot], objects, speed, frozenset())


@pytest.mark.parametrize(("robot", "task"), CELLS)
def test_every_cell_starts_in_a_valid_unsolved_state(robot, task):
    env = Env(robot, task, cameras=())
    name, region = env.task_spec.object, env.task_spec.region(env.robot)
    spread = np.array(region.half) * (2, 3) if task == "stack_cube" else np.array(region.half)
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        assert np.isfinite(env.data.qpos).all() and np.isfinite(obs["agent_pos"]).all()
        assert not info["success"] and info["is_success"] is info["success"]
        thing = env.objects()[name]
        assert (np.abs(thing.position[:2] - region.centre) <= spread + 1e-9).all()
        assert thing.position[2] == pytest.approx(thing.size[2] or thing.size[0])
        low = env.data.contact.dist.min(initial=0.0)
        assert low > -1e-3, "something starts inside something"
    start = env.objects()[name].position
    for _ in range(20):
        env.step(np.array([*env.robot.home, 1.0], dtype=np.float32))
    assert np.linalg.norm(env.objects()[name].position - start) < 1e-3, "it does not rest"
    assert env.objects()[name].is_static


def test_pick_cube_follows_maniskill_ranges_and_sizes():
    for robot, (half, reach, height) in {"panda": (0.02, 0.1, 0.3), "widowxai": (0.018, 0.05, 0.2)}.items():
        spec, arm = TASKS["pick_cube"], ROBOTS[robot]
        draws = [spec.sample(np.random.default_rng(seed), arm, spec.region(arm)) for seed in range(2000)]
        goals = np.array([draw["goal"][0] for draw in draws])
        goals[:, :2] -= arm.workspace.centre
        np.testing.assert_allclose(goals.min(0), [-reach, -reach, half], atol=0.01)
        np.testing.assert_allclose(goals.max(0), [reach, reach, half + height], atol=0.01)
        assert {item.name: item.parts[0].size[0] for item in spec.items(arm)} == {
            "cube": half, "goal": pytest.approx(half * 1.25),
        }  # fmt: skip


@pytest.mark.parametrize(("robot", "tolerance"), [("panda", 0.025), ("xarm7", 0.025), ("widowxai", 0.0225)])
def test_pick_cube_succeeds_within_the_tolerance_and_at_rest(robot, tolerance):
    rule = TASKS["pick_cube"].success
    assert rule(world(robot, cube=(0, 0, tolerance - 1e-6), goal=(0, 0, 0)))["success"]
    assert not rule(world(robot, cube=(0, 0, tolerance + 1e-6), goal=(0, 0, 0)))["success"]
    moving = rule(world(robot, 0.21, cube=(0, 0, 0), goal=(0, 0, 0)))
    assert moving["is_at_goal"] and not moving["is_robot_static"] and not moving["success"]
    assert rule(world(robot, 0.2, cube=(0, 0, 0), goal=(0, 0, 0)))["success"]


def test_push_cube_succeeds_inside_the_circle_on_the_table():
    rule = TASKS["push_cube"].success
    assert rule(world("panda", cube=(0.0999, 0, 0.0249), target=(0, 0, 0)))["success"]
    assert not rule(world("panda", cube=(0.1, 0, 0.02), target=(0, 0, 0)))["success"]
    assert not rule(world("panda", cube=(0.08, 0.08, 0.02), target=(0, 0, 0)))["success"]
    lifted = rule(world("panda", cube=(0, 0, 0.0251), target=(0, 0, 0)))
    assert lifted["is_at_target"] and not lifted["success"]


def test_pull_cube_succeeds_inside_the_circle():
    rule = TASKS["pull_cube"].success
    assert rule(world("panda", cube=(0.0999, 0, 0.02), target=(0, 0, 0)))["success"]
    assert not rule(world("panda", cube=(0.1, 0, 0.02), target=(0, 0, 0)))["success"]
    draw = TASKS["pull_cube"].sample(np.random.default_rng(0), ROBOTS["panda"], Region((0, 0), (0.1, 0.1)))
    np.testing.assert_allclose(np.subtract(draw["target"][0], draw["cube"][0])[:2], (-0.2, 0))


def put_down(robot, task, name, position, speed=0.0, spin=0.0, grasped=(), **others):
    """What the rule says of a thing that lies here."""
    upright = np.array([1.0, 0, 0, 0])
    sizes = {item.name: item.parts[0].size for item in TASKS[task].items(ROBOTS[robot])}
    objects = {
        other: ObjectState(other, "", "", np.array(at), upright, sizes[other]) for other, at in others.items()
    }
    objects[name] = ObjectState(name, "", "", np.array(position), upright, sizes[name], speed, spin)
    return TASKS[task].success(TaskState(ROBOTS[robot], objects, 0.0, frozenset(grasped)))


@pytest.mark.parametrize(
    ("state", "success"),
    [
        ({"position": (0.0332, 0, 0.06)}, True),
        ({"position": (0.0334, 0, 0.06)}, False),
        ({"position": (0, 0, 0.0649)}, True),
        ({"position": (0, 0, 0.0651)}, False),
        ({"position": (0, 0, 0.06), "speed": 0.011}, False),
        ({"position": (0, 0, 0.06), "spin": 0.51}, False),
        ({"position": (0, 0, 0.06), "speed": 0.0099, "spin": 0.49}, True),
        ({"position": (0, 0, 0.06), "grasped": ("cube",)}, False),
    ],
)
def test_stack_cube_needs_a_cube_at_rest_on_the_other(state, success):
    assert put_down("panda", "stack_cube", "cube", lower=(0, 0, 0.02), **state)["success"] is success


@pytest.mark.parametrize(
    ("state", "success"),
    [
        ({"position": (0.0049, 0, 0.025)}, True),
        ({"position": (0.0051, 0, 0.025)}, False),
        ({"position": (0, 0, 0.0299)}, True),
        ({"position": (0, 0, 0.0301)}, False),
        ({"position": (0, 0, 0.025), "speed": 0.011}, False),
        ({"position": (0, 0, 0.025), "grasped": ("ball",)}, False),
    ],
)
def test_place_sphere_needs_a_ball_at_rest_in_the_bin(state, success):
    bin_at = {"bin": (0, 0, 0.0025)}
    assert put_down("xarm6", "place_sphere", "ball", **state, **bin_at)["success"] is success


@pytest.mark.parametrize(
    ("lean", "height", "success"),
    [(0.0, 0.12, True), (0.079, 0.12, True), (0.081, 0.12, False), (0.0, 0.1249, True), (0.0, 0.1251, False)],
)
@pytest.mark.parametrize("end", [1, -1])
def test_lift_peg_needs_a_peg_on_either_end(lean, height, success, end):
    """The peg lies along its x; a turn by -90 or 90 deg about y sets it up."""
    angle = end * (np.pi / 2 - lean)
    turned = np.array([np.cos(angle / 2), 0, np.sin(angle / 2), 0])
    peg = ObjectState("peg", "", "", np.array([0, 0, height]), turned, (0.06, 0.025, 0.025))
    flags = TASKS["lift_peg_upright"].success(TaskState(ROBOTS["panda"], {"peg": peg}, 0.0, frozenset()))
    assert flags["success"] is success


def test_place_sphere_and_peg_have_maniskills_sizes():
    ball, tray = TASKS["place_sphere"].items(ROBOTS["panda"])
    assert ball.parts[0].size[0] == 0.02
    assert {part.size for part in tray.parts} == {
        (0.025, 0.025, 0.0025), (0.0025, 0.025, 0.005), (0.025, 0.0025, 0.005),
    }  # fmt: skip
    env = Env("panda", "lift_peg_upright", cameras=())
    assert env.model.body("peg").mass[0] == pytest.approx(0.6)


def test_a_ball_comes_to_rest_and_fits_the_bin():
    env = Env("panda", "place_sphere", cameras=(), terminate_on_success=False)
    env.reset(seed=0)
    hold = np.array([*env.robot.home, 1.0], dtype=np.float32)
    env.data.joint("ball").qvel[0] = 0.3
    for _ in range(100):
        env.step(hold)
    assert env.objects()["ball"].is_static
    env.data.joint("ball").qpos[:3] = env.objects()["bin"].position + np.array([0.002, -0.002, 0.03])
    for _ in range(30):
        info = env.step(hold)[4]
    assert info["success"]


def test_speeds_are_those_of_the_simulator():
    env = Env("panda", "stack_cube", cameras=())
    env.reset(seed=0)
    env.data.joint("cube").qvel[:] = (0.3, 0, 0.4, 0, 1.2, 0.5)
    cube, lower = env.objects()["cube"], env.objects()["lower"]
    assert (cube.speed, cube.spin) == (pytest.approx(0.5), pytest.approx(1.3))
    assert not cube.is_static and lower.is_static


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_suite_version_follows_regions_and_words(robot, monkeypatch):
    before = suite_version([robot], ["pull_cube"])
    assert before == suite_version([robot], ["pull_cube"]) != suite_version([robot], ["push_cube"])
    moved = dataclasses.replace(TASKS["pull_cube"], regions={robot: Region((0.01, 0), (0.1, 0.1))})
    monkeypatch.setitem(TASKS, "pull_cube", moved)
    assert suite_version([robot], ["pull_cube"]) != before


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_phrasings_are_enough_and_disjoint(task):
    every = task.phrasings + task.held_out_phrasings
    assert len(task.phrasings) >= 4 and task.held_out_phrasings and len(set(every)) == len(every)
    assert [task.instruction(i) for i in range(len(every))] == list(every)
    for index in (-1, len(every)):
        with pytest.raises(BlmError, match=f"no phrasing {index}"):
            task.instruction(index)


def test_reset_draws_seen_phrasings_and_obeys_the_option():
    env = Env("panda", "pick_cube", cameras=())
    drawn = {env.reset(seed=seed)[1]["instruction"] for seed in range(40)}
    assert drawn == set(env.task_spec.phrasings)
    held_out = env.reset(seed=0, options={"phrasing": len(env.task_spec.phrasings)})[1]
    assert held_out["instruction"] == env.task_description == env.task_spec.held_out_phrasings[0]


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_same_seed_gives_the_same_episode_bit_for_bit(robot):
    runs = []
    for used_before in (False, True):
        env = Env(robot, "pick_cube", cameras=CAMERAS, distractors=3)
        if used_before:
            env.reset(seed=99)
            wander(env, 7, seed=1)
        obs, _ = env.reset(seed=5, options={"arm": "random"})
        runs.append([*obs["pixels"].values(), obs["agent_pos"], *wander(env, 12)])
        env.close()
    assert equal(*runs)


def test_another_seed_gives_another_scene_and_options_do_not_move_it():
    env, crowd = Env("xarm6", "pick_cube", cameras=()), Env("xarm6", "pick_cube", cameras=(), distractors=4)
    env.reset(seed=1)
    first = env.objects()
    env.reset(seed=2)
    assert not np.allclose(first["cube"].position, env.objects()["cube"].position)
    crowd.reset(seed=1, options={"arm": "random", "phrasing": 2})
    for name in ("cube", "goal"):
        np.testing.assert_array_equal(first[name].position, crowd.objects()[name].position)


@pytest.mark.parametrize(("robot", "task"), CELLS)
def test_a_restored_state_continues_exactly(robot, task):
    env = Env(robot, task, cameras=("wrist",), image_size=48, terminate_on_success=False, distractors=2)
    env.reset(seed=3)
    wander(env, 9)
    saved, before = env.get_state(), env.observe()
    expected = wander(env, 6, seed=7)
    grasping, text = env.is_grasping(env.task_spec.object), env.task_description
    other = Env(robot, task, cameras=("wrist",), image_size=48, terminate_on_success=False, distractors=2)
    other.reset(seed=11)
    for continued in (env, other):
        continued.set_state(saved)
        assert equal([continued.observe()["agent_pos"]], [before["agent_pos"]])
        assert equal([continued.observe()["pixels"]["wrist"]], [before["pixels"]["wrist"]])
        assert equal(wander(continued, 6, seed=7), expected)
        assert (continued.is_grasping(env.task_spec.object), continued.task_description) == (grasping, text)
        assert continued.step(env.action_space.sample())[3] == (15 + 1 >= 200)


def test_a_foreign_state_is_refused():
    donor, env = Env("panda", "push_cube", cameras=()), Env("xarm6", "push_cube", cameras=())
    donor.reset(seed=0)
    with pytest.raises(ContractError, match="is not of 'xarm6'"):
        env.set_state(donor.get_state())


def test_episodes_end_on_success_or_at_the_limit():
    for terminate in (True, False):
        env = Env("panda", "push_cube", cameras=(), max_steps=5, terminate_on_success=terminate)
        env.reset(seed=0)
        hold = np.array([*env.robot.home, 1.0], dtype=np.float32)
        env.data.joint("cube").qpos[:2] = env.objects()["target"].position[:2]
        _, reward, terminated, truncated, info = env.step(hold)
        assert (reward, terminated, truncated, info["success"]) == (1.0, terminate, False, True)
        assert [env.step(hold)[3] for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("robot", ["panda", "widowxai"])
def test_projection_matches_the_image(robot, camera):
    """The pixels that show a sphere are centred where perspective puts its outline: between tan(t +- a)."""
    env, checked = Env(robot, "pick_cube", cameras=(), image_size=224), 0
    focal = 112 / np.tan(np.radians(env.model.cam(camera).fovy[0]) / 2)
    for seed in range(25):
        env.reset(seed=seed)
        goal = env.objects()["goal"]
        (u, v, depth), mask = env.project(goal.position[None], camera)[0], env.mask("goal", camera)
        radial = np.array([u - 112, v - 112]) / focal
        off_axis = np.arctan(np.linalg.norm(radial))
        width = np.arcsin(goal.size[0] / np.linalg.norm(goal.position - env.data.cam(camera).xpos))
        outline = np.tan(off_axis + width), np.tan(off_axis - width)
        centre = 112 + radial / np.tan(off_axis) * focal * sum(outline) / 2
        area = np.pi * (focal * width) ** 2 / np.cos(off_axis) ** 3
        if depth > 0 and mask.sum() > 0.9 * area and max(abs(centre - 112)) + focal * width < 108:
            rows, columns = np.nonzero(mask)
            np.testing.assert_allclose([columns.mean() + 0.5, rows.mean() + 0.5], centre, atol=1.5)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("robot", ROBOTS)
def test_cameras_show_the_task_closely(robot):
    env = Env(robot, "pick_cube", cameras=("base",), image_size=112)
    env.reset(seed=0)
    area = env.robot.workspace
    signs = np.array(list(itertools.product((-1, 1), (-1, 1), (0, 1))))
    corners = signs * (area.half, area.half, area.height) + (*area.centre, area.cube_half)
    for camera in ("base", "side"):
        u, v, _ = env.project(corners, camera).T
        assert min(u.min(), v.min()) >= 0 and max(u.max(), v.max()) <= 112
        centre = np.array([[*area.centre, 0.0]])
        _, _, depth = env.project(centre, camera)[0]
        focal = 56 / np.tan(np.radians(env.model.cam(camera).fovy[0]) / 2)
        assert depth / focal < 0.005, "more than 5 mm a pixel"
    robot_share = np.isin(env.model.geom_bodyid, range(1, env.model.body("right_finger").id + 1))
    geoms = env._ready_renderer().geoms(env.data, "wrist", 112)
    assert np.append(robot_share, False)[geoms].mean() < 0.4, "the hand fills the wrist camera's image"


def test_environments_do_not_disturb_each_others_pictures():
    kept, closed = Env("xarm6", "pick_cube"), Env("panda", "pick_cube", image_size=224)
    for env in (kept, closed):
        env.reset(seed=0)
    reference = kept.picture("base")
    closed.close()
    np.testing.assert_array_equal(kept.picture("base"), reference)
    assert closed.picture("base").shape == (224, 224, 3)  # opens again when needed
    del closed, env
    gc.collect()
    np.testing.assert_array_equal(kept.picture("base"), reference)


def test_objects_hide_each_other():
    env = Env("panda", "pick_cube", cameras=())
    env.reset(seed=0)
    goal = env.objects()["goal"].position
    assert env.mask("goal", "base").sum() > 20
    env.data.joint("cube").qpos[:3] = goal + 0.06 * (env.data.cam("base").xpos - goal)
    env._refresh()
    assert env.mask("goal", "base").sum() < 20 < env.mask("cube", "base").sum()


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("task", TASKS)
def test_distractors_are_apart_told_apart_and_touch_nothing(robot, task):
    env, plain = Env(robot, task, cameras=(), distractors=6), Env(robot, task, cameras=())
    for seed in range(5):
        env.reset(seed=seed)
        plain.reset(seed=seed)
        things = env.objects()
        assert len(things) == len(env.items) + 6
        assert len({thing.label for thing in things.values()}) == len(things)
        solids = [thing for thing in things.values() if thing.kind not in ("sphere", "disc")]
        for i, one in enumerate(solids):
            for other in solids[:i]:
                assert np.linalg.norm((one.position - other.position)[:2]) > 0.035
        assert env.data.ncon == plain.data.ncon


@pytest.mark.parametrize("robot", ROBOTS)
def test_random_arm_starts_are_free_and_varied(robot):
    env, tools = Env(robot, "pick_cube", cameras=()), []
    hand = env.model.body("right_finger").id
    for seed in range(8):
        env.reset(seed=seed, options={"arm": "random"})
        owners = env.model.geom_bodyid[env.data.contact.geom]
        assert not ((owners > 0) & (owners <= hand)).any()
        position, _ = env.tcp()
        assert position[2] >= 0.05
        tools.append(position)
        before = env.data.qpos[: len(env.robot.home)].copy()
        env.step(np.array([*before, env.gripper_opening], dtype=np.float32))
        np.testing.assert_allclose(env.data.qpos[: len(before)], before, atol=0.01)
    assert np.std(tools, axis=0).min() > 0.01


def test_gymnasium_checker_passes():
    env = Env("panda", "push_cube", cameras=("base",), image_size=48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about infinite bounds and the registry
        check_env(env, skip_render_check=True)
    assert env.render().shape == (480, 480, 3)
    assert env.metadata["render_fps"] == 20 and env._max_episode_steps == 200


def test_observation_is_the_contracts():
    env = Env("widowxai", "pick_cube", cameras=CAMERAS, image_size=64)
    env.reset(seed=0)
    seen = env.observation(seed=4)
    assert (seen.robot, seen.seed, seen.instruction) == ("widowxai", 4, env.task_description)
    assert {name: image.shape for name, image in seen.images.items()} == dict.fromkeys(CAMERAS, (64, 64, 3))
    env.contract_space.check_state(seen.state, "test")


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda env: Env("panda2", "pick_cube"), "Did you mean 'panda'"),
        (lambda env: Env("panda", "pick_cub"), "Did you mean 'pick_cube'"),
        (lambda env: Env("panda", "pick_cube", cameras=("wrst",)), "Did you mean 'wrist'"),
        (lambda env: env.picture("top"), "unknown camera 'top'"),
        (lambda env: env.is_grasping("cub"), "Did you mean 'cube'"),
        (lambda env: env.reset(seed=0, options={"arms": 1}), "Did you mean 'arm'"),
        (lambda env: env.reset(seed=0, options={"arm": "left"}), "unknown arm start 'left'"),
    ],
)
def test_unknown_names_are_answered_with_the_valid_ones(misuse, message):
    with pytest.raises(UnknownNameError, match=message):
        misuse(Env("panda", "pick_cube"))


def test_bad_numbers_are_refused():
    for size in (0, 8, 4096):
        with pytest.raises(BlmError, match="image_size"):
            Env("panda", "pick_cube", image_size=size)
    with pytest.raises(BlmError, match="distractors"):
        Env("panda", "pick_cube", distractors=-1)
    with pytest.raises(BlmError, match="no room for 70"):
        draw_distractors(np.random.default_rng(0), ROBOTS["panda"], (), {}, 70)
    env = Env("panda", "pick_cube", cameras=())
    env.reset(seed=0)
    with pytest.raises(BlmError, match="no phrasing 9"):
        env.reset(seed=0, options={"phrasing": 9})
    with pytest.raises(ContractError, match=r"needs \(8,\)"):
        env.step(np.zeros(7, dtype=np.float32))
    with pytest.raises(ContractError, match="not finite in joint2"):
        env.step(np.array([0, np.nan, 0, -1, 0, 2, 0, 1], dtype=np.float32))
    env.step(np.full(8, 1e6, dtype=np.float32))  # clipped to the limits
    np.testing.assert_allclose(env.data.ctrl[:-1], env.contract_space.high[:-1])


def test_rendering_names_the_fix_when_there_is_no_opengl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libEGL.so.1" if name == "EGL" else None)
    assert gl_backend() == "egl"
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(BlmError, match="apt-get install libegl1"):
        gl_backend()
    monkeypatch.setenv("MUJOCO_GL", "egle")
    with pytest.raises(UnknownNameError, match="Did you mean 'egl'"):
        gl_backend()


def test_a_backend_that_fails_to_load_names_the_fix():
    code = "from blm.tasks import Env; Env('panda', 'pick_cube').picture('base')"
    env = {**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "BlmError: OpenGL through 'osmesa' failed" in run.stderr and "apt-get install" in run.stderr


def test_pictures_need_no_environment_variable_and_leave_no_noise_at_exit():
    code = "from blm.tasks import Env; print(Env('panda', 'pick_cube').picture('base').shape)"
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(112, 112, 3)" and run.stderr == ""


def test_a_new_task_is_one_spec(monkeypatch):
    """A registry entry is all that the environment needs: fixed items collide, markers do not."""
    from blm.tasks.spec import Item, Part

    wall = Item("wall", "wall", "white", (Part("box", (0.01, 0.1, 0.05), "white"),), role="fixed")
    push = TASKS["push_cube"]
    spec = dataclasses.replace(
        push,
        name="walled",
        items=lambda robot: (*push.items(robot), wall),
        sample=lambda *where: {**push.sample(*where), "wall": ((0.2, 0, 0.05), (1.0, 0.0, 0.0, 0.0))},
    )
    monkeypatch.setitem(TASKS, "walled", spec)
    env = Env("panda", "walled", cameras=())
    env.reset(seed=0)
    env.data.joint("cube").qpos[:3] = (0.15, 0, 0.02)
    env.data.joint("cube").qvel[0] = 1.0
    for _ in range(20):
        env.step(np.array([*env.robot.home, 1.0], dtype=np.float32))
    assert 0.15 < env.objects()["cube"].position[0] < 0.2 - 0.01 - 0.02 + 1e-3
    np.testing.assert_allclose(env.objects()["wall"].position, (0.2, 0, 0.05))
