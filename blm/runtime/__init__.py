"""Control loop of a real arm: it limits every command and stops on faults."""

from blm.runtime.arm import Arm, RobotLike, Units
from blm.runtime.limits import ArmLimits, Safety, StoppedError
from blm.runtime.log import RunLog
from blm.runtime.loop import Driver
from blm.runtime.states import RunReport, State

__all__ = [
    "Arm",
    "ArmLimits",
    "Driver",
    "RobotLike",
    "RunLog",
    "RunReport",
    "Safety",
    "State",
    "StoppedError",
    "Units",
]  # fmt: skip
