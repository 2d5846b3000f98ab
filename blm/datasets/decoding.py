"""Decode the normalised actions of a network to chunks of absolute targets.

Shape legend: B batch, H action steps, D padded dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blm.datasets.transforms import RobotTransforms
from blm.types import ActionChunk, FloatArray, Observation, PolicyContract


def decode_chunks(
    contract: PolicyContract,
    transforms: Mapping[str, RobotTransforms],
    observations: Sequence[Observation],
    normalised: FloatArray,
) -> list[ActionChunk]:
    """Decode normalised actions [B, H, D] in float64 to chunks of absolute targets within the limits.

    Relative actions are added to the state of their observation.
    """
    chunks = []
    for o, actions_HD in zip(observations, normalised, strict=True):
        space = contract.action_spaces[o.robot]
        actions = transforms[o.robot].actions.inverse(actions_HD[:, : space.dim], o.state)
        assert np.isfinite(actions).all(), "the policy produced an action that is not finite"
        clipped = np.clip(actions, space.low, space.high).astype(np.float32)
        chunks.append(ActionChunk(actions=clipped, rate_hz=space.rate_hz))
    return chunks
