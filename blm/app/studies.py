"""Ablations: variants of Stage II with the same training budget, compared on the same scenes.

    runs/NAME/studies/  STUDY/{report.json, report.md}  variants/KEY/{PART/.., result.json}

A variant changes a few fields of the recipe, or splits one joint model into several. Every model of
every variant is trained for the same number of steps, so a variant of 24 models sees 24 times the
samples: dividing one budget among them would compare a trained model with untrained ones.
Evaluation seeds are the same, so the variants are compared episode by episode. Variants with the
same backbone, layer and cameras share the cache of hidden states, and a variant that several
studies have in common is trained once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from blm.app.model import BLM
from blm.app.pipeline import NOT_IN_KEYS, json_of, to_json
from blm.app.policies import load_checkpoint
from blm.app.recipe import (
    Recipe,
    RobotsAndTasks,
    load_options,
    physical_protocol,
    policy_training_config,
)
from blm.app.study_result import StudyResult, VariantResult
from blm.backbone import Backbone
from blm.backbone.nano import model as nano
from blm.baselines.diffusion_policy import BaselineConfig, train_baseline
from blm.corpora import read_questions
from blm.evaluation import PhysicalProtocol, compare, evaluate_digital, evaluate_physical
from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.digital.subset import evenly_spaced
from blm.evaluation.physical.result import EpisodeResult, PhysicalResult
from blm.evaluation.physical.summary import summarise
from blm.evaluation.result_files import load_result, write_result
from blm.evaluation.results import this_machine
from blm.evaluation.statistics import Rate, holm
from blm.io import read_json_lines, write_json, write_text
from blm.policy.checkpoint import read_contract
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.train import train_stage2
from blm.types import BlmError, lookup


@dataclass(frozen=True)
class Variant:
    """One way to train Stage II."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted names of recipe fields -> values."""
    models: Literal["joint", "robot", "task", "cell"] = "joint"
    """One joint model, or one per robot (dagger in the paper), task, or robot and task (star)."""
    backbone: Literal["stage1", "untrained"] = "stage1"
    """The backbone after Stage I, or before it (for nano: random weights)."""
    policy: Literal["blm", "diffusion policy"] = "blm"

    def parts(self, recipe: Recipe) -> list[RobotsAndTasks]:
        if self.models == "joint":
            return [(recipe.robots, recipe.tasks)]
        if self.models == "robot":
            return [((robot,), recipe.tasks) for robot in recipe.robots]
        if self.models == "task":
            return [(recipe.robots, (task,)) for task in recipe.tasks]
        return [((robot,), (task,)) for robot in recipe.robots for task in recipe.tasks]


def _values(title: str, path: str, values: Sequence[Any]) -> tuple[Variant, ...]:
    return tuple(Variant(title.format(value), {path: value}) for value in values)


STUDIES: dict[str, tuple[Variant, ...]] = {
    "models": (
        Variant("joint"),
        Variant("per robot", models="robot"),
        Variant("per task", models="task"),
        Variant("per robot and task", models="cell"),
    ),
    "baseline": (
        Variant("BLM"),
        Variant("Diffusion Policy", policy="diffusion policy"),
        Variant("Diffusion Policy, per robot", policy="diffusion policy", models="robot"),
        Variant("Diffusion Policy, per robot and task", policy="diffusion policy", models="cell"),
    ),
    "head": (
        Variant("diffusion transformer, flow matching"),
        Variant("U-Net, diffusion", {"stage2.policy.head": "unet", "stage2.policy.sampler_steps": 16}),
    ),
    "future": _values("lambda {}", "stage2.policy.future_weight", (0.2, 0.0)),
    "backbone": (Variant("after Stage I"), Variant("untrained", backbone="untrained")),
    "layer": _values("layer {}", "stage2.layer", (3, 1, 2, 4)),
    "latents": _values("{} latents", "stage2.policy.bridge.latents", (8, 2, 4, 16)),
    "cameras": (
        Variant("base, side, wrist", {"cameras": ("base", "side", "wrist")}),
        Variant("base, wrist", {"cameras": ("base", "wrist")}),
        Variant("base", {"cameras": ("base",)}),
    ),
    "actions": (
        Variant("relative", {"stage2.policy.relative": True}),
        Variant("absolute", {"stage2.policy.relative": False}),
    ),
    "tuning": (
        Variant("frozen"),
        Variant("LoRA", {"stage2.tune.kind": "lora"}),
        Variant(
            "LoRA, co-trained",
            {"stage2.tune.kind": "lora", "stage2.cotrain.weight": 1.0, "stage2.cotrain.every": 4},
        ),
    ),
}
"""Name of a study -> its variants; all are compared with the first."""


ASKED = ("tuning",)
"""Studies whose variants also answer the held-out scene questions of the run."""


def with_field(value: Any, path: str, new: Any) -> Any:
    """Return a copy of nested dataclasses in which the field with the dotted name `path` is `new`."""
    first, _, rest = path.partition(".")
    if not hasattr(value, first):
        raise BlmError(f"a recipe has no field '{path}'")
    return replace(value, **{first: with_field(getattr(value, first), rest, new) if rest else new})


def run_study(name: str, recipe: Recipe, run: Path, only: Sequence[str] = ()) -> Path:
    """Train and evaluate the variants of a study; return the path of report.md.

    It uses the demonstrations and the backbone of `run`. The same call again continues an
    interrupted study. `only` names the variants to compare with the first, in place of all: parts
    of a study can run in parallel, and a later call reports all of them. Raises BlmError without
    demonstrations or Stage I in `run`, and for an unknown variant.
    """
    first, *others = STUDIES[name]
    for wanted in only:
        lookup(f"variant of {name}", wanted, {variant.name: variant for variant in others})
    variants = [first, *(variant for variant in others if not only or variant.name in only)]
    asked = name in ASKED
    questions = ("corpora/train", "corpora/held_out") if asked else ()
    for needed in ("episodes", "stage1/backbone", *questions):
        if not (run / needed).exists():
            more = ", scene questions" if asked else ""
            raise BlmError(
                f"'{run}' has no {needed}; a study needs a run with demonstrations{more} and a finished "
                "Stage I"
            )
    folder = run / "studies" / name
    rows = []
    for variant in variants:
        Console(stderr=True).print(f"[bold]study {name}: {variant.name}[/bold]")
        row = run_variant(variant, recipe, run)
        rows.append(replace(row, answers=ask_variant(row, recipe, run)) if asked else row)
    reference, *results = (load_result(run / "studies/variants" / row.result) for row in rows)
    folder.mkdir(exist_ok=True)
    gaps = [compare(result, reference, but=("cameras",)) for result in results]
    corrected = holm([gap.p_value for gap in gaps])
    compared = [
        replace(row, gap=gap, p_corrected=p) for row, gap, p in zip(rows[1:], gaps, corrected, strict=True)
    ]
    study = StudyResult(name, to_json(recipe), [rows[0], *compared])
    write_json(folder / "report.json", study.to_json())
    report = folder / "report.md"
    write_text(report, study.to_markdown())
    return report


def _train(variant: Variant, config: PolicyTrainingConfig, out: Path, provenance: Mapping[str, Any]) -> Path:
    """Train one model of a variant without validation; return its checkpoint."""
    config = replace(config, loop=replace(config.loop, eval_every=0))
    if variant.policy == "blm":
        return train_stage2(config, out, provenance)
    return train_baseline(baseline_config(config), out, provenance)


def run_variant(variant: Variant, recipe: Recipe, run: Path) -> VariantResult:
    """Train and evaluate the models of a variant."""
    for path, new in variant.changes.items():
        recipe = with_field(recipe, path, new)
    out = run / "studies/variants" / variant_key(variant, recipe)
    backbone = run / "stage1/backbone"
    if variant.backbone == "untrained":
        backbone = untrained_backbone(recipe, backbone, run / "studies/untrained")
    stage2 = recipe.stage2
    parts = variant.parts(recipe)
    begin = time.monotonic()
    cache = f"{backbone.parent.name}-{stage2.layer}-{stage2.stride}-{'-'.join(recipe.cameras)}"
    intents = run / "studies/intents" / cache
    episodes: list[EpisodeResult] = []
    trained = 0.0
    for robots, tasks in parts:
        work = out / "-".join((*robots, *tasks)) if len(parts) > 1 else out / "joint"
        config = policy_training_config(recipe, run, backbone, intents, (robots, tasks))
        checkpoint = _train(variant, config, work, {"variant": out.name, "recipe": to_json(recipe)})
        trained += last_log_row(work / "log.jsonl")["seconds"]
        contract = read_contract(checkpoint)
        protocol = physical_protocol(recipe, contract, (robots, tasks))
        episodes += evaluate_variant(checkpoint, protocol, recipe, work / "physical").episodes
    protocol = physical_protocol(recipe, contract, (recipe.robots, recipe.tasks))
    order = {key.id: i for i, key in enumerate(protocol.keys)}
    episodes.sort(key=lambda episode: order[episode.id])
    result = PhysicalResult(
        protocol=protocol,
        machine=this_machine(),
        seconds=time.monotonic() - begin,
        model=f"variant {out.name}",
        training=contract.training,
        summary=summarise(episodes),
        episodes=tuple(episodes),
    )
    summary = write_result(out, result).summary
    return VariantResult(
        variant=variant.name,
        models=len(parts),
        steps=stage2.loop.steps,
        samples=stage2.loop.batch_size * stage2.loop.steps * len(parts),
        training_seconds=trained,
        success=summary.overall.success_once,
        success_at_end=summary.overall.success_at_end,
        success_at_limit=summary.overall.success_at_limit,
        solved={cell.name: int(cell.summary.success_once.hits) for cell in summary.cells},
        result=out.name,
    )


def ask_variant(row: VariantResult, recipe: Recipe, run: Path) -> Rate:
    """Ask the joint model of a variant the held-out scene questions; return the rate of correct
    answers."""
    folder, corpus = run / "studies/variants" / row.result, run / "corpora/held_out"
    if (folder / "digital/result.json").exists():
        result = load_result(folder / "digital")
        assert isinstance(result, DigitalResult)
    else:
        model = BLM.from_pretrained(folder / "joint/checkpoint", **load_options(recipe))
        result = evaluate_digital(
            model.backbone,
            evenly_spaced(read_questions(corpus), recipe.evaluation.max_questions),
            folder / "digital",
            model=model.contract.revision,
            config=DigitalEvalConfig(root=corpus),
        )
    overall = result.summary.overall
    return Rate(**{field.name: getattr(overall, field.name) for field in fields(Rate)})


def variant_key(variant: Variant, recipe: Recipe) -> str:
    """Hash of everything that the result of a variant depends on; `recipe` has its changes applied."""
    made = [variant.models, variant.backbone, variant.policy, "equal steps per model"]
    made += [json_of(recipe, name) for name in vars(recipe) if name not in NOT_IN_KEYS]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def baseline_config(config: PolicyTrainingConfig) -> BaselineConfig:
    """Return the configuration of a Diffusion Policy with the same budget and data."""
    return BaselineConfig(
        datasets=config.datasets,
        cameras=config.intents.cameras,
        loop=config.loop,
        actions=config.policy,
        weights=config.weights,
        execute=config.execute,
        stride=config.intents.stride,
    )


def evaluate_variant(
    checkpoint: Path, protocol: PhysicalProtocol, recipe: Recipe, out: Path
) -> PhysicalResult:
    """Evaluate one model on its own robots and tasks."""
    make = partial(load_checkpoint, checkpoint, **load_options(recipe))
    return evaluate_physical(
        make, protocol, out, workers=recipe.workers, engine=recipe.engine, videos_per_cell=0
    )


def untrained_backbone(recipe: Recipe, backbone: Path, folder: Path) -> Path:
    """Return the backbone before Stage I: for nano, random weights behind the same tokenizer."""
    if not (folder / "backbone").exists():
        if recipe.stage1.backbone == "nano":
            made = Backbone.load(backbone)
            made.model = nano.untrained(made.model.config, seed=recipe.stage1.training.loop.seed)
        else:
            made = Backbone.load(recipe.stage1.backbone)
        made.save(folder / "backbone")
    return folder / "backbone"


def last_log_row(log: Path) -> dict[str, float]:
    """Return the last row of a training log."""
    row: dict[str, float] = read_json_lines(log)[-1]
    return row
