"""`BLM`: one checkpoint, one copy of frozen weights, two methods: `answer` and `act`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blm.backbone import Backbone
from blm.backbone.generation import Generation
from blm.backbone.sight import remember_sight
from blm.policy.checkpoint import RELEASES, folder_of
from blm.policy.policy import CheckpointPolicy
from blm.types import ActionChunk, Message, Observation, PolicyContract, UnknownNameError


class BLM:
    """Answers questions and drives robots from one loaded checkpoint. It is a `Policy` and a `Chat`.

    A question about the frame that an action was just chosen for does not look at it again.
    """

    def __init__(self, policy: CheckpointPolicy) -> None:
        self.policy = policy
        remember_sight(policy.backbone)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, device: str = "cpu") -> BLM:
        """Load a checkpoint folder, or a release by name.

        Raises UnknownNameError for what is neither, BlmError for a missing or altered file.
        """
        if not (folder := folder_of(name_or_folder)).is_dir():
            raise UnknownNameError("checkpoint", str(name_or_folder), [*RELEASES, "<a folder from Stage II>"])
        return cls(CheckpointPolicy.load(folder, device=device))

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    @property
    def contract(self) -> PolicyContract:
        return self.policy.contract

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the greedy answer to a conversation; all blocks of the backbone run."""
        return self.backbone.answer(messages, max_tokens=max_tokens)

    def speaker(self) -> Generation:
        """Return what gives several answers at once, token by token."""
        return Generation(self.backbone)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next action chunk; only blocks 1..k of the backbone run."""
        return self.policy.act(observation)

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return a chunk for each observation, from one pass."""
        return self.policy.act_batch(observations)

    def reset(self) -> None:
        self.policy.reset()
