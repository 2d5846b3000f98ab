"""Trossen WidowX AI (follower).

Joint frames, limits, efforts, masses and finger travel: trossen_arm_mujoco wxai_follower.xml; its
link 6 is split into link 6 and hand, and its servos are at least twice as stiff here. Speed limits:
trossen_arm_moveit joint_limits.yaml; the accelerations are our choice (that file's 3.14 rad/s^2 is
a cautious one). Workspace, cube size, grasp force and the absence of reset noise: ManiSkill 3.0.1,
widowxai and PickCube-v1.
"""

from __future__ import annotations

from math import pi

from blm.robots.spec import (
    IDENTITY,
    Gripper,
    Joint,
    Link,
    Mount,
    RobotSpec,
    Workspace,
    box,
    capsule,
    cylinder,
)

_DOWN = (0.0, -1.0, 0.0)
_WHOLE, _HALF, _FAST = 2 * pi, pi / 2, 3 * pi
WIDOWXAI = RobotSpec(
    name="widowxai",
    title="Trossen WidowX AI",
    base_position=(-0.615, 0.0, 0.0),
    base=(
        box((0, 0, 0.004), (0.075, 0.06, 0.004), "grey"),
        cylinder((0, 0, 0.008), (0, 0, 0.056), "black", 0.045),
    ),
    links=(
        Link((0, 0, 0.05725), IDENTITY, 0.152704, Joint(-3.05433, 3.05433, _WHOLE, 10.0, 27, 400), (
            cylinder((0, 0, 0), (0, 0, 0.02), "grey", 0.042),
            cylinder((0.02, -0.042, 0.04625), (0.02, 0.042, 0.04625), "black", 0.034),
        )),
        Link((0.02, 0, 0.04625), IDENTITY, 1.15316, Joint(0, pi, _WHOLE, 10.0, 27, 400, (0, 1, 0)), (
            cylinder((0, -0.048, 0), (0, 0.048, 0), "grey", 0.031),
            box((-0.131, 0, 0), (0.1, 0.022, 0.024), "black"),
            cylinder((-0.264, -0.04, 0), (-0.264, 0.04, 0), "black", 0.033),
        )),
        Link((-0.264, 0, 0), IDENTITY, 0.686666, Joint(0, 2.35619, _WHOLE, 10.0, 27, 400, _DOWN), (
            cylinder((0, -0.046, 0), (0, 0.046, 0), "grey", 0.03),
            capsule((0, 0, 0), (0.05, 0, 0.06), "black", 0.022),
            box((0.13, 0, 0.06), (0.09, 0.020, 0.022), "black"),
            cylinder((0.245, -0.034, 0.06), (0.245, 0.034, 0.06), "black", 0.03),
        )),
        Link((0.245, 0, 0.06), IDENTITY, 0.457899, Joint(-_HALF, _HALF, _FAST, 15.0, 7, 200, _DOWN), (
            cylinder((0, -0.04, 0), (0, 0.04, 0), "grey", 0.026),
            box((0.04, 0, 0.055), (0.045, 0.024, 0.016), "black"),
        )),
        Link((0.06775, 0, 0.0455), IDENTITY, 0.366939, Joint(-_HALF, _HALF, _FAST, 15, 7, 200, (0, 0, -1)), (
            cylinder((0, 0, -0.065), (0, 0, 0.02), "black", 0.028),
        )),
        Link((0.02895, 0, -0.0455), IDENTITY, 0.32, Joint(-pi, pi, _FAST, 15.0, 7, 200, (1, 0, 0)), (
            cylinder((0, 0, 0), (0.056, 0, 0), "black", 0.029),
        )),
    ),
    gripper=Gripper(
        hand=Link((0, 0, 0), (0, 1, 0, 1), 0.35, None, (  # hand z = link 6's x (approach), hand x = its z
            box((0, 0, 0.0685), (0.031, 0.094, 0.0125), "black"),
            box((0.057, 0, 0.051), (0.0125, 0.021, 0.0115), "silver", solid=False),
            box((0.038, 0, 0.045), (0.02, 0.012, 0.006), "grey", solid=False),
        )),
        tcp=0.156,
        finger=Link((0, 0, 0.0865), IDENTITY, 0.081271, None, (
            box((0, 0.006, 0.060), (0.010, 0.006, 0.015), "grey"),
            box((0, 0.0150, 0.030), (0.013, 0.009, 0.030), "black"),
        )),
        stroke=0.044,
        grasp_force=0.2,
    ),
    home=(0, 1.9385, 1.829, -1.4612, 0, 0),
    reset_noise=0.0,
    workspace=Workspace(centre=(-0.25, 0.0), half=0.05, height=0.2, cube_half=0.018),
    wrist_camera=Mount(eye=(0.075, 0, 0.05), target=(0.01, 0, 0.18), fovy=75),
)  # fmt: skip
