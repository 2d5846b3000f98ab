"""The summary of a collection, `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from blm.io import read_json, reading

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class CellCounts:
    """What became of the attempts in one cell: one robot and one task."""

    attempts: int
    kept: int
    """Episodes in the dataset."""
    rejected: Mapping[str, int]
    """Reason -> attempts; see `demonstration.demonstrate`."""
    frames: int


@dataclass(frozen=True, kw_only=True)
class CollectionSummary:
    """What a collection holds and how it was made."""

    robots: Mapping[str, Mapping[str, CellCounts]]
    """Robot -> task -> counts."""
    seconds: float
    """Duration of the run that finished [s]."""
    seconds_in: Mapping[str, float]
    """Planning, physics, rendering, encoding -> time, summed over attempts [s]."""
    versions: Mapping[str, str]
    """Package -> version."""
    suite: str
    seeds: tuple[int, int]
    """First and last seed that was tried."""
    reserved_seeds: Mapping[str, int]
    """Purpose -> episodes on scenes that are not for training."""
    config: Mapping[str, Any]
    """The `CollectConfig`, and the pilot if there was one, as JSON."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, out: Path) -> Self:
        """Read the summary of the collection in `out`. Raises DamagedError that names the file."""
        value = read_json(out / SUMMARY)
        with reading(out / SUMMARY):
            cells = {
                robot: {task: CellCounts(**counts) for task, counts in tasks.items()}
                for robot, tasks in value["robots"].items()
            }
            first, last = value["seeds"]
            reserved = value.get("reserved_seeds", {})  # absent in files from before it was recorded
            return cls(**{**value, "robots": cells, "seeds": (first, last), "reserved_seeds": reserved})
