"""Metrics of a training run: rows of means and rates in `log.jsonl`, and in experiment trackers."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from blm.types import BlmError


class Meter:
    """Accumulates the metrics of the next row of the log."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the training time before this row, including that of an interrupted run."""
        self.seconds, self.begin, self.waited = seconds, time.perf_counter(), 0.0
        self.values, self.sizes = defaultdict[str, list[float]](list), defaultdict[str, float](float)

    def add(self, values: Mapping[str, float], sizes: Mapping[str, float], wait: float) -> None:
        """Add the metrics of a step (NaN if it has none), its sizes, and seconds of waiting."""
        for name, value in values.items():
            self.values[name] += [] if math.isnan(value) else [value]
        for name, size in sizes.items():
            self.sizes[name] += size
        self.waited += wait

    def row(self, lr: float) -> dict[str, float]:
        """Return the means of metrics, and rates, since the last row."""
        elapsed = time.perf_counter() - self.begin
        self.seconds += elapsed
        row = {name: fmean(values) for name, values in self.values.items() if values}
        row |= {"lr": lr, "samples_per_s": self.sizes["samples"] / elapsed}
        if positions := self.sizes["positions"]:
            row["tokens_per_s"] = self.sizes["tokens"] / elapsed
            row["padding_share"] = 1.0 - self.sizes["tokens"] / positions
        return row | {"data_share": self.waited / elapsed, "seconds": self.seconds}


class MetricsLog:
    """Writes rows to `out/log.jsonl` and to trackers; a context manager."""

    def __init__(self, out: Path, trackers: Sequence[str], config: Mapping[str, Any], *, on: bool) -> None:
        """Write if `on`, which is True in the first process only."""
        self.trackers = [_tracker(name, out, config) for name in trackers] if on else []
        self.file = (out / "log.jsonl").open("a") if on else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()
        if self.file:
            self.file.close()

    def write(self, row: Mapping[str, float]) -> None:
        if self.file:
            print(json.dumps(row), file=self.file, flush=True)
        for tracker in self.trackers:
            tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _tracker(name: str, out: Path, config: Mapping[str, Any]) -> Any:
    available = [str(tracker) for tracker in get_available_trackers()]
    if name not in available:
        raise BlmError(f"tracker '{name}' is not installed (pip install {name}); installed: {available}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = {"logging_dir": str(out)} if kind.requires_logging_directory else {}
    tracker = kind(out.name, **folder)
    tracker.start()
    tracker.store_init_configuration({key: str(value) for key, value in config.items()})
    return tracker
