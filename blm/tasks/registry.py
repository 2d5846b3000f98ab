"""Every task, by name."""

from blm.tasks.pick_cube import PICK_CUBE
from blm.tasks.push_cube import PUSH_CUBE

TASKS = {"push_cube": PUSH_CUBE, "pick_cube": PICK_CUBE}
