"""Command of retention: what a tuned backbone kept of its base's language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

console = Console()


def retention(command: str, arguments: list[str]) -> None:
    """`blm eval retention BASE TUNED`: divergence, perplexity, and paired instruction probes."""

    def run(
        base: tyro.conf.Positional[str],
        tuned: tyro.conf.Positional[str],
        text: Path | None = None,
        out: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Compare a tuned backbone with its base on held-out text and on verifiable instructions.

        Args:
            base: A name of BACKBONES, or a folder.
            tuned: What was trained from it.
            text: Text file to read; by default a part of Python's own manual.
            out: JSON file to write.
            device: Torch device.
        """
        from blm.app.model import check_device
        from blm.backbone import Backbone
        from blm.io import write_json
        from blm.training.sft.retention import Retention, read_texts

        check_device(device)
        before = Backbone.load(base, device=device)
        kept = Retention(before, read_texts(text) if text else ())
        after = Backbone.load(tuned, device=device)
        found = {"base": base, "tuned": tuned, "text": kept.measure(after), **probe(before, after)}
        show(found)
        if out is not None:
            write_json(out, found)
            console.print(f"result: {out}", soft_wrap=True)

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def probe(before: Any, after: Any) -> dict[str, Any]:
    """Ask both models the instruction probes; rates of each, and the paired difference."""
    from blm.evaluation.digital.instructions import run_instructions, summarise
    from blm.evaluation.statistics import paired_difference

    asked = {"base": run_instructions(before), "tuned": run_instructions(after)}
    outcomes = {name: [answer.correct for answer in answers] for name, answers in asked.items()}
    return {
        "probes": {
            name: {part: asdict(rate) for part, rate in summarise(answers).items()}
            for name, answers in asked.items()
        },
        "tuned_minus_base": asdict(paired_difference(outcomes["tuned"], outcomes["base"])),
        "rows": {name: [asdict(answer) for answer in answers] for name, answers in asked.items()},
    }


def show(found: Mapping[str, Any]) -> None:
    """Print the comparison."""
    text, gap = found["text"], found["tuned_minus_base"]
    table = Table(box=None)
    for heading in ("", "base", "tuned", "tuned - base, or KL (95 %)"):
        table.add_column(heading, justify="left" if not heading else "right")
    spread = f"KL {text['kl']:.3f} nats a token ({text['kl_low']:.3f} to {text['kl_high']:.3f})"
    table.add_row(
        "perplexity of held-out text", f"{text['perplexity_base']:.1f}", f"{text['perplexity']:.1f}", spread
    )
    for name in found["probes"]["base"]:
        rates = [found["probes"][side][name] for side in ("base", "tuned")]
        counts = [f"{rate['hits']}/{rate['n']}" for rate in rates]
        paired = f"{gap['difference']:+.1%} ({gap['low']:+.1%} to {gap['high']:+.1%})"
        table.add_row(f"probes: {name}", *counts, paired if name == "all" else "")
    Console(width=max(console.width, 110)).print(table)
