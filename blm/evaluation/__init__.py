"""Judge any Policy and any Chat: protocols as data, every row kept, every score with n and an interval."""

from blm.evaluation.digital import BENCHMARKS, evaluate_digital
from blm.evaluation.physical.baselines import RandomPolicy, ReplayPolicy, ZeroPolicy
from blm.evaluation.physical.episode import Privileged
from blm.evaluation.physical.evaluate import evaluate_physical
from blm.evaluation.protocol import (
    PROTOCOLS,
    DigitalProtocol,
    PhysicalProtocol,
)
from blm.evaluation.results import compare, compare_cells, format_comparison, load_result
from blm.seeds import EVALUATION_SEEDS, STAGE1_HELD_OUT_SEEDS, TRAINING_SEEDS

__all__ = [
    "BENCHMARKS",
    "EVALUATION_SEEDS",
    "PROTOCOLS",
    "STAGE1_HELD_OUT_SEEDS",
    "TRAINING_SEEDS",
    "DigitalProtocol",
    "PhysicalProtocol",
    "Privileged",
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
