"""Types that the results of both spaces share: protocol, machine, model, and scored items.

`physical/result.py` and `digital/result.py` define the two kinds of result. JSON is written by
`to_json` and read by `from_json`; the rest of the package uses attributes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from blm.evaluation.protocol import DigitalProtocol, PhysicalProtocol, protocol_hash

FORMAT = 2
"""Version of result.json: written into it, and required when it is read."""
PACKAGES = ("blm", "numpy", "torch", "transformers", "mujoco")
"""Packages whose versions a result records."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine on which a result was computed."""

    processor: str
    cores: int | None
    """Number of logical cores; None if the system does not report it."""
    system: str
    python: str
    packages: Mapping[str, str]
    """Package -> version."""
    rendering: str | None = None
    """OpenGL backend that rendered the images; None if no images were rendered."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, in which each package has its own key."""
        value = {name: getattr(self, name) for name in ("processor", "cores", "system", "python")}
        value |= self.packages
        return value if self.rendering is None else {**value, "rendering": self.rendering}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote. Raises KeyError for a missing field."""
        own = {name: value[name] for name in ("processor", "cores", "system", "python")}
        rendering = value.get("rendering")
        packages = {name: v for name, v in value.items() if name not in own and name != "rendering"}
        return cls(**own, packages=packages, rendering=rendering)


def this_machine(rendering: str | None = None) -> Machine:
    """Describe the machine that this process runs on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        rendering=rendering,
    )


@dataclass(frozen=True, kw_only=True)
class ScoredItem:
    """One episode or question of a result, as the paired comparison sees it."""

    id: str
    """Identifier by which the items of two results are paired."""
    score: float
    """0 wrong .. 1 right."""
    stratum: str
    """Robot and task of an episode, or kind of a question."""
    phrasing: str | None = None
    """"seen" or "held_out" for an episode; None for a question."""
    scene: str | None = None
    """Hash of the initial state of an episode; None for a question."""
    group: str | None = None
    """Cluster of a question: one image or video. None for an episode."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The fields that both kinds of result have. Use `PhysicalResult` or `DigitalResult`."""

    kind: ClassVar[str]
    """"physical" or "digital"."""
    score: ClassVar[str]
    """JSON key of the score in a row, between 0 and 1."""

    protocol: PhysicalProtocol | DigitalProtocol
    machine: Machine
    seconds: float
    """Wall time of the last run [s]."""
    model: str
    """Revision of the evaluated weights."""

    @property
    def protocol_hash(self) -> str:
        return protocol_hash(self.protocol)

    def items(self) -> list[ScoredItem]:
        """Return the scored items, in the order of the rows."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; subclasses add their own fields after these."""
        return {
            "format": FORMAT,
            "protocol": self.protocol.to_json(),
            "protocol_hash": self.protocol_hash,
            "machine": self.machine.to_json(),
            "seconds": self.seconds,
            "kind": self.kind,
            "score": self.score,
            "model": self.model,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the JSON form. Raises KeyError or TypeError for missing or unknown fields."""
        raise NotImplementedError
