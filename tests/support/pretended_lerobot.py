"""A pretended LeRobot: a Python that runs the server with a policy from this file, and policy folders.

The policy's `behaviour.json` says what it does wrong.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
HORIZON, EXECUTE = 6, 3


def pretended_python(folder: Path) -> Path:
    """Write an executable that takes the arguments of Python and runs this file instead."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\nshift 4\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" "{__file__}" "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def policy_folder(
    folder: Path,
    *,
    dim: int = 8,
    pictures: Mapping[str, tuple[int, int]] | None = None,
    state: str = "observation.state",
    renamed: Mapping[str, str] | None = None,
    statistics: Mapping[str, list[float]] | None = None,
    **behaviour: Any,
) -> Path:
    """Write the files of a LeRobot policy, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {"observation.images.base": (32, 32)} if pictures is None else pictures
    inputs = {name: {"type": "VISUAL", "shape": [3, *size]} for name, size in shown.items()}
    config = {
        "type": "act",
        "input_features": {state: {"type": "STATE", "shape": [dim]}, **inputs},
        "output_features": {"action": {"type": "ACTION", "shape": [dim]}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    steps: list[dict[str, Any]] = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": dict(renamed or {})}}
    ]
    if statistics is not None:
        save_file(
            {name: np.array(one, np.float32) for name, one in statistics.items()}, folder / "s.safetensors"
        )
        steps.append({"registry_name": "normalizer_processor", "config": {}, "state_file": "s.safetensors"})
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "before", "steps": steps}))
    (folder / "behaviour.json").write_text(json.dumps({"dim": dim, **behaviour}))
    return folder


class Model:
    """Holds the measured state; what else it does is in behaviour.json."""

    def __init__(self, folder: Path, device: str) -> None:
        self.does: dict[str, Any] = json.loads((folder / "behaviour.json").read_text())
        self.execute = EXECUTE
        self.sessions = 0
        print(f"loading on {device}")
        if "load_s" in self.does:
            time.sleep(self.does["load_s"])
        if "load_error" in self.does:
            raise RuntimeError(self.does["load_error"])
        (folder / "pid").write_text(str(os.getpid()))

    def session(self) -> Session:
        self.sessions += 1
        return Session(self.does, probing=self.sessions == 1)


class Session:
    def __init__(self, does: dict[str, Any], probing: bool) -> None:
        self.does, self.probing, self.calls = does, probing, 0

    def act(self, inputs: Mapping[str, np.ndarray], task: str, seed: int) -> np.ndarray:
        """Return the state; or facts about the inputs, with "facts" """
        self.calls += 1
        states = [value for value in inputs.values() if value.dtype == np.float32]
        actions = np.repeat(np.concatenate(states)[None], HORIZON, axis=0)
        fault = None if self.probing else self.does.get("fault")
        if fault == "dies" and self.calls > 1:
            print("out of memory, says the pretended LeRobot", file=sys.stderr)
            os._exit(9)
        if fault == "raises":
            raise RuntimeError("shapes cannot be multiplied")
        if fault == "slow":
            time.sleep(5)
        if fault == "nan":
            actions[0, 0] = np.nan
        if fault == "short":
            actions = actions[:, 1:]
        if self.does.get("wrong_shape"):
            actions = actions[:, 1:]
        if fault == "facts":
            pictures = [value for value in inputs.values() if value.dtype == np.uint8]
            facts = [self.calls, seed, len(task), *(picture.shape[0] for picture in pictures)]
            facts += [picture.mean() for picture in pictures]
            actions[1, : len(facts)] = facts
        return actions


if __name__ == "__main__":
    from blm.serving.lerobot.server import run

    run(Model)
