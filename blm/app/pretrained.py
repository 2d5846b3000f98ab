"""`BLM`, a model that answers and acts from one checkpoint.

torch is imported when a checkpoint is loaded; an exported policy does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blm.app.exported import RuntimeChoice, load_exported
from blm.edge.folder import is_export
from blm.edge.policy import ExportedPolicy
from blm.types import ActionChunk, BlmError, Message, Observation, PolicyContract, UnknownNameError

if TYPE_CHECKING:
    from blm.backbone import Backbone
    from blm.backbone.compilation import CompileMode
    from blm.backbone.generation.generator import Generation
    from blm.backbone.precision import WeightDtype
    from blm.policy.policy import CheckpointPolicy


class BLM:
    """A checkpoint that answers questions and controls robots: both a `Policy` and a `Chat`.

    Vision features of recent images are cached: a question about a frame for which an action was
    just chosen does not run the vision tower again.
    """

    def __init__(self, policy: CheckpointPolicy | ExportedPolicy) -> None:
        self.policy = policy
        if not isinstance(policy, ExportedPolicy):
            from blm.backbone.vision_cache import cache_vision_features

            cache_vision_features(policy.backbone)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: WeightDtype | None = None,
        attn_implementation: str | None = None,
        actions_only: bool = False,
        compile: CompileMode = "none",
        runtime: RuntimeChoice | None = None,
    ) -> BLM:
        """Load a checkpoint folder, a release by name, or the folder of an exported policy.

        `dtype` is the precision of the backbone: by default bfloat16 on CUDA, and that of the
        checkpoint elsewhere. `attn_implementation` is its attention implementation in transformers.
        With `actions_only` the blocks and the head that only answers need are not loaded, and
        asking for an answer raises BlmError. `compile` compiles what chooses actions.
        With the `runtime` "onnx" or "openvino", only an exported folder of that form is loaded; torch
        is then not imported, the other settings do not apply, and the model does not answer.
        Raises UnknownNameError for any other name, and BlmError for a missing or altered file.
        """
        if runtime != "torch" and (runtime is not None or is_export(name_or_folder)):
            return cls(load_exported(Path(name_or_folder), runtime))
        from blm.app.model import check_device
        from blm.policy.checkpoint import RELEASES, checkpoint_folder, checkpoint_kind
        from blm.policy.policy import CheckpointPolicy

        if is_export(name_or_folder):
            raise BlmError(f"'{name_or_folder}' is an exported policy, and torch runs checkpoints")
        if not (folder := checkpoint_folder(name_or_folder)).is_dir():
            raise UnknownNameError("checkpoint", str(name_or_folder), [*RELEASES, "<a folder from Stage II>"])
        if (kind := checkpoint_kind(folder)) != "blm":
            raise BlmError(
                f"checkpoint '{folder}' is a {kind}, which cannot chat; `blm serve` serves its actions"
            )
        check_device(device)
        policy = CheckpointPolicy.load(
            folder,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            actions_only=actions_only,
            compile=compile,
        )
        return cls(policy)

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone that answers and acts. Raises BlmError for an exported policy."""
        if isinstance(self.policy, ExportedPolicy):
            raise BlmError("an exported policy chooses actions and does not chat; load its checkpoint")
        return self.policy.backbone

    @property
    def contract(self) -> PolicyContract:
        """Inputs and outputs of the policy."""
        return self.policy.contract

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the greedy answer to a conversation; all blocks of the backbone run."""
        return self.backbone.answer(messages, max_tokens=max_tokens)

    def generator(self) -> Generation:
        """Return a generator of several answers at once, token by token."""
        from blm.backbone.generation.generator import Generation

        return Generation(self.backbone)

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next action chunk; only blocks 1..k of the backbone run."""
        return self.policy.act(observation)

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return an action chunk for each observation, computed in one batch."""
        return self.policy.act_batch(observations)

    def reset(self) -> None:
        """Forget the previous episode."""
        self.policy.reset()
