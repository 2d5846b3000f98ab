"""Answers with known grades, to calibrate a judge before it grades anything.

Written for this purpose, in the manner of EgoThink (short answers, plans) and ShareRobot (next,
past and remaining steps); no row is taken from a benchmark.
"""

from __future__ import annotations

_NEXT = "The robot has just grasped the banana. What will most likely happen next?"
_STEPS = "The goal is to put the cup into the drawer; the drawer is open. Which steps remain?"
_LEAVE = "How do I get from this kitchen to the garden?"

CALIBRATION: tuple[tuple[str, str, str, float], ...] = (
    ("What am I holding?", "a knife", "knife", 1.0),
    ("What am I holding?", "a knife", "You are holding a kitchen knife in your right hand.", 1.0),
    ("What am I holding?", "a knife", "a spoon", 0.0),
    ("What am I holding?", "a knife", "A knife or a spoon, hard to tell.", 0.0),
    ("What am I holding?", "a knife", "I'm sorry, I can't help with that.", 0.0),
    ("What am I holding?", "a knife", "Some kind of cutlery.", 0.5),
    ("How many plates are on the table?", "3", "There are three plates.", 1.0),
    ("How many plates are on the table?", "3", "4", 0.0),
    ("How many plates are on the table?", "3", "Several.", 0.0),
    ("What colour is the car?", "dark blue", "navy blue", 1.0),
    ("What colour is the car?", "dark blue", "blue", 0.5),
    ("What colour is the car?", "dark blue", "The car is black.", 0.0),
    ("Where is the sponge?", "to the left of the sink", "left of the sink", 1.0),
    ("Where is the sponge?", "to the left of the sink", "right of the sink", 0.0),
    ("Where is the sponge?", "to the left of the sink", "near the sink", 0.5),
    ("Which is closer to me, the cup or the bowl?", "the bowl", "Bowl.", 1.0),
    ("Which is closer to me, the cup or the bowl?", "the bowl", "They are equally close.", 0.0),
    ("Is it possible to open the drawer now?", "no", "No, the gripper holds a cup.", 1.0),
    ("Is it possible to open the drawer now?", "no", "Yes.", 0.0),
    (_NEXT, "place the banana into the mug", "It will put the banana in the mug.", 1.0),
    (_NEXT, "place the banana into the mug", "move the banana towards the mug", 0.5),
    (_NEXT, "place the banana into the mug", "open the gripper over the table", 0.0),
    (_NEXT, "place the banana into the mug", "", 0.0),
    (
        _STEPS,
        "1. pick up the cup 2. place it in the drawer",
        "Grasp the cup, then put it into the drawer.",
        1.0,
    ),
    (_STEPS, "1. pick up the cup 2. place it in the drawer", "Pick up the cup.", 0.5),
    (
        _STEPS,
        "1. pick up the cup 2. place it in the drawer",
        "Close the drawer, then push the cup away.",
        0.0,
    ),
    (
        _LEAVE,
        "Turn around, go through the door, then left to the garden.",
        "Turn round, take the door, go left.",
        1.0,
    ),
    (_LEAVE, "Turn around, go through the door, then left to the garden.", "Use the door behind you.", 0.5),
    (_LEAVE, "Turn around, go through the door, then left to the garden.", "Climb out of the window.", 0.0),
    (
        _LEAVE,
        "Turn around, go through the door, then left to the garden.",
        "Gardens are lovely in spring.",
        0.0,
    ),
)
"""Question, reference, answer, grade."""
