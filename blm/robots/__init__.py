"""The robot arms, by name. To add one: write its file, add its line here."""

from blm.robots.build import add_robot, look_at
from blm.robots.panda import PANDA
from blm.robots.spec import RobotSpec, Workspace
from blm.robots.widowxai import WIDOWXAI
from blm.robots.xarm6 import XARM6
from blm.robots.xarm7 import XARM7

ROBOTS = {"panda": PANDA, "xarm6": XARM6, "xarm7": XARM7, "widowxai": WIDOWXAI}

__all__ = ["ROBOTS", "RobotSpec", "Workspace", "add_robot", "look_at"]
