"""Boundless: one embodied model that answers questions about a scene and controls four robot arms.

The flow, one artifact per arrow:

    robots x tasks --planner--> episodes/ (LeRobotDataset v3.0)
    scenes + episodes --questions--> corpora/ (messages JSONL) --Stage I--> backbone/ (stock folder), frozen
    episodes + backbone --tap H_k--> intents/ (cached) --Stage II: bridge + DiT--> checkpoint/
    checkpoint/ --> eval digital, eval physical --> results/*.json --> report.html
    checkpoint/ --> serve (chat + actions)

`BLM.from_pretrained(folder)` gives the two methods that matter: `answer(messages)` and `act(observation)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blm.types import ActionChunk, ActionSpace, BlmError, Episode, Image, Message, Observation

if TYPE_CHECKING:
    from blm.app.model import BLM

__version__ = "0.1.0"
__all__ = ["BLM", "ActionChunk", "ActionSpace", "BlmError", "Episode", "Image", "Message", "Observation"]


def __getattr__(name: str) -> Any:
    """Load `BLM` on first use: it needs torch, which `import blm` must not pay for."""
    if name == "BLM":
        from blm.app.model import BLM

        return BLM
    raise AttributeError(f"module 'blm' has no attribute '{name}'")
