"""Execution of action chunks: compared with the definition, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm.chunks import ChunkExecutor, ObservationHistory
from blm.types import ActionSpace, BlmError, Observation, PolicyContract

HOLD = np.array([-1.0])


def chunk(decision: int, length: int) -> np.ndarray:
    """A chunk whose actions name their decision and their place."""
    return np.array([[100.0 * decision + place] for place in range(length)])


def executed(execute: int, length: int, delays: Sequence[int], steps: int) -> tuple[list[float], list[int]]:
    """The actions of `steps` steps, and the steps at which a decision was made."""
    executor, actions, asked = ChunkExecutor(execute, HOLD), list[float](), list[int]()
    for _ in range(steps):
        if executor.decision_due:
            executor.receive(chunk(len(asked), length), delays[len(asked) % len(delays)])
            asked.append(executor.step)
        actions.append(float(executor.next_action()[0]))
    return actions, asked


def test_without_delay_the_first_actions_of_each_chunk_are_executed() -> None:
    actions, asked = executed(execute=3, length=5, delays=[0], steps=7)
    assert actions == [0, 1, 2, 100, 101, 102, 200] and asked == [0, 3, 6]


def test_a_late_chunk_replaces_the_previous_one_when_it_arrives() -> None:
    actions, asked = executed(execute=3, length=5, delays=[2], steps=8)
    assert actions == [-1, -1, 2, 3, 4, 102, 103, 104] and asked == [0, 3, 6]


def test_when_the_previous_chunk_is_over_its_last_action_is_held() -> None:
    actions, asked = executed(execute=2, length=3, delays=[1, 4], steps=9)
    assert actions == [-1, 1, 2, 2, 2, 2, 102, 201, 202] and asked == [0, 2, 6, 8]


def test_a_chunk_shorter_than_the_decision_interval_ends_it() -> None:
    actions, asked = executed(execute=5, length=2, delays=[0], steps=5)
    assert actions == [0, 1, 100, 101, 200] and asked == [0, 2, 4]


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 40),
)
def test_each_step_executes_the_action_of_the_newest_chunk(
    execute: int, length: int, delays: list[int], steps: int
) -> None:
    actions, asked = executed(execute, length, delays, steps)
    for step, action in enumerate(actions):
        arrived = [number for number, at in enumerate(asked) if at + delays[number % len(delays)] <= step]
        if not arrived:
            assert action == HOLD[0]
            continue
        newest = arrived[-1]
        assert action == 100 * newest + min(step - asked[newest], length - 1)
    for number, (before, after) in enumerate(pairwise(asked)):
        assert after - before == max(min(execute, length), delays[number % len(delays)])


def test_invalid_chunks_are_refused() -> None:
    with pytest.raises(BlmError, match="execute is 0"):
        ChunkExecutor(0, HOLD)
    with pytest.raises(BlmError, match="without actions"):
        ChunkExecutor(1, HOLD).receive(np.zeros((0, 1)))


def contract(frames: int) -> PolicyContract:
    space = ActionSpace(robot="arm", names=("gripper",), units=("opening",), low=(0.0,), high=(1.0,))
    return PolicyContract(
        action_spaces={"arm": space}, cameras=("base",), image_size=2, horizon=4, execute=2, frames=frames
    )


@given(st.integers(1, 5), st.integers(1, 12))
def test_a_history_has_the_decisions_before_this_one_oldest_first(frames: int, decisions: int) -> None:
    history, picture = ObservationHistory(contract(frames)), np.zeros((2, 2, 3), np.uint8)
    for number in range(decisions):
        seen = Observation(
            images={"base": picture}, state=np.zeros(1), instruction="go", robot="arm", seed=number
        )
        complete = contract(frames).check(history.extend(seen))
        assert [one.seed for one in complete.history] == list(range(max(0, number - frames + 1), number))
        assert all(not one.history for one in complete.history), "a history does not nest"
