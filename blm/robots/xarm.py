"""UFACTORY xArm 6 and xArm 7 with the UFACTORY gripper; the 7 has one more joint in the upper arm.

Joint frames, limits and efforts: xarm_ros2 xarm6.urdf.xacro and xarm7.urdf.xacro. Masses: UFACTORY,
"Kinematic and Dynamic Parameters of xArm 6", model 1; those of the 7's links 2 to 4 are our
estimate. Speed and acceleration: UFACTORY user manual, 180 deg/s and 1145 deg/s^2. Servo stiffness:
MuJoCo Menagerie ufactory_xarm7. The real gripper's fingers swing on a linkage; ours slide in
parallel, with its 85 mm stroke and its tool centre point 172 mm from the flange
(xarm_gripper.urdf.xacro). Shapes: our primitives.
"""

from __future__ import annotations

from math import pi, radians

from blm.robots.spec import IDENTITY, Gripper, Joint, Link, Mount, RobotSpec, box, capsule, cylinder, ring

_SPEED, _ACCELERATION = pi, radians(1145)
_BACK, _FORTH = (1.0, -1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)
_BASE = (
    cylinder((0, 0, 0), (0, 0, 0.02), "grey", 0.063),
    cylinder((0, 0, 0.02), (0, 0, 0.19), "white", 0.055),
    ring((0, 0, 0.19), (0, 0, 0.2), "silver", 0.056),
)
_SHOULDER = (
    capsule((0, 0, -0.065), (0, 0, -0.02), "white", 0.053),
    cylinder((0, -0.05, 0), (0, 0.06, 0), "white", 0.053),
    ring((0, -0.054, 0), (0, -0.05, 0), "grey", 0.045),
)
_FOREARM = (
    cylinder((0, 0, -0.085), (0, 0, -0.02), "white", 0.039),
    ring((0, 0, -0.085), (0, 0, -0.08), "silver", 0.041),
    capsule((0, 0, -0.02), (0, 0.02, 0), "white", 0.037),
    cylinder((0, 0, 0), (0, 0.058, 0), "white", 0.039),
    ring((0, 0.058, 0), (0, 0.062, 0), "grey", 0.033),
)
_WRIST = (
    cylinder((0, 0, 0), (0, 0, 0.054), "white", 0.039),
    ring((0, 0, 0.054), (0, 0, 0.058), "grey", 0.033),
    capsule((0, 0, 0.012), (0.076, 0.02, 0), "white", 0.036),
    cylinder((0.076, -0.03, 0), (0.076, 0.075, 0), "white", 0.039),
    ring((0.076, -0.034, 0), (0.076, -0.03, 0), "grey", 0.033),
)
_FLANGE = (cylinder((0, 0, -0.022), (0, 0, 0), "silver", 0.038),)
_GRIPPER = Gripper(
    hand=Link((0, 0, 0), IDENTITY, 0.54, None, (
        box((0, 0, 0.045), (0.022, 0.045, 0.045), "black"),
        box((0, 0, 0.098), (0.018, 0.065, 0.010), "grey"),
    )),
    tcp=0.172,
    finger=Link((0, 0, 0.105), IDENTITY, 0.08, None, (
        box((0, 0.006, 0.055), (0.011, 0.006, 0.022), "grey"),
        box((0, 0.014, 0.030), (0.011, 0.009, 0.034), "black"),
    )),
    stroke=0.0425,
    grasp_force=0.5,
)  # fmt: skip
_WRIST_CAMERA = Mount(eye=(0.085, 0, 0.06), target=(0.01, 0, 0.2), fovy=75)


def _joint(low: float, high: float, effort: float, stiffness: float) -> Joint:
    return Joint(low, high, _SPEED, _ACCELERATION, effort, stiffness)


XARM6 = RobotSpec(
    name="xarm6",
    title="UFACTORY xArm 6",
    base_position=(-0.5, 0.0, 0.0),  # nearer than ManiSkill's -0.522: a vertical tool reaches every goal
    base=_BASE,
    links=(
        Link((0, 0, 0.267), IDENTITY, 2.177, _joint(-2 * pi, 2 * pi, 50, 1500), _SHOULDER),
        Link((0, 0, 0), _BACK, 2.011, _joint(-2.059, 2.0944, 50, 1500), (
            cylinder((0, 0, 0.06), (0, 0, 0.125), "white", 0.05),
            ring((0, 0, 0.125), (0, 0, 0.129), "grey", 0.043),
            capsule((0, 0, 0.085), (0, -0.23, 0.075), "white", 0.043),
            capsule((0, -0.23, 0.075), (0.0535, -0.2845, 0.07), "white", 0.043),
            cylinder((0.0535, -0.2845, 0.04), (0.0535, -0.2845, 0.11), "white", 0.046),
            ring((0.0535, -0.2845, 0.11), (0.0535, -0.2845, 0.114), "grey", 0.04),
        )),
        Link((0.0535, -0.2845, 0), IDENTITY, 1.725, _joint(-3.927, 0.19198, 32, 1000), (
            cylinder((0, 0, -0.045), (0, 0, 0.04), "white", 0.046),
            ring((0, 0, -0.049), (0, 0, -0.045), "grey", 0.04),
            capsule((0, 0, 0), (0.0775, 0.08, 0), "white", 0.043),
            capsule((0.0775, 0.08, 0), (0.0775, 0.22, 0), "white", 0.043),
        )),
        Link((0.0775, 0.3425, 0), _BACK, 1.211, _joint(-2 * pi, 2 * pi, 32, 1000), _FOREARM),
        Link((0, 0, 0), _FORTH, 1.206, _joint(-1.69297, pi, 32, 1000), _WRIST),
        Link((0.076, 0.097, 0), _BACK, 0.17, _joint(-2 * pi, 2 * pi, 20, 800), _FLANGE),
    ),
    gripper=_GRIPPER,
    home=(0, 0.1247, -1.1734, 0, 1.0487, 0),
    wrist_camera=_WRIST_CAMERA,
)  # fmt: skip
XARM7 = RobotSpec(
    name="xarm7",
    title="UFACTORY xArm 7",
    base_position=(-0.55, 0.0, 0.0),  # a vertical tool reaches every goal from here, not from -0.615
    base=_BASE,
    links=(
        Link((0, 0, 0.267), IDENTITY, 2.177, _joint(-2 * pi, 2 * pi, 50, 1500), _SHOULDER),
        Link((0, 0, 0), _BACK, 1.6, _joint(-2.059, 2.0944, 50, 1500), (
            cylinder((0, 0, 0.05), (0, 0, 0.075), "white", 0.053),
            ring((0, 0, 0.075), (0, 0, 0.079), "grey", 0.045),
            capsule((0, 0, 0.01), (0, -0.15, 0), "white", 0.048),
            ring((0, -0.195, 0), (0, -0.19, 0), "silver", 0.05),
        )),
        Link((0, -0.293, 0), _FORTH, 1.4, _joint(-2 * pi, 2 * pi, 30, 1000), (
            cylinder((0, 0, -0.1), (0, 0, -0.02), "white", 0.046),
            capsule((0, 0, -0.02), (0.0525, 0, 0), "white", 0.042),
            cylinder((0.0525, -0.045, 0), (0.0525, 0.05, 0), "white", 0.046),
            ring((0.0525, 0.05, 0), (0.0525, 0.054, 0), "grey", 0.04),
        )),
        Link((0.0525, 0, 0), _FORTH, 1.7, _joint(-0.19198, 3.927, 30, 1000), (
            cylinder((0, 0, 0.045), (0, 0, 0.075), "white", 0.046),
            ring((0, 0, 0.075), (0, 0, 0.079), "grey", 0.04),
            capsule((0, 0, 0.02), (0.0775, -0.08, 0), "white", 0.043),
            capsule((0.0775, -0.08, 0), (0.0775, -0.22, 0), "white", 0.043),
        )),
        Link((0.0775, -0.3425, 0), _FORTH, 1.211, _joint(-2 * pi, 2 * pi, 30, 1000), _FOREARM),
        Link((0, 0, 0), _FORTH, 1.206, _joint(-1.69297, pi, 20, 800), _WRIST),
        Link((0.076, 0.097, 0), _BACK, 0.17, _joint(-2 * pi, 2 * pi, 20, 800), _FLANGE),
    ),
    gripper=_GRIPPER,
    home=(0, 0.2949, 0, 1.3749, 0, 1.08, 0),
    wrist_camera=_WRIST_CAMERA,
)  # fmt: skip
