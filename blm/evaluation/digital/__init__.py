"""Benchmarks of the digital space: questions with known answers. To add one: its file, its line here."""

from blm.evaluation.digital.scene import evaluate_digital

BENCHMARKS = {"scene": evaluate_digital}

__all__ = ["BENCHMARKS", "evaluate_digital"]
