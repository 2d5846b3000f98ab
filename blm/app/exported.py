"""Exported policies by folder. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blm.edge.folder import Runtime, is_export
from blm.edge.policy import ExportedPolicy
from blm.types import BlmError

RuntimeChoice = Literal["torch", "onnx", "openvino"]
"""What runs a policy: torch a checkpoint, the others an exported folder."""


def load_exported(folder: Path, runtime: Runtime | None = None) -> ExportedPolicy:
    """Load an exported policy. Raises BlmError as `ExportedPolicy.load` does, and if the folder was
    exported for another runtime."""
    if not is_export(folder):
        raise BlmError(
            f"'{folder}' is not an exported policy; write one: blm export {runtime or 'onnx'} CHECKPOINT OUT"
        )
    return ExportedPolicy.load(folder, runtime=runtime)


def require_no_torch_flags(name: str, **given: bool) -> None:
    """Raise BlmError if a setting of torch was `given` for an exported policy."""
    wrong = [f"--{flag.replace('_', '-')}" for flag, is_given in given.items() if is_given]
    if wrong:
        raise BlmError(
            f"{', '.join(wrong)}: a setting of checkpoints, and '{name}' is an exported policy; leave it "
            "out, or name the checkpoint"
        )


@dataclass(frozen=True)
class ExportSource:
    """An exported policy that was found but is not loaded yet, as `ModelSource` is for checkpoints."""

    where: str
    kind: Literal["export"] = "export"
    has_policy: bool = True
    has_chat: bool = False
    warning: str = ""


def find_export(name: str) -> ExportSource | None:
    """Return the exported policy of this folder; None if the folder is none."""
    return ExportSource(name) if is_export(name) else None
