"""The estimate of a recipe's memory as text."""

from __future__ import annotations

from collections.abc import Mapping

from blm.app.memory.estimate import MemoryEstimate, StageMemory

GIB = 2**30
NAMES = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "average": "moving average",
}
"""Fields of `TrainingMemory` -> words of the table."""


def describe(estimate: MemoryEstimate, device: str) -> str:
    """Return the estimate as lines of text; `device` is that of the recipe."""
    where = "GPU" if device.startswith("cuda") else "process"
    lines = [
        f"backbone {estimate.backbone / 1e6:,.1f} M parameters, of which {estimate.tapped / 1e6:,.1f} M are "
        f"used for an action; policy {estimate.policy / 1e6:,.1f} M",
        f"control prompt {estimate.tokens} tokens x {estimate.hidden}; a frame in the cache "
        f"{estimate.cached / 1e6:.3g} MB",
    ]
    for stage in estimate.stages:
        lines.append("")
        lines += _stage(stage, where)
    lines += ["", estimate.uncounted] if estimate.uncounted else []
    return "\n".join(lines)


def _stage(stage: StageMemory, where: str) -> list[str]:
    lines = [stage.stage]
    for place, parts in ((f"each {where}", stage.device), ("host", stage.host), ("disk", stage.disk)):
        if any(parts.values()):
            lines.append(f"  {place:12} {_size(sum(parts.values())):>10}   {_shares(parts)}")
    return lines


def _shares(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{NAMES.get(name, name)} {_size(size)}" for name, size in parts.items() if size)


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
