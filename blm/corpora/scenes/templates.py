"""Question templates of every kind: those for training, and held-out ones for evaluation.

A template is a pattern in which `[a|b|]` stands for one of its alternatives (see
`blm.tasks.wordings.expand`), and `{...}` is filled from an annotation. A multiple choice adds its
options on separate lines.

There are many training templates, because a model that is trained from scratch on a few memorises
them and understands no others. Held-out templates recombine words and phrases of training
templates, of the same kind or of others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Wording = Literal["seen", "held_out"]


class Wordings(NamedTuple):
    """The templates of one kind of question."""

    seen: tuple[str, ...]
    held_out: tuple[str, ...]


def _wordings(*seen: str, held_out: tuple[str, ...]) -> Wordings:
    return Wordings(seen, held_out)


_POINT = _wordings(
    "[Point to|Please point to|Mark|Find|Locate|Show] the {thing} in the {camera} view.",
    "[Where is|Where do you see|At which point is|At what point is] the {thing} in the {camera} view?",
    "In the {camera} view, [where is|where do you see|which point is on|what point is on] the {thing}?",
    "In the {camera} view, [mark|find|locate|show|give the point of|tell the point of] the {thing}.",
    "[Give|Tell|Show|Find|Please give] the point of the {thing} in the {camera} view.",
    "[Which|What] point [is on|marks|shows] the {thing} in the {camera} view?",
    held_out=(
        "In the {camera} view, point to the {thing}.",
        "In the {camera} view, at which point is the {thing}?",
    ),
)
_BOX = _wordings(
    "[Draw|Put|Show|Please draw] a box around the {thing} in the {camera} view.",
    "[Give|Tell|Show|Find|Please give] the box of the {thing} in the {camera} view.",
    "[Which|What] box [holds|is around|marks|shows] the {thing} in the {camera} view?",
    "In the {camera} view, [which|what] box [holds|is around|marks|shows] the {thing}?",
    "In the {camera} view, [give|tell|show|find|mark] the box of the {thing}.",
    "Where is the box [of|around] the {thing} in the {camera} view?",
    held_out=(
        "In the {camera} view, draw a box around the {thing}.",
        "In the {camera} view, where is the box of the {thing}?",
    ),
)
_DISCRIMINATIVE = _wordings(
    "Is [this|this step] possible[ now|]: {step}?",
    "Can the robot {step}[ now|]?",
    "Step: {step}. [Is it what the robot can do|Is it possible|Can the robot do it|Can it be done] now?",
    "[Is it|Now, is it] possible for the robot to {step}?",
    "Is it possible for the robot to {step} now?",
    "Now, [is this possible|is this step possible|can this be done|can this step be done]: {step}?",
    "Can [this|this step] be done[ now|]: {step}?",
    "[Now, is|Is] the robot able to {step}?",
    "[Now, can|Can] the robot do [this|this step]: {step}?",
    held_out=("Now, can the robot {step}?", "Is it possible to {step} now?"),
)
_SUCCESS = _wordings(
    "Step: {step}. [Is it|Has it been|Is the robot] [finished|done]?",
    "Step: {step}. [Did the robot finish it|Has the robot done it|Is the robot done with it]?",
    "Is [this|this step] [finished|done][ now|]: {step}?",
    "Did the robot [finish|do] [this|this step]: {step}?",
    "Has the robot [finished|done] [this|this step]: {step}?",
    held_out=("Is the robot finished with this step: {step}?",),
)
_NOW = "[What to do now?|Which step is to do now?|Name the step to do now.|Tell the step to do now.]"


def _attribute(name: str, thing: str) -> Wordings:
    return _wordings(
        f"[What|Which|Of what|Of which] {name} is the {thing}?",
        f"[What|Which] {name} does the {thing} have?",
        f"[Tell|Name|Give] the {name} of the {thing}.",
        f"[Tell|Name] [what|which] {name} the {thing} has.",
        f"The {thing}: [what|which] {name} is it?",
        f"The {thing} has [what|which] {name}?",
        held_out=(f"The {thing} is of which {name}?",),
    )


def _farthest(most: str, same: str, to: str) -> Wordings:
    return _wordings(
        f"[Which object|What|Which of the objects] is [{most}|{same}] {to} the {{thing}}?",
        f"[Name|Find|Give] the object [{most}|{same}] {to} the {{thing}}.",
        f"Of [all|the] objects, [which|which one] is [{most}|{same}] {to} the {{thing}}?",
        f"The {{thing}}: [which object|what] is [{most}|{same}] {to} it?",
        f"[Which|What] is the object [{most}|{same}] {to} the {{thing}}?",
        held_out=(
            f"Tell which object is {most} {to} the {{thing}}.",
            f"Name the object that is {most} {to} the {{thing}}.",
        ),
    )


def _distance(start: str, end: str) -> Wordings:
    return _wordings(
        f"How far is the {start} [from|away from] the {end}[ now|]?",
        f"How far is it [from the {start} to the {end}|to the {end} from the {start}]?",
        f"[Give|Tell|Find] the distance [between the {start} and|from the {start} to] the {end}.",
        f"From the {start}, how far [is it to|away is] the {end}?",
        f"What is the distance [from the {start} to the {end}|to the {end} from the {start}]?",
        held_out=(f"What is the distance between the {start} and the {end}?",),
    )


def _displacement(start: str, end: str) -> Wordings:
    return _wordings(
        f"How must the {start} [move|go] [to|to reach] the {end} in cm?",
        f"[Give|Find|Name] the way from the {start} to the {end} in cm.",
        f"What is the way [from the {start} to the {end}|to the {end} from the {start}] in cm?",
        f"In cm, [how must the {start} move|what is the way from the {start}] to the {end}?",
        f"To [reach|get to] the {end}, how must the {start} [move|go] in cm?",
        f"From the {start}, what is the way to the {end} in cm?",
        held_out=(
            f"Tell the way from the {start} to the {end} in cm.",
            f"In cm, give the way from the {start} to the {end}.",
        ),
    )


def _named(what: str) -> Wordings:
    return _wordings(
        f"Task: {{task}} [Which|What] {{kind}} {what}[ now|]?",
        f"Task: {{task}} [Name|Tell|Give|Find] the {{kind}} that {what}.",
        f"[Which|What] {{kind}} {what} for this task: {{task}}",
        f"[Name|Give|Find] the {{kind}} that {what} for this task: {{task}}",
        f"For this task, [which|what] {{kind}} {what}: {{task}}",
        held_out=(f"Task: {{task}} Tell which {{kind}} {what}.",),
    )


TEMPLATES: dict[str, Wordings] = {
    "existence": _wordings(
        "[Is there|Can you see|Do you see|Can you find] a {thing} on the table?",
        "[Is there|Can you see|Do you see|Can you find] a {thing}?",
        "Does the table have a {thing}[ on it|]?",
        "On the table, [is there|can you see|do you see|can you find] a {thing}?",
        "Can a {thing} be [seen|found][ on the table|]?",
        held_out=("Is a {thing} on the table?",),
    ),
    "attribute_color": _attribute("colour", "{thing}"),
    "attribute_shape": _attribute("shape", "{thing} object"),
    "affordance_held": _wordings(
        "Is the gripper holding the {thing}[ now|]?",
        "Does the gripper [hold|have] the {thing}[ now|]?",
        "Is the {thing} [in the gripper|held by the gripper|what the gripper holds][ now|]?",
        "Can the gripper let go of the {thing}[ now|]?",
        "You are the gripper. [Are you holding|Do you hold|Do you have] the {thing}?",
        "Now, [does the gripper hold|can the gripper let go of] the {thing}?",
        held_out=("Is the {thing} what the gripper is holding?", "Now, is the gripper holding the {thing}?"),
    ),
    "affordance_room": _wordings(
        "Is there [room|space] for [an|another] object on the {thing}[ now|]?",
        "Can [an|another] object be put on the {thing}[ now|]?",
        "Is the {thing} free[ now|]?",
        "On the {thing}, is there [room|space][ for another object|]?",
        "Does the {thing} have [room|space] for [an|another] object[ now|]?",
        "Now, can [an|another] object be put on the {thing}?",
        held_out=("Is there room on the {thing} now?", "Is the {thing} free for another object?"),
    ),
    "affordance_roll": _wordings(
        "Which object [can|will] roll[ on the table|]?",
        "What [rolls|can roll|will roll] when it is pushed?",
        "[Name|Find|Give] the object that [rolls|can roll|will roll].",
        "When it is pushed, [what|which object] [can|will] roll?",
        "[What|Which] is the object that [rolls|can roll|will roll]?",
        held_out=("Which object rolls when it is pushed?",),
    ),
    "location_table": _wordings(
        "[In|On] which part of the table is the {thing}[:|,] left, middle or right?",
        "[What|Which] part of the table [has|holds] the {thing}[:|,] left, middle or right?",
        "Where on the table is the {thing}[:|,] [left, middle or right|right, middle or left]?",
        "Left, middle or right: [where on|in which part of|on which part of] the table is the {thing}?",
        "On the table, is the {thing} [left, right or in the middle|right, left or in the middle]?",
        held_out=("Is the {thing} in the left, middle or right part of the table?",),
    ),
    "location_state": _wordings(
        "Where is the {thing}?",
        "What is the {thing} [on or in|in or on][ now|]?",
        "Tell [where|on or in what|in or on what] the {thing} is[ now|].",
        "[On or in|In or on] what is the {thing}[ now|]?",
        "Where [can|do] you [see|find] the {thing}[ now|]?",
        "Now, [tell where the {thing} is.|what is the {thing} on or in?|what is the {thing} in or on?]",
        held_out=("Where is the {thing} now?", "Now, where is the {thing}?"),
    ),
    "location_goal": _wordings(
        "Is the {thing} in the air or on the table[ now|]?",
        "Where is the {thing}[:|,] [in the air or on the table|on the table or in the air]?",
        "[On the table or in the air|In the air or on the table]: where is the {thing}?",
        "Tell where the {thing} is[:|,] [in the air or on the table|on the table or in the air].",
        "The {thing}: is it [in the air or on the table|on the table or in the air]?",
        held_out=("Is the {thing} on the table or in the air?",),
    ),
    "left_right": _wordings(
        "Is the {thing} [left or right|right or left|to the left or to the right] of the {other}?",
        "On which side of the {other} is the {thing}[:|,] [left or right|right or left]?",
        "[Left or right|Right or left]: where is the {thing} from the {other}?",
        "From the {other}, is the {thing} [left or right|right or left|on the left or on the right]?",
        "Which side of the {other} is the {thing} on[:|,] [left or right|right or left]?",
        "Where is the {thing}[:|,] [left or right|right or left] of the {other}?",
        held_out=(
            "Is the {thing} on the left or right side of the {other}?",
            "From the {other}, on which side is the {thing}, left or right?",
        ),
    ),
    "front_behind": _wordings(
        "Is the {thing} in front of or behind the {other}?",
        "[Front or behind|In front or behind|Behind or in front]: where is the {thing} from the {other}?",
        "Where is the {thing}[:|,] [behind or in front of|in front of or behind] the {other}?",
        "From the {other}, is the {thing} [in front or behind|behind or in front]?",
        "The {thing}: is it [in front of or behind|behind or in front of] the {other}?",
        "Tell where the {thing} is[:|,] [in front of or behind|behind or in front of] the {other}.",
        held_out=("Is the {thing} behind or in front of the {other}?",),
    ),
    "above": _wordings(
        "Is the gripper above or below the {thing}[ now|]?",
        "[Above or below|Below or above]: where is the gripper from the {thing}?",
        "Where is the gripper[:|,] [below or above|above or below] the {thing}?",
        "You are the gripper. Are you [above or below|below or above] the {thing}?",
        "From the {thing}, is the gripper [above or below|below or above]?",
        "Tell where the gripper is[:|,] [above or below|below or above] the {thing}.",
        held_out=("Is the gripper below or above the {thing}?",),
    ),
    "counting": _wordings(
        "How many {thing}s [are on the table|are there|do you see|can you see|can you find]?",
        "Count the {thing}s [on the table|that you see|that you can see].",
        "[Give|Tell|Find] the number of {thing}s [on the table|that you see].",
        "What is the number of {thing}s [on the table|that you see|that you can see]?",
        "On the table, how many {thing}s [are there|do you see|can you see|can you find]?",
        held_out=("How many {thing}s does the table have on it?",),
    ),
    "comparing_nearest": _farthest("nearest", "closest", "to"),
    "comparing_farthest": _farthest("farthest", "farthest away", "from"),
    "comparing_closer": _wordings(
        "Which is [nearer|closer] to the {goal}[:|,] the {thing} or the {other}?",
        "The {thing} or the {other}: which[ object|] is [nearer|closer] to the {goal}?",
        "Is the {thing} or the {other} [nearer|closer] to the {goal}?",
        "Tell which[ object|] is [nearer|closer] to the {goal}: the {thing} or the {other}.",
        "Of the {thing} and the {other}, which[ one|] is [nearer|closer] to the {goal}?",
        held_out=("Which object is nearer to the {goal}, the {thing} or the {other}?",),
    ),
    "situated_left_right": _wordings(
        "You are the gripper. Is the {thing} on your [left or right|right or left]?",
        "You are the gripper. Is the {thing} [left or right|right or left] of you?",
        "You are the gripper. On which side is the {thing}[:|,] [left or right|right or left]?",
        "Is the {thing} [left or right|right or left|to the left or to the right] of the gripper?",
        "From the gripper, is the {thing} [left or right|right or left]?",
        "On which side of the gripper is the {thing}[:|,] [left or right|right or left]?",
        held_out=("From the gripper, is the {thing} on the left or right?",),
    ),
    "situated_front_behind": _wordings(
        "You are the gripper. Is the {thing} [in front of you or behind you|in front of or behind you]?",
        "You are the gripper. [In front of or behind|Behind or in front of] you: where is the {thing}?",
        "Is the {thing} [in front of or behind|behind or in front of] the gripper?",
        "From the gripper, is the {thing} [in front or behind|behind or in front]?",
        "Where is the {thing} from the gripper[:|,] [in front or behind|behind or in front]?",
        held_out=("You are the gripper. Is the {thing} behind you or in front of you?",),
    ),
    "situated_move": _wordings(
        "[Which|What] way [must|does] the gripper [move|go] most to reach the {thing}?",
        "You are the gripper. [Which|What] way is it most to the {thing}?",
        "You are the gripper. [Which|What] way must you [move|go] most to reach the {thing}?",
        "To get to the {thing}, [which|what] way [must|does] the gripper go most?",
        "From the gripper, [which|what] way is it most to the {thing}?",
        held_out=("To reach the {thing}, which way must the gripper move most?",),
    ),
    "forecasting_direction": _wordings(
        "The {thing} will be brought to the {goal}. [Which|What] way will it [go|move]?",
        "[Which|What] way will the {thing} [go|move] when it is brought to the {goal}?",
        "The robot brings the {thing} to the {goal}. [Which|What] way does it [go|move]?",
        "When the robot brings the {thing} to the {goal}, [which|what] way [will|does] it [go|move]?",
        "[Which|What] way is it from the {thing} to the {goal}?",
        held_out=("When the {thing} is brought to the {goal}, which way does it go?",),
    ),
    "forecasting_touch": _wordings(
        "Will the gripper touch the {thing} [in the next half second|within half a second]?",
        "[In the next half second|Within half a second], will the gripper touch the {thing}?",
        "[In the next half second|Within half a second], will the {thing} be touched?",
        "Does the gripper touch the {thing} [in the next half second|within half a second]?",
        "Is the gripper going to touch the {thing} [in the next half second|within half a second]?",
        held_out=("Will the {thing} be touched in the next half second?",),
    ),
    "point_base": _POINT,
    "point_side": _POINT,
    "point_wrist": _POINT,
    "box_base": _BOX,
    "box_side": _BOX,
    "box_wrist": _BOX,
    "metric_position": _wordings(
        "What is the position of the {thing}[ from the robot|] in cm?",
        "[Give|Find|Name] the position of the {thing}[ from the robot|] in cm.",
        "Where is the {thing}[ from the robot|] in cm?",
        "In cm, [where is|what is the position of] the {thing}[ from the robot|]?",
        "At [which|what] position is the {thing} in cm?",
        "In cm, [tell where the {thing} is|give the position of the {thing}].",
        held_out=("Tell the position of the {thing} in cm.", "In cm, at which position is the {thing}?"),
    ),
    "metric_gripper_to_object": _displacement("gripper", "{thing}"),
    "metric_object_to_goal": _displacement("{thing}", "{goal}"),
    "metric_gripper_distance": _distance("gripper", "{thing}"),
    "metric_goal_distance": _distance("{thing}", "{goal}"),
    "metric_height": _wordings(
        "How [high|far] is the {thing} above the table[ now|]?",
        "[Give|Find|Name] the height of the {thing} above the table.",
        "What is the height of the {thing} above the table[ now|]?",
        "Above the table, how high is the {thing}?",
        "At [what|which] height[ above the table|] is the {thing}?",
        "How [high|far] above the table is the {thing}?",
        held_out=(
            "Tell the height of the {thing} above the table.",
            "Above the table, what is the height of the {thing}?",
        ),
    ),
    "discriminative_affordance_positive": _DISCRIMINATIVE,
    "discriminative_affordance_negative": _DISCRIMINATIVE,
    "success_positive": _SUCCESS,
    "success_negative": _SUCCESS,
    "generative_affordance": _wordings(
        "[Which|What] step [is possible|can be done] now?",
        "What [can the robot|is it possible to] do now?",
        "[Name|Tell|Give] [the|a] step that [is possible|can be done] now.",
        "Now, [which|what] step [is possible|can be done]?",
        "Now, what [can the robot|is it possible to] do?",
        "[Which|What] step is [it|the robot] able to do now?",
        "[Which|What] step is possible for the robot now?",
        "[Name|Tell|Give] a step that the robot can do now.",
        "Tell what the robot [can|is able to] do now.",
        held_out=("Which step can the robot do now?",),
    ),
    "future_prediction": _wordings(
        "[Which|What] step comes [after this one|after this|next]?",
        "What will the robot do [after this step|after this one|after this|next]?",
        "[Name|Tell|Give] the step [after this one|that comes after this one|that comes next].",
        "After this [step|one], [which step|what] comes next?",
        "Tell what the robot will do [after this step|after this one|next].",
        held_out=("After this step, what will the robot do?",),
    ),
    "past_description": _wordings(
        "[Which|What] step [came|was] before this[ one|]?",
        "What did the robot do before this[ step| one|]?",
        "[Name|Tell|Give] the step [before this one|that came before this one].",
        "Before this [step|one], [what did the robot do|which step came]?",
        "Tell what the robot did before this[ step| one|].",
        held_out=("Which step did the robot do before this one?",),
    ),
    "remaining_steps": _wordings(
        "[Which|What] steps remain[ to do| to be done|] after this one?",
        "[List|Name|Give] the steps that remain[ to do|] after this[ one|].",
        "What remains to [do|be done] after this[ step| one|]?",
        "After this [step|one], what remains[ to do| to be done|]?",
        "Tell which steps remain after this[ one|].",
        held_out=("After this step, which steps remain?",),
    ),
    "planning": _wordings(
        "Task: {task} [What is the plan|Which steps come|What will the robot do] from now on?",
        "Task: {task} [List|Name|Give] the steps from now on.",
        "[Plan|List|Name|Give] the steps from now on for this task: {task}",
        "[What is the plan|Which steps come] from now on for this task: {task}",
        "From now on, [what is the plan|which steps come] for this task: {task}",
        "Task: {task} From now on, [what is the plan|which steps come|what will the robot do]?",
        held_out=(
            "Task: {task} Plan the steps from now on.",
            "From now on, list the steps for this task: {task}",
        ),
    ),
    "instruction_object": _named("is to be moved"),
    "instruction_goal": _named("is the goal"),
    "instruction_end": _named("must be up"),
    "planning_with_context": _wordings(
        "Task: {task} At least this is [finished|done]: {done}. " + _NOW,
        "[Finished|Done]: {done}, maybe more. Task: {task} " + _NOW,
        "Task: {task} Finished, maybe with more: {done}. " + _NOW,
        "At least this is [finished|done]: {done}. Task: {task} " + _NOW,
        "Task: {task} Done: {done}, maybe more. " + _NOW,
        held_out=("Task: {task} Finished: {done}, maybe more. Which step is to do now?",),
    ),
}
