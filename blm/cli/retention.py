"""Command that measures how much of its base's language ability a fine-tuned backbone has kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from blm.cli.command import CliCommand

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
        from blm.app.retention import RetentionCheck, print_retention
        from blm.backbone import Backbone
        from blm.io import write_json
        from blm.training.sft.retention import read_texts

        check_device(self.device)
        before = Backbone.load(self.base, device=self.device)
        check = RetentionCheck(before, self.base, read_texts(self.text) if self.text else ())
        result = check.compare(Backbone.load(self.tuned, device=self.device), self.tuned)
        print_retention(result, console)
        if self.out is not None:
            write_json(self.out, asdict(result))
            console.print(f"result: {self.out}", soft_wrap=True)
