"""Inputs of the network in common formats: padding of states and actions to one width for all
robots, and the version of the control prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blm.backbone import Backbone
from blm.backbone.families import require_rendered_order
from blm.backbone.prompt import PromptOrder, control_prompt, to_chat
from blm.types import FloatArray


def pad_dims(values: FloatArray, size: int) -> Tensor:
    """Return `values` [.., d] as a float32 tensor [.., size], padded with zeros."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
    return torch.from_numpy(np.pad(values, missing).astype(np.float32))


def prompt_version(backbone: Backbone, cameras: Sequence[str], order: PromptOrder) -> str:
    """Return a short hash of the control prompt's wording and order, and of the chat template.

    Raises BlmError for a chat template that cannot write the order.
    """
    blank = np.zeros((8, 8, 3), np.uint8)
    chat = to_chat(control_prompt("{instruction}", "{robot}", dict.fromkeys(cameras, blank), order=order))
    require_rendered_order(backbone.processor, backbone.model.config.model_type, order)
    text = json.dumps([chat, backbone.processor.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
