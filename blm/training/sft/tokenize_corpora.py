"""Conversations become rows: each process of a run reads its share, and all of them get all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from blm.backbone import Backbone
from blm.training.loop.distributed import Part, Processes
from blm.training.sft.mixture_sampler import Source
from blm.training.sft.tokenize import Limits, Row, make_row
from blm.training.sft.vision_features import FeatureCache
from blm.types import BlmError, Message

READ_TOGETHER = 256
"""Conversations of a process between two exchanges; if features are wanted, their pictures wait so long."""


@dataclass(frozen=True, kw_only=True)
class TrainingSource:
    """Conversations of one kind."""

    name: str
    conversations: Sequence[Sequence[Message]]
    root: Path | None = None
    """Folder below which their pictures lie."""
    weight: float = 1.0
    """Its share of the rows trained on, relative to the other sources."""
    places: Sequence[str] = ()
    """Where each conversation stands ("file:line"), for messages."""

    def place(self, index: int) -> str:
        return self.places[index] if self.places else f"{self.name}, conversation {index}"


@dataclass
class Share:
    """What one process read of a block."""

    rows: list[Row | None] = field(default_factory=list)
    """None: not to be trained on."""
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Number of a conversation that cannot be used, and why."""


class Reader:
    """Reads sources together with the other processes; `counts` says what happened in this one."""

    def __init__(
        self, backbone: Backbone, limits: Limits, processes: Processes, *, skip_bad: bool, features: bool
    ) -> None:
        """With `features` pictures become those of the frozen eye, 256 conversations at a time."""
        self.backbone, self.limits, self.processes, self.skip_bad = backbone, limits, processes, skip_bad
        self.counts: Counter[str] = Counter()
        self.see = FeatureCache(backbone, self.counts) if features else None
        self.console = Console(stderr=True, quiet=not processes.first)

    def read(self, source: TrainingSource) -> Source:
        """Return all rows of a source. Raises BlmError naming a conversation of no use, in every process."""
        count, total = self.processes.count, len(source.conversations)
        size = READ_TOGETHER * count
        blocks = [range(begin, min(begin + size, total)) for begin in range(0, total, size)]
        rows = list[Row]()
        for block in track(blocks, f"reading {source.name}", console=self.console):
            own = Part(self.processes.rank, count).of(block)
            mine = self._share(source, own)
            shares = self.processes.gather_objects(mine)
            shares[self.processes.rank] = mine  # and not a copy
            self._tell(source, sorted(fault for share in shares for fault in share.faults))
            mixed = (shares[place % count].rows[place // count] for place in range(len(block)))
            rows += [row for row in mixed if row is not None]
        if not rows:
            raise BlmError(f"no conversation of '{source.name}' can be trained on: {dict(self.counts)}")
        return Source(name=source.name, rows=rows, weight=source.weight)

    def total(self) -> Counter[str]:
        """Return what happened in all processes."""
        seen = {*self.see.features} if self.see is not None else set[str]()
        parts = self.processes.gather_objects((self.counts, seen))
        counts = sum((part for part, _ in parts), Counter[str]())
        if self.see is not None:
            counts["distinct pictures"] = len(set[str]().union(*(pictures for _, pictures in parts)))
        return counts

    def _share(self, source: TrainingSource, numbers: Sequence[int]) -> Share:
        share = Share()
        for number in numbers:
            messages, row = tuple(source.conversations[number]), None
            try:
                row = make_row(self.backbone, messages, self.limits, source.root, self.counts)
            except BlmError as error:
                share.faults.append((number, str(error)))
                if not self.skip_bad:
                    break
                self.counts["skipped, bad"] += 1
            share.rows.append(row)
        if self.see is not None:
            seen = iter(self.see([row for row in share.rows if row is not None]))
            share.rows = [None if row is None else next(seen) for row in share.rows]
        return share

    def _tell(self, source: TrainingSource, faults: Sequence[tuple[int, str]]) -> None:
        for number, reason in faults:
            if not self.skip_bad:
                raise BlmError(f"{source.place(number)}: {reason}; skip_bad leaves such rows out")
            self.console.print(f"skipped {source.place(number)}: {reason}", highlight=False, soft_wrap=True)
