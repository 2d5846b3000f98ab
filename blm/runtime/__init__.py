"""The loop beside a real arm: every command inside the user's limits, and a stop when in doubt."""

from blm.runtime.arm import Arm, RobotLike, Units
from blm.runtime.limits import Limits, Safety, StoppedError
from blm.runtime.log import RunLog
from blm.runtime.loop import Driver
from blm.runtime.states import Report, State

__all__ = [
    "Arm", "Driver", "Limits", "Report", "RobotLike", "RunLog", "Safety", "State", "StoppedError", "Units",
]  # fmt: skip
