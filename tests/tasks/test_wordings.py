"""The wordings of instructions: enough of them, well formed, and never shared by training and tests."""

from __future__ import annotations

import importlib
import re
import string

import pytest

from blm.tasks import TASKS
from blm.tasks.registry import WORDS
from blm.tasks.spec import PALETTE
from blm.tasks.wordings import HELD_OUT_WORDINGS, LEVELS, TEST_WORDINGS, TRAINING_WORDINGS, expand, training
from blm.types import BlmError

SLOTS = {name: set() for name in TASKS} | {
    "words_push_cube": {"color"},
    "words_pull_cube": {"color"},
    "words_pick_cube": {"color"},
    "words_stack_cube": {"a", "b"},
    "words_place_sphere": {"color", "bin"},
    "words_lift_peg_upright": {"top"},
}
HELD_OUT = {name: task.held_out_phrasings for name, task in TASKS.items()} | {**HELD_OUT_WORDINGS}
TESTED = {
    task: [text for level in TEST_WORDINGS[task].values() for text in level] + [*HELD_OUT[task]]
    for task in SLOTS
}
"""Task -> all that is never trained on."""
EVERY = {task: [*TRAINING_WORDINGS[task], *TESTED[task]] for task in SLOTS}
POLITE = re.compile(r"^(could|can|would) you | ?\b(please|kindly|now|just)\b ?")
PUSHES = r"\b(push|shov|nudg|propel|bulldoz|thrust|advanc|forward|ahead|away|far)"
PULLS = r"\b(pull|drag|draw|haul|tow\b|tug|reel|rake|back|near|clos|towards you|towards the robot)"


def plain(text: str) -> str:
    """The words alone, with one name for every colour and slot."""
    colours = "|".join(PALETTE)
    words = re.findall(r"\{\w+\}|[\w-]+", text.lower())
    return " ".join(re.sub(rf"^({colours}|\{{\w+\}})$", "colour", word) for word in words)


def core(text: str) -> str:
    """`plain` without politeness."""
    return " ".join(POLITE.sub(" ", plain(text)).split())


def test_tasks_levels_and_counts():
    assert {*TRAINING_WORDINGS} == {*TEST_WORDINGS} == {*SLOTS}
    assert {*HELD_OUT_WORDINGS} == {*WORDS} and {*SLOTS} == {*TASKS}
    assert all(len(texts) >= 3 for texts in HELD_OUT_WORDINGS.values())
    for task in SLOTS:
        assert 60 <= len(TRAINING_WORDINGS[task]) <= 100, (task, len(TRAINING_WORDINGS[task]))
        assert [*TEST_WORDINGS[task]] == [*LEVELS] == [1, 2, 3, 4, 5]
        assert all(len(texts) >= 5 for texts in TEST_WORDINGS[task].values())


@pytest.mark.parametrize("task", TASKS)
def test_training_starts_with_the_phrasings_of_the_suite(task):
    assert TRAINING_WORDINGS[task][:4] == TASKS[task].phrasings


@pytest.mark.parametrize("task", SLOTS)
def test_every_wording_is_well_formed(task):
    assert len({plain(text) for text in EVERY[task]}) == len(EVERY[task])
    for text in EVERY[task]:
        assert len(text.encode()) <= 300, text
        assert re.fullmatch(r"[A-Z][^][|]*[.?]", text) and not re.search(r"  | [?.,:;]|\s$", text), text
        assert {name for _, name, _, _ in string.Formatter().parse(text) if name} == SLOTS[task], text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\ban? (\w+ )?\{|\bbehind\b|\bfront\b", text), text
        assert not re.search(r"\b(\w+) \1\b", text.lower()), f"a word twice: {text}"


@pytest.mark.parametrize("task", SLOTS)
def test_no_test_wording_is_a_training_wording_or_contains_one(task):
    trained = {core(text) for texts in TRAINING_WORDINGS.values() for text in texts}
    for text in TESTED[task]:
        inside = [other for other in trained if f" {other} " in f" {core(text)} "]
        assert not inside, f"'{text}' contains {inside}"


@pytest.mark.parametrize("task", SLOTS)
def test_levels_differ_from_training_in_their_own_way(task):
    levels = TEST_WORDINGS[task]
    known = {word for texts in TRAINING_WORDINGS.values() for text in texts for word in plain(text).split()}
    starts = {tuple(plain(text).split()[:2]) for text in TRAINING_WORDINGS[task]}
    for text in levels[1] + levels[2]:
        assert {*plain(text).split()} - known, f"no new word: {text}"
    for text in levels[3]:
        assert tuple(plain(text).split()[:2]) not in starts, f"a known syntax: {text}"
    assert min(len(text.split()) for text in levels[4]) > max(
        len(text.split()) for text in (*TRAINING_WORDINGS[task], *levels[1], *levels[2], *levels[3])
    )


@pytest.mark.parametrize(
    ("task", "own", "other"),
    [(f"{kind}{way}", *cues) for kind in ("", "words_") for way, cues in {
        "push_cube": (PUSHES, PULLS), "pull_cube": (PULLS, PUSHES),
    }.items()],
)  # fmt: skip
def test_words_tell_pushing_from_pulling(task, own, other):
    loose = {"Slide the blue block to the round target."}  # a phrasing of the suite, told by its scene
    distracting = TEST_WORDINGS[task][5]
    for text in EVERY[task]:
        if text not in loose:
            assert re.search(own, text, re.IGNORECASE), text
        if text not in distracting:
            assert not re.search(other, text, re.IGNORECASE), text


@pytest.mark.parametrize("task", HELD_OUT_WORDINGS)
def test_words_tasks_name_no_colour_that_a_slot_might_take(task):
    fixed = {"green"} if task == "words_pick_cube" else set()
    for text in EVERY[task]:
        named = {colour for colour in PALETTE if re.search(rf"\b{colour}\b", text)}
        assert named <= fixed, text


def test_expand_lists_the_alternatives_in_order():
    assert expand("Is it?") == ("Is it?",)
    assert expand("[A|B] {x}[ now|].") == ("A {x} now.", "A {x}.", "B {x} now.", "B {x}.")


@pytest.mark.parametrize("pattern", ["[a|[b|c]]", "[a|b", "a|b]", "[a]]"])
def test_expand_refuses_nested_and_unmatched_brackets(pattern):
    with pytest.raises(BlmError, match="nested or unmatched bracket"):
        expand(pattern)


def test_expansion_is_deterministic():
    before = dict(TRAINING_WORDINGS)
    assert dict(importlib.reload(training).TRAINING_WORDINGS) == before
