"""Add a RobotSpec to a MuJoCo model.

The contact settings were chosen by measurement so that grasps hold on these arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco
import numpy as np

from blm.robots.spec import Link, RobotSpec, Shape

DAMPING_TIME = 0.06
"""Ratio of servo damping to stiffness [s]: the time by which an arm lags behind its target."""
ARMATURE = 0.1
"""Reflected rotor inertia of an arm joint [kg m^2] (MuJoCo Menagerie panda, xarm7)."""
GRIP = 700.0
"""Stiffness of the gripper servo [N/m]: 14 N on a 4 cm cube.

Menagerie's panda has 2 N and drops it.
"""
GRIP_DAMPING = 56.0
"""Damping of the gripper servo [N s/m]."""
FINGER_ARMATURE = 0.05
"""Armature of a finger joint [kg]."""
PAD_FRICTION = (1.15, 0.005, 0.0001)
"""Friction of finger on object: the mean of ManiSkill's 2.0 (finger) and 0.3 (object).

SAPIEN combines them in this way.
"""
FINGERS = ("left_finger", "right_finger")
"""Names of the finger bodies and joints."""
COLORS = {
    "white": (0.93, 0.93, 0.92, 1.0),
    "pearl": (0.80, 0.82, 0.83, 1.0),
    "silver": (0.62, 0.64, 0.66, 1.0),
    "grey": (0.36, 0.37, 0.39, 1.0),
    "black": (0.12, 0.12, 0.13, 1.0),
    "blue": (0.10, 0.55, 0.80, 1.0),
}
_KINDS = {
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "box": mujoco.mjtGeom.mjGEOM_BOX,
}


def add_robot(spec: mujoco.MjSpec, robot: RobotSpec) -> None:
    """Add bodies, joints, actuators (in action order), the site "tcp" and the camera "wrist".

    Bodies: "base", "link1".., "hand", "left_finger", "right_finger". Joints: `robot.joint_names`,
    then the slides "left_finger", "right_finger" (0 closed, `stroke` open). The site's axes are the
    hand's.
    """
    spec.compiler.degree = False
    body = spec.worldbody.add_body(name="base", pos=robot.base_position)
    _add_shapes(body, robot.base, mass=1.0)
    chain = ["base"]
    for link, name in zip(robot.links, robot.joint_names, strict=True):
        chain.append(name.replace("joint", "link"))
        body = _add_link(body, link, chain[-1])
        _add_servo(spec, body, link, name)
    _add_gripper(spec, body, robot)
    chain.append("hand")
    pairs = [(one, other) for i, one in enumerate(chain) for other in chain[i + 1 : i + 3]]
    pairs += [(part, finger) for part in chain[-3:] for finger in FINGERS] + [FINGERS]
    # Neighbouring bodies never collide. MuJoCo excludes them itself, but not the base, which is fixed.
    for one, other in pairs:
        spec.add_exclude(bodyname1=one, bodyname2=other)


def camera_quaternion(eye: Sequence[float], target: Sequence[float], up: Sequence[float]) -> list[float]:
    """Return the quaternion (wxyz) of a camera at `eye` that looks at `target` along -z."""
    back = np.subtract(eye, target)
    right = np.cross(up, back)
    axes = np.stack([right, np.cross(back, right), back], axis=1)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, (axes / np.linalg.norm(axes, axis=0)).ravel())
    return quaternion.tolist()


def _add_link(parent: mujoco.MjsBody, link: Link, name: str) -> mujoco.MjsBody:
    body = parent.add_body(name=name, pos=link.position, quat=link.quaternion, gravcomp=1)
    _add_shapes(body, link.shapes, link.mass)
    return body


def _add_shapes(body: mujoco.MjsBody, shapes: tuple[Shape, ...], mass: float) -> None:
    volumes = [_volume(shape) for shape in shapes]
    for shape, volume in zip(shapes, volumes, strict=True):
        geom = body.add_geom(type=_KINDS[shape.kind], rgba=COLORS[shape.color])
        geom.mass = mass * volume / sum(volumes)
        geom.contype = geom.conaffinity = int(shape.solid)
        if shape.kind == "box":
            geom.pos, geom.size = shape.start, shape.end
        else:
            geom.fromto = (*shape.start, *shape.end)
            geom.size = (shape.radius, 0, 0)


def _volume(shape: Shape) -> float:
    if shape.kind == "box":
        return 8 * math.prod(shape.end)
    ends = 4 / 3 * math.pi * shape.radius**3 if shape.kind == "capsule" else 0.0
    return math.pi * shape.radius**2 * math.dist(shape.start, shape.end) + ends


def _add_servo(spec: mujoco.MjSpec, body: mujoco.MjsBody, link: Link, name: str) -> None:
    joint = link.joint
    assert joint is not None
    limits = (joint.low, joint.high)
    body.add_joint(name=name, axis=joint.axis, range=limits, armature=ARMATURE)
    actuator = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    actuator.set_to_position(kp=joint.stiffness, kv=DAMPING_TIME * joint.stiffness)
    actuator.ctrlrange = limits
    actuator.forcerange = (-joint.effort, joint.effort)


def _add_gripper(spec: mujoco.MjSpec, wrist: mujoco.MjsBody, robot: RobotSpec) -> None:
    gripper, mount = robot.gripper, robot.wrist_camera
    hand = _add_link(wrist, gripper.hand, "hand")
    hand.add_site(name="tcp", pos=(0, 0, gripper.tcp), group=4)  # groups above 2 are not drawn
    view = camera_quaternion(mount.eye, mount.target, (1, 0, 0))
    hand.add_camera(name="wrist", pos=mount.eye, quat=view, fovy=mount.fovy)
    tendon = spec.add_tendon(name="gripper")
    for name, turn in zip(FINGERS, ((1, 0, 0, 0), (0, 0, 0, 1)), strict=True):
        finger = hand.add_body(name=name, pos=gripper.finger.position, quat=turn, gravcomp=1)
        _add_shapes(finger, gripper.finger.shapes, gripper.finger.mass)
        finger.first_geom().friction = PAD_FRICTION
        slide = finger.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 1, 0))
        slide.range, slide.armature = (0, gripper.stroke), FINGER_ARMATURE
        tendon.wrap_joint(name, 0.5)
    couple = spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, name1=FINGERS[0], name2=FINGERS[1])
    couple.objtype, couple.data[:2] = mujoco.mjtObj.mjOBJ_JOINT, (0, 1)  # left = 0 + 1 * right
    couple.solref, couple.solimp = (0.005, 1), (0.95, 0.99, 0.001, 0.5, 2)
    actuator = spec.add_actuator(name="gripper", target="gripper", trntype=mujoco.mjtTrn.mjTRN_TENDON)
    actuator.set_to_position(kp=GRIP, kv=GRIP_DAMPING)
    actuator.ctrlrange = (0, gripper.stroke)
