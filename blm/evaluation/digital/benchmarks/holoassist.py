"""HoloAssist, as in Cosmos-Reason1-Benchmark: the next action of a person who wears the camera."""

from __future__ import annotations

from blm.evaluation.digital.benchmarks.cosmos import cosmos

HOLOASSIST = cosmos(
    "holoassist",
    "HoloAssist",
    clips="its clips are not in it: process_raw_data.py of nvidia-cosmos/cosmos-reason1, "
    "examples/benchmark/tools/eval, cuts them from the videos of holoassist.github.io",
    licence="clips: HoloAssist (see holoassist.github.io)",
)
