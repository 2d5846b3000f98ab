"""The robot arms by name. To add a robot, write its file and add a line here."""

from blm.robots.build import add_robot, camera_quaternion
from blm.robots.panda import PANDA
from blm.robots.spec import RobotSpec
from blm.robots.widowxai import WIDOWXAI
from blm.robots.xarm import XARM6, XARM7

ROBOTS = {"panda": PANDA, "xarm6": XARM6, "xarm7": XARM7, "widowxai": WIDOWXAI}

__all__ = ["ROBOTS", "RobotSpec", "add_robot", "camera_quaternion"]
