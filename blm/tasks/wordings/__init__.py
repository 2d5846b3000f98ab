"""Minimal test wordings, against which the protocols were developed; the real ones replace this file."""

from collections.abc import Mapping

_NAMES = ("push_cube", "pull_cube", "pick_cube", "stack_cube", "place_sphere", "lift_peg_upright")
TEST_WORDINGS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    task: {
        level: tuple(f"Wording {number} of level {level} for {task}." for number in range(5))
        for level in range(1, 6)
    }
    for task in _NAMES
}
"""Task -> level -> wordings for tests only."""
