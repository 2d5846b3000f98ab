"""AgiBot, as in Cosmos-Reason1-Benchmark: the next subtask of a humanoid robot."""

from __future__ import annotations

from blm.evaluation.digital.benchmarks.cosmos import cosmos

AGIBOT = cosmos(
    "agibot",
    "AgiBot",
    clips="its clips are not in it: process_raw_data.py of nvidia-cosmos/cosmos-reason1, "
    "examples/benchmark/tools/eval, cuts them from agibot-world/AgiBotWorld-Beta, which is gated",
    licence="clips: AgiBotWorld-Beta, gated (see its card)",
)
