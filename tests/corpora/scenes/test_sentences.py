"""Plain-English answers: every kind has a sentence, and what asks for the answer only gets it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from blm.corpora.scenes.annotations import Annotation, QuestionSampler
from blm.corpora.scenes.build import SceneCorpusConfig, _sampler
from blm.corpora.scenes.sentences import BRIEF, sentence
from blm.corpora.scenes.templates import TEMPLATES
from tests.corpora.scenes.test_thoughts import FACTS

WORDS = ("thing", "other", "goal", "camera", "step", "task", "done")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_kind_has_a_sentence(kind: str) -> None:
    words = {word: f"<{word}>" for word in WORDS}
    for answer in ("yes", "no", "front", "red cube"):
        try:
            text = sentence(kind, answer, words)
        except KeyError:
            raise AssertionError(f"{kind} has no sentence") from None
        assert text[0].isupper() and text.endswith(".") and "{" not in text
        assert answer.lower() in text.lower()


def test_sentences_hold_the_answer_and_no_thought() -> None:
    sampler = QuestionSampler(np.random.default_rng(0), brief=0.5, choice=0.3)
    briefly = 0
    for fact in FACTS[:2000]:
        turn = sampler.phrase(fact)
        assert not turn.thought
        if turn.question.endswith(BRIEF):
            briefly += 1
            right = turn.answer if not turn.kind.endswith("_choice") else option(turn.question, turn.answer)
            assert right == fact.answer
        else:
            expected = "in front of" if fact.answer == "front" and "_choice" not in turn.kind else fact.answer
            assert expected.lower() in turn.answer.lower()
            assert " a orange" not in turn.answer
    assert briefly == pytest.approx(1000, abs=100)


def option(question: str, letter: str) -> str:
    found = re.search(rf"^\({letter}\) (.+)$", question, re.MULTILINE)
    assert found is not None
    return found[1]


def test_orange_takes_an() -> None:
    assert sentence("existence", "yes", {"thing": "orange ball"}) == "Yes, there is an orange ball."
    assert sentence("existence", "no", {"thing": "red ball"}) == "No, there is no red ball."
    assert sentence("success_negative", "no", {"step": "x"}) == "No, this step is not finished."
    assert sentence("front_behind", "front", {"thing": "ball", "other": "cube"}).endswith(
        "front of the cube."
    )


def config(**changes: object) -> SceneCorpusConfig:
    base = {"robots": ("panda",), "tasks": ("push_cube",), "cameras": ("base",), "image_size": 64}
    return SceneCorpusConfig(**{**base, "scenes": 2, "first_seed": 10_000, **changes})  # type: ignore[arg-type]


def test_the_form_of_the_answers_decides_about_thoughts_scans_and_letters() -> None:
    plain, terse, spoken = (config(answers=form) for form in ("reasoning", "terse", "sentence"))
    assert (plain.thoughts, plain.scans) == (True, True)
    assert (terse.thoughts, terse.scans) == (False, True)
    assert (spoken.thoughts, spoken.scans) == (False, False)
    assert _sampler(plain, 0).brief is None and not _sampler(plain, 0).letters
    assert _sampler(spoken, 0).brief == 0.5 and _sampler(spoken, 0).letters
    held_out = _sampler(config(answers="sentence", teach=False), 0)
    assert held_out.brief == 1.0
    turn = held_out.phrase(Annotation("existence", "yes", {"thing": "red ball"}))
    assert turn.question.endswith(f" {BRIEF}") and turn.answer == "yes"
