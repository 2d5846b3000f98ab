"""Varied episodes: the plain suite stays, every part has its effect, states continue, physics is right."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from blm.planner.demonstration import Perturbation, demonstrate
from blm.planner.expert import Expert
from blm.robots import ROBOTS
from blm.tasks import SUITE24, TASKS, Env, ObjectState, TaskState
from blm.tasks.clutter import resize
from blm.tasks.scene import SHAPES, view_centre
from blm.tasks.spec import Item, SceneDraw
from blm.tasks.textures import render_texture
from blm.tasks.variation import (
    PLAIN,
    CameraShift,
    Clutter,
    Dynamics,
    Lighting,
    SensorNoise,
    Surface,
    Variation,
)
from blm.types import BlmError

CAMERAS = ("base", "side", "wrist")
EVERYTHING = Variation(
    camera=CameraShift(azimuth=0.1, offset=(0.02, 0.0, 0.01), field_of_view=1.05),
    light=Lighting(brightness=0.8, direction=(0.2, -0.1), warmth=0.3, shadows=True),
    table=Surface(color=(0.4, 0.5, 0.6), pattern="wood", other=(0.2, 0.2, 0.3), seed=3),
    wall=Surface(color=(0.8, 0.8, 0.6), pattern="dots", seed=4),
    robot_tint=(-0.2, 0.0, 0.1),
    clutter=Clutter(distractors=3, similar=True, scale=1.1, tint=(0.1, -0.1, 0.0)),
    arm_offset=0.2,
    sensors=SensorNoise(blur=0.5, pixel_noise=8, jpeg_quality=50, exposure=1.1, dropped=0.5, joints=0.01),
    dynamics=Dynamics(mass=1.5, friction=0.8, grip_force=1.2, move_goal_at=5, move_goal_by=(0.03, 0.0)),
)


@pytest.fixture(scope="module")
def env():
    made = Env("panda", "stack_cube", cameras=CAMERAS, image_size=64, terminate_on_success=False)
    yield made
    made.close()


def start(env: Env, seed: int = 3, **parts) -> dict[str, np.ndarray]:
    """Reset to a variation; return the pictures."""
    return env.reset(seed=seed, options={"variation": Variation(**parts)})[0]["pixels"]


def run(env: Env, steps: int) -> list[np.ndarray]:
    """Everything observed under random targets, bit for bit."""
    rng, home, seen = np.random.default_rng(0), np.array(env.robot.home), []
    for _ in range(steps):
        action = np.append(home + rng.normal(0, 0.15, len(home)), rng.uniform()).astype(np.float32)
        observation = env.step(action)[0]
        seen += [env.data.qpos.copy(), env.data.qvel.copy(), observation["agent_pos"]]
        seen += observation["pixels"].values()
    return seen


def equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_plain_episode_is_the_same_after_a_varied_one(env):
    fresh = Env("panda", "stack_cube", cameras=CAMERAS, image_size=64, terminate_on_success=False)
    fresh.reset(seed=3)
    expected = run(fresh, 5)
    env.reset(seed=3, options={"variation": EVERYTHING})
    run(env, 2)
    env.reset(seed=3)
    assert env.variation == PLAIN and equal(run(env, 5), expected)
    fresh.close()


def test_looks_change_pictures_only(env):
    looks = replace(EVERYTHING, clutter=Clutter(), arm_offset=0.0, sensors=SensorNoise(), dynamics=Dynamics())
    plain = start(env)
    states = run(env, 6)
    varied = env.reset(seed=3, options={"variation": looks})[0]["pixels"]
    again = run(env, 6)
    assert all(np.abs(varied[c].astype(int) - plain[c]).mean() > 3 for c in CAMERAS)
    per_step = 3 + len(CAMERAS)
    for index in itertools.chain.from_iterable(range(t, t + 3) for t in range(0, len(states), per_step)):
        np.testing.assert_array_equal(states[index], again[index])


@pytest.mark.parametrize("part", ["camera", "light", "table", "wall", "robot_tint"])
def test_a_dressed_scene_of_the_plain_looks_has_the_plain_pictures(env, part):
    """What a part does not change stays as it is to the last bit: here, a change too small to see."""
    tiny = {
        "camera": CameraShift(field_of_view=1 + 1e-12),
        "light": Lighting(brightness=1 + 1e-9),
        "table": Surface(seed=1),
        "wall": Surface(seed=1),
        "robot_tint": (1e-9, 0.0, 0.0),
    }
    plain, dressed = start(env), start(env, **{part: tiny[part]})
    assert equal(plain.values(), dressed.values())


def test_everything_is_the_same_twice_and_continues_from_a_state(env):
    runs = []
    for _ in range(2):
        env.reset(seed=9)
        env.reset(seed=5, options={"variation": EVERYTHING})
        runs.append(run(env, 8))
    assert equal(*runs)
    env.reset(seed=5, options={"variation": EVERYTHING})
    run(env, 3)
    state = env.get_state()
    expected = [*env.observe()["pixels"].values(), *run(env, 6)]
    other = Env("panda", "stack_cube", cameras=CAMERAS, image_size=64, terminate_on_success=False)
    other.reset(seed=1)
    for continued in (env, other):
        continued.set_state(state)
        assert continued.variation == EVERYTHING
        assert equal([*continued.observe()["pixels"].values(), *run(continued, 6)], expected)
    other.close()


def test_cameras_turn_about_the_workspace(env):
    start(env)
    middle = np.array(view_centre(env.robot, env.task_spec))
    before = {
        c: (env.data.cam(c).xpos.copy(), env.project(np.array([[*middle, 0.0]]), c)) for c in CAMERAS[:2]
    }
    start(env, camera=CameraShift(azimuth=0.3))
    for camera, (place, seen) in before.items():
        now = env.data.cam(camera).xpos
        a, b = place[:2] - middle, now[:2] - middle
        assert now[2] == pytest.approx(place[2])
        assert np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b) == pytest.approx(0.3)
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b))
        np.testing.assert_allclose(env.project(np.array([[*middle, 0.0]]), camera), seen, atol=1e-6)
    wrist = env.model.cam("wrist").fovy[0]
    start(env, camera=CameraShift(offset=(0.01, 0.02, 0.03), field_of_view=1.1))
    for camera, (place, _) in before.items():
        np.testing.assert_allclose(env.data.cam(camera).xpos - place, (0.01, 0.02, 0.03))
    assert env.model.cam("wrist").fovy[0] == wrist


def test_brightness_is_a_factor_and_warmth_a_colour(env):
    plain = start(env)["side"].astype(float)
    dim = start(env, light=Lighting(brightness=0.5))["side"].astype(float)
    assert np.abs(dim - plain / 2)[plain < 250].max() <= 3
    warm, cold = (start(env, light=Lighting(warmth=w))["side"].mean((0, 1)) for w in (0.8, -0.8))
    assert warm[0] > plain.mean((0, 1))[0] > cold[0] and warm[2] < plain.mean((0, 1))[2] < cold[2]
    start(env, light=Lighting(direction=(np.pi / 2, 0.0)))
    x, y, z = env._models[None].model.light_dir[0]
    np.testing.assert_allclose(env.model.light_dir[0], (x, -z, y), atol=1e-9)


def test_shadows_darken_some_of_the_table(env):
    lit, shaded = (
        start(env, light=Lighting(direction=(0.3, 0.3), shadows=on))["base"] for on in (False, True)
    )
    darker = (lit.astype(int) - shaded).mean(-1) > 20
    assert 0.005 < darker.mean() < 0.4


def test_table_and_wall_get_their_colour_and_pattern(env):
    table = np.zeros((64, 64), bool)
    start(env)
    geoms = env._ready_renderer().geoms(env.data, "base", 64)
    table, wall = geoms == env.model.geom("table").id, geoms == -1
    blue = start(env, table=Surface(color=(0.0, 0.0, 1.0)), wall=Surface(color=(0.0, 1.0, 0.0)))["base"]
    assert (blue[table][:, 2] > 100).all() and blue[table][:, :2].max() < 5 + 13
    np.testing.assert_array_equal(np.unique(blue[wall], axis=0), [[0, 255, 0]])
    checked = Surface(color=(0.0, 0.0, 0.0), pattern="checker", other=(1.0, 1.0, 1.0))
    picture = start(env, table=checked, wall=checked)["base"]
    assert picture[table].std() > 50 and picture[wall].std() > 50
    np.testing.assert_array_equal(env._ready_renderer().geoms(env.data, "base", 64), geoms)
    np.testing.assert_array_equal(start(env)["base"][wall], start(env, robot_tint=(0.1, 0, 0))["base"][wall])


@pytest.mark.parametrize("pattern", ["checker", "stripes", "wood", "noise", "marble", "dots"])
def test_patterns_mix_two_colours_and_fit_together(pattern):
    surface = Surface(pattern=pattern, other=(0.0, 1.0, 0.0), seed=5)
    image = render_texture(surface, (1.0, 0.0, 0.0), 64)
    np.testing.assert_allclose(image.sum(-1), 1.0)
    assert image.min() >= 0 and 0.05 < image[..., 0].mean() < 0.95 and image.std() > 0.05
    for axis in (0, 1):  # no line changes more across the seam than some line inside
        jumps = np.abs(np.diff(image[..., 0], axis=axis, append=np.take(image[..., 0], [0], axis)))
        lines = jumps.mean(1 - axis)
        assert lines[-1] <= lines[:-1].max() + 0.05
    assert np.array_equal(image, render_texture(surface, (1.0, 0.0, 0.0), 64))
    assert not np.array_equal(image, render_texture(replace(surface, seed=6), (1.0, 0.0, 0.0), 64))


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_arm_starts_at_the_stated_distance_and_free(robot):
    env = Env(robot, "lift_peg_upright", cameras=())
    for seed in range(4):
        start(env, seed)
        home = env.data.qpos[: len(env.robot.home)].copy()
        start(env, seed, arm_offset=0.4)
        angles = env.data.qpos[: len(home)]
        assert np.linalg.norm(angles - home) == pytest.approx(0.4)
        low, high = np.array([(joint.low, joint.high) for joint in env.robot.joints]).T
        assert ((angles >= low) & (angles <= high)).all()
        owners = env.model.geom_bodyid[env.data.contact.geom]
        assert not ((owners > 0) & (owners <= env.model.body("right_finger").id)).any()


def test_sensors_err_as_stated_and_only_for_the_policy(env):
    start(env, sensors=SensorNoise(pixel_noise=20, joints=0.02))
    true, clean = env.state(), env.picture("base").astype(float)
    assert equal(env.observe()["pixels"].values(), env.observe()["pixels"].values())
    errors = []
    for seed in range(40):
        start(env, seed, sensors=SensorNoise(joints=0.02))
        seen = env.observe(())["agent_pos"]
        errors.append(seen - env.state())
        assert seen[-1] == env.state()[-1]
    assert np.std(np.array(errors)[:, :-1]) == pytest.approx(0.02, rel=0.15)
    seen = start(env, sensors=SensorNoise(pixel_noise=20, joints=0.02))["base"]
    grey = (clean > 80) & (clean < 170)
    assert (seen - clean)[grey].std() == pytest.approx(20, rel=0.1)
    np.testing.assert_array_equal(env.state(), true)
    np.testing.assert_array_equal(env.picture("base"), clean)
    exposed = start(env, sensors=SensorNoise(exposure=0.5))["base"]
    assert np.abs(exposed - clean / 2).max() <= 1
    blurred, packed = (
        start(env, sensors=s)["base"] for s in (SensorNoise(blur=2), SensorNoise(jpeg_quality=5))
    )
    assert np.abs(np.diff(blurred.astype(int), axis=0)).mean() < np.abs(np.diff(clean, axis=0)).mean()
    assert not np.array_equal(packed, clean)


def test_a_dropped_picture_is_the_previous_one():
    env = Env("panda", "push_cube", cameras=("wrist",), image_size=32)
    first = start(env, sensors=SensorNoise(dropped=1.0))["wrist"]
    np.testing.assert_array_equal(first, env.picture("wrist"))
    for _ in range(4):
        seen = env.step(np.append(np.array(env.robot.home) + 0.3, 1.0).astype(np.float32))[0]["pixels"][
            "wrist"
        ]
        np.testing.assert_array_equal(seen, first)
    assert not np.array_equal(env.picture("wrist"), first)
    assert np.array_equal(env.observation(cameras=("wrist",)).images["wrist"], first)


# --- size, distractors, dynamics ---


def compiled_like(env: Env) -> mujoco.MjModel:
    """The present scene, compiled anew from its items instead of edited."""
    spec = mujoco.MjSpec()
    spec.option.timestep = 0.002
    spec.default.geom.density = 1000
    for item in (*env.items, *env.solid_distractors):
        body = spec.worldbody.add_body(name=item.name)
        body.add_freejoint()
        for part in item.parts:
            body.add_geom(type=SHAPES[part.shape], size=part.size, pos=part.position)
    return spec.compile()


@pytest.mark.parametrize("task", ["lift_peg_upright", "place_sphere", "stack_cube"])
def test_edited_bodies_are_those_of_a_compiled_model(task):
    env = Env("panda", task, cameras=())
    for seed in range(3):
        start(env, seed, clutter=Clutter(distractors=5, similar=True, scale=1.15))
        fresh = compiled_like(env)
        for item in (*env.items, *env.solid_distractors):
            mine, theirs = env.model.body(item.name), fresh.body(item.name)
            np.testing.assert_allclose(mine.mass, theirs.mass)
            np.testing.assert_allclose(np.sort(mine.inertia), np.sort(theirs.inertia))
            np.testing.assert_allclose(mine.ipos, theirs.ipos, atol=1e-12)
            for geom in range(len(item.parts)):
                a, b = (int(body.geomadr[0]) + geom for body in (mine, theirs))
                for field in ("geom_type", "geom_size", "geom_pos", "geom_rbound", "geom_aabb"):
                    np.testing.assert_allclose(
                        getattr(env.model, field)[a], getattr(fresh, field)[b], atol=1e-12
                    )
            trees = [m.bvh_aabb[m.body_bvhadr[b.id] :][: m.body_bvhnum[b.id]] for m, b in
                     ((env.model, mine), (fresh, theirs))]  # fmt: skip
            np.testing.assert_allclose(*trees, atol=1e-12)


@pytest.mark.parametrize(("robot", "task"), [*itertools.product(ROBOTS, SUITE24)])
def test_distractors_stand_still_free_and_unlike_the_objects(robot, task):
    env, plain = Env(robot, task, cameras=()), Env(robot, task, cameras=())
    for seed, similar in ((1, False), (2, True)):
        start(env, seed, clutter=Clutter(distractors=6, similar=similar))
        plain.reset(seed=seed)
        things, known = env.objects(), plain.objects()
        looks = {(thing.kind, thing.color) for thing in things.values()}
        assert len(things) == len(known) + 6
        assert len(looks) == len({(thing.kind, thing.color) for thing in known.values()}) + 6
        for name, thing in known.items():
            np.testing.assert_array_equal(things[name].position, thing.position)
        objects = [item for item in env.items if item.role != "marker"]
        kinds, colors = {i.kind for i in objects}, {p.color for i in env.items for p in i.parts}
        for item in env.solid_distractors:
            assert similar or not (item.kind in kinds or item.color in colors)
        start(env, seed, clutter=Clutter(distractors=6, similar=similar))
        before = {item.name: things[item.name].position for item in env.solid_distractors}
        for _ in range(10):
            env.step(np.append(env.state()[:-1], 1.0).astype(np.float32))
        for name, place in before.items():
            assert np.linalg.norm(env.objects()[name].position - place) < 1e-3
            gaps = [np.linalg.norm((o.position - place)[:2]) for n, o in env.objects().items() if n != name]
            assert min(gaps) > 0.03


def test_a_cube_is_stopped_by_a_solid_distractor():
    env = Env("panda", "push_cube", cameras=(), terminate_on_success=False)
    start(env, clutter=Clutter(distractors=1))
    (item,) = env.solid_distractors
    env.shift_object(item.name, np.array([*(-env.objects()[item.name].position[:2] + (0.1, 0.0)), 0.0]))
    env.shift_object("cube", np.array([*(-env.objects()["cube"].position[:2]), 0.0]))
    env.data.joint("cube").qvel[0] = 1.0
    for _ in range(20):
        env.step(np.append(env.robot.home, 1.0).astype(np.float32))
    assert env.objects()[item.name].position[0] > 0.103


def test_distractors_without_room_are_refused_by_name():
    env = Env("widowxai", "place_sphere", cameras=(), distractors=14)
    with pytest.raises(
        BlmError, match=r"of 20 solid distractors in this scene of 'widowxai' in 'place_sphere'"
    ):
        start(env, clutter=Clutter(distractors=20))


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("task", TASKS)
def test_scaled_scenes_rest_apart_and_their_rules_follow(task, scale):
    env = Env("widowxai", task, cameras=(), terminate_on_success=False)
    plain = {item.name: item for item in TASKS[task].items(env.robot)}
    start(env, 4, clutter=Clutter(scale=scale))
    env.step(np.append(env.robot.home, 1.0).astype(np.float32))
    assert env.data.contact.dist.min(initial=0.0) > -1e-3
    for item in env.items:
        share = 1.0 if item.role == "marker" else scale
        np.testing.assert_allclose(
            env.objects()[item.name].size, np.multiply(plain[item.name].parts[0].size, share)
        )
    things = env.objects()
    name = env.task_spec.object
    resting = {"stack_cube": ("lower", 2 * 0.018), "place_sphere": ("bin", 0.0225)}
    if task in resting:
        base, height = resting[task]
        for error, good in ((0.0, True), (0.007, False)):
            place = things[base].position + np.array([0, 0, height * scale + error])
            objects = things | {name: replace(things[name], position=place, speed=0.0, spin=0.0)}
            assert env.task_spec.success(TaskState(env.robot, objects, 0.0, frozenset()))["success"] is good


def test_resizing_moves_overlapping_items_apart():
    near = {"cube": ((0.0, 0.0, 0.02), (1.0, 0, 0, 0)), "lower": ((0.058, 0.0, 0.02), (1.0, 0, 0, 0))}
    items = TASKS["stack_cube"].items(ROBOTS["panda"])
    draw = resize(SceneDraw(items, near), 1.2)
    gap = np.subtract(draw.placement["lower"][0], draw.placement["cube"][0])
    assert gap[0] == pytest.approx(2 * 1.2 * 0.02 * np.sqrt(2)) and draw.placement["cube"][0][2] == 0.024
    assert resize(SceneDraw(items, near), 1.0).placement is near


def test_dynamics_are_factors(env):
    start(env)
    pads, mass = env.model.geom_friction[:, 0].copy(), env.model.body("cube").mass[0]
    gain = env.model.actuator_gainprm[-1].copy()
    start(env, dynamics=Dynamics(mass=2.0, friction=0.5, grip_force=1.5))
    np.testing.assert_allclose(env.model.geom_friction[:, 0], pads / 2)
    assert env.model.body("cube").mass[0] == pytest.approx(2 * mass)
    np.testing.assert_allclose(env.model.actuator_gainprm[-1], 1.5 * gain)


@pytest.mark.parametrize(
    ("task", "goal"), [("pick_cube", "goal"), ("stack_cube", "lower"), ("lift_peg_upright", "peg")]
)
def test_a_goal_moves_at_its_step(task, goal):
    env = Env("panda", task, cameras=(), terminate_on_success=False)
    start(env, dynamics=Dynamics(move_goal_at=2, move_goal_by=(0.05, -0.02)))
    before = env.objects()[goal].position
    for step in range(4):
        env.step(np.append(env.robot.home, 1.0).astype(np.float32))
        moved = env.objects()[goal].position - before
        np.testing.assert_allclose(moved[:2], (0.05, -0.02) if step >= 2 else (0, 0), atol=1e-3)


@pytest.mark.parametrize(
    ("robot", "task", "clutter"),
    [
        ("panda", "stack_cube", Clutter(distractors=8, scale=1.2)),
        ("xarm6", "place_sphere", Clutter(distractors=8, similar=True, scale=0.85)),
        ("panda", "lift_peg_upright", Clutter(distractors=4, scale=0.8)),
    ],
)
def test_the_expert_solves_cluttered_scenes_and_touches_no_distractor(robot, task, clutter):
    env = Env(robot, task, cameras=(), terminate_on_success=False)
    reset = env.reset
    env.reset = lambda *, seed, options: reset(  # type: ignore[method-assign]
        seed=seed, options=options | {"variation": Variation(clutter=clutter, arm_offset=0.3)}
    )
    expert = Expert(env, np.random.default_rng(0))
    quiet = Perturbation(sigma=0.0, pulse=None, random_start=False, take_over=0)
    episode, reason = demonstrate(expert, 2, quiet, np.random.default_rng(0))
    assert episode is not None, reason
    now = {item.name: env.objects()[item.name].position for item in env.solid_distractors}
    reset(seed=2, options={"variation": Variation(clutter=clutter, arm_offset=0.3)})
    start_at = env.objects()
    for name, place in now.items():
        assert np.linalg.norm(place - start_at[name].position) < 0.01


def test_solid_names_are_bodies(env):
    start(env, clutter=Clutter(distractors=2))
    assert isinstance(env.objects()["distractor1"], ObjectState)
    assert all(isinstance(item, Item) and item.role == "free" for item in env.solid_distractors)
    assert env.mask("distractor0", "base").any() or env.mask("distractor0", "side").any()
