"""The command limiter: limits hold exactly, a next command always exists, feasible motion is left alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm.runtime import ArmLimits
from blm.runtime.command_limiter import CommandLimiter, largest_step
from blm.types import BlmError
from tests.support.runtime import HOME, LIMITS, Checker

positive = st.floats(1e-3, 1e3)
wild = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([-1e6, 0.0, 1e6]))


@st.composite
def any_limits(draw: st.DrawFn) -> ArmLimits:
    low = draw(st.lists(st.floats(-10, 10), min_size=2, max_size=4))
    wide = draw(st.lists(st.floats(1e-2, 10), min_size=len(low), max_size=len(low)))
    speeds, changes = (draw(st.lists(positive, min_size=len(low), max_size=len(low))) for _ in range(2))
    return ArmLimits(
        robot="any",
        names=(*(f"joint{i}" for i in range(1, len(low))), "gripper"),
        low=tuple(low),
        high=tuple(a + b for a, b in zip(low, wide, strict=True)),
        velocity=tuple(speeds),
        acceleration=tuple(changes),
        rate_hz=draw(st.sampled_from([5.0, 20.0, 30.0, 333.3, 1000.0])),
    )


@settings(max_examples=400, deadline=None)
@given(limits=any_limits(), seed=st.integers(0, 2**32 - 1), outside=st.booleans())
def test_no_command_ever_leaves_the_envelope(limits: ArmLimits, seed: int, outside: bool) -> None:
    """Recursive feasibility: whatever is wanted, braked for or delayed, the next command is within limits."""
    rng, limiter, checker = np.random.default_rng(seed), CommandLimiter(limits), Checker(limits)
    low, high = np.array(limits.low), np.array(limits.high)
    slack = 0.5 * (high - low) if outside else 0.0
    start = rng.uniform(low - slack, high + slack)
    limiter.start(start)
    now, wanted, ahead = 0.0, start, np.zeros(limits.dim)
    for _ in range(120):
        if rng.random() < 0.3:  # long enough between changes to reach full speed and the position limits
            wanted = rng.choice([rng.uniform(low, high), low - 5, high + 5, rng.normal(0, 1e6, limits.dim)])
            ahead = rng.choice(
                [np.zeros(limits.dim), rng.normal(0, 1, limits.dim), rng.normal(0, 1e6, limits.dim)]
            )
        command = limiter.brake() if rng.random() < 0.15 else limiter.track(wanted, ahead)
        gap = limits.period * (rng.choice([1.0, 1.01, 3.7]) if rng.random() < 0.1 else 1.0)
        now += gap
        elapsed = 1.0 if checker.at is None else (now - checker.at) / limits.period
        checker.check(now, command, start)
        limiter.sent(command, elapsed)
    for _ in range(10_000_000):  # it also comes to rest, and then stays
        if limiter.still:
            break
        now += limits.period
        command = limiter.brake()
        checker.check(now, command, start)
        limiter.sent(command, 1.0)
    assert (limiter.brake() == limiter.position).all()
    if not outside:
        assert (limiter.position >= low).all() and (limiter.position <= high).all()


@settings(max_examples=300, deadline=None)
@given(distance=st.floats(0, 1e3), change=st.floats(1e-6, 1e3))
def test_the_largest_step_stops_just_in_time(distance: float, change: float) -> None:
    step = float(largest_step(np.array([distance]), np.array([change]))[0])

    def travelled(v: float) -> float:
        n = int(np.ceil(v / change)) - 1 if v > 0 else 0
        n = max(n, 0)
        return v + n * v - change * n * (n + 1) / 2

    assert 0 <= step <= distance + 1e-12
    assert travelled(step) == pytest.approx(distance, rel=1e-6, abs=1e-9)


def test_feasible_motion_is_followed_exactly() -> None:
    limiter, t = CommandLimiter(LIMITS), np.arange(0, 6, LIMITS.period)[:, None]
    path = HOME - [0, 0, 0, 0.5] + np.array([0.8, 0.5, 0.2, 0.3]) * (1 - np.cos(1.2 * t)) / 2
    limiter.start(path[0])
    for here, there in pairwise(path[1:]):
        command = limiter.track(here, there - here)
        assert command == pytest.approx(here, abs=1e-9)
        limiter.sent(command, 1.0)


def test_a_step_is_reached_without_overshoot_and_a_start_outside_moves_back_in() -> None:
    limiter, path = CommandLimiter(LIMITS), []
    start, goal = np.array([-1.9, 1.54, 0.08, 1.05]), np.array([1.7, -0.5, 0.6, 0.0])
    limiter.start(start)
    for _ in range(80):
        command = limiter.track(goal, np.zeros(4))
        limiter.sent(command, 1.0)
        path.append(command)
    moved = np.diff([start, *path], axis=0) * np.sign(goal - start)
    assert (moved >= -1e-12).all() and path[-1] == pytest.approx(goal)
    assert np.abs(path[0] - start).max() <= 50 * LIMITS.period**2


def test_limits_that_make_no_sense_are_refused() -> None:
    def changed(**fields: object) -> ArmLimits:
        return ArmLimits(**{**vars(LIMITS), **fields})

    for fields, message in [
        ({"low": (0.0, float("nan"), 0.0, 0.0)}, "low must be finite"),
        ({"high": (-3.0, 1.5, 0.9, 1.0)}, "need low < high"),
        ({"velocity": (0.0, 1.0, 1.0, 1.0)}, "velocity > 0"),
        ({"acceleration": (1.0, 1.0, 1.0, float("inf"))}, "acceleration must be finite"),
        ({"acceleration": (1.0, 1.0, 1.0)}, "4 names, 3 of acceleration"),
        ({"rate_hz": 0.5}, "rate_hz must be 1..1000"),
        ({"names": ("a", "a", "b", "gripper")}, "names must differ"),
        ({"names": ("a", "b", "c", "d")}, "end with 'gripper'"),
        ({"velocity": ("1", 1.0, 1.0, 1.0)}, "velocity must be finite numbers"),
    ]:
        with pytest.raises(BlmError, match=message):
            changed(**fields)
