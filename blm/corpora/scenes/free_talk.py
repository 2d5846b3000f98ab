"""Free questions that no scene decides: about the robot, about what no camera shows, and small talk."""

from __future__ import annotations

from collections.abc import Iterator

from blm.corpora.scenes.free_talk_templates import REFUSAL_TEMPLATES
from blm.corpora.scenes.free_words import NUMBERS, FreeQuestion, SceneInWords
from blm.robots import ROBOTS, RobotSpec
from blm.types import KeyFacts

UNKNOWN = (
    "can not|not know|not able|unable|no sense|no microphone|no nose|no way|no idea|no information|"
    "not have sense*|not have ability|not have nose|not have microphone|not have access|not have information|"
    "only have camera*|only see|not possible|impossible|not see|not hear|not tell|not sure"
)
"""Fact of an answer that says that something cannot be perceived."""
_ABOUT_ONE_THING = ("free_taste", "free_weight", "free_temperature", "free_inside", "free_owner")
SMALL_TALK = {
    "free_hello": "hello|hi|hey|greetings|welcome|good morning|good evening|good afternoon|nice to meet",
    "free_thanks": "welcome|pleasure|glad|happy|no problem|any time|anytime|no worries",
    "free_bye": "bye|goodbye|see you|take care|farewell|good night|nice day|good day|great day",
    "free_how_are_you": "ready|fine|well|good|great|feeling*|program|works|help",
    "free_praise": "thank*|glad|kind|pleasure|happy|welcome|appreciate*",
}
"""Kind -> what a polite answer says."""
_OTHER_ASSISTANTS = (
    "chatgpt",
    "gpt*",
    "openai",
    "smollm",
    "qwen*",
    "hugging face",
    "claude",
    "gemini",
    "human",
)


def talk_questions(words: SceneInWords, robot: RobotSpec) -> Iterator[FreeQuestion]:
    """Yield the questions about the robot, those that are politely refused, and small talk."""
    yield from _about_the_robot(words, robot)
    yield from _refused(words)
    for kind, polite in SMALL_TALK.items():
        yield FreeQuestion(kind, words.facts(polite))


def _about_the_robot(words: SceneInWords, robot: RobotSpec) -> Iterator[FreeQuestion]:
    joints = len(robot.joints)
    yield FreeQuestion("free_who", words.facts("boundless", forbidden=_OTHER_ASSISTANTS))
    yield FreeQuestion("free_human", words.facts("no", forbidden=("yes", *_OTHER_ASSISTANTS)))
    sees, moves = (
        "see*|look*|describ*|answer*|question*|image*|camera*",
        "mov*|push*|pull*|pick*|stack*|plac*|lift*|control*",
    )
    yield FreeQuestion("free_can_do", words.facts(sees, moves))
    brands = {word for spec in ROBOTS.values() for word in spec.title.lower().split() if len(word) > 2}
    counts = {len(spec.joints) for spec in ROBOTS.values()} - {joints}
    wrong = [
        *sorted(brands - {*robot.title.lower().split()}),
        *(f"{count} joint*" for count in sorted(counts)),
    ]
    named = {"title": robot.title, "joints": NUMBERS[joints]}
    facts = words.facts("arm*|manipulator*", forbidden=(*wrong, "humanoid"))
    yield FreeQuestion("free_robot", facts, named)
    yield FreeQuestion("free_arms", words.facts("#1|single|only arm", forbidden=("2 arm*", "no arm*")))
    yield FreeQuestion("free_joints", words.facts(f"#{joints}"), named)
    yield FreeQuestion("free_fingers", words.facts("#2"))
    asked = (
        "no task|not have task|not given|not been given|no instruction*|tell me|not have specific|no specific"
    )
    yield FreeQuestion("free_no_task", words.facts(asked))


def _refused(words: SceneInWords) -> Iterator[FreeQuestion]:
    """Yield the questions that a camera does not answer; a right answer claims nothing about the scene."""
    things = [t.label for t in words.objects if t.kind != "bin"]
    for kind in REFUSAL_TEMPLATES:
        if kind not in _ABOUT_ONE_THING:
            yield FreeQuestion(kind, KeyFacts(required=(UNKNOWN,)))
            continue
        for label in things:
            yield FreeQuestion(kind, KeyFacts(required=(UNKNOWN,), things=(label,)), {"thing": label})
