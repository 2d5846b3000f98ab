"""The multimodal language model: load, prompt, answer, tap hidden states, freeze.

Importing it registers two vision towers with transformers.
"""

from blm.backbone.backbone import BACKBONES, Backbone, build_nano, build_smol
from blm.backbone.model import HiddenStates, Inputs, MultimodalModel
from blm.backbone.prompt import control_prompt, question_prompt, video_prompt

__all__ = [
    "BACKBONES",
    "Backbone",
    "HiddenStates",
    "Inputs",
    "MultimodalModel",
    "build_nano",
    "build_smol",
    "control_prompt",
    "question_prompt",
    "video_prompt",
]
