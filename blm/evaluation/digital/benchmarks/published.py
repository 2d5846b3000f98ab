"""The digital results that BLM1 publishes (arXiv 2510.24161), in percent; not measured here.

Source: the tables on https://boundless-large-model.github.io. The order of columns is the paper's.
"""

from __future__ import annotations

SIX = ("robovqa", "agibot", "holoassist", "robofail", "egothink", "sharerobot")
"""Benchmarks of the paper's average."""
COUNTS = (110, 100, 100, 100, 700, 4100)
"""Number of questions of each. That of ShareRobot is inferred: every published value fits 410 questions of
each of its ten kinds."""
EXACT = 4
"""The first so many are scored right or wrong; a judge grades the others."""

DIGITAL: dict[str, tuple[float, ...]] = {
    "GPT-4o": (75.45, 38.00, 54.00, 58.00, 72.42, 61.30),
    "Claude-3.5 Sonnet": (64.55, 32.00, 46.00, 58.00, 48.54, 53.20),
    "LLaVA-OneVision-7B": (75.45, 29.00, 31.00, 58.00, 59.46, 40.41),
    "InternVL2.5-8B": (69.09, 29.00, 37.00, 60.00, 61.54, 45.06),
    "Qwen2.5-VL-7B-Instruct": (86.36, 42.00, 49.00, 64.00, 57.00, 46.67),
    "Cosmos-7B": (90.91, 39.00, 45.00, 62.00, 56.67, 57.70),
    "Magma-8B": (47.27, 28.00, 35.00, 49.00, 48.83, 35.17),
    "VeBrain-7B": (85.45, 41.00, 44.00, 55.00, 59.33, 51.28),
    "ChatVLA-2B": (60.91, 38.00, 36.00, 52.00, 47.71, 35.80),
    "RoboBrain2-7B": (72.73, 31.00, 48.00, 54.00, 61.21, 51.88),
    "BLM1": (95.45, 47.00, 56.00, 66.00, 59.42, 65.40),
}

EGOTHINK_KINDS = (
    *("activity", "forecast", "location", "spatial", "affordance", "attribute", "existence"),
    *("assistance", "navigation", "comparing", "counting", "situated"),
)
EGOTHINK: dict[str, tuple[float, ...]] = {
    "GPT-4o": (70.5, 69.5, 91, 74, 74, 88, 71, 73, 32, 75, 68, 83),
    "Claude-3.5 Sonnet": (46, 44.5, 80, 38, 46, 63, 48, 60, 11, 49, 38, 59),
    "LLaVA-OneVision-7B": (51.5, 58, 90, 64, 58, 74, 69, 47, 15, 69, 46, 72),
    "InternVL2.5-8B": (60.5, 56, 87, 68, 66, 72, 71, 54, 27, 64, 58, 55),
    "Qwen2.5-VL-7B-Instruct": (58, 50, 74, 79, 61, 65, 62, 54, 20, 60, 48, 53),
    "Cosmos-7B": (54.5, 47.5, 84, 68, 55, 65, 62, 52, 18, 63, 48, 63),
    "Magma-8B": (32, 52, 78, 70, 58, 78, 62, 9, 9, 58, 34, 46),
    "VeBrain-7B": (63, 56, 90, 67, 64, 68, 73, 39, 13, 60, 58, 61),
    "ChatVLA-2B": (46.5, 47, 75, 64, 44, 69, 58, 20, 8, 40, 36, 65),
    "RoboBrain2-7B": (53, 46.5, 93, 70, 75, 79, 77, 49, 18, 62, 44, 68),
    "BLM1": (55, 51, 81, 71, 61, 76, 63, 55, 25, 60, 56, 59),
}
"""Scores by EGOTHINK_KINDS; 100 questions for the first two kinds, 50 for the others."""

SHAREROBOT_KINDS = (
    *("discriminative_affordance_negative", "discriminative_affordance_positive", "future_prediction"),
    *("generative_affordance", "past_description", "planning_remaining_steps", "planning"),
    *("planning_with_context", "success_negative", "success_positive"),
)
SHAREROBOT: dict[str, tuple[float, ...]] = {
    "GPT-4o": (95.61, 54.15, 63.17, 29.02, 33.66, 75.49, 62.80, 86.46, 36.59, 76.10),
    "Claude-3.5 Sonnet": (65.73, 65.24, 50.49, 23.05, 15.12, 68.78, 60.98, 75.73, 36.46, 70.37),
    "LLaVA-OneVision-7B": (69.27, 72.20, 29.88, 13.90, 11.22, 26.71, 40.00, 44.39, 38.05, 58.54),
    "InternVL2.5-8B": (80.73, 62.56, 34.76, 9.76, 13.90, 38.90, 47.68, 56.95, 41.83, 63.54),
    "Qwen2.5-VL-7B-Instruct": (99.02, 32.20, 50.12, 13.90, 21.22, 41.46, 46.22, 56.22, 93.17, 13.17),
    "Cosmos-7B": (93.17, 42.93, 70.37, 25.12, 27.93, 64.39, 61.34, 82.32, 48.29, 60.98),
    "Magma-8B": (100, 10.24, 39.39, 3.66, 5.37, 33.05, 26.59, 32.44, 96.10, 4.88),
    "VeBrain-7B": (84.88, 80.49, 52.20, 17.68, 19.27, 47.20, 40.00, 57.44, 53.66, 60.00),
    "ChatVLA-2B": (87.32, 57.56, 27.20, 11.46, 9.63, 0.24, 45.37, 25.12, 43.90, 50.24),
    "RoboBrain2-7B": (65.12, 77.07, 58.78, 22.07, 22.44, 41.59, 47.32, 69.27, 40.98, 74.15),
    "BLM1": (94.63, 84.88, 73.29, 29.15, 30.24, 72.80, 60.49, 85.73, 51.71, 71.22),
}
"""Scores by SHAREROBOT_KINDS; 410 questions each."""
