"""The MLLM: load, prompt, answer, tap hidden states, freeze. Importing it registers nano's eye."""

from blm.backbone.backbone import BACKBONES, Backbone, Inputs, Tapped, build_nano
from blm.backbone.prompt import control_prompt, question_prompt, video_prompt

__all__ = [
    "BACKBONES",
    "Backbone",
    "Inputs",
    "Tapped",
    "build_nano",
    "control_prompt",
    "question_prompt",
    "video_prompt",
]
