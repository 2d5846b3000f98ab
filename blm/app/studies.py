"""Studies: what each idea buys. Variants of Stage II with the same budget, on the same scenes, paired.

    runs/NAME/studies/  STUDY/{report.json, report.md}  variants/KEY/{PART/.., result.json}

A variant changes a few fields of the recipe, or splits one joint model into several. Every model of every
variant is trained for the same number of steps, so a variant of 24 models sees 24 times the samples: dividing
one budget among them would compare a trained model with untrained ones. Evaluation seeds are the same, so the
variants are compared episode by episode. Caches of intents are shared where backbone, layer and cameras are,
and so is a whole variant: what several studies compare with is trained once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from blm.app.pipeline import to_json
from blm.app.policies import load_checkpoint
from blm.app.recipe import Recipe, RobotsAndTasks, physical_protocol, policy_training_config
from blm.backbone import Backbone
from blm.backbone.nano import model as nano
from blm.baselines.diffusion_policy import BaselineConfig, train_baseline
from blm.evaluation import PhysicalProtocol, compare, evaluate_physical
from blm.evaluation.physical.evaluate import summarise
from blm.evaluation.results import load_result, write_result
from blm.evaluation.statistics import Difference, holm
from blm.io import write_json, write_text
from blm.policy.checkpoint import read_contract
from blm.training.policy.train import PolicyTrainingConfig, train_stage2
from blm.types import BlmError, lookup


@dataclass(frozen=True)
class Variant:
    """One way to train Stage II."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted names of recipe fields -> values."""
    models: Literal["joint", "robot", "task", "cell"] = "joint"
    """One model; one for each robot (the paper's dagger), each task, or each of both together (its star)."""
    backbone: Literal["stage1", "untrained"] = "stage1"
    """What Stage I made, or what it began with; nano begins untrained."""
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
}
"""Name -> variants; the others are compared with the first."""


def changed(value: Any, path: str, new: Any) -> Any:
    """Return a copy of nested dataclasses in which the field with this dotted name is `new`."""
    first, _, rest = path.partition(".")
    if not hasattr(value, first):
        raise BlmError(f"a recipe has no field '{path}'")
    return replace(value, **{first: changed(getattr(value, first), rest, new) if rest else new})


def run_study(name: str, recipe: Recipe, run: Path, only: Sequence[str] = ()) -> Path:
    """Train and evaluate the variants of a study on the data and backbone of a run; return report.md.

    The same call again continues what was interrupted. `only` names variants to compare with the first, in
    place of all: parts of a study can run beside each other, and a later call reports what they made.
    Raises BlmError without episodes or Stage I in `run`, and for a name that is no variant of the study.
    """
    first, *others = STUDIES[name]
    for wanted in only:
        lookup(f"variant of {name}", wanted, {variant.name: variant for variant in others})
    variants = [first, *(variant for variant in others if not only or variant.name in only)]
    for needed in ("episodes", "stage1/backbone"):
        if not (run / needed).exists():
            raise BlmError(f"'{run}' has no {needed}; a study needs a run with demonstrations and Stage I")
    folder, rows = run / "studies" / name, []
    for variant in variants:
        Console(stderr=True).print(f"[bold]study {name}: {variant.name}[/bold]")
        rows.append(run_variant(variant, recipe, run))
    reference, *results = (load_result(run / "studies/variants" / row["result"]) for row in rows)
    folder.mkdir(exist_ok=True)
    gaps = [compare(result, reference, but=("cameras",)) for result in results]
    for row, gap, p in zip(rows[1:], gaps, holm([gap.p_value for gap in gaps]), strict=True):
        row |= {"gap": asdict(gap), "p_corrected": p}
    write_json(folder / "report.json", {"study": name, "recipe": to_json(recipe), "variants": rows})
    report = folder / "report.md"
    write_text(report, table(name, rows, gaps))
    return report


def run_variant(variant: Variant, recipe: Recipe, run: Path) -> dict[str, Any]:
    """Train and evaluate the models of a variant; return what its row of the table says."""
    for path, new in variant.changes.items():
        recipe = changed(recipe, path, new)
    out = run / "studies/variants" / key_of(variant, recipe)
    backbone = run / "stage1/backbone"
    if variant.backbone == "untrained":
        backbone = untrained(recipe, backbone, run / "studies/untrained")
    stage2, parts, begin = recipe.stage2, variant.parts(recipe), time.monotonic()
    cache = f"{backbone.parent.name}-{stage2.layer}-{stage2.stride}-{'-'.join(recipe.cameras)}"
    intents = run / "studies/intents" / cache
    made: list[dict[str, Any]] = []
    trained = 0.0
    for robots, tasks in parts:
        work = out / "-".join((*robots, *tasks)) if len(parts) > 1 else out / "joint"
        config = policy_training_config(recipe, run, backbone, intents, (robots, tasks))
        config = replace(config, loop=replace(config.loop, eval_every=0))
        facts = {"variant": out.name, "recipe": to_json(recipe)}
        if variant.policy == "blm":
            checkpoint = train_stage2(config, work, facts)
        else:
            checkpoint = train_baseline(baseline_of(config), work, facts)
        trained += last_row(work / "log.jsonl")["seconds"]
        contract = read_contract(checkpoint)
        protocol = physical_protocol(recipe, contract, (robots, tasks))
        made += evaluated(checkpoint, protocol, recipe, work / "physical")["rows"]
    protocol = physical_protocol(recipe, contract, (recipe.robots, recipe.tasks))
    order = {f"{robot}/{task}/{seed}": i for i, (robot, task, seed) in enumerate(protocol.scenes)}
    made.sort(key=lambda row: order[row["id"]])
    about = {"kind": "physical", "score": "success_once", "model": f"variant {out.name}"}
    result = write_result(out, protocol, begin, **about, **summarise(made), rows=made)
    return {
        "variant": variant.name,
        "models": len(parts),
        "steps": stage2.loop.steps,
        "samples": stage2.loop.batch_size * stage2.loop.steps * len(parts),
        "training_seconds": trained,
        "success": result["overall"]["success_once"],
        **{name: result["overall"][name] for name in ("success_at_end", "success_at_limit")},
        "solved": {f"{c['robot']}/{c['task']}": c["success_once"]["hits"] for c in result["cells"]},
        "result": out.name,
    }


def key_of(variant: Variant, recipe: Recipe) -> str:
    """Name of what this variant of an already changed recipe trains and evaluates, whatever study asks."""
    made = [variant.models, variant.backbone, variant.policy, "equal steps per model"]
    made += [to_json(value) for name, value in vars(recipe).items() if name != "workers"]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:12]


def baseline_of(config: PolicyTrainingConfig) -> BaselineConfig:
    """The same budget and data for a Diffusion Policy."""
    return BaselineConfig(
        datasets=config.datasets,
        cameras=config.intents.cameras,
        loop=config.loop,
        actions=config.policy,
        weights=config.weights,
        execute=config.execute,
        stride=config.intents.stride,
    )


def evaluated(checkpoint: Path, protocol: PhysicalProtocol, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Evaluate one model on its own robots and tasks."""
    make = partial(load_checkpoint, checkpoint)
    how: Any = {"workers": recipe.workers, "engine": recipe.engine, "videos_per_cell": 0}
    return evaluate_physical(make, protocol, out, **how)


def untrained(recipe: Recipe, backbone: Path, folder: Path) -> Path:
    """Return the folder of what Stage I began with: for nano, an untrained one behind the same tokenizer."""
    if not (folder / "backbone").exists():
        if recipe.stage1.backbone == "nano":
            made = Backbone.load(backbone)
            made.model = nano.untrained(made.model.config, seed=recipe.stage1.training.loop.seed)
        else:
            made = Backbone.load(recipe.stage1.backbone)
        made.save(folder / "backbone")
    return folder / "backbone"


def last_row(log: Path) -> dict[str, float]:
    row: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return row


def table(name: str, rows: Sequence[Mapping[str, Any]], gaps: Sequence[Difference]) -> str:
    """A table in Markdown: success of each variant with its interval, and the paired difference."""
    lines = [
        f"# Study: {name}",
        "",
        f"n = {rows[0]['success']['n']} episodes on the same scenes; {rows[0]['steps']:,} steps per model; "
        "95 % intervals; p: McNemar's exact test, corrected for the number of variants (Holm).",
        "",
        "| variant | models | samples seen | training | success once | at end | at step limit "
        "| against the first | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        won, gap, p = row["success"], row.get("gap"), row.get("p_corrected")
        success = f"{won['rate']:.1%} ({won['low']:.1%} to {won['high']:.1%})"
        success += f" | {row['success_at_end']['rate']:.1%} | {row['success_at_limit']['rate']:.1%}"
        against = "-"
        if gap is not None:
            against = f"{100 * gap['difference']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
        cells = (
            row["variant"],
            row["models"],
            f"{row['samples']:,}",
            f"{row['training_seconds'] / 60:.1f} min",
        )
        lines.append(
            f"| {' | '.join(map(str, cells))} | {success} | {against} | {'-' if p is None else f'{p:.2g}'} |"
        )
    return "\n".join(lines) + "\n"
