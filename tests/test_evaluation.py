"""Evaluation: intervals against known values and simulation, protocols, closed-loop episodes, scoring."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import uvicorn

from blm.evaluation import (
    DigitalProtocol,
    PhysicalProtocol,
    RandomPolicy,
    ZeroPolicy,
    compare,
    evaluate_digital,
    evaluate_physical,
)
from blm.evaluation.digital.scoring import extract, normalise, parse_point, score
from blm.evaluation.intervals import effective_size, mcnemar, paired_difference, success_rate, wilson
from blm.evaluation.physical import decision_seed
from blm.evaluation.protocol import (
    EVALUATION_SEEDS,
    STAGE1_HELD_OUT_SEEDS,
    TRAINING_SEEDS,
    protocol_hash,
)
from blm.robots import ROBOTS
from blm.serving.app import create_app, server_config
from blm.serving.client import RemotePolicy
from blm.tasks import TASKS, Env
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    Image,
    Message,
    Observation,
    PolicyContract,
    Question,
)

CONTRACT = PolicyContract(
    action_spaces={name: robot.action_space for name, robot in ROBOTS.items()},
    cameras=("base",),
    image_size=32,
    horizon=6,
    execute=4,
)
make_random = partial(RandomPolicy, CONTRACT)


def protocol(**changes: object) -> PhysicalProtocol:
    options = {"robots": ["panda"], "tasks": ["push_cube"], "episodes": 2, "max_steps": 14, **changes}
    return PhysicalProtocol.for_policy(CONTRACT, **options)


def run(
    policy: type[ZeroPolicy], out: Path, *, contract: PolicyContract = CONTRACT, **changes: object
) -> dict:
    """Evaluate in this process, without videos."""
    make = partial(policy, contract)
    return evaluate_physical(make, protocol(**changes), out, workers=0, videos_per_cell=0)


def without_times(rows: Sequence[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "act_ms"} for row in rows]


# --- intervals ---


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(hits: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - hits / n, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_wilson_covers_the_truth(p: float) -> None:
    hits = np.random.default_rng(0).binomial(40, p, 4000)
    covered = [low <= p <= high for low, high in (wilson(h / 40, 40) for h in hits)]
    assert 0.93 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("alike", [0.05, 1.0])
def test_clustered_interval_covers_the_truth_where_wilson_does_not(alike: float) -> None:
    """40 scenes of 6 questions; the scene's own rate is beta distributed around 0.6."""
    rng, groups = np.random.default_rng(1), [str(i // 6) for i in range(240)]
    covered, naive = [], []
    for rates in rng.beta(0.6 / alike, 0.4 / alike, (400, 40)):
        outcomes = list(rng.random(240) < np.repeat(rates, 6))
        clustered, plain = success_rate(outcomes, groups), success_rate(outcomes)
        covered.append(clustered.low <= 0.6 <= clustered.high)
        naive.append(plain.low <= 0.6 <= plain.high)
    assert 0.92 <= np.mean(covered) <= 0.985
    assert alike < 1 or np.mean(naive) < 0.85


def test_effective_size_limits() -> None:
    values, groups = np.array([1.0, 0, 1, 0, 1, 0]), list("abcdef")
    assert effective_size(values, groups) == 6  # each its own group: nothing shared
    copies = np.repeat([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 0], 50)
    ten_scenes = [str(i // 50) for i in range(500)]
    assert effective_size(copies, ten_scenes) < 10  # however many questions
    assert effective_size(np.ones(6), list("aabbcc")) == 3
    with pytest.raises(BlmError, match="at least one"):
        success_rate([])


def test_paired_difference() -> None:
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(1000):
        shared = rng.random(50)
        a = (shared < 0.7).tolist()
        b = (np.where(rng.random(50) < 0.3, rng.random(50), shared) < 0.5).tolist()
        difference = paired_difference(a, b)
        covered.append(difference.low <= 0.2 <= difference.high)
        opposite = paired_difference(b, a)
        assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low))
        assert difference.only_first - difference.only_second == round(50 * difference.difference)
    assert 0.93 <= np.mean(covered) <= 0.985
    equal = paired_difference([True] * 10, [True] * 10)
    assert equal.low < 0 < equal.high and equal.p_value == 1.0
    assert paired_difference([True] * 4, [False] * 4, list("aabb")).p_value is None


# --- protocols ---


def test_seed_ranges_are_disjoint() -> None:
    ranges = [EVALUATION_SEEDS, TRAINING_SEEDS, STAGE1_HELD_OUT_SEEDS]
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))


def test_protocol_refuses_seeds_of_training() -> None:
    protocol(first_seed=9_998, episodes=2)
    for first, count in [(9_999, 2), (10_000, 1), (-1, 2), (0, 0)]:
        with pytest.raises(BlmError, match=r"within 0\.\.9999"):
            protocol(first_seed=first, episodes=count)


def test_every_field_changes_the_hash() -> None:
    base = protocol()
    assert protocol_hash(base) == protocol_hash(protocol())
    for name, value in vars(base).items():
        other = value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else ()
        assert protocol_hash(replace(base, **{name: other})) != protocol_hash(base), name


def test_suite_hash_follows_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = protocol().suite
    reworded = replace(TASKS["push_cube"], phrasings=("Push it.",) * 4)
    monkeypatch.setitem(TASKS, "push_cube", reworded)
    assert protocol().suite != before


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
    done = run(Cheat, tmp_path / "a")
    row = done["rows"][0]
    assert row["success_once"] and row["success_at_end"] and row["first_success"] == 1 and row["reason"] == ""
    assert row["steps"] == 11  # the first success, then ten steps to settle
    assert row["video"] is None and not (tmp_path / "a" / "videos").exists()
    lost = run(Spoiler, tmp_path / "b")
    assert lost["overall"]["success_once"]["hits"] == 2 and lost["overall"]["success_at_end"]["hits"] == 0


def test_result_file_is_complete_and_rows_name_the_failure(tmp_path: Path) -> None:
    result = evaluate_physical(make_random, protocol(robots=["panda", "xarm6"]), tmp_path, workers=0)
    assert result == json.loads((tmp_path / "result.json").read_text())
    ids = [f"{robot}/push_cube/{seed}" for robot in ("panda", "xarm6") for seed in (0, 1)]
    assert [row["id"] for row in result["rows"]] == ids
    assert [(c["robot"], c["n"]) for c in result["cells"]] == [("panda", 2), ("xarm6", 2)]
    assert result["overall"]["success_once"]["high"] == pytest.approx(wilson(0, 4)[1])
    assert {row["reason"] for row in result["rows"]} == {"never: is_at_target"}
    assert result["protocol"]["simulator"].startswith("mujoco") and result["machine"]["cores"] >= 1
    for row in result["rows"]:
        assert (row["video"] is not None) == (row["seed"] == 0)
    with av.open(str(tmp_path / result["rows"][0]["video"])) as video:
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
    assert run(Counting, tmp_path)["rows"] == first["rows"] and len(calls) == 8
    run(Counting, tmp_path, max_steps=8)
    assert len(calls) == 12


def test_worker_processes_and_a_socket_give_the_same_episodes(tmp_path: Path) -> None:
    local = evaluate_physical(make_random, protocol(), tmp_path / "local", workers=0)
    spawned = evaluate_physical(make_random, protocol(), tmp_path / "spawned", workers=2)
    server = uvicorn.Server(server_config(create_app(RandomPolicy(CONTRACT)), port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    uri = f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    remote = evaluate_physical(partial(RemotePolicy, uri), protocol(), tmp_path / "remote", workers=0)
    server.should_exit = True
    thread.join()
    assert without_times(local["rows"]) == without_times(spawned["rows"]) == without_times(remote["rows"])
    assert compare(local, remote).difference == 0


def test_held_out_phrasings(tmp_path: Path) -> None:
    seen = run(RandomPolicy, tmp_path, max_steps=1)
    unseen = run(RandomPolicy, tmp_path, max_steps=1, phrasing="held_out")
    task = TASKS["push_cube"]
    assert {row["instruction"] for row in seen["rows"]} <= set(task.phrasings)
    assert {row["instruction"] for row in unseen["rows"]} <= set(task.held_out_phrasings)


def test_policy_that_breaks_its_promise_is_named(tmp_path: Path) -> None:
    class Short(ZeroPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(actions=super().act(observation).actions[:3])

    with pytest.raises(BlmError, match=r"promised finite actions \(6, 8\), gave \(3, 8\)"):
        run(Short, tmp_path)


def test_compare_refuses_unlike_runs(tmp_path: Path) -> None:
    solved, still = run(Cheat, tmp_path / "a", max_steps=3), run(ZeroPolicy, tmp_path / "b", max_steps=3)
    gain = compare(solved, still)
    assert (gain.difference, gain.only_first, gain.p_value) == (1.0, 2, 0.5)
    with pytest.raises(ContractError, match="max_steps: 3 here, 4 there"):
        compare(solved, run(ZeroPolicy, tmp_path / "c", max_steps=4))
    still["rows"][0]["scene"] = "elsewhere"
    with pytest.raises(ContractError, match="'panda/push_cube/0' started from another scene"):
        compare(solved, still)


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


# --- scoring ---


@pytest.mark.parametrize(
    "raw, text",
    [
        ("red", "red"),
        ("<think>Maybe blue? Answer: blue</think> red", "red"),
        ("the prompt opened the tag </think>red", "red"),
        ("<think>I keep thinking about red", ""),
        ("<think>x</think><answer> red </answer> I hope so", "red"),
        ("<answer>blue</answer> no: <answer>red</answer>", "red"),
        ("The cube is near.\n**Answer:** red", "red"),
        ("Final answer: (376, 309)", "(376, 309)"),
        ("**red**", "red"),
        ("", ""),
    ],
)
def test_extract(raw: str, text: str) -> None:
    assert extract(raw) == text


def test_normalise() -> None:
    assert normalise("The Red  cube.") == normalise("red cube") == "red cube"
    assert normalise("Three") == normalise("3.") == "3"
    assert normalise("A") == "a" and normalise("an apple") == "apple"
    assert normalise("-5") != normalise("5") and normalise("0.5") != normalise("5")
    assert normalise("?!") == ""


@pytest.mark.parametrize(
    "text, point",
    [
        ("(376, 309)", (376, 309)),
        ("The cube is at [12,1000]", (12, 1000)),
        ("(0.376, 0.309)", None),
        ("(1200, 3)", None),
        ("376 309", None),
        ("(1, 2) or (3, 4)", (1, 2)),
    ],
)
def test_parse_point(text: str, point: tuple[int, int] | None) -> None:
    assert parse_point(text) == point


def test_point_score_is_a_distance() -> None:
    asked = Question(id="p", kind="point_base", messages=(), answer="(500, 500)", group="g", scorer="point")
    assert score(asked, "(530, 540)", 50.0).error == pytest.approx(50)
    assert score(asked, "(530, 540)", 50.0).correct and not score(asked, "(531, 540)", 50.0).correct
    unread = score(asked, "to the left", 50.0)
    assert not unread.correct and unread.parsed is None and unread.error is None


# --- digital ---


def question(index: int, kind: str, text: str, answer: str, scene: int) -> Question:
    about = {"id": str(index), "kind": kind, "answer": answer, "group": str(scene)}
    messages = (Message("user", (Image(np.full((2, 2, 3), scene, np.uint8)), text)),)
    return Question(**about, messages=messages, scorer="point" if kind == "point" else "exact")


TRAIN = [
    question(0, "color", "What colour is the cube?", "red", 0),
    question(1, "color", "What colour is the cube?", "Red", 1),
    question(2, "color", "What colour is the ball?", "blue", 2),
    question(3, "point", "Point to the cube.", "(100, 200)", 3),
    question(4, "point", "Point to the cube.", "(300, 400)", 4),
    question(5, "point", "Point to the cube.", "(200, 900)", 4),
]
ASKED = [
    question(0, "color", "What colour is the cube?", "red", 100),
    question(1, "color", "What colour is the ball?", "blue", 100),
    question(2, "color", "What colour is the ball?", "green", 101),
    question(3, "point", "Point to the cube.", "(230, 400)", 101),
    question(4, "count", "How many cubes?", "2", 102),
]


class Scripted:
    """Answers by the question's text, and counts how often it is asked."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.asked = answers, 0

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 64) -> str:
        self.asked += 1
        return self.answers[messages[-1].text]


SCRIPT = {
    "What colour is the cube?": "<think>hm</think>Red.",
    "What colour is the ball?": "green",
    "Point to the cube.": "somewhere",
    "How many cubes?": "two",
}


def examine(chat: Scripted, out: Path, asked: Sequence[Question] = ASKED, **options: object) -> dict:
    return evaluate_digital(chat, asked, out, train_questions=TRAIN, **{"model": "script", **options})


def test_digital_scores_every_item_beside_the_baselines(tmp_path: Path) -> None:
    result = examine(Scripted(SCRIPT), tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [row["correct"] for row in result["rows"]] == [True, False, True, False, True]
    assert result["rows"][0]["raw"] == "<think>hm</think>Red." and result["rows"][0]["parsed"] == "Red."
    assert (result["overall"]["hits"], result["overall"]["n"], result["overall"]["unread"]) == (3, 5, 1)
    kinds = result["kinds"]
    assert {kind: part["n"] for kind, part in kinds.items()} == {"color": 3, "point": 1, "count": 1}
    assert kinds["point"]["unread"] == 1 and kinds["point"]["median_error"] is None
    majority, prior = (result["baselines"][name] for name in ("majority", "question_only"))
    assert (majority["kinds"]["color"]["hits"], prior["kinds"]["color"]["hits"]) == (1, 2)
    assert majority["kinds"]["point"]["hits"] == 1  # (200, 400), the median, is 30 away
    assert majority["kinds"]["point"]["median_error"] == pytest.approx(30)
    assert majority["kinds"]["count"]["hits"] == 0  # never trained: no guess
    gain = prior["model_minus_baseline"]
    assert gain["difference"] == pytest.approx(0.0) and gain["n"] == 5


def test_digital_resumes_and_batches(tmp_path: Path) -> None:
    chat = Scripted(SCRIPT)
    first, again = (examine(chat, tmp_path) for _ in range(2))
    assert chat.asked == 5 and again["rows"] == first["rows"]
    examine(chat, tmp_path, model="other weights")
    assert chat.asked == 10

    class Batched(Scripted):
        def answer_batch(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str]:
            assert max_tokens == 7 and conversations[0][0] == Message("system", ("Be brief.",))
            return [self.answer(messages) for messages in conversations]

    batched = examine(Batched(SCRIPT), tmp_path / "batched", max_tokens=7, prompt="Be brief.")
    assert batched["rows"] == first["rows"]
    with pytest.raises(ContractError, match=r"max_tokens: 7 here, 32 there(.|\n)*prompt: 'Be brief.' here"):
        compare(batched, first)


def test_digital_protocol_names_the_items(tmp_path: Path) -> None:
    base = examine(Scripted(SCRIPT), tmp_path / "a")
    assert DigitalProtocol(**base["protocol"]).count == 5
    repainted = [*ASKED[:4], question(4, "count", "How many cubes?", "2", 103)]
    other = examine(Scripted(SCRIPT), tmp_path / "b", repainted)
    assert other["protocol"]["items"] != base["protocol"]["items"]
    on_disk = replace(ASKED[0], messages=(Message("user", (Image(path="x.png"), "What?")),))
    with pytest.raises(BlmError, match="not in memory"):
        examine(Scripted(SCRIPT), tmp_path / "c", [on_disk])


def test_compare_digital_clusters_by_scene(tmp_path: Path) -> None:
    worse = Scripted({**SCRIPT, "How many cubes?": "9"})
    gain = compare(examine(Scripted(SCRIPT), tmp_path / "a"), examine(worse, tmp_path / "b"))
    assert gain.difference == pytest.approx(0.2) and gain.p_value is None and gain.low < 0 < gain.high
