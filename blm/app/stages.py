"""The stages of the loop, and the folders of a run that they read and write.

run/  recipe.json stages.json  episodes/<robot>  episodes_held_out/<robot>  corpora/{train,held_out,..}
      stage1/{eye,drill,backbone}  intents/<robot>  stage2/checkpoint  results/  report.html
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from rich.console import Console
from rich.markup import escape

from blm.app.mixed_training import MIXTURE, RETENTION, train_on_mixture
from blm.app.mixture import SCENES, read_mixture
from blm.app.model import BLM
from blm.app.pipeline import Stage, read_ledger, to_json
from blm.app.preflight import check_stage1, check_stage2
from blm.app.recipe import (
    CorpusName,
    Recipe,
    collect_config,
    corpus_config,
    load_options,
    physical_protocol,
    policy_training_config,
)
from blm.app.retention import retention_table
from blm.app.stage1 import TrainingCorpus, load_pretrained, prepare_stage1, warn_of_lengths
from blm.app.validation import closed_loop_validation
from blm.app.viewing import collection_sheet
from blm.corpora import CurationReport, build_scene_corpus, curate, read_corpus, read_questions
from blm.corpora.scenes.build import remove_shards
from blm.datasets.lerobot import open_dataset
from blm.evaluation import (
    EVALUATION_SEEDS,
    ZeroPolicy,
    evaluate_digital,
    evaluate_physical,
)
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.digital.subset import evenly_spaced
from blm.evaluation.report import ReportData, build_report
from blm.io import read_json, replacing, write_json
from blm.planner import collect
from blm.policy.checkpoint import checkpoint_folder, read_contract
from blm.policy.policy import CheckpointPolicy
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.training.loop.distributed import Processes
from blm.training.policy.train import train_stage2
from blm.training.run_inputs import run_together
from blm.training.sft.train import train_stage1
from blm.types import BlmError, Image, Message


def run_collect(recipe: Recipe, run: Path) -> None:
    """Record demonstrations for training, and a few on held-out scenes for held-out questions."""
    collect(collect_config(recipe, held_out=False), run / "episodes")
    collect(collect_config(recipe, held_out=True), run / "episodes_held_out")


def run_corpus(recipe: Recipe, run: Path) -> None:
    """Generate training and held-out questions about random scenes and recorded frames."""
    names: tuple[CorpusName, ...] = ("held_out", "held_out_wording", "train")
    for name in names:
        folder = run / "corpora" / name
        if folder.exists():
            remove_shards(folder)
        else:
            build_scene_corpus(corpus_config(recipe, run, name), folder, workers=recipe.workers)


def run_stage1(recipe: Recipe, run: Path) -> None:
    """Fine-tune the backbone on scene questions, or on the recipe's mixture, in all processes."""
    out = run / "stage1"
    settings = recipe.stage1
    processes = Processes.join(recipe.device)
    recipe = replace(recipe, device=str(processes.device))
    pretrained = load_pretrained(settings.backbone, settings.training, **load_options(recipe))
    scenes, report = run_together(processes, lambda: read_scenes(run))
    if settings.mixed:
        assert pretrained is not None  # `check_stage1` refuses a nano
        used = scenes if settings.mixture.scenes else None
        counts = train_on_mixture(pretrained, read_mixture(pretrained, settings, used, run), settings, out)
    else:
        if pretrained is not None and processes.first:
            warn_of_lengths(pretrained, scenes, settings.training)
        backbone, sources = prepare_stage1(
            pretrained, [scenes], settings.training, settings.schooling, out, device=recipe.device
        )
        counts = train_stage1(backbone, sources, settings.training, out)
    if processes.first:
        write_json(out / "corpus.json", {**asdict(report), "rows": dict(counts)})


def read_scenes(run: Path) -> tuple[TrainingCorpus, CurationReport]:
    """Return the curated scene questions of a run folder, and the report of their curation."""
    folder = run / "corpora/train"
    held_out = {row.group for row in read_corpus(run / "corpora/held_out")}
    kept, report = curate(read_corpus(folder), folder, evaluation_groups=held_out)
    return TrainingCorpus(name=SCENES, folder=folder, conversations=kept), report


def run_stage2(recipe: Recipe, run: Path) -> None:
    """Cache hidden states H_k, then train bridge and policy on the frozen backbone."""
    for robot in recipe.robots:
        space = ROBOTS[robot].action_space
        data = open_dataset(run / "episodes" / robot)
        data.require(space, recipe.cameras, recipe.image_size, space.rate_hz)
    config = policy_training_config(
        recipe, run, run / "stage1/backbone", run / "intents", (recipe.robots, recipe.tasks)
    )
    drives = recipe.stage2.drive
    drive = closed_loop_validation(run / "stage2", recipe.tasks, drives, recipe.workers) if drives else None
    train_stage2(config, run / "stage2", {"recipe": to_json(recipe)}, validate=drive)


def run_eval_digital(recipe: Recipe, run: Path) -> None:
    """Ask the checkpoint the held-out questions, in the wordings of training and in others."""
    model = BLM.from_pretrained(run / "stage2/checkpoint", **load_options(recipe))
    known = read_questions(run / "corpora/train")
    for corpus, name in (("held_out", "digital"), ("held_out_wording", "digital_wording")):
        folder = run / "corpora" / corpus
        evaluate_digital(
            model.backbone,
            evenly_spaced(read_questions(folder), recipe.evaluation.max_questions),
            run / "results" / name,
            train_questions=known,
            model=model.contract.revision,
            config=DigitalEvalConfig(root=folder),
        )


def run_eval_physical(recipe: Recipe, run: Path) -> None:
    """Evaluate the checkpoint and a hold-still baseline in closed loop on every robot and task."""
    folder = run / "stage2/checkpoint"
    contract = read_contract(folder)
    protocol = physical_protocol(recipe, contract, (recipe.robots, recipe.tasks))
    for name, make in (
        ("physical", partial(CheckpointPolicy.load, folder, actions_only=True, **load_options(recipe))),
        ("zero", partial(ZeroPolicy, contract)),
    ):
        videos = int(name == "physical")
        how: Any = {"workers": recipe.workers, "engine": recipe.engine, "videos_per_cell": videos}
        evaluate_physical(make, protocol, run / "results" / name, **how)


def run_released(recipe: Recipe, run: Path) -> None:
    """Evaluate the released model on the scenes of this run, and ask it about one of them."""
    folder, out = checkpoint_folder("blm-nano"), run / "results/released"
    protocol = physical_protocol(recipe, read_contract(folder), (recipe.robots, recipe.tasks))
    make = partial(CheckpointPolicy.load, folder, actions_only=True, **load_options(recipe))
    evaluate_physical(make, protocol, out, workers=recipe.workers, engine=recipe.engine)
    model = BLM.from_pretrained(folder, **load_options(recipe))
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
"""Questions to the released model about a scene of the Panda and pick_cube."""
DIGITAL = {"BLM": "digital", "BLM, held-out wordings": "digital_wording"}
"""Name in the report -> result folder below results/."""
PHYSICAL = {"BLM": "physical", "blm-nano, released": "released", "hold still": "zero"}
"""Name of a policy in the report -> result folder below results/."""

REPLAY_IGNORES = (
    *("stage1.training", "stage1.schooling", "stage1.epochs"),
    *("stage1.mixture.public", "stage1.mixture.scenes", "stage1.mixture.replay_share"),
)
"""Settings that do not change what the base model writes."""
_SUITE = ("robots", "tasks", "cameras", "image_size")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "released",
            "Released model: closed loop and questions",
            (*_SUITE, "evaluation"),
            (),
            run_released,
            ("results/released",),
        ),
        Stage(
            "collect",
            "Demonstrations by the planning expert",
            (*_SUITE, "demonstrations"),
            (),
            run_collect,
            ("episodes", "episodes_held_out"),
        ),
        Stage(
            "corpus",
            "Scene questions",
            (*_SUITE, "corpus", "prompt"),
            ("collect",),
            run_corpus,
            ("corpora",),
        ),
        Stage(
            "stage1",
            "Stage I: fine-tune the backbone",
            ("stage1",),
            ("corpus",),
            run_stage1,
            ("stage1", "replay"),
            {"replay": REPLAY_IGNORES},
            check_stage1,
            together=True,
        ),
        Stage(
            "stage2",
            "Stage II: train bridge and policy",
            ("stage2", "prompt"),
            ("collect", "stage1"),
            run_stage2,
            ("stage2", "intents"),
            {"intents": ("stage2.loop", "stage2.policy", "stage2.execute", "stage2.drive")},
            check_stage2,
            together=True,
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
    """Write `report.html` from the results in a run folder, and return its path.

    Raises BlmError for a folder that is not a run folder.
    """
    if not (run / "recipe.json").exists():
        raise BlmError(
            f"'{run}' is not a run folder (it has no recipe.json); name a folder that `blm demo --run` wrote"
        )
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
        seconds={STAGES[name].title: record.seconds for name, record in ledger.items()},
        collection=run / "episodes/summary.json",
        sheet=sheet,
        questions={name: len(read_questions(path)) for name, path in corpora.items() if path.exists()},
        logs={
            name: run / folder / "log.jsonl"
            for name, folder in (("Stage I", "stage1"), ("Stage II", "stage2"))
        },
        mixture=run / "stage1" / MIXTURE,
        retention=retention_table(run / "stage1" / RETENTION),
        digital={name: run / "results" / part / "result.json" for name, part in DIGITAL.items()},
        physical={name: run / "results" / part / "result.json" for name, part in PHYSICAL.items()},
        dialogue=run / "results/released/dialogue.json",
    )
    build_report(data, run / "report.html")
    return run / "report.html"
