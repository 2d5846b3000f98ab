"""Benchmarks of the digital space: questions with known answers. To add one: its file, its line here."""

from collections.abc import Mapping

from blm.evaluation.digital.agibot import AGIBOT
from blm.evaluation.digital.benchmark import Benchmark
from blm.evaluation.digital.easy_vqa import EASY_VQA
from blm.evaluation.digital.egothink import EGOTHINK
from blm.evaluation.digital.erqa import ERQA
from blm.evaluation.digital.holoassist import HOLOASSIST
from blm.evaluation.digital.refspatial import REFSPATIAL
from blm.evaluation.digital.robofail import ROBOFAIL
from blm.evaluation.digital.robovqa import ROBOVQA
from blm.evaluation.digital.runner import evaluate_digital
from blm.evaluation.digital.scene_questions import SCENE
from blm.evaluation.digital.sharerobot import SHAREROBOT
from blm.evaluation.digital.where2place import WHERE2PLACE

BENCHMARKS: Mapping[str, Benchmark] = {
    "robovqa": ROBOVQA,
    "agibot": AGIBOT,
    "holoassist": HOLOASSIST,
    "robofail": ROBOFAIL,
    "egothink": EGOTHINK,
    "sharerobot": SHAREROBOT,
    "erqa": ERQA,
    "where2place": WHERE2PLACE,
    "refspatial": REFSPATIAL,
    "easy_vqa": EASY_VQA,
    "scene": SCENE,
}
"""The six of BLM1's table first."""

__all__ = ["BENCHMARKS", "Benchmark", "evaluate_digital"]
