"""Judge any Policy and any Chat: protocols as data, every row kept, every score with n and an interval."""

from blm.evaluation.baselines import RandomPolicy, ZeroPolicy
from blm.evaluation.digital import BENCHMARKS, evaluate_digital
from blm.evaluation.physical import evaluate_physical
from blm.evaluation.protocol import (
    EVALUATION_SEEDS,
    STAGE1_HELD_OUT_SEEDS,
    TRAINING_SEEDS,
    DigitalProtocol,
    PhysicalProtocol,
)
from blm.evaluation.results import compare

__all__ = [
    "BENCHMARKS",
    "EVALUATION_SEEDS",
    "STAGE1_HELD_OUT_SEEDS",
    "TRAINING_SEEDS",
    "DigitalProtocol",
    "PhysicalProtocol",
    "RandomPolicy",
    "ZeroPolicy",
    "compare",
    "evaluate_digital",
    "evaluate_physical",
]
