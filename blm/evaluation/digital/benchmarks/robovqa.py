"""RoboVQA, as in Cosmos-Reason1-Benchmark: robots and people at household tasks."""

from __future__ import annotations

from blm.evaluation.digital.benchmarks.cosmos import cosmos

ROBOVQA = cosmos(
    "robovqa",
    "RoboVQA",
    clips="the clips are in it",
    licence="clips: CC-BY-4.0 (RoboVQA)",
)
