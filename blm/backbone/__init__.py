"""The MLLM: load, prompt, answer, tap hidden states, freeze. Importing it registers two eyes."""

from blm.backbone.backbone import BACKBONES, Backbone, Inputs, Tapped, build_nano, build_smol
from blm.backbone.prompt import control_prompt, question_prompt, video_prompt

__all__ = [
    "BACKBONES",
    "Backbone",
    "Inputs",
    "Tapped",
    "build_nano",
    "build_smol",
    "control_prompt",
    "question_prompt",
    "video_prompt",
]
