"""A policy that LeRobot loads, with its pre- and post-processors. Needs LeRobot 0.4 and its torch.

A policy that decides on one observation at a time returns its whole chunk, and `n_action_steps` of it
are executed, as in LeRobot's own loop. A policy that remembers observations or averages chunks
(Diffusion Policy, VQ-BeT, ACT with temporal ensembling) is asked at every control step, as LeRobot
does. Shape legend: H steps, K dimensions of the policy's action.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blm.serving.lerobot.server import Session
from blm.types import BlmError, FloatArray, ImageArray


class LeRobotModel:
    """A policy of any type that LeRobot registers, on one device."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load a folder that LeRobot's `save_pretrained` wrote. Raises BlmError for an adapter, and
        LeRobot's errors for a folder that it cannot load."""
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies import factory  # registers the types of policies

        config = PreTrainedConfig.from_pretrained(folder)
        if config.use_peft:
            raise BlmError(f"'{folder}' holds an adapter; merge it with its model and save that")
        config.device = device
        self.policy = factory.get_policy_class(config.type).from_pretrained(folder, config=config)
        self.policy.eval()
        self.before, self.after = factory.make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"device_processor": {"device": device}},
        )
        self.lock = threading.Lock()
        """Held while the policy runs: its sessions share the weights and torch's random numbers."""
        self.remembers = (
            config.n_obs_steps != 1
            or getattr(config, "temporal_ensemble_coeff", None) is not None
            or not hasattr(config, "chunk_size")
        )
        """Whether an action depends on earlier observations, so that the policy must see every step."""
        self.execute = 1 if self.remembers else int(config.n_action_steps)

    def session(self) -> Session:
        """Return the policy at the begin of an episode, with the same weights in memory."""
        policy = self.policy
        if self.remembers:
            shared = {id(one): one for one in (*policy.parameters(), *policy.buffers())}
            policy = copy.deepcopy(policy, shared)
        policy.reset()
        return _Episode(self, policy)


class _Episode:
    """A policy during one episode."""

    def __init__(self, model: LeRobotModel, policy: Any) -> None:
        self._model, self._policy = model, policy

    def act(self, inputs: Mapping[str, ImageArray | FloatArray], task: str, seed: int) -> FloatArray:
        """Return actions [H, K] in the units of the policy's training data."""
        import torch

        batch: dict[str, Any] = {name: _tensor(value) for name, value in inputs.items()}
        with self._model.lock, torch.inference_mode():
            torch.manual_seed(seed)
            batch = self._model.before({**batch, "task": [task]})
            if self._model.remembers:
                steps = [self._policy.select_action(batch)]
            else:
                steps = [*self._policy.predict_action_chunk(batch).unbind(1)]
            actions = torch.cat([self._model.after(step) for step in steps])  # each of them is [1, K]
        return actions.to("cpu", torch.float32).numpy()


def _tensor(value: ImageArray | FloatArray) -> Any:
    """Return a batch of one: a picture as float32 [1, 3, height, width] in 0..1, or a vector."""
    import torch

    tensor = torch.from_numpy(np.array(value))
    if tensor.dtype == torch.uint8:
        tensor = tensor.permute(2, 0, 1).contiguous().to(torch.float32) / 255
    return tensor[None]
