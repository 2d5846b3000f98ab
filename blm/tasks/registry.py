"""Every task, by name."""

from blm.tasks.lift_peg_upright import LIFT_PEG_UPRIGHT
from blm.tasks.pick_cube import PICK_CUBE
from blm.tasks.place_sphere import PLACE_SPHERE
from blm.tasks.pull_cube import PULL_CUBE
from blm.tasks.push_cube import PUSH_CUBE
from blm.tasks.stack_cube import STACK_CUBE

TASKS = {
    "push_cube": PUSH_CUBE,
    "pull_cube": PULL_CUBE,
    "pick_cube": PICK_CUBE,
    "stack_cube": STACK_CUBE,
    "place_sphere": PLACE_SPHERE,
    "lift_peg_upright": LIFT_PEG_UPRIGHT,
}
