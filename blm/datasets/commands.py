"""Whether actions are absolute targets or deltas, told by how the state follows them.

Shape legend: N frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blm.datasets.mapping import ABSOLUTE, Dimension
from blm.types import ActionKind, FloatArray

ALIKE = 0.8
"""Correlation with the next state from which an action is its target."""
FOLLOWED = 0.5
"""Correlation with the change of the state from which an action is a delta."""
WEAKLY_FOLLOWED = 0.25
"""The same for an action whose range is not that of the state, such as a controller's input."""
DELTAS: Mapping[ActionKind, ActionKind] = {
    "absolute_joint_position": "delta_joint_position",
    "absolute_eef_position": "delta_eef_position",
    "absolute_eef_rotation": "delta_eef_rotation",
}
POSE = 6
"""Dimensions of a step of the end effector: position, then rotation."""
Verdict = Literal["absolute", "delta", "still", "untold"]


@dataclass(frozen=True)
class Signals:
    """Values of some episodes, one array [N] per dimension."""

    state: tuple[FloatArray, ...]
    action: tuple[FloatArray, ...]
    inside: NDArray[np.bool_]
    """[N - 1] whether a frame and the next belong to one episode."""


def decided_actions(
    action: Sequence[Dimension], state: Sequence[Dimension], signals: Signals, notes: list[str]
) -> tuple[Dimension, ...]:
    """Return the actions as absolute targets, with the states that they command, or as deltas.

    A dimension whose values do not tell follows the others if these agree; else it stays unknown.
    """
    movable = [i for i, one in enumerate(action) if one.kind in (*ABSOLUTE, "absolute_eef_rotation")]
    near = {i: _counterpart(action[i], i, action, state) for i in movable}
    verdicts = {
        i: _verdict(signals.action[i], signals.state[near[i]] if near[i] >= 0 else None, signals.inside)
        for i in movable
    }
    seen = {verdict for verdict in verdicts.values() if verdict in ("absolute", "delta")}
    common: Verdict = seen.pop() if len(seen) == 1 else "untold"
    found = list(action)
    for i in movable:
        verdict = verdicts[i] if verdicts[i] in ("absolute", "delta") else common
        one = action[i]
        if verdict != verdicts[i] and verdicts[i] == "untold" and common != "untold":
            notes.append(f"'{one.name}' is taken for {common}, as the other dimensions are")
        if one.kind == "unknown" and verdicts[i] == "still":
            found[i] = replace(one, kind="other")
        else:
            other = state[near[i]] if near[i] >= 0 else None
            found[i] = _decided(one, other, verdict, movable.index(i), len(movable))
    if any(one.kind == "unknown" != kept.kind for one, kept in zip(action, found, strict=True)):
        notes.append("the kinds of dimensions without names are guessed from values: check them")
    return tuple(found)


def states_of(state: Sequence[Dimension], action: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """Return states with the kinds of the actions that command them; other ones without a known kind
    are numbers that are learned as they are."""
    commanded = {one.origin: one.kind for one in action if one.origin}
    return tuple(
        replace(one, kind=commanded.get(one.name, "other")) if one.kind == "unknown" else one for one in state
    )


def _counterpart(one: Dimension, place: int, action: Sequence[Dimension], state: Sequence[Dimension]) -> int:
    """Return the state of the same name, or in the same place; -1 without one."""
    name, names = _plain(one), [_plain(other) for other in state]
    if name in names:
        return names.index(name)
    there = state[place].kind if place < len(state) else "gripper"
    fits = there != "gripper" and (there == one.kind or "unknown" in (there, one.kind))
    return place if fits else -1


def _plain(one: Dimension) -> str:
    return one.name.lower().removesuffix(".pos")


def _verdict(action: FloatArray, state: FloatArray | None, inside: NDArray[np.bool_]) -> Verdict:
    """Return whether an action is the next state, or its change."""
    if np.ptp(action) == 0:
        return "still"
    if state is None:
        return "untold"
    now, after, command = state[:-1][inside], state[1:][inside], action[:-1][inside]
    absolute, delta = _correlation(command, after), _correlation(command, after - now)
    span = max(float(np.ptp(state)), 1e-9)
    close = bool(len(command)) and float(np.abs(command - after).mean()) < 0.25 * span
    if absolute > ALIKE and close and np.ptp(action) < 5 * span:
        return "absolute"
    if delta > max(absolute, FOLLOWED if close else WEAKLY_FOLLOWED):
        return "delta"
    return "untold"


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _decided(one: Dimension, near: Dimension | None, verdict: Verdict, place: int, count: int) -> Dimension:
    """Return dimension `place` of `count` that move, with its kind and the state that it commands."""
    kind: ActionKind = one.kind
    if kind == "unknown" and near is not None and near.kind in DELTAS:
        kind = near.kind
    if verdict == "untold":
        return replace(one, kind="unknown")
    if kind == "unknown":
        kind = "absolute_joint_position"
        if verdict == "delta" and count == POSE:
            kind = "absolute_eef_position" if place < POSE // 2 else "absolute_eef_rotation"
    if verdict == "delta":
        return replace(one, kind=DELTAS[kind])
    origin = near.name if near is not None and kind in ABSOLUTE and near.kind in (kind, "unknown") else ""
    return replace(one, kind=kind, origin=origin)
