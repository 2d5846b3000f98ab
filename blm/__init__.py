"""Boundless: one embodied model that answers questions about a scene and controls four robot arms.

The flow, one artifact per arrow:

    robots x tasks --planner--> episodes/ (LeRobotDataset v3.0)
    scenes + episodes --questions--> corpora/ (messages JSONL) --Stage I--> backbone/ (stock folder), frozen
    episodes + backbone --tap H_k--> intents/ (cached) --Stage II: bridge + DiT--> checkpoint/
    checkpoint/ --> eval digital, eval physical --> results/*.json --> report.html
    checkpoint/ --> serve (chat + actions)

`BLM.from_pretrained(folder)` returns a model with two methods: `answer(messages)` and `act(observation)`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` would delay the command line (see blm/cli/__init__.py)
if TYPE_CHECKING:
    from typing import Any

    from blm.app.pretrained import BLM
    from blm.types import ActionChunk, ActionSpace, BlmError, Episode, Image, Message, Observation

__version__ = "0.1.0"
__all__ = ["BLM", "ActionChunk", "ActionSpace", "BlmError", "Episode", "Image", "Message", "Observation"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `BLM` needs torch for checkpoints, the others need NumPy."""
    if name not in __all__:
        raise AttributeError(f"module 'blm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module("blm.app.pretrained" if name == "BLM" else "blm.types"), name)
