"""Perturbed protocols: which episodes they have, how they are run, summarised, shown and compared."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blm.app.policies import policy_factory
from blm.cli import main
from blm.datasets.dataset import EpisodeDataset
from blm.evaluation import (
    PROTOCOLS,
    PhysicalProtocol,
    PhysicalResult,
    RandomPolicy,
    ZeroPolicy,
    compare,
    evaluate_physical,
    format_comparison,
    load_result,
)
from blm.evaluation.conditions import CONTROLS, OTHER_TASK, PLAIN, Condition, graded, select
from blm.evaluation.physical.summary import summarise
from blm.evaluation.protocol import EpisodeKey, protocol_hash
from blm.evaluation.report import ReportData, build_report
from blm.evaluation.statistics import success_rate, wilson
from blm.tasks import TASKS, Env
from blm.tasks.suite_plus import AXES, DYNAMICS, LEVELS, perturbation
from blm.tasks.visibility import MIN_PIXELS, hidden_goals
from blm.tasks.wordings import TEST_WORDINGS
from blm.types import (
    ActionChunk,
    BlmError,
    ContractError,
    Observation,
    PolicyContract,
    UnknownNameError,
    joint_training,
)
from tests.support.contracts import CONTRACT

BLANK = Condition(axis="control", name="blank")
FEW = (*graded(("camera", "start"), (1, 3)), Condition(axis="dynamics", name="delay_2"), BLANK)
"""Two axes with two levels, changed dynamics and a control."""


def named(name: str, **changes: Any) -> PhysicalProtocol:
    return PhysicalProtocol.named(name, CONTRACT, **changes)


def few(**changes: Any) -> PhysicalProtocol:
    options = {"robots": ("panda",), "tasks": ("push_cube",), "episodes": 2, "max_steps": 2}
    return PhysicalProtocol.for_policy(CONTRACT, **{**options, "conditions": FEW, **changes})


# --- which episodes ---


def test_plain_protocols_are_what_they_were() -> None:
    """Published results compare with new ones only if these stay as they are."""
    suite = named("suite24", simulator="mujoco 3.17.0")
    keys = [
        *("name", "purpose", "robots", "tasks", "first_seed", "episodes", "recorded", "max_steps"),
        *("settle_steps", "phrasing", "latency", "rate_hz", "cameras", "image_size", "execute"),
        *("simulator", "suite", "success_rule"),
    ]
    assert [*suite.to_json()] == keys and suite.suite == "2-50469280"
    assert protocol_hash(replace(suite, name="suite24")) == "d498bd6d4e3d8e72"


def test_published_suite24_is_the_present_one() -> None:
    file = Path(__file__).parents[3] / "results/physical/blm_nano_step_200.json"
    published = PhysicalProtocol.from_json(json.loads(file.read_text())["protocol"])
    seen = {name: getattr(published, name) for name in ("cameras", "image_size", "execute")}
    contract = replace(CONTRACT, **seen, horizon=16)
    now = PhysicalProtocol.named("suite24", contract, simulator=published.simulator)
    now = replace(now, name="suite24")  # also where another version of the simulator is installed
    assert now == published and protocol_hash(now) == json.loads(file.read_text())["protocol_hash"]


def test_suite24_plus_has_its_episodes() -> None:
    plus = named("suite24-plus")
    keys = plus.keys
    assert plus.name == "suite24-plus" and len({key.id for key in keys}) == len(keys)
    kinds = Counter(key.condition.axis for key in keys)
    assert sum(kinds[axis] for axis in AXES) == 4 * 6 * 7 * 5 * 5 == 4200
    assert kinds[""] == 600 and kinds["control"] == 2 * 24 * 5 and {*kinds} == {"", "control", *AXES}
    for key in keys:
        if key.condition.is_graded:
            assert key.seed // 5 == key.condition.level - 1
    plain = {key.id for key in keys if key.condition == PLAIN}
    assert {key.twin for key in keys} == plain
    assert [key.seed for key in keys[:26]] == [*range(25), 0]  # a cell begins with its twins


def test_the_other_named_protocols_have_theirs() -> None:
    dynamics = named("suite24-dynamics").keys
    assert Counter(key.condition.row for key in dynamics) == dict.fromkeys(("", *DYNAMICS), 24 * 5)
    assert len(named("suite24-v2").keys) == 1200
    words = PROTOCOLS["suite24-words"]
    assert len(words["tasks"]) == 6 and {one.name for one in words["conditions"]} == {*CONTROLS}
    seeds = few(tasks=("push_cube",), episodes=25, conditions=words["conditions"])
    assert Counter(key.condition.row for key in seeds.keys) == {"": 25, "blank": 25, "other": 25}


def test_visible_goals_are_another_suite_with_another_hash() -> None:
    old, new = named("suite24"), named("suite24-v2")
    assert new.visible_goals and new.suite.startswith("3-") and old.suite.startswith("2-")
    assert protocol_hash(old) != protocol_hash(new)
    assert new.to_json().pop("visible_goals") is True


@pytest.mark.parametrize("name", sorted({*PROTOCOLS} - {"suite24-words"}))
def test_protocols_survive_a_round_trip(name: str) -> None:
    protocol = named(name)
    again = PhysicalProtocol.from_json(json.loads(json.dumps(protocol.to_json())))
    assert again == protocol and protocol_hash(again) == protocol_hash(protocol)


def test_tables_are_part_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {axis: protocol_hash(few(conditions=graded((axis,)))) for axis in ("light", "language")}
    monkeypatch.setattr("blm.evaluation.protocol.table_hash", lambda: "other")
    words = {**TEST_WORDINGS["push_cube"], 1: ("Other words.",)}
    monkeypatch.setitem(TEST_WORDINGS, "push_cube", words)
    for axis, known in before.items():
        assert protocol_hash(few(conditions=graded((axis,)))) != known, axis


def test_a_selection_has_no_name_and_only_its_twins() -> None:
    conditions = PROTOCOLS["suite24-plus"]["conditions"]
    chosen = select(conditions, ("camera", "light"), (3, 5))
    assert chosen == graded(("camera", "light"), (3, 5))
    part = named("suite24-plus", conditions=chosen)
    assert part.name == "" and part.seeds == (*range(10, 15), *range(20, 25))
    assert len(part.keys) == 24 * (10 + 2 * 2 * 5)
    assert named("suite24-plus", conditions=select(conditions)).name == "suite24-plus"
    assert select(conditions, ("blank",)) == (BLANK,)


# --- bad input ---


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ({"axis": "lights", "level": 1}, "unknown axis 'lights'. Did you mean 'light'"),
        ({"axis": "light", "level": 6}, r"unknown level of axis 'light' '6'.*Valid: 1, 2, 3, 4, 5"),
        ({"axis": "light"}, "unknown level of axis 'light' '0'"),
        ({"axis": "dynamics", "name": "mass"}, "unknown dynamics condition 'mass'.*mass_double"),
        ({"axis": "control", "name": "empty"}, "unknown control condition 'empty'. Valid: blank, other"),
        ({"axis": "light", "level": 1, "name": "x"}, "only dynamics, control names"),
        ({"level": 2}, "have levels"),
    ],
)
def test_unknown_conditions_are_refused_by_name(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BlmError, match=complaint):
        Condition(**wrong)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"simulator": "maniskill 3.0.1"}, "ManiSkill's scenes cannot be varied.* camera, start, dynamics"),
        ({"visible_goals": True}, "by their plain looks"),
        ({"conditions": (BLANK, BLANK)}, "must differ"),
        ({"conditions": (PLAIN,)}, "must differ"),
        ({"first_seed": 9_995}, r"within 0\.\.9999"),
        ({"episodes": 0}, "need one or more"),
    ],
)
def test_protocols_that_cannot_be_run_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BlmError, match=complaint):
        few(**changes)


def test_a_task_without_test_wordings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TEST_WORDINGS, "push_cube")
    with pytest.raises(UnknownNameError, match="unknown task with test wordings 'push_cube'"):
        few(conditions=graded(("language",)))
    few()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--protocol", "suite24-pluss"], "Did you mean 'suite24-plus'"),
        (["--protocol", "suite24-plus", "--axes", "lihgt"], "unknown axis of this protocol 'lihgt'"),
        (
            ["--protocol", "suite24-plus", "--levels", "7"],
            "levels is (7,); it must be 1 to 5",
        ),
        (["--protocol", "suite24-dynamics", "--levels", "2"], "level 2: this protocol has none"),
        (["--axes", "light"], "axis light: this protocol has none to choose from"),
        (["--protocol", "suite24-plus", "--simulator", "maniskill"], "ManiSkill's scenes cannot be varied"),
        (["--protocol", "suite24-v2", "--simulator", "maniskill"], "protocol varies visible goals"),
    ],
)
def test_the_command_refuses_by_name(
    flags: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "physical", "--model", "zero", "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert complaint in " ".join(capsys.readouterr().err.split())


# --- how an episode is run ---


class Witness(ZeroPolicy):
    """Holds still, and notes what each episode shows."""

    seen: list[tuple[Any, str, dict[str, Any]]]

    def attach(self, env: Env) -> None:
        self.env = env

    def act(self, observation: Observation) -> ActionChunk:
        self.seen.append((self.env.variation, observation.instruction, dict(observation.images)))
        return super().act(observation)


def watch(protocol: PhysicalProtocol, out: Path) -> tuple[PhysicalResult, list[tuple[Any, str, dict]]]:
    policy = Witness(CONTRACT)
    policy.seen = []
    result = evaluate_physical(lambda: policy, protocol, out, workers=0, videos_per_cell=0)
    return result, policy.seen


def test_conditions_reach_the_episodes(tmp_path: Path) -> None:
    language, other = Condition(axis="language", level=1), Condition(axis="control", name="other")
    protocol = few(conditions=(*FEW, language, other), phrasing="both")
    result, seen = watch(protocol, tmp_path)
    assert [episode.id for episode in result.episodes] == [key.id for key in protocol.keys]
    wordings = {episode.id: episode.instruction for episode in result.episodes}
    for episode, (variation, instruction, images) in zip(result.episodes, seen, strict=True):
        condition, seed = episode.condition, episode.seed
        assert instruction == episode.instruction and [*images] == ["base"]
        if condition.is_graded:
            assert variation == perturbation(condition.axis, condition.level, "panda", "push_cube", seed)
        if condition == language:
            tests = TEST_WORDINGS["push_cube"][1]
            assert instruction == tests[seed % len(tests)]
        elif condition == BLANK:
            assert instruction == ""
        elif condition == other:
            assert instruction == TASKS["pull_cube"].instruction(0)
        else:
            assert instruction == wordings[episode.twin]
    delayed = [one for one in seen if one[0].dynamics.delay]
    assert len(delayed) == 2 and delayed[0][0].dynamics.delay == 2


def test_the_other_instruction_is_always_another_tasks() -> None:
    assert sorted(OTHER_TASK) == sorted(OTHER_TASK.values()) == sorted(PROTOCOLS["suite24"]["tasks"])
    assert all(task != other for task, other in OTHER_TASK.items())
    assert Condition(axis="control", name="other").reset_options("panda", "words_x", 0) == {"named": "other"}


def test_a_perturbed_run_resumes(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(RandomPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            asked.append(observation.instruction)
            return super().act(observation)

    run = partial(evaluate_physical, partial(Counting, CONTRACT), workers=0, videos_per_cell=0)
    first = run(few(), tmp_path)
    count = len(asked)
    assert count == len(few().keys) == 2 + 2 + 2 * (2 + 2) + 2 + 2  # twins of two levels, 4 + 2 conditions
    assert run(few(), tmp_path).episodes == first.episodes and len(asked) == count
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-3]))
    again = run(few(), tmp_path)
    assert len(asked) == count + 3
    assert [e.without_times() for e in again.episodes] == [e.without_times() for e in first.episodes]


def test_the_expert_is_perturbed_too(tmp_path: Path) -> None:
    make = policy_factory("expert", cameras=(), image_size=32, horizon=1, execute=1, api_key=None, load={})
    options = {"robots": ("panda",), "tasks": ("push_cube",), "episodes": 1, "max_steps": 120}
    protocol = PhysicalProtocol.for_policy(
        make().contract, **options, conditions=(Condition(axis="light", level=2), BLANK)
    )
    result = evaluate_physical(make, protocol, tmp_path, workers=0, videos_per_cell=0)
    assert result.training == "none"
    assert all(episode.success_once for episode in result.episodes)
    (axis,), (control,) = result.summary.perturbed.axes, result.summary.perturbed.controls
    assert (axis.axis, axis.success.rate, axis.drop.difference) == ("light", 1.0, 0.0)
    assert control.condition == BLANK and control.summary.n == 1


# --- goals that can be seen ---


@pytest.fixture
def pick() -> Iterator[Env]:
    env = Env("panda", "pick_cube", cameras=(), image_size=32)
    yield env
    env.close()


def test_a_scene_with_a_hidden_goal_is_drawn_again(pick: Env) -> None:
    def scene(seed: int, **options: Any) -> np.ndarray:
        pick.reset(seed=seed, options=options)
        return np.concatenate([pick.state(), *(thing.position for thing in pick.objects().values())])

    for seed, hidden in ((5, False), (6, True), (11, True)):
        plain = scene(seed)
        assert bool(hidden_goals(pick)) == hidden
        redrawn = scene(seed, visible_goals=True)
        assert not hidden_goals(pick) and (redrawn == scene(seed, visible_goals=True)).all()
        assert (redrawn == plain).all() == (not hidden), "a good scene stays, a bad one is drawn again"
        assert max(pick.mask("goal", camera, 112).sum() for camera in ("base", "wrist")) >= MIN_PIXELS


def test_goals_that_are_never_visible_are_an_error(pick: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm.tasks.visibility.MIN_PIXELS", 10**6)
    monkeypatch.setattr("blm.tasks.visibility.DRAWS", 2)
    with pytest.raises(BlmError, match=r"goal of 'panda' in 'pick_cube' is hidden .* in 2 scenes"):
        pick.reset(seed=0, options={"visible_goals": True})


# --- summaries ---


def made_up(solves: dict[str, Sequence[int]], protocol: PhysicalProtocol, out: Path) -> PhysicalResult:
    """A result whose episodes of a row (see `Condition.row`) are solved for these seeds."""
    result = evaluate_physical(partial(ZeroPolicy, CONTRACT), protocol, out, workers=0, videos_per_cell=0)
    episodes = tuple(
        replace(one, success_once=one.seed in solves.get(one.condition.row, ())) for one in result.episodes
    )
    return replace(result, episodes=episodes, summary=summarise(episodes))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PhysicalResult:
    solves = {"": (0, 1, 4, 5), "camera": (0, 1, 4, 5), "start": (0, 4), "delay_2": (1,), "blank": (0, 1)}
    return made_up(solves, few(), tmp_path_factory.mktemp("made_up"))


def test_axes_levels_and_the_headline(result: PhysicalResult) -> None:
    summary = result.summary
    perturbed = summary.perturbed
    assert (summary.overall.n, summary.overall.success_once.hits) == (4, 4), "the twins alone"
    camera, start = perturbed.axes
    assert [level.condition.level for level in camera.levels] == [1, 3]
    assert (camera.success.rate, start.success.rate, perturbed.worst_axis.axis) == (1.0, 0.5, "start")
    assert perturbed.mean_of_axes.rate == 0.75 and perturbed.mean_of_axes.n == 8
    assert (start.drop.difference, start.drop.only_second, camera.drop.difference) == (-0.5, 2, 0.0)
    assert start.levels[1].drop.n == 2 and perturbed.drop.difference == -0.25
    assert perturbed.drop.p_value is None, "scenes recur on several axes"
    assert start.levels[0].summary.success_once.high == pytest.approx(wilson(0.5, 2)[1])
    assert [one.condition.name for one in perturbed.dynamics] == ["delay_2"]
    assert [one.condition.name for one in perturbed.controls] == ["blank"]
    assert perturbed.chance is None and perturbed.wrong_object is None


def test_the_interval_knows_that_axes_share_scenes() -> None:
    """Seven axes of the same scenes, all alike: no narrower than one axis."""
    rng = np.random.default_rng(0)
    scenes = [f"{number}" for number in range(100)]
    outcomes = rng.integers(2, size=100).tolist()
    seven = success_rate(7 * outcomes, 7 * scenes, [axis for axis in AXES for _ in scenes])
    one = success_rate(outcomes)
    assert seven.rate == one.rate and seven.high - seven.low >= one.high - one.low
    apart = success_rate(7 * outcomes, None, [axis for axis in AXES for _ in scenes])
    assert apart.high - apart.low < (one.high - one.low) / 2


def test_a_perturbed_result_survives_its_file(result: PhysicalResult, tmp_path: Path) -> None:
    value = json.loads(json.dumps(result.to_json()))
    assert PhysicalResult.from_json(value) == result
    (tmp_path / "result.json").write_text(json.dumps(value))
    assert load_result(tmp_path) == result
    assert "condition" not in value["rows"][0] and value["training"] == "none"
    value["rows"][-1]["success_once"] ^= True
    (tmp_path / "result.json").write_text(json.dumps(value))
    with pytest.raises(BlmError, match="n and hits of the conditions"):
        load_result(tmp_path)


def test_words_have_a_chance_level(result: PhysicalResult) -> None:
    words = [
        replace(one, id=one.id.replace("push", "words_push"), task="words_push_cube")
        for one in result.episodes
        if one.condition in (PLAIN, BLANK)
    ]
    perturbed = summarise(words).perturbed
    assert perturbed.chance == TASKS["words_push_cube"].chance == 0.25
    assert perturbed.wrong_object.n == 4
    assert not perturbed.axes and perturbed.mean_of_axes is None and perturbed.worst_axis is None


# --- report and command ---


def test_the_report_shows_axes_and_levels(result: PhysicalResult, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result.to_json()))
    out = tmp_path / "report.html"
    build_report(ReportData(title="x", physical={"made up": tmp_path / "result.json"}), out)
    text = out.read_text()
    table = text[text.index('<table class="axes">') :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    assert len(rows) == 3 and "level 3" in rows[0] and "-50 points" in rows[2]
    assert "Mean of the axes <b>75 %</b>" in text and "worst axis: start" in text
    assert "4 unperturbed episodes per cell" in text and "Robustness: mean of 2 axes" in text
    figure = text[text.index('<div class="box axes">') :]
    assert "<svg" in figure[:100] and ">camera<" in figure and ">start<" in figure
    build_report(ReportData(title="x", physical={"made up": tmp_path / "result.json"}), out)
    assert out.read_text() == text


def test_the_command_runs_a_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = ["--robots", "panda", "--tasks", "push_cube", "--episodes", "1", "--image-size", "32"]
    what = ["--protocol", "suite24-plus", "--axes", "start", "blank", "--levels", "1", "2"]
    few_cameras = ["--cameras", "base", "--workers", "0", "--videos", "0"]
    main(["eval", "physical", "--model", "zero", "--out", str(tmp_path), *cell, *what, *few_cameras])
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in ("level 1", "level 2", "worst axis: start", "blank", "mean"))
    protocol = load_result(tmp_path).protocol
    assert protocol.name == "" and [one.label for one in protocol.conditions] == [
        "start-1",
        "start-2",
        "blank",
    ]
    assert protocol.name == "" and protocol.max_steps == 200 and (tmp_path / "report.html").exists()


# --- augmented and zero-shot ---


def test_augmented_and_zero_shot_results_are_told_apart(
    result: PhysicalResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, varied = (replace(result, training=training) for training in ("plain", "randomized"))
    with pytest.raises(ContractError, match="'the first' is zero-shot, 'the second' is augmented"):
        compare(plain, varied)
    assert compare(plain, varied, across_training=True).difference == 0
    assert compare(plain, result).n == 10, "the untrained stand beside both; controls do not count"
    text = format_comparison(plain, varied, across_training=True)
    assert "zero-shot)" in text and "augmented)" in text and "camera-3" in text and "clustered" in text
    with pytest.raises(ContractError, match="training unknown"):
        compare(replace(result, training="unknown"), varied)
    paths = {}
    for name, one in (("plain", plain), ("varied", varied)):
        (tmp_path / name).mkdir()
        paths[name] = tmp_path / name / "result.json"
        paths[name].write_text(json.dumps(one.to_json()))
    data = ReportData(title="x", physical=paths)
    with pytest.raises(ContractError, match="'plain' is zero-shot, 'varied' is augmented"):
        build_report(data, tmp_path / "report.html")
    build_report(replace(data, across_training=True), tmp_path / "report.html")
    assert "<small>augmented</small>" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "plain"), str(tmp_path / "varied")])
    assert "--across-training" in capsys.readouterr().err
    main(["compare", str(tmp_path / "plain"), str(tmp_path / "varied"), "--across-training"])


def test_plain_protocols_compare_whatever_the_training(result: PhysicalResult) -> None:
    episodes = tuple(one for one in result.episodes if one.condition == PLAIN)
    plain = replace(result, protocol=few(conditions=()), episodes=episodes, training="plain")
    assert compare(plain, replace(plain, training="randomized")).n == 4


def test_a_contract_tells_its_training() -> None:
    assert "training" not in CONTRACT.to_json() and CONTRACT.training == "unknown"
    told = replace(CONTRACT, training="randomized")
    assert PolicyContract.from_json(told.to_json()) == told
    with pytest.raises(BlmError, match="unknown training 'yes'"):
        replace(CONTRACT, training="yes")
    assert joint_training(["plain", "randomized", "unknown"]) == "randomized"
    assert joint_training(["plain", "unknown"]) == "unknown" and joint_training(["plain"]) == "plain"


@pytest.mark.parametrize(
    "provenance, training",
    [
        ({}, "unknown"),
        ({"training": "randomized", "collect": {}}, "randomized"),
        ({"collect": {"distractors": 0, "appearance": {"light": 0.0}}}, "plain"),
        ({"collect": {"distractors": 0, "appearance": {"light": 0.3}}}, "randomized"),
        ({"collect": {"distractors": 2}}, "randomized"),
    ],
)
def test_a_dataset_tells_whether_its_scenes_were_randomized(provenance: dict, training: str) -> None:
    """Those collected before this was recorded tell it by their configuration."""
    dataset = SimpleNamespace(provenance=provenance)
    assert EpisodeDataset.training.fget(dataset) == training


def test_keys_name_episodes() -> None:
    key = EpisodeKey("panda", "push_cube", 7, Condition(axis="light", level=LEVELS[1]))
    assert (key.id, key.twin) == ("panda/push_cube/7/light-2", "panda/push_cube/7")
