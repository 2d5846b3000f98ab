"""Scenes in which only the words decide: drawn colours, exchanged things, and the memory of a mistake."""

from __future__ import annotations

from contextlib import closing
from itertools import combinations

import numpy as np
import pytest

from blm.app.recipes import ci, nano
from blm.evaluation.protocol import PROTOCOLS
from blm.planner import CollectConfig
from blm.robots import ROBOTS
from blm.tasks import SUITE24, TASKS, WORDS, Env, ObjectState, TaskState
from blm.tasks.scene import CAMERAS
from blm.tasks.spec import PALETTE, Item, exchange
from blm.tasks.suite import suite_version
from blm.tasks.task_env import draw_scene
from blm.tasks.words import DISPLACED, are_alike, draw_colors

CELLS = [(robot, task) for robot in ROBOTS for task in WORDS]


def structure(items: tuple[Item, ...]) -> list[object]:
    """Everything about items but their colours."""
    parts = [[(part.shape, part.size, part.position) for part in item.parts] for item in items]
    return [(item.name, item.kind, item.role, part) for item, part in zip(items, parts, strict=True)]


def hold(env: Env) -> np.ndarray:
    return np.array([*env.robot.home, 1.0], dtype=np.float32)


def test_what_means_the_six_tasks_stays_as_it_was() -> None:
    assert (*SUITE24, *WORDS) == tuple(TASKS) and len(SUITE24) == len(WORDS) == 6
    for tasks in (PROTOCOLS["suite24"]["tasks"], CollectConfig().tasks, ci().tasks, nano().tasks):
        assert tasks == SUITE24
    assert suite_version(tuple(ROBOTS), SUITE24) == "2-50469280"


@pytest.mark.parametrize(("robot", "task"), CELLS)
def test_a_drawn_scene_has_the_structure_of_the_items(robot: str, task: str) -> None:
    spec, arm = TASKS[task], ROBOTS[robot]
    seen = set()
    for seed in range(60):
        draw = draw_scene(robot, task, seed)
        assert structure(draw.items) == structure(spec.items(arm))
        assert draw.placement.keys() == {item.name for item in draw.items}
        assert draw.words.keys() == draw.other_words.keys()
        assert all(draw.words[slot] != draw.other_words[slot] for slot in draw.words)
        labels = [f"{item.color} {item.kind}" for item in draw.items if item.role != "marker"]
        assert len({*labels}) == len(labels)
        for wording in (*spec.phrasings, *spec.held_out_phrasings):
            own, other = wording.format(**draw.words), wording.format(**draw.other_words)
            assert own != other and "{" not in own
        seen.add(tuple(draw.words.items()))
    assert len(seen) >= 5


@pytest.mark.parametrize("task", WORDS)
def test_the_other_thing_is_an_exchange_of_equals(task: str) -> None:
    spec = TASKS[task]
    assert spec.swap and all(spec.swap[spec.swap[name]] == name for name in spec.swap)
    assert 1 / spec.chance in (2, 4) and spec.wrong is not None
    with closing(Env("panda", task, cameras=())) as env:
        env.reset(seed=1)
        plain, instruction = env.objects(), env.task_description
        twice = exchange(exchange(plain, spec.swap), spec.swap)
        for name, thing in plain.items():
            np.testing.assert_array_equal(twice[name].position, thing.position)
            np.testing.assert_array_equal(abs(twice[name].quaternion), abs(thing.quaternion))
        items = {item.name: item for item in env.items}
        for one, other in spec.swap.items():
            assert structure((items[one],))[0][1:] == structure((items[other],))[0][1:]
        words, others = env.naming.words, env.naming.other_words
        env.reset(seed=1, options={"named": "other"})
        assert (env.naming.words, env.naming.other_words) == (
            others,
            words,
        ) and env.task_description != instruction
        for name, thing in env.objects().items():
            np.testing.assert_array_equal(thing.position, plain[name].position)
        assert not env.evaluate()["is_wrong_object"]


def test_pushing_and_pulling_have_the_same_scenes() -> None:
    for robot in ROBOTS:
        for seed in range(20):
            push, pull = (draw_scene(robot, task, seed) for task in ("words_push_cube", "words_pull_cube"))
            assert push == pull or (push.items, push.placement) == (pull.items, pull.placement)
        assert TASKS["words_push_cube"].view_shift == TASKS["words_pull_cube"].view_shift
    discs = [item for item in push.items if item.kind == "disc"]
    assert discs[0].parts == discs[1].parts, "the discs look different"


def test_drawn_colours_can_be_told_apart() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 4):
        for _ in range(100):
            colors = draw_colors(rng, count, unlike=("red",) if count == 2 else ())
            assert len(colors) == count and {*colors} <= {*PALETTE} - {"white"}
            assert not any(are_alike(one, other) for one, other in combinations(colors, 2))
            assert count == 4 or not any(are_alike(color, "red") for color in colors)


@pytest.mark.parametrize("task", ["words_push_cube", "words_pick_cube", "words_place_sphere"])
def test_a_displaced_thing_is_remembered(task: str) -> None:
    with closing(Env("panda", task, cameras=(), terminate_on_success=False)) as env:
        env.reset(seed=2)
        other = env.task_spec.swap[env.task_spec.object]
        start = env.data.joint(other).qpos.copy()
        assert not env.step(hold(env))[4]["is_wrong_object"]
        env.data.joint(other).qpos[0] = start[0] + 0.9 * DISPLACED
        assert not env.step(hold(env))[4]["is_wrong_object"]
        env.data.joint(other).qpos[0] = start[0] + 1.2 * DISPLACED
        assert env.step(hold(env))[4]["is_wrong_object"]
        env.data.joint(other).qpos[:] = start
        assert env.step(hold(env))[4]["is_wrong_object"], "it forgot"
        saved, naming = env.get_state(), env.naming
        env.reset(seed=3)
        assert not env.evaluate()["is_wrong_object"]
        env.set_state(saved)
        assert env.evaluate()["is_wrong_object"] and env.naming == naming
        np.testing.assert_allclose(env.task_state().start[other], start[:3])


def test_there_is_no_success_after_a_mistake() -> None:
    with closing(Env("panda", "words_push_cube", cameras=(), terminate_on_success=False)) as env:
        for mistake in (False, True):
            env.reset(seed=4)
            if mistake:
                env.data.joint("other").qpos[1] += 0.05
                env.step(hold(env))
            env.data.joint("cube").qpos[:2] = env.objects()["far_target"].position[:2]
            info = env.step(hold(env))[4]
            assert info["is_at_target"] and info["success"] is not mistake


def test_a_hand_that_moves_a_thing_is_not_the_robot() -> None:
    with closing(Env("panda", "words_pick_cube", cameras=())) as env:
        env.reset(seed=5)
        away = np.sign(env.objects()["other"].position - env.objects()["cube"].position)
        env.shift_object("other", 0.1 * away * (0, 1, 0))
        assert not env.step(hold(env))[4]["is_wrong_object"]


def test_the_wrong_disc_and_the_wrong_stack_are_mistakes() -> None:
    with closing(Env("panda", "words_pull_cube", cameras=())) as env:
        env.reset(seed=6)
        env.data.joint("cube").qpos[:2] = env.objects()["far_target"].position[:2]
        assert env.step(hold(env))[4]["is_wrong_object"]
    for named, wrong in (("own", True), ("other", False)):
        with closing(Env("panda", "words_stack_cube", cameras=())) as env:
            env.reset(seed=6, options={"named": named})
            below = env.data.joint("cube").qpos.copy()
            env.data.joint("lower").qpos[:] = [*below[:2], below[2] + 0.04, *below[3:]]
            info = env.step(hold(env))[4]
            assert info["is_wrong_object"] is wrong and info["success"] is not wrong


@pytest.mark.parametrize("up", [1, -1])
@pytest.mark.parametrize("named", ["own", "other"])
def test_the_named_end_of_the_peg_must_be_up(up: int, named: str) -> None:
    turn = np.array([np.cos(np.pi / 4), 0.0, -up * np.sin(np.pi / 4), 0.0])  # its front end points up or down
    spec = TASKS["words_lift_peg_upright"]
    size = spec.items(ROBOTS["panda"])[0].parts[0].size
    peg = {"peg": ObjectState("peg", "peg", "", np.array([0.0, 0.0, 0.12]), turn, size)}
    state = TaskState(ROBOTS["panda"], peg if named == "own" else exchange(peg, spec.swap), 0.0, frozenset())
    right = (up == 1) == (named == "own")
    assert spec.wrong is not None
    assert spec.success(state)["success"] is right and spec.wrong(state) is not right


@pytest.mark.parametrize(("robot", "task"), CELLS)
def test_everything_is_visible_at_the_start(robot: str, task: str) -> None:
    assert {"base", "wrist"} <= {*CAMERAS}
    with closing(Env(robot, task, cameras=())) as env:
        for seed in range(6):
            env.reset(seed=seed)
            for item in env.items:
                assert max(env.mask(item.name, camera).sum() for camera in ("base", "wrist")) >= 12


@pytest.mark.parametrize("task", WORDS)
def test_a_state_carries_colours_and_words(task: str) -> None:
    with closing(Env("xarm6", task, cameras=("base",))) as env:
        env.reset(seed=7, options={"named": "other"})
        saved, picture, flags = env.get_state(), env.picture("base"), env.evaluate()
        env.reset(seed=8)
        env.set_state(saved)
        np.testing.assert_array_equal(env.picture("base"), picture)
        assert env.evaluate() == flags and env.naming.swap == env.task_spec.swap
