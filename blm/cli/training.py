"""Commands of training: fine-tune a backbone on corpora, and show what it learnt and what it kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from blm.baselines.diffusion_policy import BaselineConfig, train_baseline
from blm.seeds import VALIDATION_SEEDS, warning
from blm.training.policy.train import PolicyTrainingConfig
from blm.training.pretraining.nano import Schooling, for_nano, is_nano, taught_nano
from blm.training.sft.train import Stage1Config
from blm.types import BlmError, require_numbers

if TYPE_CHECKING:
    from blm.backbone import Backbone
    from blm.training.sft.train import TrainingSource

console = Console()
WIDTH = 120
"""Characters that the table needs."""
KEPT = ("kl", "kl_low", "kl_high", "perplexity_base", "perplexity")
"""Of what retention measures, what is shown."""


@dataclass(frozen=True, kw_only=True)
class TrainStage1(Stage1Config):
    """Fine-tune a backbone on corpora; write OUT/backbone, a stock transformers folder, and OUT/log.jsonl.

    The same command again continues what was interrupted. `accelerate launch` starts it in several processes.
    """

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    corpus: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Corpus folder, or FOLDER:WEIGHT with its share of the rows trained on (1); give it once per corpus."""
    replay: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same for general data that keep what the backbone knows (`blm corpus replay`)."""
    backbone: str = "nano"
    """nano (made fresh, with a tokenizer of these corpora), another name of BACKBONES, or a folder."""
    schooling: Schooling = field(default_factory=Schooling)
    """What a fresh nano learns first."""
    held_out: Path | None = None
    """Corpus folder for the held-out loss."""
    held_out_rows: int = 500
    """Of it, this many are read."""
    retention_text: Path | None = None
    """Text file on which to measure what the backbone kept; by default part of Python's own manual."""
    device: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, held_out_rows=(1, 10**9))


def parse_stage1(command: str, arguments: list[str]) -> TrainStage1:
    return tyro.cli(TrainStage1, args=arguments, prog=f"blm {command}")


def stage1(command: str, arguments: list[str]) -> None:
    """`blm train stage1 OUT --corpus FOLDER`: train, evaluating held-out loss and retention on the way."""
    chosen = parse_stage1(command, arguments)
    from blm.app.model import check_device
    from blm.io import write_json
    from blm.training.loop.distributed import Processes
    from blm.training.sft.retention import Retention, read_texts
    from blm.training.sft.train import held_out_loss, train_stage1

    config = Stage1Config(**{field.name: getattr(chosen, field.name) for field in fields(Stage1Config)})
    check_device(chosen.device)
    processes = Processes.join(chosen.device)
    backbone, sources, held_out = _open(chosen, config, processes.device)
    retention = Retention(backbone, read_texts(chosen.retention_text) if chosen.retention_text else ())

    def evaluate(step: int) -> dict[str, float]:
        found = held_out_loss(backbone, held_out, config.loop.batch_size) if held_out else {}
        return found | {name: value for name, value in retention.measure(backbone).items() if name in KEPT}

    if processes.first:
        chosen.out.mkdir(parents=True, exist_ok=True)
        write_json(chosen.out / "command.json", json.loads(json.dumps(asdict(chosen), default=str)))
    before = evaluate(0)
    counts = train_stage1(backbone, sources, config, chosen.out, on_eval=evaluate)
    if processes.first:
        console.print(", ".join(f"{name}: {count}" for name, count in counts.items()), soft_wrap=True)
        rows = [json.loads(line) for line in (chosen.out / "log.jsonl").read_text().splitlines()]
        print_training([{"step": 0, **before}, *rows])
        console.print(f"backbone: {chosen.out / 'backbone'}", soft_wrap=True)
    processes.leave()


@dataclass(frozen=True, kw_only=True)
class TrainStage2(PolicyTrainingConfig):
    """Train bridge and policy on datasets of demonstrations, with the backbone frozen.

    Writes OUT/checkpoint and OUT/best. The same command again continues what was interrupted; `accelerate
    launch` starts it in several processes.
    """

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    drive: int = 0
    """Episodes that the policy drives in each robot and task at every evaluation (`loop.eval-every`), on
    seeds for validation; 0: the validation loss alone chooses the best checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_numbers(self, drive=(0, len(VALIDATION_SEEDS)))


def parse_stage2(command: str, arguments: list[str]) -> TrainStage2:
    return tyro.cli(TrainStage2, args=arguments, prog=f"blm {command}")


def stage2(command: str, arguments: list[str]) -> None:
    """`blm train stage2 OUT --datasets FOLDER ..`: bridge and policy on any datasets."""
    chosen = parse_stage2(command, arguments)
    from blm.app.model import check_device
    from blm.app.validation import validation_episodes
    from blm.datasets.lerobot import open_dataset
    from blm.training.loop.distributed import Processes
    from blm.training.policy.train import train_stage2

    check_device(chosen.device)
    config = PolicyTrainingConfig(
        **{field.name: getattr(chosen, field.name) for field in fields(PolicyTrainingConfig)}
    )
    tasks = sorted({task for folder in config.datasets for task in open_dataset(folder).tasks})
    drive = (
        validation_episodes(chosen.out, tasks, chosen.drive, config.intents.workers) if chosen.drive else None
    )
    facts = {
        "command": ["blm", command, *arguments],
        "config": json.loads(json.dumps(asdict(chosen), default=str)),
    }
    checkpoint = train_stage2(config, chosen.out, facts, drive=drive)
    processes = Processes.join(chosen.device)
    if processes.first:
        console.print(f"checkpoint: {checkpoint}, best: {chosen.out / 'best'}", soft_wrap=True)
    processes.leave()


@dataclass(frozen=True, kw_only=True)
class TrainBaseline(BaselineConfig):
    """Train a Diffusion Policy, eyes and all, on datasets of demonstrations: the baseline.

    Writes OUT/checkpoint. The same command again continues what was interrupted.
    """

    out: tyro.conf.Positional[Path]
    """Folder to write."""


def parse_baseline(command: str, arguments: list[str]) -> TrainBaseline:
    return tyro.cli(TrainBaseline, args=arguments, prog=f"blm {command}")


def baseline(command: str, arguments: list[str]) -> None:
    """`blm train baseline OUT --datasets FOLDER .. --cameras base ..`."""
    chosen = parse_baseline(command, arguments)
    config = BaselineConfig(**{field.name: getattr(chosen, field.name) for field in fields(BaselineConfig)})
    checkpoint = train_baseline(config, chosen.out, {"command": ["blm", command, *arguments]})
    console.print(f"checkpoint: {checkpoint}", soft_wrap=True)


def _open(
    chosen: TrainStage1, config: Stage1Config, device: Any
) -> tuple[Backbone, list[TrainingSource], list[Any]]:
    """Return the backbone, the corpora without faults, and held-out rows."""
    from blm.backbone import Backbone
    from blm.corpora.format.messages import reserved_scenes
    from blm.corpora.format.validate import clean_corpus
    from blm.training.loop.distributed import Processes
    from blm.training.sft.tokenize_corpora import Reader, TrainingSource

    parts = [split_weight(text) for text in (*chosen.corpus, *chosen.replay)]
    made = None if chosen.backbone == "nano" else Backbone.load(chosen.backbone, device=str(device))
    rows = [clean_corpus(folder, backbone=made, skip_bad=config.skip_bad) for folder, _ in parts]
    for (folder, _), part in zip(parts, rows, strict=True):
        if counts := reserved_scenes(part):
            Console(stderr=True).print(f"warning: {warning(str(folder), counts)}", soft_wrap=True)
    if made is None:
        corpora = [(part, folder) for (folder, _), part in zip(parts, rows, strict=True)]
        made = taught_nano(corpora, chosen.schooling, chosen.out, seed=config.loop.seed)
        made.model.to(device)
    shares = [(part, folder, weight) for (folder, weight), part in zip(parts, rows, strict=True)]
    sources = (
        for_nano(shares, config.loop)
        if is_nano(made)
        else [
            TrainingSource(
                name=folder.name,
                conversations=[row.messages for row in part],
                root=folder,
                weight=weight,
                places=[f"{folder}, {row.id}" for row in part],
            )
            for part, folder, weight in shares
        ]
    )
    if chosen.held_out is None:
        return made, sources, []
    asked = [row.messages for row in clean_corpus(chosen.held_out, skip_bad=config.skip_bad)]
    asked = asked[:: max(1, len(asked) // chosen.held_out_rows)][: chosen.held_out_rows]
    held_out = TrainingSource(name="held out", conversations=asked, root=chosen.held_out)
    reader = Reader(made, config.limits, Processes.join(made.model.device), skip_bad=False, features=False)
    return made, sources, list(reader.read(held_out).rows)


def split_weight(text: str) -> tuple[Path, float]:
    """Return folder and weight of FOLDER or FOLDER:WEIGHT. Raises BlmError for a weight that is no number."""
    if Path(text).is_dir():
        return Path(text), 1.0
    folder, colon, weight = text.rpartition(":")
    try:
        if colon and not 0 < float(weight) < math.inf:
            raise BlmError(f"the weight of '{folder}' is {weight}; it must be a positive number")
        return (Path(folder), float(weight)) if colon else (Path(text), 1.0)
    except BlmError:
        raise
    except ValueError:
        raise BlmError(
            f"'{text}' is no folder; give FOLDER or FOLDER:WEIGHT, as corpora/scenes:2.5"
        ) from None


def print_training(rows: Sequence[Mapping[str, float]]) -> None:
    """Print the rows of a log that hold an evaluation, and how fast training was."""
    table = Table(box=None)
    for heading in ("step", "loss", "held-out loss", "accuracy", "KL to base [nats]", "95 %", "perplexity"):
        table.add_column(heading, justify="right")
    for row in (row for row in rows if "kl" in row or "held_out_loss" in row):
        number = {name: f"{value:.4g}" for name, value in row.items()}
        table.add_row(
            str(row["step"]),
            number.get("loss", "-"),
            number.get("held_out_loss", "-"),
            f"{row['held_out_accuracy']:.1%}" if "held_out_accuracy" in row else "-",
            number.get("kl", "-"),
            f"{number['kl_low']} to {number['kl_high']}" if "kl_low" in row else "-",
            f"{number['perplexity']} (base {number['perplexity_base']})" if "perplexity" in row else "-",
        )
    Console(width=max(console.width, WIDTH)).print(table)
    if timed := [row for row in rows if "seconds" in row]:
        share = {n: sum(row[n] for row in timed) / len(timed) for n in ("data_share", "padding_share")}
        speed = f"{timed[-1]['tokens_per_s']:.0f} tokens/s, {share['data_share']:.1%} of the time for data"
        console.print(f"{timed[-1]['seconds'] / 60:.1f} min, {speed}, {share['padding_share']:.0%} padding")
