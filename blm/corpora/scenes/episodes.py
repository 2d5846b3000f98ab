"""Recorded episodes as a sequence of steps, and annotations of the ShareRobot kinds about a frame.

Primitives that look alike in an image are merged into one step: descending and grasping, lifting
and carrying, releasing and retreating.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from blm.corpora.scenes.annotations import Annotation
from blm.corpora.scenes.instructions import instruction_annotations
from blm.tasks.naming import Naming
from blm.types import BlmError, lookup

MERGED = {"lift": "move", "retreat": "release"}
"""Primitive -> the step that it is merged into, for every task."""
IN_TASK = {
    "push_cube": {},
    "pull_cube": {},
    "pick_cube": {"descend": "grasp"},
    "stack_cube": {"descend": "grasp"},
    "place_sphere": {"descend": "grasp"},
    "lift_peg_upright": {"descend": "grasp", "lift": "lift", "turn": "lift"},
    "words_push_cube": {},
    "words_pull_cube": {},
    "words_pick_cube": {"descend": "grasp"},
    "words_stack_cube": {"descend": "grasp"},
    "words_place_sphere": {"descend": "grasp"},
    "words_lift_peg_upright": {"descend": "grasp", "lift": "lift", "turn": "lift"},
}
"""Task -> further merged primitives."""
PHRASES = {
    "push_cube": ("blue cube", "target"),
    "pull_cube": ("blue cube", "target"),
    "pick_cube": ("red cube", "goal"),
    "stack_cube": ("red cube", "green cube"),
    "place_sphere": ("blue ball", "white bin"),
    "lift_peg_upright": ("peg", "table"),
    "words_push_cube": ("{color} cube", "far target"),
    "words_pull_cube": ("{color} cube", "near target"),
    "words_pick_cube": ("{color} cube", "goal"),
    "words_stack_cube": ("{a} cube", "{b} cube"),
    "words_place_sphere": ("{color} ball", "{bin} bin"),
    "words_lift_peg_upright": ("peg", "table"),
}
"""Task -> names of its object and its goal; slots stand for the words of an episode."""
WORDS = {
    "approach": "approach the {object}",
    "descend": "descend to the {object}",
    "push": "push the {object} to the {goal}",
    "pull": "pull the {object} to the {goal}",
    "grasp": "grasp the {object}",
    "move": "move the {object} to the {goal}",
    "lift": "lift the {object}",
    "place": "place the {object} on the {goal}",
    "release": "release the {object}",
    "hold": "hold still",
}
"""Step -> its template in answers."""
SHORT_RUN = 3
"""Runs of a label shorter than this are flicker and count to the step before [frames]."""
AFTER = 3
"""Frames after a change of step that are not asked about."""
BEFORE = 4
"""Frames before a change of step that are not asked about."""
SOON = 9
"""Maximum time to a contact "in the next half second" [frames of 50 ms]."""
LATER = 13
"""Minimum time to a contact that does not come in the next half second [frames of 50 ms].

Frames with a time between SOON and LATER are not asked about.
"""


_NO_WORDS = Naming()


@dataclass(frozen=True)
class EpisodeSteps:
    """The steps of one episode, in order."""

    task: str
    names: tuple[str, ...]
    starts: tuple[int, ...]
    """First frame of each step, followed by the number of frames."""
    contact: int
    """Frame at which the fingers start to touch the object; the number of frames if never."""
    done: int
    """First frame from which the task stays solved; the number of frames if never."""
    naming: Naming = field(default_factory=Naming)
    """Words of the episode's instruction."""

    @property
    def thing(self) -> str:
        """The object as answers name it, e.g. 'red cube'."""
        return PHRASES[self.task][0].format(**self.naming.words)

    @property
    def regular(self) -> bool:
        """Whether every step occurs once, so that the order of steps follows from the task."""
        return len(set(self.names)) == len(self.names)

    def moments(self, index: int) -> range:
        """Return the frames of a step that are not close to a change of step."""
        last = index == len(self.names) - 1
        return range(
            self.starts[index] + (AFTER if index else 0), self.starts[index + 1] - (0 if last else BEFORE)
        )

    def phrase(self, name: str) -> str:
        """Return a step as answers name it, e.g. 'grasp the red cube'."""
        goal = PHRASES[self.task][1].format(**self.naming.words)
        return WORDS[name].format(object=self.thing, goal=goal)


def read_steps(
    task: str, primitives: Sequence[str] | np.ndarray, success: np.ndarray, naming: Naming = _NO_WORDS
) -> EpisodeSteps:
    """Segment an episode into steps by the primitive labels of its frames.

    Raises BlmError for an unknown primitive.
    """
    merged = MERGED | lookup("task", task, IN_TASK)
    names = [merged.get(str(primitive), str(primitive)) for primitive in primitives]
    unknown = sorted({*names} - {*WORDS})
    if unknown:
        raise BlmError(f"primitives {unknown} have no wording; valid: {', '.join(WORDS)}")
    runs: list[tuple[str, int]] = []
    for frame, name in enumerate(names):
        if names[frame : frame + SHORT_RUN] != [name] * len(names[frame : frame + SHORT_RUN]) and runs:
            continue  # flicker
        if not runs or runs[-1][0] != name:
            runs.append((name, frame))
    count = len(names)
    touching = np.flatnonzero(np.isin(np.asarray(primitives), ("grasp", "push", "pull")))
    solved_for = count if success.all() else int(np.argmin(success[::-1]))
    return EpisodeSteps(
        task=task,
        names=tuple(name for name, _ in runs),
        starts=(*(frame for _, frame in runs), count),
        contact=int(touching[0]) if len(touching) else count,
        done=count - solved_for,
        naming=naming,
    )


def frame_annotations(steps: EpisodeSteps, index: int, frame: int, instruction: str) -> Iterator[Annotation]:
    """Yield all annotations of a frame in step `index`."""
    phrases = [steps.phrase(name) for name in steps.names]
    now = phrases[index]
    thought = f"now {now}"
    if steps.regular:
        thought = f"{', '.join(steps.names)}; {thought}"
        yield from _ordered(steps, index, phrases, instruction, thought)
    others = tuple(sorted({*phrases} - {now}))
    yield Annotation("generative_affordance", now, {}, others)
    asked = f"{thought}; asked {now}"
    yield Annotation("discriminative_affordance_positive", "yes", {"step": now}, thought=asked)
    thing = steps.thing
    yield from instruction_annotations(steps.task, instruction, steps.naming)
    if frame + SOON >= steps.contact > frame:
        yield Annotation("forecasting_touch", "yes", {"thing": thing}, thought=f"now {now}")
    elif frame + LATER < steps.contact or (now == "hold still" and "release" in steps.names):
        yield Annotation("forecasting_touch", "no", {"thing": thing}, thought=f"now {now}")
    task = {"step": instruction.rstrip(".")}
    if steps.done > frame + LATER:
        yield Annotation("success_negative", "no", task, thought=thought)
    elif frame >= steps.done + AFTER:
        yield Annotation("success_positive", "yes", task, thought=thought)


def _ordered(
    steps: EpisodeSteps, index: int, phrases: list[str], instruction: str, thought: str
) -> Iterator[Annotation]:
    """Yield the annotations that follow from the order of the steps."""
    for other, phrase in enumerate(phrases):
        if abs(other - index) >= 2:
            asked = f"{thought}; asked {phrase}"
            yield Annotation("discriminative_affordance_negative", "no", {"step": phrase}, thought=asked)
        if 0 < other < len(phrases) - 1 and other != index:
            kind, answer = ("success_positive", "yes") if other < index else ("success_negative", "no")
            yield Annotation(kind, answer, {"step": phrase}, thought=thought)
    for kind, other in (("future_prediction", index + 1), ("past_description", index - 1)):
        answer = phrases[other] if 0 <= other < len(phrases) else "nothing"
        wrong = tuple(sorted({*phrases, "nothing"} - {answer, phrases[index]}))
        yield Annotation(kind, answer, {}, wrong, thought)
    names = steps.names
    yield Annotation("remaining_steps", ", ".join(names[index + 1 :]) or "nothing", thought=thought)
    yield Annotation("planning", ", ".join(names[index:]), {"task": instruction}, thought=thought)
    for known in range(index + 1):
        wrong = tuple({*phrases[known:]} - {phrases[index]})
        words = {"task": instruction, "done": ", ".join(names[:known]) or "nothing"}
        yield Annotation("planning_with_context", phrases[index], words, wrong)
