"""Franka Emika Panda with the Franka hand.

Kinematics, masses, efforts, finger travel: MuJoCo Menagerie franka_emika_panda (after
franka_description). Speed and acceleration limits: Franka Control Interface documentation, "Limits
for Panda". Home pose and base: ManiSkill 3.0.1. Servo stiffness: Menagerie. Shapes: our primitives,
after the arm's published collision capsules.
"""

from __future__ import annotations

from math import pi

from blm.robots.spec import IDENTITY, Gripper, Joint, Link, Mount, RobotSpec, box, capsule, cylinder, ring

_BACK, _FORTH = (1.0, -1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)
_WIDE = 2.8973
PANDA = RobotSpec(
    name="panda",
    title="Franka Emika Panda",
    base_position=(-0.615, 0.0, 0.0),
    base=(
        box((-0.03, 0, 0.03), (0.105, 0.09, 0.03), "white"),
        cylinder((0, 0, 0.03), (0, 0, 0.14), "white", 0.075),
        ring((0, 0, 0.136), (0, 0, 0.146), "black", 0.07),
    ),
    links=(
        Link((0, 0, 0.333), IDENTITY, 4.970684, Joint(-_WIDE, _WIDE, 2.175, 15.0, 87, 4500), (
            capsule((0, 0, -0.19), (0, 0, -0.02), "white", 0.062),
            capsule((0, -0.03, 0), (0, 0.03, 0), "white", 0.062),
        )),
        Link((0, 0, 0), _BACK, 0.646926, Joint(-1.7628, 1.7628, 2.175, 7.5, 87, 4500), (
            cylinder((0, 0, -0.105), (0, 0, 0.105), "white", 0.058),
            capsule((0, 0, 0), (0, -0.17, 0), "white", 0.055),
            ring((0, 0, -0.11), (0, 0, 0.11), "black", 0.045),
        )),
        Link((0, -0.316, 0), _FORTH, 3.228604, Joint(-_WIDE, _WIDE, 2.175, 10.0, 87, 3500), (
            capsule((0, 0, -0.13), (0, 0, -0.06), "white", 0.056),
            capsule((0, 0, -0.06), (0.0825, 0, 0), "white", 0.05),
            cylinder((0.0825, -0.062, 0), (0.0825, 0.062, 0), "white", 0.05),
        )),
        Link((0.0825, 0, 0), _FORTH, 3.587895, Joint(-3.0718, -0.0698, 2.175, 12.5, 87, 3500), (
            cylinder((0, 0, -0.072), (0, 0, 0.072), "black", 0.044),
            capsule((0, 0, 0), (-0.0825, 0.10, 0), "white", 0.052),
            cylinder((-0.0825, 0.09, 0), (-0.0825, 0.15, 0), "white", 0.056),
        )),
        Link((-0.0825, 0.384, 0), _BACK, 1.225946, Joint(-_WIDE, _WIDE, 2.61, 15.0, 12, 2000), (
            capsule((0, 0, -0.22), (0, 0.03, -0.12), "white", 0.056),
            capsule((0, 0.06, -0.16), (0, 0.06, -0.02), "white", 0.034),
            capsule((0, 0.02, -0.02), (0, -0.02, 0), "white", 0.05),
        )),
        Link((0, 0, 0), _FORTH, 1.666555, Joint(-0.0175, 3.7525, 2.61, 20.0, 12, 2000), (
            cylinder((0, 0, -0.072), (0, 0, 0.060), "white", 0.046),
            capsule((0, 0, 0.0), (0.088, 0.0, 0), "white", 0.042),
            ring((0, 0, -0.076), (0, 0, 0.064), "black", 0.034),
        )),
        Link((0.088, 0, 0), _FORTH, 0.735522, Joint(-_WIDE, _WIDE, 2.61, 20.0, 12, 2000), (
            cylinder((0, 0, -0.05), (0, 0, 0.085), "white", 0.045),
            ring((0, 0, 0.055), (0, 0, 0.062), "blue", 0.047),
            cylinder((0, 0, 0.085), (0, 0, 0.107), "grey", 0.04),
        )),
    ),
    gripper=Gripper(
        hand=Link((0, 0, 0.107), (0.9238795, 0, 0, -0.3826834), 0.73, None, (  # -45 deg about z
            box((0, 0, 0.034), (0.024, 0.1, 0.032), "white"),
            ring((0, 0, -0.004), (0, 0, 0.004), "grey", 0.044),
            box((0, 0, 0.0625), (0.014, 0.094, 0.004), "black", solid=False),
        )),
        tcp=0.1034,
        finger=Link((0, 0, 0.0584), IDENTITY, 0.015, None, (
            box((0, 0.0075, 0.0430), (0.010, 0.0075, 0.0110), "black"),
            box((0, 0.0160, 0.0240), (0.010, 0.0085, 0.0240), "pearl"),
        )),
        stroke=0.04,
        grasp_force=0.5,
    ),
    home=(0, pi / 8, 0, -5 * pi / 8, 0, 3 * pi / 4, pi / 4),
    wrist_camera=Mount(eye=(0.09, 0, 0.03), target=(0.01, 0, 0.14), fovy=75),
)  # fmt: skip
