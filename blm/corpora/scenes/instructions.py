"""Questions about an instruction: which of two things it names."""

from __future__ import annotations

from collections.abc import Iterator

from blm.corpora.scenes.annotations import Annotation
from blm.tasks.naming import Naming

_CUBE = ("instruction_object", "cube", "{color} cube", "{color} cube")
NAMED: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "words_push_cube": (_CUBE, ("instruction_goal", "target", "far target", "near target")),
    "words_pull_cube": (_CUBE, ("instruction_goal", "target", "near target", "far target")),
    "words_pick_cube": (_CUBE,),
    "words_stack_cube": (
        ("instruction_object", "cube", "{a} cube", "{a} cube"),
        ("instruction_goal", "cube", "{b} cube", "{b} cube"),
    ),
    "words_place_sphere": (
        ("instruction_object", "ball", "{color} ball", "{color} ball"),
        ("instruction_goal", "bin", "{bin} bin", "{bin} bin"),
    ),
    "words_lift_peg_upright": (("instruction_end", "end", "{top} end", "{top} end"),),
}
"""Task -> kind of question, kind of thing, named thing, and the other thing, whose slots are filled
with the other words of the scene."""


def instruction_annotations(task: str, instruction: str, naming: Naming) -> Iterator[Annotation]:
    """Yield what can be asked about an instruction; nothing for a task with one thing of each kind."""
    for kind, thing, named, other in NAMED.get(task, ()):
        asked = {"task": instruction, "kind": thing}
        yield Annotation(kind, named.format(**naming.words), asked, (other.format(**naming.other_words),))
