"""Wordings of free questions about a scene and its task, and of their answers.

Patterns as in `blm.corpora.scenes.templates`. An answer has several wordings for each variant of
the truth. Left and right are always said to be seen from the robot, because a camera that faces the
robot shows them the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class FreeWordings(NamedTuple):
    """The templates of one kind of free question."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: Mapping[str, tuple[str, ...]]
    """Variant of the truth -> wordings of the answer."""


def free_wordings(
    *seen: str, held_out: tuple[str, ...], answers: tuple[str, ...] = (), **variants: tuple[str, ...]
) -> FreeWordings:
    """Return the templates of one kind; `answers` are those of a kind with one variant."""
    return FreeWordings(seen, held_out, {**({"": answers} if answers else {}), **variants})


def _side(side: str) -> FreeWordings:
    return free_wordings(
        f"Seen from the robot, [what|which object|which things] [is|are] to the {side} of the {{thing}}?",
        f"[What|Which objects] would the robot find to the {side} of the {{thing}}?",
        f"From where the robot stands, [what is|which objects are] to the {side} of the {{thing}}?",
        f"[Tell me|Say] what is to the {side} of the {{thing}}, seen from the robot.",
        held_out=(
            f"What lies to the {side} of the {{thing}} from the robot's point of view?",
            f"If you look from the robot, which things are {side} of the {{thing}}?",
        ),
        some=(
            f"Seen from the robot, [there is {{things}}|you find {{things}}] to the {side} of the {{thing}}.",
            f"To the {side} of the {{thing}}, as the robot sees it, [there is|I see] {{things}}.",
        ),
        none=(
            f"Seen from the robot, there is nothing to the {side} of the {{thing}}.",
            f"Nothing. Seen from the robot, no other object is to the {side} of the {{thing}}.",
        ),
    )


SCENE_TEMPLATES: dict[str, FreeWordings] = {
    "free_see": free_wordings(
        "What [do|can] you see[ here| right now|]?",
        "[Tell me|Please tell me|Say] what you [see|can see].",
        "What is [in|on] [this picture|the picture|these pictures]?",
        "[What|Which things] can be seen here?",
        held_out=("What are you looking at?", "Look around: what is there?", "What's in front of you?"),
        answers=(
            "I [see|can see] {things} and a robot arm.",
            "There is a robot arm with {things}.",
            "I [see|can see] a robot arm and, next to it, {things}.",
        ),
        held=(
            "I [see|can see] {things} and a robot arm, which is holding the {object}.",
            "There is a robot arm that is holding the {object}. In total I can see {things}.",
        ),
    ),
    "free_describe": free_wordings(
        "[Describe|Please describe] [the table|the scene|what you see].",
        "[Can|Could] you describe [the table|the scene|this scene] [to me|for me]?",
        "What does the [table|scene] look like?",
        "Give me a short description of the [table|scene].",
        held_out=("Tell me about the scene in front of you.", "How would you describe this picture?"),
        free=(
            "A robot arm stands at a table. The objects are {things}, and the gripper is empty.",
            "There is a table with {things}. The robot arm is not holding anything.",
        ),
        held=(
            "A robot arm stands at a table. I see {things}, and the gripper is holding the {object}.",
            "I see {things} and a robot arm. The {object} is in the gripper.",
        ),
        done=(
            "A robot arm stands at a table. I see {things}, and the {object} is {place}.",
            "I see {things} and a robot arm. The {object} is {place}.",
        ),
    ),
    "free_colours": free_wordings(
        "[Which|What] colours do the objects have?",
        "[Which|What] colours [are the objects|are the things|do the things have]?",
        "[Tell me|Name] the colours of the objects.",
        "In [which|what] colours are the objects?",
        held_out=("What are the colours of the things on the table?", "How are the objects coloured?"),
        answers=(
            "The objects are {colours}.",
            "I see these colours on the objects: {colours}.",
            "Their colours are {colours}.",
        ),
    ),
    "free_shapes": free_wordings(
        "[Which|What] shapes do the objects have?",
        "[Which|What] shapes [do you see|can you see|are there]?",
        "[Tell me|Name] the shapes of the objects.",
        "What kinds of [objects|things] are there?",
        held_out=("What shapes are the things on the table?", "How are the objects shaped?"),
        answers=("I see {shapes}.", "The objects are {shapes}.", "There {are} {shapes}."),
    ),
    "free_count": free_wordings(
        "How many [objects|things] are there, and [which|what are they]?",
        "[Count the objects|Count the things] and name them.",
        "How many [objects|things] do you see[ on the table|]? Name them.",
        "Can you count the [objects|things] and [tell me what they are|name them]?",
        held_out=("What is the number of objects here, and which are they?", "Count what is on the table."),
        answers=(
            "There {are} {number}: {things}.",
            "I count {number}: {things}.",
            "I see {number}: {things}.",
        ),
    ),
    "free_besides": free_wordings(
        "Is [any other object|another object|anything else] on the table besides the {thing}?",
        "Besides the {thing}, [is there another object|are there other objects] on the table?",
        "[Is|Do you see] anything else on the table than the {thing}?",
        "Apart from the {thing}, what other objects are [there|on the table]?",
        held_out=(
            "Is the {thing} the only object on the table, or is there something else?",
            "What else is on the table besides the {thing}?",
        ),
        some=("Yes, there is also {things}.", "Yes, besides the {thing} I see {things}."),
        none=(
            "No, the {thing} is the only object on the table.",
            "No, I see only the {thing} on the table.",
        ),
    ),
    "free_pick_up": free_wordings(
        "[Which|What] things could I pick up?",
        "[Which|What] objects [can|could] [I|someone|a person] pick up?",
        "What could I [take|pick up] from the table?",
        "[Name|Tell me] the things that I could pick up.",
        held_out=("Is there anything here that I could pick up?", "Which of these objects could I grab?"),
        answers=(
            "You could pick up {things}.",
            "{Things} can be picked up.",
            "There is {things} that you could pick up.",
        ),
    ),
    "free_next_to": free_wordings(
        "What is next to the {thing}?",
        "[Which|What] object is [right next to|next to|beside] the {thing}?",
        "What [do you see|can you see|is there] next to the {thing}?",
        "[Tell me|Say] what is beside the {thing}.",
        held_out=("What's right beside the {thing}?", "Which object stands next to the {thing}?"),
        answers=(
            "The {near} is next to the {thing}.",
            "Next to the {thing} there is {a_near}.",
            "It is the {near} that is beside the {thing}.",
        ),
    ),
    "free_left": _side("left"),
    "free_right": _side("right"),
    "free_relation": free_wordings(
        "Seen from the robot, where is the {thing} [relative to|compared with] the {other}?",
        "From where the robot stands, on which side of the {other} is the {thing}?",
        "For the robot, is the {thing} [more to the left or to the right than|left or right of] the {other}?",
        "[Tell me|Say] on which side of the {other} the {thing} is for the robot.",
        held_out=("From the robot's point of view, where is the {thing} from the {other}?",),
        answers=(
            "Seen from the robot, the {thing} is to the {side} of the {other}.",
            "The {thing} is on the {side} side of the {other} for the robot.",
            "For the robot, it is to the {side} of the {other}.",
        ),
    ),
    "free_nearest": free_wordings(
        "[Which|What] object is [closest|nearest] to the robot's base?",
        "[What|Which of the objects] is [closest|nearest] to where the robot stands?",
        "Which [thing|object] stands [closest|nearest] to the base of the robot?",
        "[Tell me|Say] which object is nearest to the robot's base.",
        held_out=("Which object does the robot's base have closest to it?",),
        answers=(
            "The {near} is closest to the robot's base.",
            "It is the {near} that is nearest to the robot.",
        ),
    ),
    "free_held": free_wordings(
        "What is the [robot|gripper|arm] holding[ now|]?",
        "Is the [robot|gripper] holding [anything|something]?",
        "What is in the gripper[ now|]?",
        "[Tell me|Say] what the [robot|gripper] holds.",
        held_out=("Does the arm have something in its gripper?", "What has the robot got in its hand?"),
        held=("The [gripper|robot] is holding the {object}.", "It is holding the {object}."),
        free=("It is not holding anything.", "Nothing, the gripper is empty.", "The gripper is empty."),
    ),
    "free_where": free_wordings(
        "Where is the {thing}, seen from the robot?",
        "Seen from the robot, where on the table [is|do you see|do I find] the {thing}?",
        "Where [can I find|do you see] the {thing}, from the robot's side?",
        "[Tell me|Say] where the {thing} is, seen from the robot.",
        held_out=("From the robot's point of view, where do you see the {thing}?",),
        side=(
            "Seen from the robot, the {thing} is on the {side} side of the table.",
            "It is on the {side} of the table, as the robot sees it.",
        ),
        middle=(
            "Seen from the robot, the {thing} is in the middle of the table.",
            "The {thing} is in the centre, neither left nor right.",
        ),
        held=("The {thing} is in the gripper.", "The robot is holding the {thing} in its gripper."),
    ),
    "free_can_see": free_wordings(
        "[Can|Do] you see a {thing}[ anywhere|]?",
        "Is there a {thing} [anywhere|somewhere|in the picture]?",
        "I am looking for a {thing}. [Is it there|Can you see one|Do you see one]?",
        "Could you check [if|whether] there is a {thing}?",
        held_out=("Have you seen a {thing}?", "Would I find a {thing} here?"),
        yes=("Yes, I can see a {thing}.", "Yes, there is a {thing}.", "Yes, I see one: a {thing}."),
        no=(
            "No, I can't see a {thing}.",
            "No, there is no {thing}. I see {things}.",
            "No, I do not see a {thing} here.",
        ),
    ),
    "free_strange": free_wordings(
        "Can you see a {strange}?",
        "Is there a {strange} [on the table|in the picture|here]?",
        "[Do you see|I think I see|Look, isn't that] a {strange}?",
        "Where is the {strange}?",
        held_out=("Have you seen a {strange} anywhere?", "What is the {strange} doing?"),
        answers=(
            "No, I can't see a {strange} here.",
            "No, there is no {strange}. I only see {things} and a robot arm.",
            "No, I do not see a {strange}, only {things}.",
        ),
    ),
    "free_same_colour": free_wordings(
        "Do [any two objects|two of the objects|any objects] have the same colour?",
        "Are [two|any] of the objects of the same colour?",
        "Is [one|any] colour there twice among the objects?",
        "Do some of the objects share [a|their] colour?",
        held_out=("Are there two things of one colour?", "Have any objects got the same colour?"),
        yes=("Yes, {pair} are both {colour}.", "Yes, {pair} have the same colour: {colour}."),
        no=("No, every object has its own colour.", "No, all objects have different colours."),
    ),
    "free_first_step": free_wordings(
        "Instruction: {task} What should the robot do first, and why?",
        "Instruction: {task} [What|Which step] comes first, and [why|for what reason]?",
        "The robot was told: {task} What should it do [first|now], and why?",
        "[Your|The robot's] task: {task} How [should you|would you] begin, and why?",
        held_out=(
            "Instruction: {task} What would you do first? Explain why.",
            "Somebody says: {task} What is the first thing to do, and why?",
        ),
        start=(
            "First, the robot should move its gripper to the {object}, because its task is to {deed}.",
            "It should first reach for the {object}, since it has to {deed}.",
            "The first step is to approach the {object}: the robot must reach it to {deed}.",
        ),
        held=(
            "It is already holding the {object}, so the next step is to move it {to}: the task is to {deed}.",
            "The robot should carry the {object} {to}, because it already has it in its gripper.",
        ),
        done=(
            "Nothing more is needed: the {object} is already where it should be, {place}.",
            "The task is already done, so the robot should hold still: the {object} is {place}.",
        ),
    ),
    "free_task": free_wordings(
        "Instruction: {task} What is your task?",
        "Instruction: {task} [Explain|Say] in your own words what you have to do.",
        "[Your|The robot's] task: {task} What [does that mean|is to be done]?",
        "The robot was told: {task} What is it supposed to do?",
        held_out=(
            "Instruction: {task} What are you supposed to do?",
            "Somebody says: {task} What do they want?",
        ),
        answers=("My task is to {deed}.", "The robot has to {deed}.", "The task is to {deed}."),
    ),
    "free_goal": free_wordings(
        "Instruction: {task} Where should the {object} go?",
        "Instruction: {task} Where does the {object} [belong|have to go]?",
        "The robot was told: {task} Where [must|should] it bring the {object}?",
        "[Your|The robot's] task: {task} Where will the {object} [be|end up] [in the end|when it is done]?",
        held_out=("Instruction: {task} To which place should the {object} be brought?",),
        answers=("The {object} should go {to}.", "It belongs {place}.", "It should end up {place}."),
    ),
    "free_done": free_wordings(
        "Instruction: {task} [Is|Has] this [done already|been done]?",
        "Instruction: {task} Is the task [finished|done|complete]?",
        "The robot was told: {task} [Has it done so|Did it finish|Is it done]?",
        "[Your|The robot's] task: {task} Are you done?",
        held_out=("Instruction: {task} Has the robot finished?", "Somebody says: {task} Is that done yet?"),
        done=("Yes, the {object} is already {place}.", "Yes, it is done: the {object} is {place}."),
        held=(
            "No, the gripper is still holding the {object}.",
            "No, not yet: the robot has the {object} in hand.",
        ),
        start=(
            "No, the {object} is still on the table.",
            "No, not yet: the robot still has to {deed}.",
        ),
    ),
}
"""Kind -> its wordings."""
