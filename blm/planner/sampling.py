"""Ways around obstacles by sampling (OMPL's RRT-Connect), then made short and smooth.

Kuffner and LaValle, "RRT-Connect", ICRA 2000; Sucan, Moll and Kavraki, "The Open Motion Planning Library",
IEEE RAM 2012. Joint vectors [dof] in rad. The same generator and free space give the same way, bit for bit.
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
Free = Callable[[Vector], bool]

ITERATIONS = 3000
"""Samples after which a search is given up."""
SECONDS = 30.0
"""Wall time after which it is an error. Searches end by ITERATIONS: results do not depend on the clock."""
RANGE = 0.4
"""Greatest length of one branch of a tree [rad]."""
RESOLUTION = 0.03
"""Greatest motion of any joint between two points that are checked [rad]."""
SHORTCUTS, SMOOTHINGS = 80, 10
"""Attempts to cut a corner; passes of smoothing."""
_LOCK = threading.Lock()


def line(one: Vector, other: Vector, spacing: float = RESOLUTION) -> Vector:
    """Points [n, dof] from `one`, left out, to `other`; no joint moves more than `spacing` in between."""
    count = max(int(np.ceil(np.abs(other - one).max() / spacing)), 1)
    return one + (np.arange(1, count + 1) / count)[:, None] * (other - one)


def connect(
    free: Free, start: Vector, goal: Vector, bounds: tuple[Vector, Vector], rng: np.random.Generator
) -> Vector | None:
    """Return corners [K, dof] of a free path from `start` to `goal` within `bounds`, or None.

    OMPL's Python bindings take no sampler for a state space, and OMPL draws the seed of each generator from a
    global one. `RNG.setSeed` always restarts that one, whatever it warns of (OMPL RandomNumbers.cpp), and all
    generators of a search are made after it, under a lock: the search follows from the seed alone. Raises
    TimeoutError after SECONDS.
    """
    dof, deadline, calls, late = len(start), time.monotonic() + SECONDS, 0, False

    def over() -> bool:
        nonlocal calls, late
        calls, late = calls + 1, time.monotonic() > deadline
        return late or calls > ITERATIONS

    with _LOCK:
        level = util.getLogLevel()
        util.setLogLevel(util.LogLevel.LOG_NONE)
        try:
            util.RNG.setSeed(int(rng.integers(1, 2**31)))
            problem, planner = _set_up(free, start, goal, bounds)
            planner.solve(base.PlannerTerminationCondition(over))
        finally:
            util.setLogLevel(level)
    if late:
        raise TimeoutError(f"no way found in {SECONDS:g} s, after {calls} of {ITERATIONS} samples")
    if not problem.hasExactSolution():
        return None
    path = problem.getSolutionPath()
    return np.stack([_vector(path.getState(k), dof) for k in range(path.getStateCount())])


def shorten(free: Free, corners: Vector, rng: np.random.Generator) -> Vector:
    """Return corners [K, dof] of a shorter free path with the same ends: random shortcuts."""
    points = list(corners)
    for _ in range(SHORTCUTS):
        first, second = np.sort(rng.uniform(0, len(points) - 1, size=2))
        i, j = int(first), int(second)
        if i == j:
            continue
        a = points[i] + (first - i) * (points[i + 1] - points[i])
        b = points[j] + (second - j) * (points[j + 1] - points[j])
        if all(free(q) for q in line(a, b)):
            points = [*points[: i + 1], a, b, *points[j + 1 :]]
    return np.array(points)


def smooth(free: Free, corners: Vector, spacing: float) -> Vector:
    """Return waypoints [K, dof] at even distances of `spacing` [rad], drawn towards their neighbours' middle.

    Evenly, because splines through uneven waypoints swing out. Corners are cut: check what comes out.
    """
    path = spread(corners, spacing)
    for _ in range(SMOOTHINGS):
        middle = path.copy()
        middle[1:-1] = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
        keep = np.array([True, *(free(q) for q in middle[1:-1]), True])
        path = np.where(keep[:, None], middle, path)
    return spread(path, spacing)


def spread(corners: Vector, spacing: float) -> Vector:
    """Waypoints [K, dof] at even distances of `spacing` [rad] or less along a polyline."""
    along = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1)))
    count = max(int(np.ceil(along[-1] / spacing)), 1)
    places = np.linspace(0, along[-1], count + 1)
    return np.stack([np.interp(places, along, joint) for joint in corners.T], axis=1)


def _set_up(free: Free, start: Vector, goal: Vector, bounds: tuple[Vector, Vector]) -> tuple[Any, Any]:
    """OMPL's problem and planner."""
    dof, (low, high) = len(start), bounds
    space, box = base.RealVectorStateSpace(dof), base.RealVectorBounds(dof)
    for joint in range(dof):
        box.setLow(joint, float(low[joint]))
        box.setHigh(joint, float(high[joint]))
    space.setBounds(box)
    information = base.SpaceInformation(space)
    information.setStateValidityChecker(lambda state: bool(free(_vector(state, dof))))
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
    planner.setRange(RANGE)
    planner.setup()
    return problem, planner


def _vector(state: Any, dof: int) -> Vector:
    return np.array([state[joint] for joint in range(dof)])
