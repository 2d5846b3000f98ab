"""Every task, by name."""

from blm.tasks.lift_peg_upright import LIFT_PEG_UPRIGHT
from blm.tasks.pick_cube import PICK_CUBE
from blm.tasks.place_sphere import PLACE_SPHERE
from blm.tasks.pull_cube import PULL_CUBE
from blm.tasks.push_cube import PUSH_CUBE
from blm.tasks.stack_cube import STACK_CUBE
from blm.tasks.words_lift_peg_upright import WORDS_LIFT_PEG_UPRIGHT
from blm.tasks.words_pick_cube import WORDS_PICK_CUBE
from blm.tasks.words_place_sphere import WORDS_PLACE_SPHERE
from blm.tasks.words_pull_cube import WORDS_PULL_CUBE
from blm.tasks.words_push_cube import WORDS_PUSH_CUBE
from blm.tasks.words_stack_cube import WORDS_STACK_CUBE

_SUITE24 = (PUSH_CUBE, PULL_CUBE, PICK_CUBE, STACK_CUBE, PLACE_SPHERE, LIFT_PEG_UPRIGHT)
_WORDS = (
    WORDS_PUSH_CUBE,
    WORDS_PULL_CUBE,
    WORDS_PICK_CUBE,
    WORDS_STACK_CUBE,
    WORDS_PLACE_SPHERE,
    WORDS_LIFT_PEG_UPRIGHT,
)
SUITE24 = tuple(spec.name for spec in _SUITE24)
"""Names of the six tasks of suite24, which are the default wherever no task is named."""
WORDS = tuple(spec.name for spec in _WORDS)
"""Names of the six tasks in which only the words decide."""
TASKS = {spec.name: spec for spec in (*_SUITE24, *_WORDS)}
