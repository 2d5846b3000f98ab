"""Scenes whose goals can be seen: a scene with a hidden goal is drawn again.

The rule is data. The scene of a seed is the first draw of its placement stream in which every item
but the object of the task shows `min_pixels` in one of the cameras at reset; the first draw is the
scene of the plain suite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from blm.types import BlmError

if TYPE_CHECKING:
    from blm.tasks.env import Env

MIN_PIXELS, SIDE = 12, 112
CAMERAS = ("base", "wrist")
DRAWS = 50
RULE: Mapping[str, object] = {
    "min_pixels": MIN_PIXELS,
    "side": SIDE,
    "cameras": CAMERAS,
    "draws": DRAWS,
    "items": "all but the object of the task",
}
"""Pixels that a goal must show, in images of so many pixels a side, in any of the cameras; and the
maximum number of draws."""


def hidden_goals(env: Env) -> list[str]:
    """Return the items of the present scene, except the task's object, that no camera shows."""

    def is_hidden(name: str) -> bool:
        return all(env.mask(name, camera, SIDE).sum() < MIN_PIXELS for camera in CAMERAS)

    goals = [item.name for item in env.items if item.name != env.task_spec.object]
    return [name for name in goals if is_hidden(name)]


def draw_until_visible(env: Env, draw_again: Callable[[], None]) -> None:
    """Call `draw_again`, which draws the scene again, until no goal is hidden.

    Raises BlmError if DRAWS draws have not been enough.
    """
    for _ in range(DRAWS - 1):
        if not (hidden := hidden_goals(env)):
            return
        draw_again()
    if hidden := hidden_goals(env):
        raise BlmError(
            f"{', '.join(hidden)} of '{env.embodiment}' in '{env.task}' is hidden from "
            f"{' and '.join(CAMERAS)} in {DRAWS} scenes of one seed"
        )
