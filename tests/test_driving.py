"""The loop around a real arm: clamps, lost frames, frozen cameras, lost servers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
from test_serving import CONTRACT, SIDE, EchoPolicy, running

from blm.serving import RemotePolicy
from blm.serving.driving import Arm, Driver, RobotLike, Safety, StoppedError, Units, clamp
from blm.types import ActionChunk, BlmError, Observation, Policy

SPACE = CONTRACT.action_spaces["panda"]


class FakeArm:
    """Moves at once to where it is told; `fault(read number)` may raise, or say "frozen"."""

    def __init__(self, fault: Callable[[int], str | None] = lambda number: None) -> None:
        self.fault, self.reads, self.sent, self.open = fault, 0, list[np.ndarray](), False
        self.state = np.zeros(SPACE.dim)
        self.pictures = {camera: np.zeros((SIDE, SIDE, 3), np.uint8) for camera in CONTRACT.cameras}

    def connect(self) -> None:
        self.open = True

    def disconnect(self) -> None:
        self.open = False

    def get_observation(self) -> dict[str, Any]:
        self.reads += 1
        if self.fault(self.reads) != "frozen":
            self.pictures = {k: (v + 1).astype(np.uint8) for k, v in self.pictures.items()}
        joints = {f"{name}.pos": v for name, v in zip(SPACE.names, self.state.tolist(), strict=True)}
        return {**joints, **self.pictures}

    def send_action(self, action: dict[str, Any]) -> None:
        self.state = np.array([action[f"{name}.pos"] for name in SPACE.names])
        self.sent.append(self.state)


class FarPolicy(EchoPolicy):
    """Wants every joint at 2 rad at once."""

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(actions=np.full((4, len(observation.state)), 2.0, np.float32))


def drive(arm: RobotLike, make: Callable[[], Policy], safety: Safety, seconds: float = 1.0) -> Driver:
    driver = Driver(arm, make, "panda", "push", safety=safety)
    driver.run(seconds)
    return driver


def test_targets_are_never_too_far_or_too_fast() -> None:
    rng, safety = np.random.default_rng(0), Safety(speed=1.3, gripper_speed=0.7)
    most = np.array([1.3] * 7 + [0.7]) / SPACE.rate_hz
    for _ in range(200):
        last = rng.uniform(SPACE.low, SPACE.high)
        wanted = last + rng.normal(size=8) * rng.choice([0.01, 10.0])
        target = clamp(wanted, last, SPACE, safety)
        assert (np.abs(target - last) <= most + 1e-6).all()
        assert (target >= np.array(SPACE.low) - 1e-6).all() and (target <= np.array(SPACE.high) + 1e-6).all()
        inside = (np.abs(wanted - last) <= most).all() and (np.abs(wanted) <= 3).all()
        assert not inside or np.allclose(target, wanted)


def test_an_arm_reaches_where_it_is_told_at_a_safe_speed() -> None:
    arm = FakeArm()
    report = drive(arm, FarPolicy, Safety(speed=2.0, gripper_speed=2.0), 1.6).report
    steps = np.diff([np.zeros(8), *arm.sent], axis=0)
    assert np.abs(steps).max() <= 2.0 / SPACE.rate_hz + 1e-6
    assert arm.sent[-1] == pytest.approx(2.0) and not arm.open
    assert report.steps == 32 and report.chunks >= 2 and report.clamped > 5 and report.unread == 0


def test_units_of_the_arm_are_translated_both_ways() -> None:
    arm = FakeArm()
    mine = Arm(arm, SPACE, {"base": "base", "wrist": "wrist"}, Units(joint=np.pi / 180, gripper=0.01))
    target = np.linspace(-1, 1, 8).astype(np.float32)
    mine.send(target)
    assert arm.state[0] == pytest.approx(-180 / np.pi) and arm.state[-1] == pytest.approx(100)
    assert mine.read()[0] == pytest.approx(target)
    with pytest.raises(BlmError, match=r"lacks \['front'\]; it has \['base'"):
        Arm(arm, SPACE, {"base": "front"}, Units()).read()


def test_single_lost_frames_are_survived_and_counted() -> None:
    def fault(number: int) -> None:
        if number > 1 and number % 3 == 0:
            raise TimeoutError("no frame")

    report = drive(FakeArm(fault), FarPolicy, Safety(stale_s=5)).report
    assert report.steps == 20 and report.unread == 7  # of 21 reads


@pytest.mark.parametrize("kind, message", [("gone", "no observation for"), ("frozen", "shown one picture")])
def test_stale_observations_stop_the_arm_where_it_is(kind: str, message: str) -> None:
    def fault(number: int) -> str | None:
        if number > 6 and kind == "gone":
            raise TimeoutError("no frame")
        return "frozen" if number > 6 and kind == "frozen" else None

    arm = FakeArm(fault)
    start = time.monotonic()
    with pytest.raises(StoppedError, match=message):
        drive(arm, FarPolicy, Safety(stale_s=0.2), 10.0)
    assert time.monotonic() - start < 3 and not arm.open
    if kind == "frozen":
        assert (arm.sent[-1] == arm.sent[-2]).all()


def test_a_still_arm_may_see_still_pictures() -> None:
    class Still(EchoPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(actions=np.tile(observation.state, (4, 1)))

    assert drive(FakeArm(lambda number: "frozen"), Still, Safety(stale_s=0.1)).report.steps == 20


def test_a_server_that_comes_back_is_found_and_one_that_does_not_stops_the_arm() -> None:
    arm, address = FakeArm(), ""
    with ExitStack() as first:
        address = first.enter_context(running(FarPolicy(), None))
        made = 0

        def make() -> Policy:
            nonlocal made, address
            made += 1
            if made == 2:  # the server is killed and comes back elsewhere, later
                raise BlmError("nobody answers")
            if made == 3:
                address = second.enter_context(running(FarPolicy(), None))
            return RemotePolicy(f"ws://{address}", timeout_s=2)

        with ExitStack() as second:
            driver = Driver(arm, make, "panda", "push", safety=Safety(patience_s=20, stale_s=20))

            class Killing(FakeArm):
                def get_observation(self) -> dict[str, Any]:
                    if self.reads == 8:
                        first.close()
                    return super().get_observation()

            driver.arm.robot = Killing()
            report = driver.run(1.5)
    assert report.reconnections == 1 and report.steps == 30

    with ExitStack() as only:
        address = only.enter_context(running(FarPolicy(), None))
        driver = Driver(arm, partial(RemotePolicy, f"ws://{address}", timeout_s=2), "panda", "push")
        driver.safety = Safety(patience_s=0.5)
        only.close()
        with pytest.raises(StoppedError, match="the policy server is lost"):
            driver.run(5.0)
    assert not arm.open and (arm.sent[-1] == arm.sent[-2]).all()


def test_what_does_not_fit_is_named_before_anything_moves() -> None:
    with pytest.raises(BlmError, match="drives panda, xarm6, not 'ur5'"):
        Driver(FakeArm(), EchoPolicy, "ur5", "push")
    with pytest.raises(BlmError, match=r"no camera is given for \{'wrist'\}"):
        Driver(FakeArm(), EchoPolicy, "panda", "push", cameras={"base": "front"})
    with pytest.raises(BlmError, match="must be positive"):
        Safety(speed=0)
