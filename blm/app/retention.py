"""How much of its base's language ability a fine-tuned backbone has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blm.backbone import Backbone
from blm.evaluation.digital.instructions import (
    InstructionAnswer,
    compare_parts,
    run_instructions,
    summarise,
)
from blm.evaluation.statistics import Difference, Rate
from blm.io import read_json
from blm.training.sft.retention import Retention, RetentionMeasure


@dataclass(frozen=True, kw_only=True)
class RetentionResult:
    """How much of its base's language a tuned backbone kept."""

    base: str
    tuned: str
    text: RetentionMeasure
    probes: Mapping[str, Mapping[str, Rate]]
    """"base" or "tuned" -> part of the probes ("all", "instructions", "knowledge", "dialogue") -> share
    of correct answers."""
    tuned_minus_base: Difference
    """Paired difference of the shares over all probes."""
    differences: Mapping[str, Difference]
    """Part of the probes -> the same for this part."""
    rows: Mapping[str, Sequence[InstructionAnswer]]
    """"base" or "tuned" -> its answers."""


class RetentionCheck:
    """Remembers a base backbone; create it before the backbone is trained."""

    def __init__(self, base: Backbone, name: str, texts: Sequence[str] = ()) -> None:
        """Read texts with the base (by default a part of Python's manual), and ask it the probes."""
        self.name = name
        self.text = Retention(base, texts)
        self.answers = run_instructions(base)

    def compare(self, tuned: Backbone, name: str) -> RetentionResult:
        """Ask the tuned backbone the same; return both sides and their difference."""
        asked = {"base": self.answers, "tuned": run_instructions(tuned)}
        differences = compare_parts(asked["base"], asked["tuned"])
        return RetentionResult(
            base=self.name,
            tuned=name,
            text=self.text.measure(tuned),
            probes={side: summarise(answers) for side, answers in asked.items()},
            tuned_minus_base=differences["all"],
            differences=differences,
            rows=asked,
        )


def retention_table(path: Path) -> dict[str, dict[str, float]]:
    """Return a stored `RetentionResult` for the report; empty if there is none.

    Results of earlier versions, which have no questions of dialogue, are read too.
    """
    if not path.exists():
        return {}
    stored = read_json(path)
    text, probes = stored["text"], stored["probes"]
    table = {name: text[name] for name in ("kl", "kl_low", "kl_high", "perplexity_base", "perplexity")}
    gaps = stored.get("differences", {"all": stored["tuned_minus_base"]})
    for name, gap in gaps.items():
        for side in ("base", "tuned"):
            rate = probes[side][name]
            table[f"probes ({name}): right answers of the {side} model"] = rate["hits"] / rate["n"]
        table[f"probes ({name}): tuned minus base"] = gap["difference"]
    return {"Stage I, divergence in nats per token": table}


def print_retention(result: RetentionResult, console: Console) -> None:
    """Print the comparison of a fine-tuned backbone with its base."""
    text = result.text
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
        gap = result.differences[name]
        paired = f"{gap.difference:+.1%} ({gap.low:+.1%} to {gap.high:+.1%})"
        table.add_row(f"probes: {name}", *counts, paired)
    Console(file=console.file, width=max(console.width, 110)).print(table)
