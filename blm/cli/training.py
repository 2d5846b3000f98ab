"""Commands for training: Stage I, Stage II, and the Diffusion Policy baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from blm.app.model import check_device
from blm.app.stage1 import TrainingCorpus, load_pretrained, prepare_stage1
from blm.app.validation import closed_loop_validation
from blm.backbone import Backbone
from blm.backbone.precision import WeightDtype, mixed_precision, require_attention
from blm.baselines.diffusion_policy import BaselineConfig, train_baseline
from blm.cli.command import CliCommand, OutFolder
from blm.corpora.format.validated import ValidatedCorpus
from blm.datasets.lerobot import open_mapped
from blm.io import read_json_lines, write_json
from blm.seeds import VALIDATION_SEEDS, reserved_seeds_warning
from blm.training.loop.distributed import Processes
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.train import train_stage2
from blm.training.pretraining.nano import NanoPretrainingConfig, is_nano
from blm.training.sft.retention import Retention, read_texts
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.training.sft.train import Stage1Config, held_out_loss, train_stage1
from blm.training.sft.validation import Validator
from blm.types import BlmError, require_numbers

console = Console()
WIDTH = 120
"""Width of the table [characters]."""
KEPT = ("kl", "kl_low", "kl_high", "perplexity_base", "perplexity")
"""Measures of retention that are logged and shown."""


@dataclass(frozen=True, kw_only=True)
class TrainStage1(CliCommand):
    """Stage I: fine-tune a backbone on corpora.

    Writes OUT/backbone, a transformers folder, and OUT/log.jsonl.

    Run the same command again to resume; `accelerate launch` runs several processes.

    Example: blm train stage1 OUT --corpus corpora/scenes --backbone smol --loop.steps 2000
    --loop.batch-size 16
    """

    out: OutFolder
    """Folder to write."""
    config: Annotated[Stage1Config, tyro.conf.arg(name="")]
    corpus: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """Corpus folder, or FOLDER:WEIGHT. Repeat the flag for each corpus.
    WEIGHT is its relative weight in the training mixture, 1 by default."""
    replay: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Corpus of general dialogues, which limit forgetting, in the same form as --corpus.
    Use `blm corpus replay` to write one."""
    backbone: str = "nano"
    """Name or folder of the backbone.
    With `nano`, a new one is created, with a tokenizer trained on these corpora."""
    schooling: NanoPretrainingConfig = field(default_factory=NanoPretrainingConfig)
    """Pretraining of a new nano backbone."""
    held_out: Path | None = None
    """Corpus folder for the held-out loss."""
    held_out_rows: int = 500
    """Maximum number of held-out conversations to use."""
    sample: int = 500
    """Number of conversations that are measured before a corpus is validated.
    It takes seconds and shows whether the limits suit the corpus; 0 measures none."""
    validate_only: bool = False
    """Validate the corpora and end; the same command without this flag then trains at once."""
    retention_text: Path | None = None
    """Text file for measuring forgetting; by default a part of Python's manual."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps. On CUDA, the model computes in bfloat16 (autocast)."""
    dtype: WeightDtype | None = None
    """Precision of frozen weights; by default bfloat16 on CUDA and float32 elsewhere.
    Trained weights and adapters are float32."""
    attn_implementation: str | None = None
    """Attention implementation of the backbone in transformers: eager, sdpa, flash_attention_2, ..;
    by default the model's own."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out_rows=(1, 10**9), sample=(0, 10**6))
        require_attention(self.attn_implementation)

    def run(self, command_line: Sequence[str]) -> None:
        check_device(self.device)
        processes = Processes.join(self.device)
        pretrained, corpora = self._read_corpora(processes.device)
        if self.validate_only:
            self._report(corpora, processes)
            return
        backbone, sources = prepare_stage1(
            pretrained, corpora, self.config, self.schooling, self.out, device=str(processes.device)
        )
        held_out = self._held_out_examples(backbone)
        with mixed_precision(backbone.model):
            retention = Retention(backbone, read_texts(self.retention_text) if self.retention_text else ())

        def evaluate(step: int) -> dict[str, float]:
            found = held_out_loss(backbone, held_out, self.config.loop.batch_size) if held_out else {}
            with mixed_precision(backbone.model):
                measured = asdict(retention.measure(backbone))
            return found | {name: value for name, value in measured.items() if name in KEPT}

        if processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "command.json", _recorded(self, self.config))
        before = evaluate(0)
        counts = train_stage1(backbone, sources, self.config, self.out, on_eval=evaluate)
        if processes.first:
            console.print(", ".join(f"{name}: {count}" for name, count in counts.items()), soft_wrap=True)
            rows = read_json_lines(self.out / "log.jsonl")
            print_training([{"step": 0, **before}, *rows])
            console.print(f"backbone: {self.out / 'backbone'}", soft_wrap=True)
        processes.leave()

    def _read_corpora(self, device: Any) -> tuple[Backbone | None, list[TrainingCorpus]]:
        """Return the pretrained backbone, None for a new nano, and the validated corpora."""
        name = str(device)
        pretrained = load_pretrained(
            self.backbone,
            self.config,
            device=name,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
        )
        corpora = [self._read(text, pretrained) for text in (*self.corpus, *self.replay)]
        for corpus in corpora:
            if counts := corpus.facts.reserved:
                message = reserved_seeds_warning(str(corpus.folder), counts)
                Console(stderr=True).print(f"warning: {message}", soft_wrap=True)
        return pretrained, corpora

    def _report(self, corpora: Sequence[TrainingCorpus], processes: Processes) -> None:
        """Print what tokenisation makes of each corpus."""
        for corpus in corpora if processes.first else ():
            outcomes = {} if corpus.validated is None else corpus.validated.outcomes
            counts = ", ".join(f"{name}: {count:,}" for name, count in outcomes.items())
            console.print(f"{corpus.folder}: {len(corpus.conversations):,} rows {counts}", soft_wrap=True)
        processes.leave()

    def _read(self, text: str, backbone: Backbone | None) -> TrainingCorpus:
        folder, weight = split_weight(text)
        corpus = self._validated(folder, backbone)
        if backbone is None or is_nano(backbone):  # its pretraining reads all rows several times
            rows = list(corpus.open())
            return TrainingCorpus(name=folder.name, folder=folder, conversations=rows, weight=weight)
        return TrainingCorpus.of_validated(corpus, weight=weight)

    def _validated(self, folder: Path, backbone: Backbone | None) -> ValidatedCorpus:
        """Validate a corpus, together with the other processes."""
        validator = Validator(
            backbone=backbone,
            limits=self.config.limits,
            out=self.out,
            processes=Processes.join(self.device if backbone is None else backbone.model.device),
            workers=self.config.workers,
            sample=self.sample,
        )
        corpus = validator.validate(folder)
        corpus.require_clean(skip_bad=self.config.skip_bad)
        return corpus

    def _held_out_examples(self, backbone: Backbone) -> list[Any]:
        if self.held_out is None:
            return []
        rows = self._validated(self.held_out, None).open()
        step = max(1, len(rows) // self.held_out_rows)
        source = TrainingSource.of_rows("held out", rows[::step][: self.held_out_rows], self.held_out)
        processes = Processes.join(backbone.model.device)
        tokenizer = CorpusTokenizer(backbone, self.config.limits, processes, skip_bad=False)
        return list(tokenizer.tokenize(source).examples)


@dataclass(frozen=True, kw_only=True)
class TrainStage2(CliCommand):
    """Stage II: train the bridge and the policy on demonstrations; the backbone is frozen.

    Writes OUT/checkpoint and OUT/best.

    Run the same command again to resume; `accelerate launch` runs several processes.

    Example: blm train stage2 OUT --datasets data/panda --backbone blm-nano --intents.layer 3
    --intents.cameras base wrist --cache cache --loop.steps 20000 --loop.batch-size 64
    """

    out: OutFolder
    """Folder to write."""
    config: Annotated[PolicyTrainingConfig, tyro.conf.arg(name="")]
    drive: int = 0
    """Number of closed-loop validation episodes for each robot and task at every evaluation.
    Evaluations happen every --loop.eval-every steps.
    With 0, the validation loss alone selects the best checkpoint."""

    def __post_init__(self) -> None:
        require_numbers(self, drive=(0, len(VALIDATION_SEEDS)))

    def run(self, command_line: Sequence[str]) -> None:
        config = self.config
        check_device(config.device)
        opened = open_mapped(config.datasets, config.mappings)
        tasks = sorted({task for data in opened for task in data.tasks})
        drive = None
        if self.drive:
            drive = closed_loop_validation(self.out, tasks, self.drive, config.intents.workers)
        facts = {"command": list(command_line), "config": _recorded(self, config)}
        checkpoint = train_stage2(config, self.out, facts, validate=drive)
        processes = Processes.join(config.device)
        if processes.first:
            console.print(f"checkpoint: {checkpoint}, best: {self.out / 'best'}", soft_wrap=True)
        processes.leave()


@dataclass(frozen=True, kw_only=True)
class TrainBaseline(CliCommand):
    """Train the baseline: a Diffusion Policy with its own vision encoder, on the same
    demonstrations.

    Writes OUT/checkpoint. Run the same command again to resume.

    Example: blm train baseline OUT --datasets data/panda --cameras base wrist --loop.steps 20000
    --loop.batch-size 64
    """

    out: OutFolder
    """Folder to write."""
    config: Annotated[BaselineConfig, tyro.conf.arg(name="")]

    def run(self, command_line: Sequence[str]) -> None:
        checkpoint = train_baseline(self.config, self.out, {"command": list(command_line)})
        console.print(f"checkpoint: {checkpoint}", soft_wrap=True)


def _recorded(command: CliCommand, config: Stage1Config | PolicyTrainingConfig) -> dict[str, Any]:
    """Return the flags of a command as JSON, with the fields of its config at the top level."""
    flags = {name: value for name, value in asdict(command).items() if name != "config"}
    recorded: dict[str, Any] = json.loads(json.dumps(flags | asdict(config), default=str))
    return recorded


def split_weight(text: str) -> tuple[Path, float]:
    """Split FOLDER or FOLDER:WEIGHT. Raises BlmError for an invalid weight."""
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
            f"'{text}' is not a folder; give FOLDER or FOLDER:WEIGHT, such as corpora/scenes:2.5"
        ) from None


def print_training(rows: Sequence[Mapping[str, float]]) -> None:
    """Print the rows of a training log that contain an evaluation, and the training speed."""
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
        speed = f"{timed[-1]['tokens_per_s']:.0f} tokens/s"
        waiting = f"{share['data_share']:.1%} of the time waiting for data"
        padding = f"{share['padding_share']:.0%} padding"
        console.print(f"{timed[-1]['seconds'] / 60:.1f} min, {speed}, {waiting}, {padding}")
