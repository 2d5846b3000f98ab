"""Question benchmarks: questions with reference answers.

A new benchmark needs a file in `benchmarks` and a line in BENCHMARKS.
"""

from collections.abc import Mapping

from blm.evaluation.digital.benchmarks.agibot import AGIBOT
from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.easy_vqa import EASY_VQA
from blm.evaluation.digital.benchmarks.egothink import EGOTHINK
from blm.evaluation.digital.benchmarks.erqa import ERQA
from blm.evaluation.digital.benchmarks.holoassist import HOLOASSIST
from blm.evaluation.digital.benchmarks.refspatial import REFSPATIAL
from blm.evaluation.digital.benchmarks.robofail import ROBOFAIL
from blm.evaluation.digital.benchmarks.robovqa import ROBOVQA
from blm.evaluation.digital.benchmarks.scene_questions import SCENE, SCENE_FREE
from blm.evaluation.digital.benchmarks.sharerobot import SHAREROBOT
from blm.evaluation.digital.benchmarks.where2place import WHERE2PLACE
from blm.evaluation.digital.runner import evaluate_digital

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
    "scene_free": SCENE_FREE,
}
"""Name -> benchmark; the six of BLM1's table come first."""

__all__ = ["BENCHMARKS", "Benchmark", "evaluate_digital"]
