"""UFACTORY xArm 7 with the UFACTORY gripper: the xArm 6's modules with one more joint in the upper arm.

Joint frames, limits and efforts: xarm_ros2 xarm7.urdf.xacro. Masses of the links that it shares with the
xArm 6 are that arm's; those of links 2 to 4 are our estimate. The rest is as in xarm6.py.
"""

from __future__ import annotations

from math import pi

from blm.robots.spec import IDENTITY, Link, RobotSpec, capsule, cylinder, ring
from blm.robots.xarm6 import BACK, BASE, FLANGE, FOREARM, FORTH, GRIPPER, SHOULDER, WRIST, WRIST_CAMERA, joint

XARM7 = RobotSpec(
    name="xarm7",
    title="UFACTORY xArm 7",
    base_position=(-0.55, 0.0, 0.0),  # a vertical tool reaches every goal from here, not from -0.615
    base=BASE,
    links=(
        Link((0, 0, 0.267), IDENTITY, 2.177, joint(-2 * pi, 2 * pi, 50, 1500), SHOULDER),
        Link((0, 0, 0), BACK, 1.6, joint(-2.059, 2.0944, 50, 1500), (
            cylinder((0, 0, 0.05), (0, 0, 0.075), "white", 0.053),
            ring((0, 0, 0.075), (0, 0, 0.079), "grey", 0.045),
            capsule((0, 0, 0.01), (0, -0.15, 0), "white", 0.048),
            ring((0, -0.195, 0), (0, -0.19, 0), "silver", 0.05),
        )),
        Link((0, -0.293, 0), FORTH, 1.4, joint(-2 * pi, 2 * pi, 30, 1000), (
            cylinder((0, 0, -0.1), (0, 0, -0.02), "white", 0.046),
            capsule((0, 0, -0.02), (0.0525, 0, 0), "white", 0.042),
            cylinder((0.0525, -0.045, 0), (0.0525, 0.05, 0), "white", 0.046),
            ring((0.0525, 0.05, 0), (0.0525, 0.054, 0), "grey", 0.04),
        )),
        Link((0.0525, 0, 0), FORTH, 1.7, joint(-0.19198, 3.927, 30, 1000), (
            cylinder((0, 0, 0.045), (0, 0, 0.075), "white", 0.046),
            ring((0, 0, 0.075), (0, 0, 0.079), "grey", 0.04),
            capsule((0, 0, 0.02), (0.0775, -0.08, 0), "white", 0.043),
            capsule((0.0775, -0.08, 0), (0.0775, -0.22, 0), "white", 0.043),
        )),
        Link((0.0775, -0.3425, 0), FORTH, 1.211, joint(-2 * pi, 2 * pi, 30, 1000), FOREARM),
        Link((0, 0, 0), FORTH, 1.206, joint(-1.69297, pi, 20, 800), WRIST),
        Link((0.076, 0.097, 0), BACK, 0.17, joint(-2 * pi, 2 * pi, 20, 800), FLANGE),
    ),
    gripper=GRIPPER,
    home=(0, 0.2949, 0, 1.3749, 0, 1.08, 0),
    wrist_camera=WRIST_CAMERA,
)  # fmt: skip
