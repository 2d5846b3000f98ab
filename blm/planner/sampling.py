"""Sampling-based motion planning: RRT-Connect from OMPL, followed by shortcutting and smoothing.

References: Kuffner and LaValle, "RRT-Connect", ICRA 2000; Sucan, Moll and Kavraki, "The Open Motion
Planning Library", IEEE RAM 2012. Joint vectors have shape [dof] and are in radians. The same
generator and the same validity check give the same path, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ompl import base, geometric, util

Vector = NDArray[np.floating[Any]]
ValidityCheck = Callable[[Vector], bool]
"""Whether joint positions [dof] are free of collisions."""

MAX_SAMPLES = 3000
"""Number of samples after which a search gives up."""
TIME_LIMIT = 30.0
"""Wall time after which a search is an error [s].

Normally a search ends at MAX_SAMPLES, so results do not depend on the clock.
"""
MAX_BRANCH = 0.4
"""Maximum length of one branch of a search tree [rad]."""
RESOLUTION = 0.03
"""Maximum motion of any joint between two configurations that are checked [rad]."""
SHORTCUTS = 80
"""Number of random shortcuts that are tried."""
SMOOTHING_PASSES = 10
_LOCK = threading.Lock()


def interpolate(one: Vector, other: Vector, spacing: float = RESOLUTION) -> Vector:
    """Return points [n, dof] on the straight line from `one` (excluded) to `other` (included).

    No joint moves by more than `spacing` [rad] from one point to the next.
    """
    count = max(int(np.ceil(np.abs(other - one).max() / spacing)), 1)
    return one + (np.arange(1, count + 1) / count)[:, None] * (other - one)


def rrt_connect(
    is_valid: ValidityCheck,
    start: Vector,
    goal: Vector,
    bounds: tuple[Vector, Vector],
    rng: np.random.Generator,
) -> Vector | None:
    """Return waypoints [K, dof] of a valid path from `start` to `goal`, or None.

    OMPL's Python bindings accept no custom sampler, and OMPL seeds each generator from a global
    one. `RNG.setSeed` always restarts the global generator, in spite of its warning (OMPL,
    RandomNumbers.cpp). All generators of a search are created after that call and under a lock, so
    the search depends on the seed alone. Raises TimeoutError after TIME_LIMIT.
    """
    dof = len(start)
    deadline = time.monotonic() + TIME_LIMIT
    calls = 0
    late = False

    def over() -> bool:
        nonlocal calls, late
        calls, late = calls + 1, time.monotonic() > deadline
        return late or calls > MAX_SAMPLES

    with _LOCK:
        level = util.getLogLevel()
        util.setLogLevel(util.LogLevel.LOG_NONE)
        try:
            util.RNG.setSeed(int(rng.integers(1, 2**31)))
            problem, planner = _set_up(is_valid, start, goal, bounds)
            planner.solve(base.PlannerTerminationCondition(over))
        finally:
            util.setLogLevel(level)
    if late:
        raise TimeoutError(f"no path found in {TIME_LIMIT:g} s, after {calls} of {MAX_SAMPLES} samples")
    if not problem.hasExactSolution():
        return None
    path = problem.getSolutionPath()
    return np.stack([_vector(path.getState(k), dof) for k in range(path.getStateCount())])


def shortcut(is_valid: ValidityCheck, corners: Vector, rng: np.random.Generator) -> Vector:
    """Shorten a path [K, dof] by random shortcuts; its two ends stay."""
    points = list(corners)
    for _ in range(SHORTCUTS):
        first, second = np.sort(rng.uniform(0, len(points) - 1, size=2))
        i, j = int(first), int(second)
        if i == j:
            continue
        a = points[i] + (first - i) * (points[i + 1] - points[i])
        b = points[j] + (second - j) * (points[j + 1] - points[j])
        if all(is_valid(q) for q in interpolate(a, b)):
            points = [*points[: i + 1], a, b, *points[j + 1 :]]
    return np.array(points)


def smooth(is_valid: ValidityCheck, corners: Vector, spacing: float) -> Vector:
    """Resample a path at `spacing` [rad] and smooth it by local averaging.

    Returns waypoints [K, dof].

    Waypoints are evenly spaced because a spline through uneven ones overshoots. Smoothing cuts
    corners between the checked waypoints, so callers must check the result again.
    """
    path = resample(corners, spacing)
    for _ in range(SMOOTHING_PASSES):
        middle = path.copy()
        middle[1:-1] = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
        keep = np.array([True, *(is_valid(q) for q in middle[1:-1]), True])
        path = np.where(keep[:, None], middle, path)
    return resample(path, spacing)


def resample(corners: Vector, spacing: float) -> Vector:
    """Return evenly spaced waypoints [K, dof] along a polyline, at most `spacing` [rad] apart."""
    along = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1)))
    count = max(int(np.ceil(along[-1] / spacing)), 1)
    places = np.linspace(0, along[-1], count + 1)
    return np.stack([np.interp(places, along, joint) for joint in corners.T], axis=1)


def _set_up(
    is_valid: ValidityCheck, start: Vector, goal: Vector, bounds: tuple[Vector, Vector]
) -> tuple[Any, Any]:
    """Return OMPL's problem definition and planner."""
    dof = len(start)
    low, high = bounds
    space, box = base.RealVectorStateSpace(dof), base.RealVectorBounds(dof)
    for joint in range(dof):
        box.setLow(joint, float(low[joint]))
        box.setHigh(joint, float(high[joint]))
    space.setBounds(box)
    information = base.SpaceInformation(space)
    information.setStateValidityChecker(lambda state: bool(is_valid(_vector(state, dof))))
    information.setStateValidityCheckingResolution(RESOLUTION / float(np.linalg.norm(high - low)))
    information.setup()
    problem = base.ProblemDefinition(information)
    ends = space.allocState(), space.allocState()
    for state, q in zip(ends, (start, goal), strict=True):
        for joint in range(dof):
            state[joint] = float(q[joint])
    problem.setStartAndGoalStates(*ends)
    planner = geometric.RRTConnect(information)
    planner.setProblemDefinition(problem)
    planner.setRange(MAX_BRANCH)
    planner.setup()
    return problem, planner


def _vector(state: Any, dof: int) -> Vector:
    return np.array([state[joint] for joint in range(dof)])
