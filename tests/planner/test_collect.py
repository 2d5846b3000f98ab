"""Recording and collecting: noise, corrections, replays, and the collector through kills and failures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from blm.datasets.lerobot import open_dataset
from blm.io import lock_folder
from blm.planner.collect import CollectConfig, collect, draw_perturbation, make_expert
from blm.planner.collection_summary import CellCounts
from blm.planner.demonstration import Perturbation, demonstrate, replay
from blm.planner.expert import HOLD_STEPS
from blm.planner.verify import Verification, verify
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.tasks.randomization import DomainRandomization
from blm.types import ActionChunk, BlmError, ContractError, Episode, PolicyContract

collecting = sys.modules["blm.planner.collect"]
CLEAN = CollectConfig(cameras=(), noise=(0.0,), disturbed=0.0, random_starts=0.0)
SMALL = CollectConfig(
    robots=("widowxai",), tasks=("pick_cube", "push_cube"), episodes=3, cameras=("base",), image_size=64
)
CALM = Perturbation(sigma=0.0, pulse=None, random_start=False, take_over=0)


def record(robot, task, seed, **befalls):
    expert = make_expert(CLEAN, robot, task)
    draw = dataclasses.replace(CALM, **befalls)
    return demonstrate(expert, seed, draw, np.random.default_rng(seed))[0]


class Wanderer:
    """A policy that drifts off: two joints turn steadily."""

    contract = PolicyContract(
        action_spaces={"widowxai": ROBOTS["widowxai"].action_space},
        cameras=("base",), image_size=64, horizon=8, execute=4, revision="wanderer",
    )  # fmt: skip

    def reset(self): ...

    def act(self, observation):
        self.contract.check(observation)
        drift = np.zeros((8, 7))
        drift[:, :2] = 0.03 * np.arange(1, 9)[:, None]
        return ActionChunk(actions=observation.state + drift)


def wanderer():
    return Wanderer()


@pytest.mark.parametrize("befalls", [{}, {"sigma": 0.02}, {"pulse": 12}, {"random_start": True}])
def test_replay_repeats_an_episode_bit_for_bit(befalls):
    episode = record("xarm6", "pick_cube", 10_007, **befalls)
    env = Env("xarm6", "pick_cube", cameras=())
    assert replay(env, episode) == ""
    states = episode.states.copy()
    states[-1, 0] = np.nextafter(states[-1, 0], np.float32(9))
    assert f"step {len(states) - 1} on" in replay(env, dataclasses.replace(episode, states=states))
    assert "success" in replay(env, dataclasses.replace(episode, success=False))


def test_noise_moves_the_arm_and_not_the_labels():
    clean, noisy = record("panda", "pick_cube", 10_002), record("panda", "pick_cube", 10_002, sigma=0.02)
    np.testing.assert_array_equal(clean.actions, clean.executed)
    first = clean.primitives.index("descend")
    assert np.abs(clean.states[first // 2] - noisy.states[first // 2]).max() > 0.005
    np.testing.assert_array_equal(clean.actions[: first // 2], noisy.actions[: first // 2])
    assert np.abs(noisy.executed - noisy.actions)[:, :-1].max() > 0.005


def test_a_pulse_works_the_gripper_the_wrong_way():
    episode = record("panda", "push_cube", 10_003, pulse=12)
    wrong = np.flatnonzero(np.abs(episode.executed - episode.actions)[:, -1] > 0.5)
    np.testing.assert_array_equal(wrong, np.arange(12, 20))


def test_corrections_are_labels_on_the_states_of_another_policy(tmp_path):
    config = dataclasses.replace(SMALL, tasks=("push_cube",), take_over=(5, 40), workers=0)
    summary = collect(config, tmp_path / "out", wanderer)
    assert summary.config["pilot"] == "wanderer"
    dataset = open_dataset(tmp_path / "out/widowxai")
    assert dataset.num_episodes == 3
    for i in range(3):
        episode = dataset.episode(i, cameras=())
        driven = int(episode.metrics["piloted_steps"])
        assert 5 <= driven < 40
        chunk = episode.executed[:4, :2] - episode.states[0, :2]
        np.testing.assert_allclose(chunk, 0.03 * np.arange(1, 5)[:, None] * np.ones(2), atol=1e-5)
        assert np.abs(episode.executed - episode.actions)[:driven].max() > 0.05
        np.testing.assert_array_equal(episode.executed[driven:], episode.actions[driven:])
        assert episode.primitives[-HOLD_STEPS:] == ("hold",) * HOLD_STEPS
    assert verify(tmp_path / "out", workers=0).same == 3
    with pytest.raises(BlmError, match=r"pilot: 'wanderer' there, None asked for"):
        collect(config, tmp_path / "out")
    with pytest.raises(BlmError, match=r"take_over is \(9, 9\); the first number must be below"):
        dataclasses.replace(config, take_over=(9, 9))


def test_a_longer_hold_is_the_same_episode_with_more_of_its_end(tmp_path):
    config = dataclasses.replace(SMALL, tasks=("push_cube",), episodes=1, noise=(0.0,), workers=0)
    collect(config, tmp_path / "short")
    collect(dataclasses.replace(config, hold=HOLD_STEPS + 14), tmp_path / "long")
    short, long = (open_dataset(tmp_path / name / "widowxai").episode(0) for name in ("short", "long"))
    assert len(long) == len(short) + 14
    np.testing.assert_array_equal(long.states[: len(short)], short.states)
    assert set(long.primitives[len(short) :]) == {"hold"}
    with pytest.raises(BlmError, match="hold is 9; it must be 10 to"):
        dataclasses.replace(config, hold=9)


def test_a_pilot_that_needs_other_pictures_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, cameras=("side",), workers=0)
    with pytest.raises(BlmError, match="lacks camera 'base'"):
        collect(config, tmp_path / "out", wanderer)


def test_looks_vary_and_physics_does_not(tmp_path):
    vivid = DomainRandomization(amplitude=0.7, plain=0.0, layout=False, sensors=False, start=False)
    config = dataclasses.replace(SMALL, tasks=("push_cube",), episodes=1, workers=0)
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    collect(config, plain)
    collect(dataclasses.replace(config, randomization=vivid, distractors=2), changed)
    one, other = (open_dataset(out / "widowxai").episode(0) for out in (plain, changed))
    np.testing.assert_array_equal(one.states, other.states)
    difference = np.abs(one.images["base"].astype(int) - other.images["base"])
    assert difference.mean() > 5
    assert verify(changed, workers=0) == Verification(episodes=1, same=1, differing={})


# --- collector ---


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """An uninterrupted collection, made in this process."""
    out = tmp_path_factory.mktemp("collected")
    collect(dataclasses.replace(SMALL, workers=0), out)
    return out


def test_collection_gives_a_dataset_and_a_summary(collected):
    dataset = open_dataset(collected / "widowxai")
    dataset.require(ROBOTS["widowxai"].action_space, ("base",), 64, 20.0)
    assert sorted(dataset.tasks) == ["pick_cube"] * 3 + ["push_cube"] * 3
    assert dataset.seeds == (10_000, 10_001, 10_002) * 2
    assert dataset.provenance["collect"]["first_seed"] == 10_000
    summary = json.loads((collected / "summary.json").read_text())
    cells = summary["robots"]["widowxai"]
    assert [cells[task]["kept"] for task in SMALL.tasks] == [3, 3]
    assert sum(cells[task]["frames"] for task in SMALL.tasks) == dataset.num_frames
    assert summary["seeds"] == [10_000, 10_002]
    assert sorted(p.name for p in collected.iterdir()) == ["collect.json", "summary.json", "widowxai"]
    episode = dataset.episode(0)
    assert episode.success and episode.images["base"].std() > 10
    assert dataset.success[dataset.starts[1] - HOLD_STEPS : dataset.starts[1]].all()


def test_a_killed_collection_resumes_to_the_same_bytes(collected, tmp_path):
    program = (
        "from pathlib import Path; from blm.planner.collect import CollectConfig, collect\n"
        "from blm.tasks.randomization import DomainRandomization\n"
        f"if __name__ == '__main__': collect({SMALL!r}, Path('out'))\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    journal, deadline = tmp_path / "out/journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") >= 2):
        assert process.poll() is None, "the collection ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/summary.json").exists()
    collect(dataclasses.replace(SMALL, workers=0), tmp_path / "out")
    assert files(tmp_path / "out/widowxai") == files(collected / "widowxai")


def test_a_finished_collection_is_not_repeated(collected, monkeypatch):
    monkeypatch.delattr(collecting, "run_units")
    before = files(collected)
    summary = collect(SMALL, collected)
    assert summary.robots["widowxai"]["pick_cube"].kept == 3
    assert files(collected) == before
    with pytest.raises(BlmError, match=r"episodes: 3 there, 4 asked for"):
        collect(dataclasses.replace(SMALL, episodes=4), collected)


def test_every_episode_replays(collected):
    outcome = verify(collected, workers=2)
    assert outcome == Verification(episodes=6, same=6, differing={})
    assert json.loads((collected / "verified.json").read_text()) == dataclasses.asdict(outcome)
    (collected / "verified.json").unlink()


def test_a_replay_that_differs_is_named(collected, monkeypatch):
    """Somebody changed the physics without raising the suite's version."""
    monkeypatch.setattr("blm.tasks.env.SUBSTEPS", 24)
    outcome = verify(collected, workers=0)
    assert outcome.same == 0
    assert "state differs from step 1 on" in outcome.differing["widowxai/pick_cube/10000"]
    (collected / "verified.json").unlink()


def test_another_suite_or_simulator_is_not_replayed(collected, monkeypatch, tmp_path):
    monkeypatch.setattr("blm.tasks.suite.SUITE_VERSION", "999")
    with pytest.raises(ContractError, match="999-"):
        verify(collected, workers=0)
    with pytest.raises(BlmError, match="no finished collection"):
        verify(tmp_path)


def half_rejected(expert, seed, *_):
    """Stands in for `demonstrate`: even seeds fail."""
    if seed % 2 == 0:
        return None, "unreachable" if seed % 4 else "dropped"
    vectors = np.full((4, expert.env.contract_space.dim), seed, np.float32)
    episode = Episode(
        robot=expert.env.robot.name, task=expert.env.task, seed=seed, instruction="go",
        states=vectors, actions=vectors, images={},
    )  # fmt: skip
    return episode, ""


def test_rejected_seeds_are_counted_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    config = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=4, workers=0)
    summary = collect(config, tmp_path)
    assert open_dataset(tmp_path / "panda").seeds == (10_001, 10_003, 10_005, 10_007)
    cell = summary.robots["panda"]["pick_cube"]
    rejected = {"dropped": 2, "unreachable": 2}
    assert cell == CellCounts(attempts=8, kept=4, rejected=rejected, frames=16)
    assert summary.seeds == (10_000, 10_007)


def test_a_cell_that_keeps_failing_ends_the_collection(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", lambda *_: (None, "no_success"))
    config = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=2, workers=0)
    with pytest.raises(BlmError, match=r"16 attempts gave 0 of 2 episodes; rejected: {'no_success': 16}"):
        collect(config, tmp_path)


@pytest.mark.slow
def test_an_unreachable_spawn_region_is_named(tmp_path, monkeypatch):
    from blm.tasks import TASKS
    from blm.tasks.spec import Region

    far = dataclasses.replace(TASKS["pick_cube"], regions={"panda": Region((1.5, 0.0), (0.05, 0.05))})
    monkeypatch.setitem(TASKS, "pick_cube", far)
    collecting._expert.cache_clear()
    config = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=1, workers=0)
    with pytest.raises(BlmError, match=r"'unreachable': 13}; .*TaskSpec\.regions\['panda'\] of 'pick_cube'"):
        collect(config, tmp_path)
    collecting._expert.cache_clear()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BlmError, match=r"cannot write to .*file"):
        collect(SMALL, tmp_path / "file/out")


def test_perturbations_follow_from_the_seed():
    config = CollectConfig(disturbed=0.5)
    draws = [draw_perturbation(config, np.random.default_rng((seed, 1))) for seed in range(400)]
    assert draws == [draw_perturbation(config, np.random.default_rng((seed, 1))) for seed in range(400)]
    assert 0.4 < np.mean([draw.pulse is not None for draw in draws]) < 0.6
    assert {draw.sigma for draw in draws} == set(config.noise)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"robots": ("pandas",)}, "pandas"),
        ({"tasks": ("push_cub",)}, "push_cub"),
        ({"image_size": 111}, "even"),
    ],
)
def test_bad_configurations_are_refused(change, said):
    with pytest.raises(BlmError, match=said):
        CollectConfig(**change)


# --- other people's data ---

ONE = dataclasses.replace(CLEAN, robots=("panda",), tasks=("pick_cube",), episodes=2, workers=0)


def foreign(folder):
    """A dataset of another program, in LeRobot's form."""
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text('{"codebase_version": "v3.0"}')
    (folder / "data.bin").write_text("months of work")


@pytest.mark.parametrize("name", ["panda", "summary.json", "journal.jsonl", ".staging", "verified.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_foreign_files_in_the_folder_are_refused_and_kept(tmp_path, name, kind):
    out, place = tmp_path / "out", tmp_path / "out" / name
    out.mkdir()
    if kind == "file":
        place.write_text("mine")
    else:
        foreign(place if kind == "folder" else tmp_path / "far")
        if kind == "link":
            place.symlink_to(tmp_path / "far")
    before = files(tmp_path)
    with pytest.raises(BlmError, match=rf"out' has {name}, which no collection.*name another folder"):
        collect(ONE, out)
    assert files(tmp_path) == before


def test_files_beside_a_collection_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    foreign(tmp_path / "another_robot")
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    collect(ONE, tmp_path)
    assert before.items() <= files(tmp_path).items() and not (tmp_path / ".staging").exists()


def test_a_dataset_that_appears_while_collecting_is_kept(tmp_path, monkeypatch):
    def meanwhile(expert, seed, *_):
        if not (tmp_path / "panda").exists():
            foreign(tmp_path / "panda")
        return half_rejected(expert, seed)

    monkeypatch.setattr(collecting, "demonstrate", meanwhile)
    with pytest.raises(BlmError, match=r"nothing in it shows that this program wrote it"):
        collect(ONE, tmp_path)
    assert (tmp_path / "panda/data.bin").read_text() == "months of work"
    (tmp_path / "panda").rename(tmp_path / "theirs")
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    assert collect(ONE, tmp_path).robots["panda"]["pick_cube"].kept == 2


def test_a_note_among_the_staged_episodes_stays(tmp_path, monkeypatch):
    def note(expert, seed, *_):
        (tmp_path / ".staging/panda").mkdir(exist_ok=True)
        (tmp_path / ".staging/panda/note.txt").write_text("mine")
        return half_rejected(expert, seed)

    monkeypatch.setattr(collecting, "demonstrate", note)
    collect(ONE, tmp_path)
    kept = [path.name for path in (tmp_path / ".staging").rglob("*") if path.is_file()]
    assert sorted(kept) == [".blm-owner.json", "note.txt"]


def test_a_flag_may_be_corrected_before_anything_was_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    monkeypatch.setattr(collecting, "_make", lambda *_: (_ for _ in ()).throw(BlmError("refused")))
    with pytest.raises(BlmError, match="refused"):
        collect(ONE, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    assert collect(dataclasses.replace(ONE, episodes=3), tmp_path).config["episodes"] == 3
    with pytest.raises(BlmError, match="episodes: 3 there, 2 asked for"):
        collect(ONE, tmp_path)


def test_two_collections_into_one_folder_are_refused(tmp_path):
    with lock_folder(tmp_path), pytest.raises(BlmError, match="another process is using"):
        collect(ONE, tmp_path)


def test_evaluation_scenes_are_warned_of_and_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collecting, "demonstrate", half_rejected)
    summary = collect(dataclasses.replace(ONE, first_seed=9_998), tmp_path / "mixed")
    assert "warning" in capsys.readouterr().err and summary.reserved_seeds == {"evaluation": 1}
    data = open_dataset(tmp_path / "mixed/panda")
    assert data.seeds == (9_999, 10_001) and data.reserved_seeds == {"evaluation": 1}
    assert data.info["blm"]["reserved_seeds"] == {"evaluation": 1}
    collect(ONE, tmp_path / "clean")
    assert "warning" not in capsys.readouterr().err
    assert open_dataset(tmp_path / "clean/panda").reserved_seeds == {}
