"""Answers in free words: facts count, not form; what is invented or denied is false."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from blm.corpora.format.facts import facts_to_json, read_facts
from blm.corpora.format.faults import RowError
from blm.evaluation.digital.facts import FactCheck, check_facts
from blm.evaluation.digital.result import Prediction
from blm.evaluation.digital.runner import DigitalEvalConfig, RawAnswer, _predict, evaluate_digital
from blm.evaluation.digital.scoring import ScoringConfig
from blm.evaluation.protocol import DigitalProtocol
from blm.types import BlmError, KeyFacts, Message, Question

THINGS = ("red cube", "blue ball", "green cylinder", "target")
ALL = KeyFacts(required=THINGS[:3], things=THINGS)
LEFT = KeyFacts(required=("red cube <left> blue ball",), things=THINGS)
CAT = KeyFacts(required=("no|only",), forbidden=("yes", "cat"), things=THINGS)
THREE = KeyFacts(required=("#3",), things=THINGS)
UNKNOWN = KeyFacts(required=("can not|not know|unable",))
RIGHT = [
    (ALL, "A red block, a blue sphere and a green cylinder are on the table."),
    (ALL, "I see three objects: a cube that is red, a ball, which is blue, and a cylinder (green)."),
    (ALL, "a cube, a ball, and a cylinder"),
    (ALL, "The objects are red, blue and green: a cube, a ball and a cylinder."),
    (ALL, "I see a red cube, a blue ball, a green cylinder but no cup."),
    (ALL, "There's the red one, a blue ball and a green tube, and a robot arm on a grey table."),
    (ALL, "The red cube lies on a red and white target beside a blue ball and a green cylinder."),
    (LEFT, "The red cube is to the left of the blue ball."),
    (LEFT, "left"),
    (LEFT, "To the left of the blue ball."),
    (LEFT, "The blue ball is to the right of the red cube."),
    (LEFT, "On the left of the blue ball there is the red cube."),
    (LEFT, "The red cube is on the left and the blue ball is on the right."),
    (LEFT, "The red cube isn't to the right of the blue ball, but to the left."),
    (CAT, "No, I can't see a cat."),
    (CAT, "There is no cat."),
    (CAT, "I don’t see any cat in this picture."),
    (CAT, "I only see a red cube."),
    (THREE, "There are three objects."),
    (THREE, "3"),
    (THREE, "The table has 3 things on it, one of them red."),
    (UNKNOWN, "I'm sorry, I can't smell anything."),
    (UNKNOWN, "As a robot I don't know that."),
]
WRONG = [
    (ALL, ""),
    (ALL, "I see a red cube and a blue ball."),
    (ALL, "I see a red cube, a blue ball, a green cylinder and a cup."),
    (ALL, "I see a red cube, a yellow ball and a green cylinder."),
    (ALL, "There is no red cube. There is a blue ball and a green cylinder."),
    (ALL, "I can't see a red cube, only a blue ball and a green cylinder."),
    (ALL, "I see two red cubes, a blue ball and a green cylinder."),
    (ALL, "I see a blue cube, a red ball and a green cylinder."),
    (LEFT, "The red cube is to the right of the blue ball."),
    (LEFT, "The blue ball is to the left of the red cube."),
    (LEFT, "The red cube isn't to the left of the blue ball, but to the right."),
    (LEFT, "The red cube isn't to the left of the blue ball."),
    (LEFT, "It is next to the ball."),
    (CAT, "Yes, I see a cat."),
    (CAT, "I see a cat."),
    (CAT, "No. But there is a dog."),
    (THREE, "There are four objects, 3 of them red."),
    (THREE, "There are many objects."),
    (UNKNOWN, "It smells of lemons."),
    (UNKNOWN, "I can't smell it, but there is a green ball."),
]


@pytest.mark.parametrize(("facts", "answer"), RIGHT)
def test_facts_are_found_in_any_form(facts: KeyFacts, answer: str) -> None:
    assert check_facts(answer, facts).right, check_facts(answer, facts)


@pytest.mark.parametrize(("facts", "answer"), WRONG)
def test_missing_and_false_facts_are_wrong(facts: KeyFacts, answer: str) -> None:
    assert not check_facts(answer, facts).right


def test_the_result_says_what_is_found_missing_and_false() -> None:
    checked = check_facts("I see a red cube, no blue ball, and a cup.", ALL)
    assert checked == FactCheck(
        found=("red cube",), missing=("blue ball", "green cylinder"), false=("no blue ball", "a cup")
    )
    assert FactCheck.from_json(asdict(checked)) == checked
    with pytest.raises(BlmError, match="shiny"):
        check_facts("yes", KeyFacts(things=("shiny",)))


QUESTION = Question(
    id="a/0",
    kind="free_see",
    messages=(Message("user", ("What do you see?",)),),
    answer="I see a red cube, a blue ball and a green cylinder.",
    group="a",
    scorer="facts",
    facts=ALL,
)


def test_predictions_keep_the_check_and_old_ones_stay_readable() -> None:
    scoring = ScoringConfig(DigitalProtocol(items="", count=1, max_tokens=8, prompt=""))
    one = _predict(QUESTION, RawAnswer("<think>a cup</think>A red cube"), scoring)
    assert one.facts == FactCheck(found=("red cube",), missing=("blue ball", "green cylinder"), false=())
    assert one.score == 0 and one.parsed == "A red cube"
    assert Prediction.from_json(one.to_json()) == one
    assert _predict(QUESTION, RawAnswer(QUESTION.answer), scoring).score == 1
    old = replace(one, facts=None)
    assert "facts" not in old.to_json() and Prediction.from_json(old.to_json()) == old
    with pytest.raises(BlmError, match="no key facts"):
        _predict(replace(QUESTION, facts=None), RawAnswer(""), scoring)


def test_an_evaluation_scores_facts_and_identifies_them(tmp_path) -> None:
    class Chat:
        def answer(self, messages, *, max_tokens):
            return "A red cube, a blue ball and a green cylinder."

    questions = [QUESTION, replace(QUESTION, id="a/1", facts=CAT)]
    result = evaluate_digital(Chat(), questions, tmp_path / "a", model="m", config=DigitalEvalConfig())
    assert [p.score for p in result.predictions] == [1, 0]
    other = [QUESTION, replace(QUESTION, id="a/1", facts=THREE)]
    again = evaluate_digital(Chat(), other, tmp_path / "b", model="m")
    assert again.protocol.items != result.protocol.items


def test_rows_keep_their_facts_and_malformed_ones_are_refused() -> None:
    facts = (None, ALL, KeyFacts(required=("yes",)))
    stored = facts_to_json(facts)["facts"]
    assert (
        read_facts([one and {k: list(v) for k, v in one.items()} for one in stored], [False, True, True])
        == facts
    )
    assert facts_to_json((None,)) == {} == facts_to_json(()) and read_facts(None, [False]) == ()
    for value, free in (
        (None, [True]),
        ([None], [True]),
        ([{}], [False]),
        ([{}], [True, True]),
        (["x"], [True]),
        ([{"wanted": []}], [True]),
        ([{"required": "x"}], [True]),
        ([{"required": [3]}], [True]),
    ):
        with pytest.raises(RowError, match="facts"):
            read_facts(value, free)
