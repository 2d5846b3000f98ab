"""Robot arms as data: links, two-finger gripper, limits, home pose, wrist camera.

The chain starts at `base_position` in the world frame (x forward, y left, z up; table top at z =
0). A link's pose is given in its parent's frame; its joint rotates about `axis` through the link's
origin. The hand's z axis is the approach direction and its y axis the closing axis; at home its x
axis points forward. Units: m, rad, kg, N. `suite_version` hashes the representation of these
classes, including class and field names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from blm.types import ActionSpace, BlmError

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
IDENTITY: Quaternion = (1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Shape:
    """One primitive shape in its link's frame.

    All shapes are visible; `solid` ones also collide.
    """

    kind: Literal["capsule", "cylinder", "box"]
    start: Vector
    """One end of the axis; the centre of a box."""
    end: Vector
    """Other end of the axis; the half extents of a box."""
    color: str
    radius: float = 0.0
    """Unused for a box."""
    solid: bool = True


box = partial(Shape, "box")
capsule = partial(Shape, "capsule")
cylinder = partial(Shape, "cylinder")
ring = partial(Shape, "cylinder", solid=False)
"""A cylinder that is only visible, e.g. a joint's cap or a seam."""


@dataclass(frozen=True)
class Joint:
    """A revolute joint and its position servo."""

    low: float
    high: float
    velocity: float
    """Maximum speed [rad/s]."""
    acceleration: float
    """Maximum acceleration [rad/s^2]."""
    effort: float
    """Maximum torque [Nm]."""
    stiffness: float
    """Servo gain [Nm/rad]; its damping is `build.DAMPING_TIME` times this."""
    axis: Vector = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Link:
    """A rigid body.

    Its mass is distributed over its shapes by volume, which always gives a valid inertia.
    """

    position: Vector
    quaternion: Quaternion
    """Orientation (wxyz) in the parent's frame; need not be normalised."""
    mass: float
    joint: Joint | None
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """Two coupled fingers that slide along the hand's y axis.

    The right one is the left one rotated about z.
    """

    hand: Link
    """The hand, which is fixed to the last link."""
    tcp: float
    """Tool centre point along the hand's z axis [m]."""
    finger: Link
    """The left finger when closed, in the hand's frame; its first shape is the contact pad."""
    stroke: float
    """Travel of each finger [m]; the opening between the pads is twice this."""
    grasp_force: float
    """Minimum force of a finger in a grasp [N] (ManiSkill, is_grasping)."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The workspace of tasks for this arm, after ManiSkill's PickCube configurations."""

    centre: tuple[float, float] = (0.0, 0.0)
    """World x and y [m]."""
    half: float = 0.1
    """Objects spawn within +- this of the centre in x and y [m]."""
    height: float = 0.3
    """Maximum height of goals above the resting cube [m]."""
    cube_half: float = 0.02
    """Half edge length of cubes [m]."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A camera in the hand's frame; the top of its image points along the hand's +x axis."""

    eye: Vector
    target: Vector
    fovy: float
    """Vertical field of view [deg]."""


@dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """One arm with its gripper, standing on the table."""

    name: str
    title: str
    base_position: Vector
    base: tuple[Shape, ...]
    """Shapes of the part that is fixed to the table."""
    links: tuple[Link, ...]
    gripper: Gripper
    home: tuple[float, ...]
    """Arm pose with the tool vertical above the workspace [rad]."""
    reset_noise: float = 0.02
    """Standard deviation of the joint positions around home at a reset [rad] (ManiSkill)."""
    workspace: Workspace = Workspace()
    wrist_camera: Mount

    def __post_init__(self) -> None:
        if len(self.home) != len(self.links) or len(self.joints) != len(self.links):
            raise BlmError(f"robot '{self.name}': needs one joint and one home angle for each link")
        for name, angle, joint in zip(self.joint_names, self.home, self.joints, strict=True):
            if not joint.low <= angle <= joint.high:
                raise BlmError(
                    f"robot '{self.name}': home {name} is {angle}; it must be {joint.low}..{joint.high}"
                )

    @property
    def joints(self) -> tuple[Joint, ...]:
        return tuple(link.joint for link in self.links if link.joint is not None)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(f"joint{i + 1}" for i in range(len(self.links)))

    @property
    def velocity_limits(self) -> tuple[float, ...]:
        return tuple(joint.velocity for joint in self.joints)

    @property
    def acceleration_limits(self) -> tuple[float, ...]:
        return tuple(joint.acceleration for joint in self.joints)

    @property
    def action_space(self) -> ActionSpace:
        return ActionSpace(
            robot=self.name,
            names=(*self.joint_names, "gripper"),
            units=("rad",) * len(self.links) + ("opening",),
            low=(*(joint.low for joint in self.joints), 0.0),
            high=(*(joint.high for joint in self.joints), 1.0),
        )
