"""Closed-loop evaluation: protocols, episodes, reasons of failure, shared policies, latency, resumption."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from blm.app.policies import policy_factory
from blm.evaluation import (
    PROTOCOLS,
    PhysicalProtocol,
    RandomPolicy,
    ReplayPolicy,
    ZeroPolicy,
    compare,
    compare_cells,
    evaluate_physical,
    format_comparison,
    load_result,
)
from blm.evaluation.conditions import Condition
from blm.evaluation.physical.episode import EpisodeTimer, decision_seed, drive
from blm.evaluation.physical.outcome import REASONS, StepOutcome, judge, observe_step
from blm.evaluation.physical.policy_host import HostedPolicy, PolicyHost
from blm.evaluation.physical.ready_policy import ReadyPolicy
from blm.evaluation.physical.result import PhysicalResult, SharedPolicy
from blm.evaluation.protocol import (
    EpisodeKey,
    phrasing_of,
    protocol_hash,
)
from blm.evaluation.statistics import wilson
from blm.robots import ROBOTS
from blm.seeds import EVALUATION_SEEDS, STAGE1_HELD_OUT_SEEDS, TRAINING_SEEDS
from blm.serving.client import RemotePolicy
from blm.tasks import SUITE24, TASKS, Env
from blm.tasks.spec import Region
from blm.tasks.variation import PLAIN, Dynamics, Variation
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    Episode,
    Observation,
    PolicyContract,
    UnknownNameError,
)
from tests.support.contracts import CONTRACT
from tests.support.serving import foreign_openpi_server, running

make_random = partial(RandomPolicy, CONTRACT)


def protocol(**changes: object) -> PhysicalProtocol:
    options = {"robots": ["panda"], "tasks": ["push_cube"], "episodes": 2, "max_steps": 14, **changes}
    return PhysicalProtocol.for_policy(CONTRACT, **options)


def run(
    policy: type[ZeroPolicy], out: Path, *, contract: PolicyContract = CONTRACT, **changes: object
) -> PhysicalResult:
    """Evaluate in this process, without videos."""
    make = partial(policy, contract)
    return evaluate_physical(make, protocol(**changes), out, workers=0, videos_per_cell=0)


def same(one: PhysicalResult, other: PhysicalResult) -> bool:
    """Whether two results hold the same episodes, apart from the time they took."""
    rows = [[episode.without_times() for episode in result.episodes] for result in (one, other)]
    assert rows[0] == rows[1]
    return True


# --- protocols ---


def test_seed_ranges_are_disjoint() -> None:
    ranges = [EVALUATION_SEEDS, TRAINING_SEEDS, STAGE1_HELD_OUT_SEEDS]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


def test_protocol_refuses_seeds_of_training() -> None:
    protocol(first_seed=9_998, episodes=2)
    for first, count in [(9_999, 2), (10_000, 1), (-1, 2), (0, 0)]:
        with pytest.raises(BlmError, match=r"within 0\.\.9999"):
            protocol(first_seed=first, episodes=count)
    with pytest.raises(BlmError, match="use for_replay"):
        replace(protocol(), purpose="replay check")
    with pytest.raises(BlmError, match="use for_replay"):
        replace(protocol(), recorded=(("panda", "push_cube", 10_000),))


def test_suite24_is_the_suite() -> None:
    suite = PhysicalProtocol.named("suite24", CONTRACT)
    assert (suite.name, len(suite.keys), suite.max_steps) == ("suite24", 4 * 6 * 50, 200)
    assert set(suite.robots) == set(ROBOTS) and set(suite.tasks) == set(SUITE24)
    assert suite.keys[:2] == [EpisodeKey("panda", "push_cube", 0), EpisodeKey("panda", "push_cube", 1)]
    assert {key.seed for key in suite.keys} == set(range(50))
    assert [phrasing_of(suite, seed) for seed in (0, 1, 48, 49)] == ["seen", "held_out"] * 2
    same_robots = list(PROTOCOLS["suite24"]["robots"])
    again = PhysicalProtocol.named("suite24", CONTRACT, robots=same_robots, latency="none")
    assert again == suite and protocol_hash(again) == protocol_hash(suite)
    part = PhysicalProtocol.named("suite24", CONTRACT, robots=["panda"], latency=0.1)
    assert (part.name, part.robots, part.episodes, part.phrasing) == ("", ("panda",), 50, "both")
    with pytest.raises(UnknownNameError, match=r"unknown protocol 'suite25'. Did you mean 'suite24'\?"):
        PhysicalProtocol.named("suite25", CONTRACT)


def test_every_field_changes_the_hash() -> None:
    base = protocol()
    assert protocol_hash(base) == protocol_hash(protocol())
    special = {"latency": {"latency": 0.5}, "phrasing": {"phrasing": "both"}}
    replay = {"purpose": "replay check", "recorded": (("panda", "push_cube", 10_000),)}
    special |= dict.fromkeys(replay, replay)
    special["conditions"] = {"conditions": (Condition(axis="light", level=1),)}
    for name, value in vars(base).items():
        other = value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else ()
        changed = replace(base, **special.get(name, {name: other}))
        assert protocol_hash(changed) != protocol_hash(base), name


def test_suite_hash_follows_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    task, known = TASKS["push_cube"], {protocol().suite}
    for change in (
        {"phrasings": ("Push it.",) * 4},
        {"regions": {"panda": Region((0.0, 0.0), (0.05, 0.05))}},
        {"max_steps": 150},
    ):
        monkeypatch.setitem(TASKS, "push_cube", replace(task, **change))
        assert protocol().suite not in known, change
        known.add(protocol().suite)


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ({"latency": -1.0}, "seconds, 0 or more"),
        ({"latency": float("nan")}, "seconds, 0 or more"),
        ({"latency": "slow"}, "seconds, 0 or more"),
        ({"phrasing": "unseen"}, "seen, held_out or both"),
        ({"max_steps": 0}, "max_steps is 0, must be 1 or more"),
        ({"settle_steps": -1}, "settle_steps is -1, must be 0 or more"),
    ],
)
def test_protocol_refuses_senseless_values(wrong: dict, complaint: str) -> None:
    with pytest.raises(BlmError, match=complaint):
        protocol(**wrong)


def test_policy_that_does_not_fit_is_refused_before_the_start(tmp_path: Path) -> None:
    other = replace(CONTRACT, cameras=("wrist",), image_size=64)
    both = r"cameras: \('base',\) here, \('wrist',\) in the policy(.|\n)*32 here"
    with pytest.raises(ContractError, match=both):
        run(ZeroPolicy, tmp_path, contract=other)
    space = ROBOTS["panda"].action_space
    fast = replace(CONTRACT, action_spaces={"panda": replace(space, rate_hz=30.0)})
    with pytest.raises(ContractError, match=r"rate_hz: 20.0 here, 30.0 in the policy"):
        run(ZeroPolicy, tmp_path, contract=fast)
    with pytest.raises(BlmError, match="unknown robot of this policy 'xarm6'"):
        run(
            ZeroPolicy, tmp_path, contract=replace(CONTRACT, action_spaces={"panda": space}), robots=["xarm6"]
        )
    assert list(tmp_path.iterdir()) == []


# --- closed loop ---


class Cheat(ZeroPolicy):
    """Puts the cube onto the target at once, and takes it away again at its third decision if told to."""

    spoil = False

    def attach(self, env: Env) -> None:
        self.env, self.decisions = env, 0
        self._put(0.0)

    def act(self, observation: Observation) -> ActionChunk:
        self.decisions += 1
        if self.spoil and self.decisions == 3:
            self._put(0.2)
        return super().act(observation)

    def _put(self, aside: float) -> None:
        target = self.env.objects()["target"].position
        self.env.data.joint("cube").qpos[:2] = target[:2] + np.array([0, aside])


class Spoiler(Cheat):
    spoil = True


def test_success_once_and_at_end(tmp_path: Path) -> None:
    done = run(Cheat, tmp_path / "a").episodes[0]
    assert done.success_once and done.success_at_end and done.first_success == 1 and done.reason == ""
    assert done.steps == 11  # the first success, then ten steps to settle
    assert done.video is None and not (tmp_path / "a" / "videos").exists()
    lost = run(Spoiler, tmp_path / "b").summary.overall
    assert lost.success_once.hits == 2 and lost.success_at_end.hits == 0
    assert lost.success_at_limit.hits == 0


class LateSpoiler(Cheat):
    """Moves the solved cube away after `success_at_end` was judged, before the step limit."""

    def act(self, observation: Observation) -> ActionChunk:
        chunk = super().act(observation)
        if self.decisions == 4:
            self._put(0.2)
        return chunk


def test_success_at_the_step_limit(tmp_path: Path) -> None:
    """An evaluation drives on after a success: whoever spoils it afterwards is told so."""
    kept, spoilt = run(Cheat, tmp_path / "a"), run(LateSpoiler, tmp_path / "b")
    kept, spoilt = kept.summary.overall, spoilt.summary.overall
    assert kept.success_at_limit.hits == kept.n == 2
    assert spoilt.success_once.hits == spoilt.success_at_end.hits == 2
    assert spoilt.success_at_limit.hits == 0


def test_a_validation_ends_an_episode_after_its_success(tmp_path: Path) -> None:
    panda = replace(CONTRACT, action_spaces={"panda": ROBOTS["panda"].action_space})
    asked = PhysicalProtocol.for_validation(panda, tasks=["push_cube"], episodes=1)
    result = evaluate_physical(partial(Cheat, panda), asked, tmp_path, workers=0, videos_per_cell=0)
    assert result.episodes[0].success_once and result.episodes[0].success_at_limit is None
    assert result.summary.overall.success_at_limit is None


def test_result_file_is_complete(tmp_path: Path) -> None:
    asked = protocol(robots=["panda", "xarm6"], phrasing="both", episodes=3)
    result = evaluate_physical(make_random, asked, tmp_path, workers=0)
    assert result == load_result(tmp_path)
    assert json.dumps(result.to_json(), indent=1) == (tmp_path / "result.json").read_text()
    ids = [f"{robot}/push_cube/{seed}" for robot in ("panda", "xarm6") for seed in (0, 1, 2)]
    assert [episode.id for episode in result.episodes] == ids
    assert [(cell.robot, cell.summary.n) for cell in result.summary.cells] == [("panda", 3), ("xarm6", 3)]
    assert result.summary.overall.success_once.high == pytest.approx(wilson(0, 6)[1])
    summary = result.summary
    parts = [(summary.overall, summary.phrasings, 6, 2)]
    parts += [(cell.summary, cell.phrasings, 3, 1) for cell in summary.cells]
    for whole, phrasings, n, reworded in parts:
        assert whole.n == n and whole.reasons == {**dict.fromkeys(REASONS, 0), "never_touched": n}
        assert {name: p.n for name, p in phrasings.items()} == {
            "seen": n - reworded,
            "held_out": reworded,
        }
    assert result.protocol.simulator.startswith("mujoco") and result.machine.cores >= 1
    for part in ("policy", "physics", "rendering"):
        name = f"seconds_{part}"
        total = sum(getattr(episode, name) for episode in result.episodes)
        assert getattr(result.execution, name) == total > 0
    for episode in result.episodes:
        assert (episode.video is not None) == (episode.seed == 0)
        held_out = episode.seed == 1
        task = TASKS["push_cube"]
        assert episode.instruction in (task.held_out_phrasings if held_out else task.phrasings)
        assert episode.phrasing == ("held_out" if held_out else "seen")
    with av.open(str(tmp_path / result.episodes[0].video)) as video:
        stream = video.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.frames == 14


def test_a_finished_run_is_not_repeated_and_a_longer_one_is(tmp_path: Path) -> None:
    calls = []

    class Counting(RandomPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            calls.append(observation.seed)
            return super().act(observation)

    first = run(Counting, tmp_path)
    assert calls == [decision_seed(seed, step) for seed in (0, 1) for step in (0, 4, 8, 12)]
    assert run(Counting, tmp_path).episodes == first.episodes and len(calls) == 8
    run(Counting, tmp_path, max_steps=8)
    assert len(calls) == 12


def test_a_policy_without_a_revision_does_not_resume_a_run(tmp_path: Path) -> None:
    class Nameless(ZeroPolicy):
        def __init__(self, contract: PolicyContract) -> None:
            self.contract = contract

    assert run(Nameless, tmp_path).model == "unnamed"
    with pytest.raises(BlmError, match="has no revision in its contract"):
        run(Nameless, tmp_path)


def test_a_policy_of_another_contract_does_not_continue_a_run(tmp_path: Path) -> None:
    class Longer(ZeroPolicy):
        def __init__(self, contract: PolicyContract) -> None:
            super().__init__(replace(contract, horizon=contract.horizon + 4))

    run(ZeroPolicy, tmp_path)
    before = len((tmp_path / "journal.jsonl").read_text().splitlines())
    run(ZeroPolicy, tmp_path)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == before
    run(Longer, tmp_path)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2 * before


def test_a_policy_that_is_ready_is_the_first_here_and_stays_here() -> None:
    made = list[ZeroPolicy]()

    def make() -> ZeroPolicy:
        made.append(ZeroPolicy(CONTRACT))
        return made[-1]

    factory = ReadyPolicy(make)
    assert len(made) == 1 and factory.contract == made[0].contract
    assert factory() is made[0] and factory() is made[1]
    copy = pickle.loads(pickle.dumps(ReadyPolicy(partial(ZeroPolicy, CONTRACT))))
    assert copy._ready is None and copy().contract == copy.contract == factory.contract


def test_episodes_of_a_server_without_a_contract_are_never_taken_for_anothers(tmp_path: Path) -> None:
    def evaluate(address: str, **how: Any) -> PhysicalResult:
        look: Any = {"cameras": CONTRACT.cameras, "image_size": CONTRACT.image_size}
        make = ReadyPolicy(
            policy_factory(f"ws://{address}", **look, horizon=4, execute=4, api_key=None, load={}, **how)
        )
        protocol = PhysicalProtocol.for_policy(
            make.contract, robots=("panda",), tasks=("push_cube",), episodes=1, max_steps=4
        )
        return evaluate_physical(make, protocol, tmp_path, workers=0, videos_per_cell=0)

    seen: list[dict] = []
    with foreign_openpi_server(seen) as address:
        assert evaluate(address).model == "unnamed" and len(seen) == 1
        with pytest.raises(BlmError, match=r"no revision in its contract.*--server-name"):
            evaluate(address)
        named = evaluate(address, server_name="pi0-base")
        assert named.model == f"pi0-base at ws://{address}" and len(seen) == 2
        evaluate(address, server_name="pi0-base")
        assert len(seen) == 2, "the same model goes on"
        evaluate(address, server_name="pi0-tuned")
        assert len(seen) == 3, "another one begins anew"


@pytest.mark.parametrize("content", ['{"mine": 1}', "[]", "not JSON"])
def test_a_result_of_another_program_is_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(BlmError, match=r"result.json"):
        run(ZeroPolicy, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_held_out_phrasings(tmp_path: Path) -> None:
    seen = run(RandomPolicy, tmp_path, max_steps=1)
    unseen = run(RandomPolicy, tmp_path, max_steps=1, phrasing="held_out")
    task = TASKS["push_cube"]
    assert {episode.instruction for episode in seen.episodes} <= set(task.phrasings)
    assert {episode.instruction for episode in unseen.episodes} <= set(task.held_out_phrasings)


def test_a_policy_that_violates_its_contract_is_reported(tmp_path: Path) -> None:
    class Short(ZeroPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(actions=super().act(observation).actions[:3])

    with pytest.raises(BlmError, match=r"promised finite actions \(6, 8\), gave \(3, 8\)"):
        run(Short, tmp_path)


def test_baselines_hold_still_and_stay_within_limits() -> None:
    rng = np.random.default_rng(0)
    for robot, space in CONTRACT.action_spaces.items():
        state = rng.uniform(space.low, space.high).astype(np.float32)
        seen = Observation(images={}, state=state, instruction="", robot=robot, seed=5)
        assert (ZeroPolicy(CONTRACT).act(seen).actions == state).all()
        moved, again = (RandomPolicy(CONTRACT).act(seen).actions for _ in range(2))
        assert (moved == again).all() and moved.shape == (6, space.dim) and moved.dtype == np.float32
        assert (moved >= np.float32(space.low)).all() and (moved <= np.float32(space.high)).all()


def test_evaluation_imports_no_torch() -> None:
    code = "import sys, blm.evaluation; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- why an episode failed ---


def moment(**changes: object) -> StepOutcome:
    """Nothing has happened: the object lies at its start, the gripper is open."""
    still = {"success": False, "goal": False, "held": False, "resting": True, "position": np.zeros(3)}
    return StepOutcome(**{**still, "opening": 1.0, "command": 1.0, **changes})


STILL = moment()
ASIDE = moment(position=np.array([0.0, 0.05, 0.0]))
HELD = moment(held=True, resting=False, opening=0.5, command=0.0, position=np.array([0, 0, 0.1]))
LOST = moment(opening=0.2, command=0.0, position=np.array([0.0, 0.05, 0.0]))
OPENING = moment(opening=0.5, command=0.51, resting=False, position=np.array([0.0, 0.05, 0.1]))


@pytest.mark.parametrize(
    "prehensile, moments, reason",
    [
        (True, [STILL], "never_grasped"),
        (True, [ASIDE, replace(ASIDE, resting=False)], "never_grasped"),  # knocked over
        (False, [STILL, moment(position=np.array([0.0, 0.0099, 0.0]))], "never_touched"),
        (False, [moment(position=np.array([0.0, 0.0101, 0.0])), STILL], "missed_goal"),
        (False, [STILL, ASIDE], "missed_goal"),
        (False, [replace(ASIDE, resting=False)], "timeout"),
        (False, [replace(ASIDE, goal=True)], "timeout"),
        (True, [STILL, HELD], "timeout"),
        (True, [HELD, LOST], "dropped"),
        (True, [HELD, replace(LOST, resting=False)], "dropped"),  # still falling
        (True, [HELD, LOST, HELD], "timeout"),  # grasped again
        (True, [HELD, LOST, HELD, ASIDE], "missed_goal"),  # grasped again, let go
        (True, [HELD, ASIDE], "missed_goal"),  # told to open at once
        (True, [HELD, OPENING, ASIDE], "missed_goal"),  # told to open bit by bit
        (True, [HELD, replace(ASIDE, resting=False)], "timeout"),  # let go, rolls on
        (True, [HELD, replace(ASIDE, goal=True, resting=False)], "timeout"),
        (True, [HELD, LOST, LOST, LOST, LOST, ASIDE], "dropped"),  # opened later, to try again
        (True, [HELD, LOST, replace(STILL, success=True), LOST], ""),
    ],
)
def test_reasons(prehensile: bool, moments: Sequence[StepOutcome], reason: str) -> None:
    outcome = judge(np.zeros(3), moments, prehensile=prehensile)
    assert outcome.reason == reason and outcome.success_once == (reason == "")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_what_the_reasons_need(task: str) -> None:
    env = Env("panda", task, cameras=())
    _, info = env.reset(seed=0)
    spec = TASKS[task]
    seen = observe_step(env, 0.25, info)
    assert ("is_grasped" in info) == spec.prehensile
    assert (seen.success, seen.goal, seen.held, seen.command) == (False, False, False, 0.25)
    assert (seen.position == env.objects()[spec.object].position).all() and seen.opening > 0.9
    free = [item.name for item in spec.items(env.robot) if item.role == "free"]
    assert spec.object in free
    env.close()


class Puppet(ZeroPolicy):
    """PickCube without picking: the cube appears between the fingers, which close; what follows is `plot`."""

    plot = "hold"

    def attach(self, env: Env) -> None:
        self.env, self.decisions, self.pose = env, 0, env.state()
        self._put(env.tcp()[0])

    def _put(self, position: np.ndarray) -> None:
        joint = self.env.data.joint("cube")
        joint.qpos[:], joint.qvel[:] = (*position, 1, 0, 0, 0), 0

    def target(self, observation: Observation) -> np.ndarray:
        self.decisions += 1
        opening, half = 0.0, self.env.robot.workspace.cube_half
        if self.decisions > 3 and self.plot == "open":
            opening = 1.0
        if self.decisions == 4 and self.plot in ("lose", "roll"):
            self._put(np.array([-0.1, 0.2, half]))
        if self.decisions == 12 and self.plot == "roll":
            self.env.data.joint("cube").qvel[0] = 2.0
        return np.append(self.pose[:-1], opening).astype(np.float32)


class Opening(Puppet):
    plot = "open"


class Losing(Puppet):
    plot = "lose"


@pytest.mark.parametrize(
    "policy, task, reason",
    [
        (ZeroPolicy, "pick_cube", "never_grasped"),
        (ZeroPolicy, "push_cube", "never_touched"),
        (Puppet, "pick_cube", "timeout"),
        (Opening, "pick_cube", "missed_goal"),
        (Losing, "pick_cube", "dropped"),
    ],
)
def test_reasons_in_the_simulator(tmp_path: Path, policy: type, task: str, reason: str) -> None:
    result = run(policy, tmp_path, tasks=[task], max_steps=48, first_seed=3)
    assert [episode.reason for episode in result.episodes] == [reason] * 2
    assert result.summary.cells[0].summary.reasons[reason] == result.summary.overall.reasons[reason] == 2


# --- one policy for several processes ---


class Batched(RandomPolicy):
    """A random policy that decides on many at once, slowly enough for others to queue up."""

    sizes: list[int]
    device = "cuda"
    """What an evaluation shares between its workers without being told."""

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        time.sleep(0.02)
        self.sizes.append(len(observations))
        return [super(Batched, self).act(observation) for observation in observations]

    def act(self, observation: Observation) -> ActionChunk:
        return self.act_batch([observation])[0]


def batched() -> Batched:
    policy = Batched(CONTRACT)
    policy.sizes = []
    return policy


def test_worker_processes_and_a_socket_give_the_same_episodes(tmp_path: Path) -> None:
    local = evaluate_physical(make_random, protocol(), tmp_path / "local", workers=0)
    spawned = evaluate_physical(make_random, protocol(), tmp_path / "spawned", workers=2)
    with running(RandomPolicy(CONTRACT), None) as address:
        make_remote = partial(RemotePolicy, f"ws://{address}")
        remote = evaluate_physical(make_remote, protocol(), tmp_path / "remote", workers=0)
        shared = evaluate_physical(make_remote, protocol(), tmp_path / "shared", workers=2, share_policy=True)
    assert same(local, spawned) and same(local, remote) and same(local, shared)
    assert compare(local, remote).difference == 0
    assert spawned.execution.shared_policy is None
    one_by_one = SharedPolicy(max_batch=1, calls=8, observations=8)  # it has no act_batch
    assert shared.execution.shared_policy == one_by_one


def test_sharing_a_policy_changes_nothing(tmp_path: Path) -> None:
    alone = evaluate_physical(make_random, protocol(episodes=6), tmp_path / "alone", workers=0)
    policy = batched()
    many = evaluate_physical(lambda: policy, protocol(episodes=6), tmp_path / "many", workers=3)
    assert same(alone, many)
    assert many.execution.shared_policy == SharedPolicy(64, len(policy.sizes), 24)
    assert sum(policy.sizes) == 24 and max(policy.sizes) <= 3
    single = evaluate_physical(lambda: policy, protocol(episodes=6), tmp_path / "one", workers=3, max_batch=1)
    assert same(alone, single)
    assert single.execution.shared_policy == SharedPolicy(1, 24, 24)


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    class Killer(Batched):
        def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            if len(self.sizes) == 5:
                multiprocessing.active_children()[0].kill()
            return super().act_batch(observations)

    policy = Killer(CONTRACT)
    policy.sizes = []
    alone = evaluate_physical(make_random, protocol(episodes=4), tmp_path / "alone", workers=0)
    result = evaluate_physical(lambda: policy, protocol(episodes=4), tmp_path / "killed", workers=2)
    assert same(alone, result)


@pytest.mark.parametrize("error", [BlmError("the robot is tired"), KeyError("head")])
def test_an_error_of_the_shared_policy_ends_the_run(tmp_path: Path, error: Exception) -> None:
    class Failing(Batched):
        def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            raise error

    wanted = BlmError if isinstance(error, BlmError) else RuntimeError
    with pytest.raises(wanted, match=r"(?s)work unit .*(tired|head)"):
        evaluate_physical(lambda: Failing(CONTRACT), protocol(), tmp_path, workers=1)


def test_a_privileged_policy_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(BlmError, match="does not see the simulator"):
        evaluate_physical(partial(Cheat, CONTRACT), protocol(), tmp_path, workers=2, share_policy=True)


@pytest.mark.parametrize("max_batch, sizes", [(64, [1, 3]), (2, [1, 2, 1]), (1, [1, 1, 1, 1])])
def test_waiting_requests_are_answered_in_one_batch(max_batch: int, sizes: list[int]) -> None:
    entered, go = threading.Event(), threading.Event()

    class Held(Batched):
        def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            entered.set()
            assert go.wait(30)
            return super().act_batch(observations)

    policy = Held(CONTRACT)
    policy.sizes = []
    state = np.zeros(8, np.float32)
    seen = [Observation(images={}, state=state, instruction="", robot="panda", seed=i) for i in range(4)]
    with PolicyHost(policy, max_batch=max_batch) as host:
        workers = [HostedPolicy(*host.connection_info) for _ in seen]
        workers[0]._host.send(seen[0])
        assert entered.wait(30)
        for worker, observation in zip(workers[1:], seen[1:], strict=True):
            worker._host.send(observation)
        go.set()
        answers = [worker._host.recv()[1] for worker in workers]
        for worker in workers:
            worker.close()
    assert policy.sizes == sizes and (host.calls, host.observations) == (len(sizes), 4)
    for observation, actions in zip(seen, answers, strict=True):
        assert (actions == RandomPolicy(CONTRACT).act(observation).actions).all()  # each its own


@pytest.fixture
def host() -> Iterator[PolicyHost]:
    with PolicyHost(batched()) as host:
        yield host


def test_host_serves_new_workers_after_dead_ones(host: PolicyHost) -> None:
    space = ROBOTS["panda"].action_space
    seen = Observation(images={}, state=np.zeros(space.dim), instruction="", robot="panda", seed=3)
    first, second = HostedPolicy(*host.connection_info), HostedPolicy(*host.connection_info)
    first._host.send(seen)
    first.close()  # dies without reading its answer
    assert (second.act(seen).actions == RandomPolicy(CONTRACT).act(seen).actions).all()
    assert second.contract == replace(CONTRACT, revision="random", training="none") and second.seconds >= 0.02
    with pytest.raises(multiprocessing.AuthenticationError):
        HostedPolicy(host.connection_info[0], b"wrong", CONTRACT)
    third = HostedPolicy(*host.connection_info)
    assert (third.act(seen).actions == second.act(seen).actions).all()
    third.close()
    second.close()


# --- a killed run ---


def test_killed_run_continues_to_the_same_result(tmp_path: Path) -> None:
    asked = {"robots": ["panda", "widowxai"], "episodes": 8, "phrasing": "both"}
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.evaluation.physical.test_physical import *
evaluate_physical(batched, protocol(**{asked!r}), Path({str(tmp_path / "cut")!r}), workers=2)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "cut/journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/result.json").exists()
    kept = journal.read_bytes()
    assert 3 <= kept.count(b"\n") < 16
    resumed = evaluate_physical(batched, protocol(**asked), tmp_path / "cut", workers=2)
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    whole = evaluate_physical(batched, protocol(**asked), tmp_path / "whole", workers=2)
    assert same(resumed, whole)
    for one, other in zip(resumed.summary.cells, whole.summary.cells, strict=True):
        assert one.summary.success_once == other.summary.success_once
        assert one.summary.reasons == other.summary.reasons
    for episode in whole.episodes:
        pictures = [
            (tmp_path / name / episode.video).read_bytes() for name in ("cut", "whole") if episode.video
        ]
        assert len(set(pictures)) <= 1


# --- a world that does not wait ---


class Numbered:
    """A fake policy: action i of its k-th chunk is 100 k + i in every dimension. And a fake environment."""

    variation = PLAIN

    def __init__(self, horizon: int, seconds: float = 0.0) -> None:
        self.contract = replace(CONTRACT, horizon=horizon, cameras=())
        self.seconds, self.asked = seconds, 0

    def reset(self) -> None: ...

    def act(self, observation: Observation) -> ActionChunk:
        time.sleep(self.seconds)
        numbers = 100 * self.asked + np.arange(self.contract.horizon)
        self.asked += 1
        return ActionChunk(actions=np.tile(numbers[:, None], 8).astype(np.float32))

    def resting_action(self) -> np.ndarray:
        return np.full(8, -1.0, np.float32)

    def observation(self, seed: int, cameras: Sequence[str]) -> Observation:
        return Observation(images={}, state=self.resting_action(), instruction="", robot="panda", seed=seed)


@pytest.mark.parametrize(
    "latency, horizon, wanted",
    [
        ("none", 6, [0, 1, 2, 3, 100, 101, 102, 103, 200]),
        (0.0, 6, [0, 1, 2, 3, 100, 101, 102, 103, 200]),
        (0.001, 6, [-1, 1, 2, 3, 4, 101, 102, 103, 104, 201]),  # one step at 20 Hz
        (0.1, 6, [-1, -1, 2, 3, 4, 5, 102, 103, 104, 105, 202]),
        (0.1, 5, [-1, -1, 2, 3, 4, 4, 102, 103, 104, 104, 202]),  # nothing left of the chunk: hold
        (0.2, 6, [-1, -1, -1, -1, 4, 5, 5, 5, 104, 105, 105, 105, 204]),  # as late as the next question
        (0.25, 6, [-1] * 5 + [5] * 5 + [105] * 5 + [205]),  # later: asked again at once
        (0.35, 6, [-1] * 7 + [5] * 7 + [105] * 7),  # the whole chunk comes too late: hold its last target
    ],
)
def test_latency_gives_exactly_these_actions(latency: float | str, horizon: int, wanted: list[int]) -> None:
    fake = Numbered(horizon)
    asked = replace(protocol(latency=latency), cameras=())
    played = [
        int(action[0]) for action, _ in zip(drive(fake, fake, 0, asked, EpisodeTimer()), wanted, strict=False)
    ]
    assert played == wanted


@pytest.mark.parametrize(
    "dynamics, wanted",
    [
        (Dynamics(delay=1), [-1, 1, 2, 3, 4, 101, 102, 103, 104, 201]),
        (Dynamics(delay=2), [-1, -1, 2, 3, 4, 5, 102, 103, 104, 105, 202]),
        (Dynamics(hold=2), [0, 0, 2, 2, 100, 100, 102, 102, 200]),
        (Dynamics(hold=3), [0, 0, 0, 3, 3, 3, 102, 102, 102, 201]),
    ],
)
def test_delay_and_hold_of_a_variation(dynamics: Dynamics, wanted: list[int]) -> None:
    fake = Numbered(6)
    fake.variation = Variation(dynamics=dynamics)
    actions = drive(fake, fake, 0, replace(protocol(), cameras=()), EpisodeTimer())
    assert [int(action[0]) for action, _ in zip(actions, wanted, strict=False)] == wanted


def test_measured_latency_is_the_time_that_the_policy_takes() -> None:
    fake, clock = Numbered(6, seconds=0.055), EpisodeTimer()
    actions = drive(fake, fake, 0, replace(protocol(latency="measured"), cameras=()), clock)
    played = [int(next(actions)[0]) for _ in range(8)]
    late = [int(np.ceil(seconds * 20)) for seconds in clock.decisions]
    held = min(late[0], len(played))  # more than 8 only on a machine that stalls
    assert held >= 2 and played[:held] == [-1] * held and -1 not in played[held:]
    assert clock.policy >= sum(clock.decisions) >= 0.055


def test_latency_in_the_simulator(tmp_path: Path) -> None:
    prompt, instant = run(RandomPolicy, tmp_path / "a"), run(RandomPolicy, tmp_path / "b", latency=0.0)
    assert same(prompt, instant)
    with pytest.raises(ContractError, match=r"latency: 'none' here, 0.0 there"):
        compare(prompt, instant)
    late = run(RandomPolicy, tmp_path / "c", latency=0.15, max_steps=16)
    assert late.protocol.latency == 0.15 and len(late.episodes) == 2
    policy = batched()
    live = evaluate_physical(lambda: policy, protocol(latency="measured"), tmp_path / "d", workers=2)
    assert set(policy.sizes) == {1} and live.episodes[0].act_ms >= 20


# --- replay ---


def recording(seed: int, **changes: object) -> Episode:
    """Twenty steps of random motion, as a dataset would hold them."""
    start = str(changes.pop("start", "home"))
    env = Env("widowxai", "pull_cube", cameras=())
    rng, states, executed = np.random.default_rng(seed), [], []
    env.reset(seed=seed, options={"arm": start})
    for _ in range(20):
        states.append(env.state())
        executed.append((env.state() + rng.normal(0, 0.1, 7)).astype(np.float32))
        env.step(executed[-1])
    env.close()
    facts = {"robot": "widowxai", "task": "pull_cube", "seed": seed, "instruction": "", "images": {}}
    facts |= {"states": np.stack(states), "executed": np.stack(executed), "actions": np.zeros((20, 7))}
    return Episode(**{**facts, "metrics": {"random_start": float(start == "random")}, **changes})


def test_replay_executes_the_executed_actions(tmp_path: Path) -> None:
    episodes = [recording(10_000), recording(10_007, start="random")]
    policy = ReplayPolicy(episodes)
    asked = PhysicalProtocol.for_replay(policy.contract, episodes)
    assert [key.seed for key in asked.keys] == [10_000, 10_007] and asked.max_steps == 20
    told: list[np.ndarray] = []

    class Watched(ReplayPolicy):
        def attach(self, env: Env) -> None:
            super().attach(env)
            self.env, self.states = env, []
            told.append(self.states)

        def act(self, observation: Observation) -> ActionChunk:
            self.states.append(observation.state)
            return super().act(observation)

    result = evaluate_physical(partial(Watched, episodes), asked, tmp_path, workers=0)
    for episode, states in zip(episodes, told, strict=True):
        assert np.array_equal(states, episode.states[::8])  # bit for bit
    assert result.protocol.purpose == "replay check" and result.summary.overall.n == 2
    assert load_result(tmp_path) == result
    validation = PhysicalProtocol.for_validation(policy.contract, tasks=["pull_cube"], episodes=1)
    for protocol, purpose in ((result.protocol, "replay check"), (validation, "validation")):
        other = replace(result, protocol=protocol)
        with pytest.raises(BlmError, match=rf"is a {purpose}, which is not a score; compare evaluations"):
            compare(other, other)


def test_replay_refuses_a_different_start(tmp_path: Path) -> None:
    moved = recording(10_000, states=np.ones((20, 7), np.float32))
    policy = ReplayPolicy([moved])
    asked = PhysicalProtocol.for_replay(policy.contract, [moved])
    with pytest.raises(BlmError, match="'widowxai/pull_cube/10000' was recorded from another start"):
        evaluate_physical(lambda: policy, asked, tmp_path, workers=0)
    other = ReplayPolicy([recording(10_001)])
    with pytest.raises(BlmError, match="no recorded episode 'widowxai/pull_cube/10000'"):
        evaluate_physical(lambda: other, asked, tmp_path, workers=0)
    with pytest.raises(BlmError, match="each scene once; got 2"):
        PhysicalProtocol.for_replay(policy.contract, [moved, moved])
    assert other.contract.revision != policy.contract.revision


# --- comparing results ---


def test_compare_refuses_unlike_runs(tmp_path: Path) -> None:
    solved, still = run(Cheat, tmp_path / "a", max_steps=3), run(ZeroPolicy, tmp_path / "b", max_steps=3)
    gain = compare(solved, still)
    assert (gain.difference, gain.first, gain.second) == (1.0, 1.0, 0.0)
    assert (gain.only_first, gain.p_value) == (2, 0.5)
    with pytest.raises(ContractError, match="max_steps: 3 here, 4 there"):
        compare(solved, run(ZeroPolicy, tmp_path / "c", max_steps=4))
    first, second = still.episodes
    moved = replace(still, episodes=(replace(first, scene="elsewhere"), second))
    with pytest.raises(
        ContractError, match=r"'panda/push_cube/0' started from another scene \(\w+ here, elsewhere there"
    ):
        compare(solved, moved)
    with pytest.raises(ContractError, match="2 items here, 1 there"):
        compare(solved, replace(still, episodes=(first,)))


def test_comparison_by_cell_and_wording(tmp_path: Path) -> None:
    asked = {"tasks": ["push_cube", "pull_cube"], "episodes": 4, "max_steps": 1, "phrasing": "both"}
    solved, still = run(Cheat, tmp_path / "a", **asked), run(ZeroPolicy, tmp_path / "b", **asked)
    cells = compare_cells(solved, still)
    assert list(cells) == ["wording seen", "wording held_out", "panda push_cube", "panda pull_cube"]
    assert all(cell.n == 4 and cell.difference == 1.0 for cell in cells.values())
    text = format_comparison(solved, still, ("runs/a", "runs/b"))
    assert "A: runs/a (model zero)" in text and "success_once on the same 8 items" in text
    rows = {line[:16].strip(): line for line in text.splitlines()}
    assert "100.0%    0.0%" in rows["panda push_cube"] and rows["panda push_cube"].endswith("       0  0.5")
    assert rows["all"].endswith("0.0078")


def damage(text: str, how: str) -> str:
    if how == "cut":
        return text[:-40]
    result = json.loads(text)
    if how == "protocol":
        result["protocol"]["max_steps"] = 5
    elif how == "row":
        result["rows"][0]["success_once"] = not result["rows"][0]["success_once"]
    elif how == "lost":
        del result["rows"][1]
    elif how == "format":
        result["format"] = 1
    else:
        del result["overall"]
    return json.dumps(result)


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("cut", "is damaged"),
        ("overall", r"is damaged \(KeyError\('overall'\)\)"),
        ("protocol", r"hash of the protocol is \w+ in its summary, \w+ from its content"),
        ("row", r"n and hits is \[2, 0\] in its summary, \[2, 1\]"),
        ("lost", r"n and hits is \[2, 0\] in its summary, \[1, 0\]"),
        ("format", "has format 1, this program reads 2"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, how: str, complaint: str) -> None:
    run(ZeroPolicy, tmp_path, max_steps=2)
    file = tmp_path / "result.json"
    file.write_text(damage(file.read_text(), how))
    with pytest.raises(BlmError, match=complaint):
        load_result(file)
    with pytest.raises(BlmError, match="no result at"):
        load_result(tmp_path / "nothing")
