"""The stages of the loop: what each reads, what it writes, and under which name in the run folder.

run/  recipe.json stages.json  episodes/<robot>  episodes_held_out/<robot>  corpora/{train,held_out,..}
      stage1/{eye,drill,backbone}  intents/<robot>  stage2/checkpoint  results/  report.html
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from rich.console import Console
from rich.markup import escape

from blm.app.model import BLM
from blm.app.pipeline import Stage, read_ledger, to_json
from blm.app.recipes import Recipe
from blm.app.validation import validation_episodes
from blm.app.viewing import collection_sheet
from blm.backbone import Backbone
from blm.corpora import SceneCorpusConfig, build_scene_corpus, curate, read_corpus, read_questions
from blm.corpora.scenes.build import remove_parts
from blm.datasets.lerobot import open_dataset
from blm.evaluation import (
    EVALUATION_SEEDS,
    STAGE1_HELD_OUT_SEEDS,
    TRAINING_SEEDS,
    PhysicalProtocol,
    ZeroPolicy,
    evaluate_digital,
    evaluate_physical,
)
from blm.evaluation.digital.runner import Asking
from blm.evaluation.digital.subset import evenly_spaced
from blm.evaluation.report import ReportData, build_report
from blm.io import read_json, replacing, write_json
from blm.planner import CollectConfig, collect
from blm.policy.checkpoint import checkpoint_folder, read_contract
from blm.policy.policy import CheckpointPolicy
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import PolicyTrainingConfig, train_stage2
from blm.training.pretraining.nano import is_nano, nano_sources, pretrain_nano
from blm.training.sft.train import TrainingSource, train_stage1
from blm.types import BlmError, Image, Message, PolicyContract

EPISODE_SEEDS = 500_000
"""Demonstrations start this far into a seed range, scene questions at its beginning: no scene is shared."""


def run_collect(recipe: Recipe, run: Path) -> None:
    """Record demonstrations for training, and a few on held-out scenes for questions about episodes."""
    made = recipe.demonstrations
    parts = {
        "episodes": (made.episodes, TRAINING_SEEDS),
        "episodes_held_out": (made.held_out_episodes, STAGE1_HELD_OUT_SEEDS),
    }
    for name, (episodes, seeds) in parts.items():
        config = CollectConfig(
            robots=recipe.robots,
            tasks=recipe.tasks,
            episodes=episodes,
            first_seed=seeds.start + EPISODE_SEEDS,
            cameras=recipe.cameras,
            image_size=recipe.image_size,
            noise=made.noise,
            disturbed=made.disturbed,
            random_starts=made.random_starts,
            hold=made.hold,
            distractors=made.distractors,
            appearance=made.appearance,
            workers=recipe.workers,
            engine=recipe.engine,
        )
        collect(config, run / name)


def run_corpus(recipe: Recipe, run: Path) -> None:
    """Ask questions about random scenes and recorded frames, for training and held out."""
    held_out = (recipe.corpus.held_out_scenes, STAGE1_HELD_OUT_SEEDS, "episodes_held_out")
    parts = {
        "held_out": held_out,
        "held_out_wording": held_out,
        "train": (recipe.corpus.scenes, TRAINING_SEEDS, "episodes"),
    }
    for name, (scenes, seeds, episodes) in parts.items():
        config = SceneCorpusConfig(
            robots=recipe.robots,
            tasks=recipe.tasks,
            cameras=recipe.cameras,
            image_size=recipe.image_size,
            scenes=scenes,
            first_seed=seeds.start,
            turns=recipe.corpus.turns,
            max_distractors=recipe.corpus.max_distractors,
            teach=name == "train",
            wording="held_out" if name == "held_out_wording" else "seen",
            episodes=run / episodes,
            frames_per_episode=recipe.corpus.frames_per_episode,
        )
        folder = run / "corpora" / name
        if folder.exists():
            remove_parts(folder)
        else:
            build_scene_corpus(config, folder, workers=recipe.workers)


def run_stage1(recipe: Recipe, run: Path) -> None:
    """Fine-tune the backbone on the curated corpus."""
    folder, stage1 = run / "corpora/train", recipe.stage1
    held_out = {row.group for row in read_corpus(run / "corpora/held_out")}
    kept, report = curate(read_corpus(folder), folder, evaluation_groups=held_out)
    seed = stage1.training.loop.seed
    if stage1.backbone == "nano":
        backbone = pretrain_nano([(kept, folder)], stage1.schooling, run / "stage1", seed=seed)
    else:
        backbone = Backbone.load(stage1.backbone)
    if is_nano(backbone):
        sources = nano_sources([(kept, folder, 1.0)], stage1.training.loop)
    else:
        conversations = [row.messages for row in kept]
        sources = [TrainingSource(name="scenes", conversations=conversations, root=folder)]
    counts = train_stage1(backbone, sources, stage1.training, run / "stage1")
    write_json(run / "stage1/corpus.json", {**asdict(report), "rows": dict(counts)})


def run_stage2(recipe: Recipe, run: Path) -> None:
    """Cache H_k of every frame, then train bridge and policy; the backbone is proved unchanged."""
    for robot in recipe.robots:
        space = ROBOTS[robot].action_space
        data = open_dataset(run / "episodes" / robot)
        data.require(space, recipe.cameras, recipe.image_size, space.rate_hz)
    config = stage2_of(recipe, run, run / "stage1/backbone", run / "intents", (recipe.robots, recipe.tasks))
    drives = recipe.stage2.drive
    drive = validation_episodes(run / "stage2", recipe.tasks, drives, recipe.workers) if drives else None
    train_stage2(config, run / "stage2", {"recipe": to_json(recipe)}, validate=drive)


Part = tuple[tuple[str, ...], tuple[str, ...]]
"""Robots and tasks of one model."""


def stage2_of(recipe: Recipe, run: Path, backbone: Path, cache: Path, part: Part) -> PolicyTrainingConfig:
    """Stage II of one model, for these robots and tasks."""
    stage2, (robots, tasks) = recipe.stage2, part
    folders = tuple(run / "episodes" / robot for robot in robots)
    known = {task for folder in folders for task in open_dataset(folder).tasks}
    return PolicyTrainingConfig(
        datasets=folders,
        backbone=str(backbone),
        intents=HiddenStateConfig(
            layer=stage2.layer, cameras=recipe.cameras, stride=stage2.stride, workers=recipe.workers
        ),
        loop=stage2.loop,
        policy=stage2.policy,
        weights=dict.fromkeys(sorted(known - {*tasks}), 0.0),
        cache=cache,
        execute=stage2.execute,
    )


def protocol_of(recipe: Recipe, contract: PolicyContract, part: Part) -> PhysicalProtocol:
    """The recipe's physical evaluation of one model."""
    return PhysicalProtocol.for_policy(
        contract,
        robots=part[0],
        tasks=part[1],
        episodes=recipe.evaluation.episodes,
        max_steps=recipe.evaluation.max_steps,
        phrasing="both",
    )


def run_eval_digital(recipe: Recipe, run: Path) -> None:
    """Ask the checkpoint the held-out questions, in the wordings of training and in others."""
    model = BLM.from_pretrained(run / "stage2/checkpoint")
    known = read_questions(run / "corpora/train")
    for corpus, name in (("held_out", "digital"), ("held_out_wording", "digital_wording")):
        folder = run / "corpora" / corpus
        evaluate_digital(
            model.backbone,
            evenly_spaced(read_questions(folder), recipe.evaluation.max_questions),
            run / "results" / name,
            train_questions=known,
            model=model.contract.revision,
            asking=Asking(root=folder),
        )


def run_eval_physical(recipe: Recipe, run: Path) -> None:
    """Let the checkpoint drive every robot through every task; holding still is the baseline."""
    folder = run / "stage2/checkpoint"
    contract = CheckpointPolicy.load(folder).contract
    protocol = protocol_of(recipe, contract, (recipe.robots, recipe.tasks))
    for name, make in (
        ("physical", partial(CheckpointPolicy.load, folder)),
        ("zero", partial(ZeroPolicy, contract)),
    ):
        videos = int(name == "physical")
        how: Any = {"workers": recipe.workers, "engine": recipe.engine, "videos_per_cell": videos}
        evaluate_physical(make, protocol, run / "results" / name, **how)


def run_released(recipe: Recipe, run: Path) -> None:
    """Let the released model drive on the scenes of this run's evaluation, and answer about one of them."""
    folder, out = checkpoint_folder("blm-nano"), run / "results/released"
    protocol = protocol_of(recipe, read_contract(folder), (recipe.robots, recipe.tasks))
    make = partial(CheckpointPolicy.load, folder)
    evaluate_physical(make, protocol, out, workers=recipe.workers, engine=recipe.engine)
    model = BLM.from_pretrained(folder)
    env = Env("panda", "pick_cube", cameras=model.contract.cameras, image_size=model.contract.image_size)
    env.reset(seed=EVALUATION_SEEDS.start)
    views = list(env.observation().images.values())
    lines = [(text, model.answer([Message("user", (*map(Image, views), text))])) for text in QUESTIONS]
    for text, answer in lines:
        Console(stderr=True).print(f"  {text}  [bold]{escape(answer)}[/bold]", soft_wrap=True)
    with replacing(out / "dialogue.png", ".png") as temporary:
        PIL.Image.fromarray(np.concatenate(views, axis=1)).save(temporary)
    write_json(out / "dialogue.json", {"picture": "dialogue.png", "lines": lines})
    env.close()


QUESTIONS = (
    "Point to the red cube in the base view.",
    "What is the position of the red cube in cm?",
    "Where is the red cube: left or right of the gripper?",
    "What can the robot do now?",
    "What remains to be done after this step?",
)
"""Asked of the released model about a scene of Panda and pick_cube."""
DIGITAL = {"BLM": "digital", "BLM, held-out wordings": "digital_wording"}
"""Name in the report -> folder below results/."""
PHYSICAL = {"BLM": "physical", "blm-nano, released": "released", "hold still": "zero"}
"""Policy in the report -> its folder below results/."""

_SUITE = ("robots", "tasks", "cameras", "image_size")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "released",
            "The released model drives and answers",
            (*_SUITE, "evaluation"),
            (),
            run_released,
            ("results/released",),
        ),
        Stage(
            "collect",
            "Demonstrations from the planner",
            (*_SUITE, "demonstrations"),
            (),
            run_collect,
            ("episodes", "episodes_held_out"),
        ),
        Stage(
            "corpus", "Questions about scenes", (*_SUITE, "corpus"), ("collect",), run_corpus, ("corpora",)
        ),
        Stage("stage1", "Stage I: teach the backbone", ("stage1",), ("corpus",), run_stage1, ("stage1",)),
        Stage(
            "stage2",
            "Stage II: bridge and policy",
            ("stage2",),
            ("collect", "stage1"),
            run_stage2,
            ("stage2", "intents"),
        ),
        Stage(
            "digital",
            "Evaluation, digital space",
            ("evaluation",),
            ("corpus", "stage2"),
            run_eval_digital,
            ("results/digital", "results/digital_wording"),
        ),
        Stage(
            "physical",
            "Evaluation, physical space",
            (*_SUITE, "evaluation"),
            ("stage2",),
            run_eval_physical,
            ("results/physical", "results/zero"),
        ),
    )
}


def write_report(run: Path, command: str) -> Path:
    """Write `report.html` from what the run folder holds, and return its path."""
    if not (run / "recipe.json").exists():
        raise BlmError(f"'{run}' is not a run folder (no recipe.json); name one that a stage command wrote")
    corpora = {name: run / "corpora" / name for name in ("train", "held_out")}
    ledger = read_ledger(run)
    recipe = read_json(run / "recipe.json")
    sheet = run / "episodes.png"
    if (run / "episodes/summary.json").exists():
        collection_sheet(run / "episodes", sheet)
    data = ReportData(
        title=f"Boundless: run '{recipe['name']}'",
        commands=[command],
        recipe=recipe,
        seconds={STAGES[name].title: entry["seconds"] for name, entry in ledger.items()},
        collection=run / "episodes/summary.json",
        sheet=sheet,
        questions={name: len(read_questions(path)) for name, path in corpora.items() if path.exists()},
        logs={
            name: run / folder / "log.jsonl"
            for name, folder in (("Stage I", "stage1"), ("Stage II", "stage2"))
        },
        digital={name: run / "results" / part / "result.json" for name, part in DIGITAL.items()},
        physical={name: run / "results" / part / "result.json" for name, part in PHYSICAL.items()},
        dialogue=run / "results/released/dialogue.json",
    )
    build_report(data, run / "report.html")
    return run / "report.html"
