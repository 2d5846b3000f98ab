"""The whole loop, once, at the smallest size: every artifact is real, and the pieces agree."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import openai
import PIL.Image
import pytest

from blm import BLM, Image, Message, Observation
from blm.app.pipeline import read_ledger, run_stages
from blm.app.policies import load_checkpoint
from blm.app.recipe import DemonstrationSettings
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES, write_report
from blm.app.studies import STUDIES, run_study, with_field
from blm.backbone import Backbone
from blm.corpora import read_corpus, read_questions
from blm.datasets.files import write_manifest
from blm.datasets.lerobot import open_dataset
from blm.datasets.lerobot_writer import FORMAT
from blm.datasets.video import probe
from blm.evaluation import EVALUATION_SEEDS, PhysicalProtocol, evaluate_digital, evaluate_physical
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.result_files import load_result
from blm.io import read_json
from blm.policy.policy import CheckpointPolicy
from blm.serving import RemotePolicy
from blm.types import BlmError
from tests.support.hidden_states import make_dataset
from tests.support.serving import running

ROBOTS, TASKS = ("panda", "widowxai"), ("push_cube",)


def tiny():
    ci = RECIPES["ci"]()
    return replace(
        ci,
        robots=ROBOTS,
        tasks=TASKS,
        workers=0,
        demonstrations=DemonstrationSettings(episodes=2, held_out_episodes=1),
        corpus=replace(ci.corpus, scenes=8, held_out_scenes=4),
        evaluation=replace(ci.evaluation, max_steps=16, max_questions=12),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("run")
    run_stages(STAGES, list(STAGES), tiny(), folder)
    write_report(folder, "blm demo")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return BLM.from_pretrained(run / "stage2/checkpoint")


def served(model):
    """The address of a running server with this model."""
    return running(model, model.generator())


def observation(model, robot="panda", seed=0):
    rng = np.random.default_rng(seed)
    size, space = model.contract.image_size, model.contract.action_spaces[robot]
    images = {name: rng.integers(0, 256, (size, size, 3), np.uint8) for name in model.contract.cameras}
    state = np.clip(rng.normal(size=space.dim), space.low, space.high).astype(np.float32)
    return Observation(images=images, state=state, instruction="Push the cube.", robot=robot, seed=seed)


def test_a_second_run_does_nothing(run):
    before = {name: record.seconds for name, record in read_ledger(run).items()}
    stamp = (run / "stage2/checkpoint/manifest.json").stat().st_mtime_ns
    run_stages(STAGES, list(STAGES), tiny(), run)
    assert {name: record.seconds for name, record in read_ledger(run).items()} == before
    assert (run / "stage2/checkpoint/manifest.json").stat().st_mtime_ns == stamp


def test_no_scene_is_used_twice(run):
    trained = {row.group.split("/", 1)[1] for row in read_corpus(run / "corpora/train")}
    held_out = {row.group.split("/", 1)[1] for row in read_corpus(run / "corpora/held_out")}
    assert trained and held_out and not trained & held_out
    seeds = {seed for robot in ROBOTS for seed in open_dataset(run / "episodes" / robot).seeds}
    evaluated = {
        row["seed"] for row in json.loads((run / "results/physical/result.json").read_text())["rows"]
    }
    assert not seeds & evaluated and evaluated <= set(EVALUATION_SEEDS)


def test_stage_two_does_not_change_the_backbone(run, model):
    stage1 = Backbone.load(run / "stage1/backbone")
    assert stage1.fingerprint() == model.backbone.fingerprint()
    assert np.array_equal(stage1.probe_logits().numpy(), model.backbone.probe_logits().numpy())
    question = [
        Message("user", (Image(observation(model).images["base"]), "How many cubes are on the table?"))
    ]
    assert stage1.answer(question) == model.answer(question)


def test_stage_two_does_not_change_answers(run, model, tmp_path):
    folder = run / "corpora/held_out"
    questions, config = read_questions(folder)[:20], DigitalEvalConfig(root=folder)
    before, after = (
        evaluate_digital(chat, questions, tmp_path / name, model=name, config=config)
        for name, chat in (("before", Backbone.load(run / "stage1/backbone")), ("after", model))
    )
    told = [(p.id, p.raw, p.score) for p in before.predictions]
    assert told == [(p.id, p.raw, p.score) for p in after.predictions] and len(told) == 20


def test_every_robot_acts_within_its_limits(model):
    for robot in ROBOTS:
        space = model.contract.action_spaces[robot]
        actions = model.act(observation(model, robot)).actions
        assert actions.shape == (model.contract.horizon, space.dim)
        assert (actions >= np.array(space.low) - 1e-6).all() and (
            actions <= np.array(space.high) + 1e-6
        ).all()


def test_the_report_is_self_contained_and_true(run):
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']http", page) and "not run" not in page
    assert page.count("data:video/mp4;base64,") == 2 * len(ROBOTS) * len(TASKS)
    assert "Rollouts: BLM<" in page and "Rollouts: blm-nano, released<" in page
    for question, answer in read_json(run / "results/released/dialogue.json")["lines"]:
        assert f"{question}</td>" in page and answer
    result = json.loads((run / "results/physical/result.json").read_text())
    assert f"of {len(result['rows'])} episodes" in page


def test_evaluation_through_the_socket_gives_the_same_episodes(run, model, tmp_path):
    protocol = PhysicalProtocol.for_policy(
        model.contract, robots=ROBOTS, tasks=TASKS, episodes=1, first_seed=7, max_steps=17
    )
    load = partial(CheckpointPolicy.load, run / "stage2/checkpoint")
    here = evaluate_physical(load, protocol, tmp_path / "here", workers=0, videos_per_cell=0)
    with served(model) as address:
        remote = partial(RemotePolicy, f"ws://{address}/")
        there = evaluate_physical(remote, protocol, tmp_path / "there", workers=0, videos_per_cell=0)
    timeless = [[episode.without_times() for episode in result.episodes] for result in (here, there)]
    assert timeless[0] == timeless[1] and here.model == there.model


def test_one_server_chats_and_acts(model):
    seen = observation(model)
    with served(model) as address:
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="unused")
        reply = client.chat.completions.create(
            model="BLM", messages=[{"role": "user", "content": "Is the task done?"}], max_tokens=8
        )
        client.close()
        policy = RemotePolicy(f"ws://{address}/")
        chunk = policy.act(seen)
        with pytest.raises(BlmError, match=r"shape \(3,\).*panda_joint1|shape \(3,\)"):
            policy.act(replace(seen, state=np.zeros(3, np.float32)))
        assert httpx.get(f"http://{address}/health").status_code == 200
        again = RemotePolicy(f"ws://{address}/")
        assert np.array_equal(again.act(seen).actions, chunk.actions)
        again.close()
    expected = model.answer([Message("user", ("Is the task done?",))], max_tokens=8)
    assert reply.choices[0].message.content == expected
    assert np.array_equal(chunk.actions, model.act(seen).actions)


@pytest.mark.parametrize("name", ["policy.safetensors", "stats.json", "backbone/model.safetensors"])
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_checkpoints_are_refused(run, tmp_path, name, damage):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run / "stage2/checkpoint", folder)
    file = folder / name
    if damage == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(BlmError, match=f"{re.escape(name)} is {damage}; .* again"):
        BLM.from_pretrained(folder)


def test_the_recipe_of_other_robots_is_refused(run):
    with pytest.raises(
        BlmError,
        match=r"'collect' is finished with image_size 112, asked for: 64",
    ):
        run_stages(STAGES, ["collect"], replace(tiny(), image_size=64), run)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda own: own["action_space"]["high"].__setitem__(0, 9.9), "high: .*9.9"),
        (lambda own: own["action_space"]["names"].__setitem__(0, "elbow"), "names: .*'elbow'"),
        (lambda own: own.update(image_size=64), r"images of \(112, 112\), its dataset has \(64, 64\)"),
        (lambda own: own.update(cameras=["base"]), "lacks wrist"),
    ],
)
def test_a_dataset_that_differs_from_the_recipe_is_refused(run, tmp_path, change, complaint):
    shutil.copytree(run / "episodes", tmp_path / "episodes")
    file = tmp_path / "episodes/panda/meta/info.json"
    info = json.loads(file.read_text())
    change(info["blm"])
    file.write_text(json.dumps(info))
    write_manifest(file.parents[1], FORMAT, {})
    with pytest.raises(BlmError, match=complaint):
        STAGES["stage2"].run(tiny(), tmp_path)


def test_a_study_gives_every_model_the_same_steps_and_scenes(run):
    recipe = replace(tiny(), cameras=("base", "wrist"))
    report = run_study("models", recipe, run)
    made = read_json(report.with_name("report.json"))["variants"]
    assert [(row["variant"], row["models"]) for row in made] == [
        ("joint", 1),
        ("per robot", 2),
        ("per task", 1),
        ("per robot and task", 2),
    ]
    assert {row["steps"] for row in made} == {10}, "of each model"
    assert [row["samples"] for row in made] == [80, 160, 80, 160]
    assert all(row["success_at_end"]["n"] == row["success_at_limit"]["n"] for row in made)
    assert all(sum(row["solved"].values()) == row["success"]["hits"] for row in made)
    assert list(made[0]["solved"]) == ["panda/push_cube", "widowxai/push_cube"]
    folders = [run / "studies/variants" / row["result"] for row in made]
    results = [load_result(folder) for folder in folders]
    assert len({result.protocol_hash for result in results}) == 1
    assert len({tuple(episode.id for episode in result.episodes) for result in results}) == 1
    alone = CheckpointPolicy.load(folders[1] / "widowxai-push_cube/checkpoint")
    assert list(alone.contract.action_spaces) == ["widowxai"]
    assert report.read_text().count("|\n") == 6 and "per robot and task | 2 | 160" in report.read_text()
    before = report.read_text()
    assert run_study("models", recipe, run).read_text() == before, "a finished study is only told again"
    some = run_study("models", recipe, run, ["per robot"]).with_name("report.json")
    assert [row["variant"] for row in read_json(some)["variants"]] == ["joint", "per robot"]
    with pytest.raises(BlmError, match=r"'per arm'.*per robot and task"):
        run_study("models", recipe, run, ["per arm"])


def test_the_baseline_of_a_study_runs_on_the_same_scenes(run, monkeypatch):
    two = (STUDIES["baseline"][0], STUDIES["baseline"][1])
    monkeypatch.setitem(STUDIES, "baseline", two)
    report = run_study("baseline", tiny(), run)
    assert "| BLM | 1 | 80 " in report.read_text() and "| Diffusion Policy | 1 | 80 " in report.read_text()
    baseline = read_json(report.with_name("report.json"))["variants"][1]["result"]
    policy = load_checkpoint(run / "studies/variants" / baseline / "joint/checkpoint")
    assert type(policy).__name__ == "DiffusionPolicy" and list(policy.contract.action_spaces) == [*ROBOTS]


def test_a_variant_shared_by_studies_is_trained_once(run, monkeypatch):
    for name in ("future", "latents"):
        monkeypatch.setitem(STUDIES, name, STUDIES[name][:1])
    first, second = (
        read_json(run_study(name, tiny(), run).with_name("report.json"))["variants"][0]
        for name in ("future", "latents")
    )
    assert first.pop("variant") == "lambda 0.2" and second.pop("variant") == "8 latents"
    assert first == second and first["training_seconds"] > 0


def test_the_untrained_backbone_of_a_study_has_other_weights_and_the_same_tokenizer(run):
    report = run_study("backbone", tiny(), run)
    made = Backbone.load(run / "studies/untrained/backbone")
    trained = Backbone.load(run / "stage1/backbone")
    assert made.fingerprint() != trained.fingerprint()
    assert made.processor.tokenizer.get_vocab() == trained.processor.tokenizer.get_vocab()
    assert "untrained" in report.read_text()


def test_a_study_needs_a_run_and_fields_that_a_recipe_has(run, tmp_path):
    with pytest.raises(BlmError, match=r"has no episodes; a study needs"):
        run_study("models", tiny(), tmp_path)
    with pytest.raises(BlmError, match=r"a recipe has no field 'layers'"):
        with_field(tiny(), "stage2.layers", 2)
    assert with_field(tiny(), "stage2.policy.bridge.latents", 3).stage2.policy.bridge.latents == 3


def example(name):
    """One of examples/, as a module."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_ask_and_act(run, tmp_path, capsys):
    checkpoint = str(run / "stage2/checkpoint")
    example("ask").main(model=checkpoint, task="push_cube", out=tmp_path / "seen.png")
    assert "panda, " in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "seen.png") as sheet:
        assert sheet.size == (2 * 112, 112)
    example("act").main(model=checkpoint, robot="widowxai", max_steps=10, out=tmp_path / "act.mp4")
    assert re.search(r"(not )?solved after \d+ steps", capsys.readouterr().out)
    assert probe(tmp_path / "act.mp4").frames >= 8


@pytest.mark.slow
def test_examples_train_on_a_dataset_and_add_its_robot(run, tmp_path, capsys):
    make_dataset(tmp_path, "crane", 3, (30, 26, 28, 24))
    small = {"steps": 6, "batch_size": 4}
    backbone = str(run / "stage1/backbone")
    cameras = ("base", "wrist")
    example("train").main(tmp_path / "crane", backbone, cameras, out=tmp_path / "own", execute=4, **small)
    shown = capsys.readouterr().out
    assert "crane: 4 episodes, 108 frames" in shown and "gripper: " in shown
    assert list(CheckpointPolicy.load(tmp_path / "own/checkpoint").contract.action_spaces) == ["crane"]
    start = tmp_path / "own/checkpoint"
    make_dataset(tmp_path, "boom", 2, (30, 26, 28, 24))
    example("add_robot").main(start, tmp_path / "boom", out=tmp_path / "more", **small)
    shown = capsys.readouterr().out
    assert "robots: crane, boom" in shown and "all others unchanged: True" in shown


def test_the_example_evaluates_a_server(model, tmp_path, capsys):
    with served(model) as address:
        example("evaluate_server").main(
            f"ws://{address}", tasks=("push_cube",), episodes=1, max_steps=10, out=tmp_path
        )
    assert "panda  push_cube  1" in re.sub(" +", "  ", capsys.readouterr().out)
    assert load_result(tmp_path).summary.overall.n == 1
