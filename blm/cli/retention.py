"""Command that measures how much of its base's language ability a fine-tuned backbone has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from blm.cli.command import CliCommand

if TYPE_CHECKING:
    from blm.backbone import Backbone
    from blm.evaluation.digital.instructions import InstructionAnswer
    from blm.evaluation.statistics import Difference, Rate
    from blm.training.sft.retention import RetentionMeasure

console = Console()


@dataclass(frozen=True, kw_only=True)
class EvaluateRetention(CliCommand):
    """Measure how much of its base's language ability a fine-tuned backbone has kept.

    Reports KL divergence and perplexity on a text, and the success rates of instruction probes.

    Example: blm eval retention smol runs/smol/stage1/backbone --out retention.json
    """

    base: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BASE")]
    """Name or folder of the backbone before fine-tuning."""
    tuned: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TUNED")]
    """Folder of the fine-tuned backbone."""
    text: Path | None = None
    """Text file to measure on; by default a part of Python's manual."""
    out: Path | None = None
    """JSON file to write."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.model import check_device
        from blm.backbone import Backbone
        from blm.io import write_json
        from blm.training.sft.retention import Retention, read_texts

        check_device(self.device)
        before = Backbone.load(self.base, device=self.device)
        kept = Retention(before, read_texts(self.text) if self.text else ())
        after = Backbone.load(self.tuned, device=self.device)
        measured = kept.measure(after)
        result = compare_probes(before, after, base=self.base, tuned=self.tuned, text=measured)
        print_retention(result)
        if self.out is not None:
            write_json(self.out, asdict(result))
            console.print(f"result: {self.out}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class RetentionResult:
    """How much of its base's language a tuned backbone kept."""

    base: str
    tuned: str
    text: RetentionMeasure
    probes: Mapping[str, Mapping[str, Rate]]
    """"base" or "tuned" -> family of instructions, or "all" -> share of correct answers."""
    tuned_minus_base: Difference
    """Paired difference of the shares over all instructions."""
    rows: Mapping[str, Sequence[InstructionAnswer]]
    """"base" or "tuned" -> its answers."""


def compare_probes(
    before: Backbone, after: Backbone, *, base: str, tuned: str, text: RetentionMeasure
) -> RetentionResult:
    """Ask both backbones the instruction probes; return the rates beside the measure on text."""
    from blm.evaluation.digital.instructions import run_instructions, summarise
    from blm.evaluation.statistics import paired_difference

    asked = {"base": run_instructions(before), "tuned": run_instructions(after)}
    outcomes = {name: [answer.correct for answer in answers] for name, answers in asked.items()}
    return RetentionResult(
        base=base,
        tuned=tuned,
        text=text,
        probes={name: summarise(answers) for name, answers in asked.items()},
        tuned_minus_base=paired_difference(outcomes["tuned"], outcomes["base"]),
        rows=asked,
    )


def print_retention(result: RetentionResult) -> None:
    """Print the comparison of a fine-tuned backbone with its base."""
    text = result.text
    gap = result.tuned_minus_base
    table = Table(box=None)
    for heading in ("", "base", "tuned", "tuned - base, or KL (95 %)"):
        table.add_column(heading, justify="left" if not heading else "right")
    spread = f"KL {text.kl:.3f} nats a token ({text.kl_low:.3f} to {text.kl_high:.3f})"
    table.add_row(
        "perplexity of held-out text", f"{text.perplexity_base:.1f}", f"{text.perplexity:.1f}", spread
    )
    for name in result.probes["base"]:
        rates = [result.probes[side][name] for side in ("base", "tuned")]
        counts = [f"{rate.hits}/{rate.n}" for rate in rates]
        paired = f"{gap.difference:+.1%} ({gap.low:+.1%} to {gap.high:+.1%})"
        table.add_row(f"probes: {name}", *counts, paired if name == "all" else "")
    Console(width=max(console.width, 110)).print(table)
