"""RoboFail, as in Cosmos-Reason1-Benchmark: failures of a robot that follows a plan."""

from __future__ import annotations

from blm.evaluation.digital.benchmarks.cosmos import cosmos

ROBOFAIL = cosmos(
    "robofail",
    "RoboFail",
    clips="its clips are the REFLECT videos, robot-reflect.github.io",
    licence="clips: REFLECT, MIT",
)
