"""Evaluation of any Policy and any Chat: protocols, per-item results, scores with intervals."""

from blm.evaluation.comparison import compare, compare_cells, format_comparison
from blm.evaluation.digital import BENCHMARKS, evaluate_digital
from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.physical.episode import PrivilegedPolicy
from blm.evaluation.physical.evaluate import evaluate_physical
from blm.evaluation.physical.reference_policies import RandomPolicy, ReplayPolicy, ZeroPolicy
from blm.evaluation.physical.result import PhysicalResult
from blm.evaluation.protocol import (
    PROTOCOLS,
    DigitalProtocol,
    PhysicalProtocol,
)
from blm.evaluation.result_files import load_result
from blm.seeds import EVALUATION_SEEDS, STAGE1_HELD_OUT_SEEDS, TRAINING_SEEDS

__all__ = [
    "BENCHMARKS",
    "EVALUATION_SEEDS",
    "PROTOCOLS",
    "STAGE1_HELD_OUT_SEEDS",
    "TRAINING_SEEDS",
    "DigitalProtocol",
    "DigitalResult",
    "PhysicalProtocol",
    "PhysicalResult",
    "PrivilegedPolicy",
    "RandomPolicy",
    "ReplayPolicy",
    "ZeroPolicy",
    "compare",
    "compare_cells",
    "evaluate_digital",
    "evaluate_physical",
    "format_comparison",
    "load_result",
]
