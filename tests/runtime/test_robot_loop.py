"""The loop in real time: threads, signals, hanging robots, lost servers. Short runs, on loopback."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection

from blm.action_space import StateSpace
from blm.runtime import Arm, ArmLimits, Driver, RobotLike, RunLog, Safety, State, StoppedError, Units
from blm.serving import RemotePolicy
from blm.types import ActionChunk, BlmError, ContractError, Observation, Policy
from tests.support.openpi_server import fake_server, reply
from tests.support.serving import CONTRACT, SIDE, EchoPolicy, running, wait_for

SPACE = CONTRACT.action_spaces["panda"]
LIMITS = ArmLimits.of(SPACE, velocity=[2.0] * 7, acceleration=[20.0] * 7)


class FakeArm:
    """Moves at once to where it is told. `fault(read number)` may raise, sleep, or say "frozen"."""

    def __init__(self, fault: Callable[[int], str | None] = lambda number: None) -> None:
        self.fault, self.reads, self.open, self.disconnections = fault, 0, False, 0
        self.sent: list[tuple[float, np.ndarray]] = []
        self.state = np.zeros(SPACE.dim)
        self.number = 0

    def connect(self) -> None:
        self.open = True

    def disconnect(self) -> None:
        self.open = False
        self.disconnections += 1

    def get_observation(self) -> dict[str, Any]:
        self.reads += 1
        if self.fault(self.reads) != "frozen":
            self.number += 1
        rng = np.random.default_rng(self.number)
        images = {c: rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for c in CONTRACT.cameras}
        joints = {f"{name}.pos": v for name, v in zip(SPACE.names, self.state.tolist(), strict=True)}
        return {**joints, **images}

    def send_action(self, action: dict[str, Any]) -> None:
        self.state = np.array([action[f"{name}.pos"] for name in SPACE.names])
        self.sent.append((time.monotonic(), self.state))


class Moving(EchoPolicy):
    """Moves all joints upwards at 1 rad/s, and opens the gripper."""

    def act(self, observation: Observation) -> ActionChunk:
        rise = np.arange(4)[:, None] / 20 * np.ones(len(observation.state))
        return ActionChunk(actions=np.clip(observation.state + rise, -2.5, 2.5).astype(np.float32))


def check(arm: FakeArm, limits: ArmLimits = LIMITS) -> None:
    """All commands are within the limits, by a check that knows nothing of the limiter.

    The arm's times differ from the loop's by the jitter of this machine, and after a gap the loop may slow
    down at once: so a step may lie anywhere between 0 and the one before, and beyond by the limit of
    acceleration. In simulated time the check is exact (test_runtime_supervisor.py).
    """
    dt = limits.period
    path = np.array([np.zeros(limits.dim), *(command for _, command in arm.sent)])
    assert np.isfinite(path).all() and (path >= limits.low).all() and (path <= limits.high).all()
    steps = np.diff(path, axis=0)
    assert (np.abs(steps) <= np.array(limits.velocity) * dt).all()
    before = np.vstack([np.zeros(limits.dim), steps[:-1]])
    beyond = np.maximum(steps - np.maximum(before, 0), np.minimum(before, 0) - steps)
    assert (beyond <= np.array(limits.acceleration) * dt**2).all()
    gaps = np.diff([real for real, _ in arm.sent])
    assert len(gaps) < 2 or gaps.min() > 0.5 * dt, gaps


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t not in before and t.name.startswith("blm-")]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


def driver_of(arm: RobotLike, make: Callable[[], Policy] = Moving, **options: Any) -> Driver:
    limits = options.pop("limits", LIMITS)
    return Driver(Arm(arm, limits, **options.pop("views", {})), make, "push", **options)


def stopped(driver: Driver, seconds: float = 20.0) -> StoppedError:
    with pytest.raises(StoppedError) as caught:
        driver.run(seconds)
    assert driver.report.state is State.STOPPED and driver.report.kind == caught.value.kind
    return caught.value


def test_an_arm_moves_within_its_limits_and_twice_in_one_process() -> None:
    arm, threads = FakeArm(), threading.active_count()
    driver = driver_of(arm)
    for run in (1, 2):
        report = driver.run(1.0)
        assert report.kind == "finished" and 16 <= report.steps <= 26 and report.chunks >= 3
        assert not arm.open and arm.disconnections == run
        assert (arm.sent[-1][1] == arm.sent[-2][1]).all()  # at rest
        check(arm)
        assert arm.state[0] > 0.4
        arm.sent, arm.state = [], np.zeros(8)
    wait_for(lambda: threading.active_count() <= threads)


def test_units_of_the_arm_are_translated_both_ways() -> None:
    arm = FakeArm()
    units = Units(joint=np.pi / 180, gripper=0.01)
    mine = Arm(arm, LIMITS, units=units).fitted(CONTRACT)
    target = np.linspace(-1, 1, 8)
    mine.send(target)
    assert arm.state[0] == pytest.approx(-180 / np.pi) and arm.state[-1] == pytest.approx(100)
    assert mine.read(0.0).state == pytest.approx(target)
    for bad in (np.full(8, np.nan), np.zeros(7), np.append(np.zeros(7), np.inf)):
        with pytest.raises(BlmError, match="refused to send"):
            mine.send(bad)
    with pytest.raises(BlmError, match="positive"):
        Units(joint=0.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"joint3.pos": float("nan")}, "'joint3.pos' is nan"),
        ({"joint3.pos": "far"}, "'joint3.pos' is not a number"),
        ({"joint3.pos": np.zeros(2)}, "'joint3.pos' is not a number"),
        ({"base": np.zeros((SIDE, SIDE, 3), np.uint8)}, "'base' gives a blank image"),
        ({"base": np.full((SIDE, SIDE, 3), (0, 135, 0), np.uint8)}, "'base' gives a blank image"),
        ({"base": np.full((SIDE, SIDE, 3), np.nan)}, "'base': float64"),
        ({"base": np.ones((SIDE, SIDE), np.uint8)}, "needed: uint8"),
        ({"base": np.ones((SIDE, 9, 3), np.uint8)}, "the policy needs 8x8: crop and resize"),
        ({"base": None}, "'base': object"),
    ],
)
def test_a_malformed_observation_is_named(changes: dict[str, Any], message: str) -> None:
    class Broken(FakeArm):
        def get_observation(self) -> dict[str, Any]:
            return {**super().get_observation(), **changes}

    with pytest.raises(BlmError, match=message):
        Arm(Broken(), LIMITS).fitted(CONTRACT).read(0.0)
    arm = Broken()
    error = stopped(driver_of(arm, safety=Safety(start_s=0.3)))
    assert error.kind == "start" and not arm.sent and arm.disconnections == 1


def test_single_lost_frames_are_survived_and_counted() -> None:
    def fault(number: int) -> None:
        if number > 6 and number % 3 == 0:
            raise TimeoutError("no frame")

    arm = FakeArm(fault)
    report = driver_of(arm).run(1.5)
    assert report.kind == "finished" and report.unread >= 5 and report.held <= 8
    check(arm)


def test_a_blocking_observation_holds_then_stops_though_it_never_returns() -> None:
    free = threading.Event()

    def fault(number: int) -> None:
        if number > 15:
            free.wait(30)

    arm = FakeArm(fault)
    begin = time.monotonic()
    error = stopped(driver_of(arm, log=(log := RunLog())))
    assert error.kind == "observation" and "has not returned" in error.reason
    assert time.monotonic() - begin < 8 and arm.disconnections == 1
    last = [command for _, command in arm.sent[-3:]]
    assert (last[0] == last[1]).all() and (last[1] == last[2]).all()  # it held while the reader hung
    check(arm)
    assert any(row["event"] == "thread left behind" for row in log.recent)
    free.set()


def test_a_blocking_command_stops_the_run() -> None:
    free = threading.Event()

    class Stuck(FakeArm):
        def send_action(self, action: dict[str, Any]) -> None:
            super().send_action(action)
            if len(self.sent) == 8:
                free.wait(30)

    arm = Stuck()
    begin = time.monotonic()
    error = stopped(driver_of(arm))
    assert error.kind == "send" and time.monotonic() - begin < 8
    assert len(arm.sent) == 8 and arm.disconnections == 1
    free.set()


def test_a_hanging_policy_is_abandoned_and_a_failing_one_recreated() -> None:
    free, made = threading.Event(), list[int]()

    class Moody(Moving):
        def act(self, observation: Observation) -> ActionChunk:
            if len(made) == 1 and len(self.acted) > 3:
                raise ZeroDivisionError("a bug in the model")
            if len(made) == 2 and len(self.acted) > 3:
                free.wait(30)
            self.acted.append(1)
            return super().act(observation)

    def make() -> Policy:
        policy = Moody()
        policy.acted = []  # type: ignore[attr-defined]
        made.append(1)
        return policy

    arm = FakeArm()
    driver = driver_of(arm, make, safety=Safety(max_hold_s=1.0))
    error = stopped(driver)
    assert error.kind == "patience" and driver.report.reconnections == 1 and len(made) == 2
    assert (arm.sent[-1][1] == arm.sent[-2][1]).all()
    check(arm)
    free.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_brings_the_arm_to_rest_and_handlers_are_restored(number: signal.Signals) -> None:
    before, arm = signal.getsignal(number), FakeArm()
    threading.Timer(1.2, os.kill, (os.getpid(), number)).start()
    error = stopped(driver_of(arm))
    assert error.kind == "signal" and error.reason == f"{number.name} received"
    assert arm.disconnections == 1 and (arm.sent[-1][1] == arm.sent[-2][1]).all()
    assert signal.getsignal(number) is before
    check(arm)


def test_the_estop_is_polled_and_reported() -> None:
    pressed, told = threading.Event(), list[tuple[str, str]]()

    def on_stop(kind: str, reason: str) -> None:
        told.append((kind, reason))
        raise RuntimeError("the horn is broken")

    threading.Timer(1.0, pressed.set).start()
    arm = FakeArm()
    error = stopped(driver_of(arm, estop=pressed.is_set, on_stop=on_stop))
    assert error.kind == "estop" and told == [("estop", "the e-stop was pressed")]
    assert arm.disconnections == 1 and (arm.sent[-1][1] == arm.sent[-2][1]).all()
    pressed.clear()
    check(arm)


def test_an_estop_hook_that_fails_or_hangs_stops_the_arm() -> None:
    def fails() -> bool:
        raise OSError("the button is unplugged")

    error = stopped(driver_of(FakeArm(), estop=fails))
    assert error.kind == "estop" and "unplugged" in error.reason
    free = threading.Event()
    error = stopped(driver_of(FakeArm(), estop=lambda: free.wait(30), safety=Safety(stall_s=0.5)))
    assert error.kind == "estop" and "has not returned" in error.reason
    free.set()


def test_the_watchdog_detects_a_stalled_loop() -> None:
    """The log's disk hangs in the middle of the run: no command may follow when it is back."""
    arm, told = FakeArm(), list[str]()

    class Hanging(RunLog):
        def write(self, event: str, at: float, **details: Any) -> None:
            if event == "no observation":
                self.sent_before = len(arm.sent)
                time.sleep(1.5)
                assert told == ["stalled"]  # already while it hangs
            super().write(event, at, **details)

    def fault(number: int) -> None:
        if number == 15:
            raise TimeoutError("no frame")

    arm.fault = fault
    log = Hanging()
    error = stopped(
        driver_of(arm, log=log, safety=Safety(stall_s=0.6), on_stop=lambda kind, _: told.append(kind))
    )
    assert error.kind == "stalled" and told == ["stalled"]
    assert len(arm.sent) == log.sent_before


def test_the_run_ends_cleanly_when_connect_or_disconnect_fail() -> None:
    class Refusing(FakeArm):
        def connect(self) -> None:
            raise ConnectionError("no such port")

    refusing = Refusing()
    with pytest.raises(ConnectionError, match="no such port"):
        driver_of(refusing).run(1.0)
    assert refusing.disconnections == 1

    class Falling(FakeArm):
        def disconnect(self) -> None:
            super().disconnect()
            raise OSError("already gone")

    log = RunLog()
    assert driver_of(Falling(), log=log).run(0.3).kind == "finished"
    assert [row["event"] for row in log.recent][-1] == "disconnect failed"


def test_the_log_has_the_reason_of_the_stop(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    driver_of(FakeArm(), log=log).run(0.3)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows if row["event"] == "state"] == ["running", "holding"]
    last = rows[-1]
    assert last["event"] == "stopped" and last["kind"] == "finished" and len(last["held"]) == 8
    log.write("after the end", 0.0)  # a closed log takes events in memory


@pytest.mark.parametrize("timeout_s", [2.0])
def test_a_killed_server_that_comes_back_is_found(timeout_s: float) -> None:
    address = ""
    with ExitStack() as first, ExitStack() as second:
        address = first.enter_context(running(Moving(), None))
        made = 0

        def make() -> Policy:
            nonlocal made, address
            made += 1
            if made == 2:  # the server is killed and comes back elsewhere, later
                raise BlmError("nobody answers")
            if made == 3:
                address = second.enter_context(running(Moving(), None))
            return RemotePolicy(f"ws://{address}", timeout_s=timeout_s)

        arm = FakeArm()
        driver = driver_of(arm, make, safety=Safety(max_hold_s=20))

        def kill() -> None:
            while len(arm.sent) < 6:
                time.sleep(0.01)
            first.close()

        killer = threading.Thread(target=kill)
        killer.start()
        report = driver.run(5.0)
        killer.join()
    assert report.kind == "finished" and report.reconnections == 1 and report.held > 3
    check(arm)


def test_an_unavailable_server_stops_the_arm() -> None:
    arm = FakeArm()
    with ExitStack() as only:
        address = only.enter_context(running(Moving(), None))
        driver = driver_of(
            arm, lambda: RemotePolicy(f"ws://{address}", timeout_s=2), safety=Safety(max_hold_s=0.8)
        )
        threading.Timer(1.0, only.close).start()
        error = stopped(driver)
    assert error.kind in ("patience", "policy") and not arm.open
    assert (arm.sent[-1][1] == arm.sent[-2][1]).all()
    check(arm)


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_server_moves_no_arm_out_of_its_limits(seed: int) -> None:
    """Over a real socket: good chunks between garbage, duplicates, delays, lies, text and hang-ups."""
    rng, arm = np.random.default_rng(seed), FakeArm()

    def answer(socket: ServerConnection, request: dict[str, Any], number: int) -> None:
        state = request["observation/state"]
        good = state + np.arange(4)[:, None] / 20 * rng.choice([-1.0, 1.0], 8)
        bad = [np.full((4, 8), np.nan), np.full((4, 8), 1e30), np.zeros((9, 8)), np.zeros((4, 2)), "x", None]
        kind = rng.integers(12)
        if kind == 0:
            socket.send(rng.bytes(20))
        elif kind == 1:
            socket.send("the policy failed")
        elif kind == 2:
            socket.close()
        elif kind == 3:
            reply(socket, request, actions=bad[rng.integers(len(bad))])
        elif kind == 4:
            reply(socket, request, actions=good, request_id=int(rng.integers(9)))
        elif kind == 5:
            time.sleep(0.4)
            reply(socket, request, actions=good)
        elif kind == 6:
            reply(socket, request, actions=good)
            reply(socket, request, actions=good + 1)
        else:
            reply(socket, request, actions=good)

    with fake_server(answer) as address:
        driver = driver_of(arm, lambda: RemotePolicy(address, timeout_s=1.0), safety=Safety(max_hold_s=1.5))
        with suppress(StoppedError):
            driver.run(2.0)
    assert driver.report.kind in ("finished", "policy", "patience") and arm.disconnections == 1
    assert (arm.sent[-1][1] == arm.sent[-2][1]).all() if len(arm.sent) > 1 else not arm.sent
    check(arm)


def test_mismatches_are_reported_before_the_arm_moves() -> None:
    with pytest.raises(BlmError, match="unknown robot 'ur5'"):
        driver_of(FakeArm(), limits=replace(LIMITS, robot="ur5"))
    with pytest.raises(BlmError, match=r"no camera is given for \['wrist'\]"):
        driver_of(FakeArm(), views={"cameras": {"base": "front"}})
    limp = FakeArm()
    limp.config = SimpleNamespace(disable_torque_on_disconnect=True)  # type: ignore[attr-defined]
    with pytest.raises(BlmError, match="goes limp when it is disconnected"):
        driver_of(limp)
    driver_of(limp, safety=Safety(accept_torque_off=True)).run(0.2)
    with pytest.raises(BlmError, match="seconds must be positive"):
        driver_of(FakeArm()).run(float("nan"))


def test_policies_of_other_states_and_without_limits_are_refused() -> None:
    kinds = ("absolute_joint_position",) * 2
    other = StateSpace(names=("x", "y"), units=("m", "m"), kinds=kinds, origins=(-1,) * SPACE.dim)
    for space, said in (
        (replace(SPACE, state=other), r"state of 'panda' is \('x', 'y'\), and not that of its actions"),
        (replace(SPACE, low=(-np.inf, *SPACE.low[1:])), r"both limits must be finite.* 'low' and 'high'"),
    ):
        with pytest.raises(ContractError, match=said):
            LIMITS.check_contract(replace(CONTRACT, action_spaces={"panda": space}))


def test_it_runs_beside_another_main_thread() -> None:
    kinds: list[str] = []
    thread = threading.Thread(target=lambda: kinds.append(driver_of(FakeArm()).run(0.3).kind))
    thread.start()
    thread.join(10)
    assert kinds == ["finished"]
