"""The judge: strict ratings, nothing asked twice, failures counted as wrong and shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from blm.evaluation import compare, load_result
from blm.evaluation.digital.answers import AnswerError
from blm.evaluation.digital.calibration import CALIBRATION
from blm.evaluation.digital.judge import AnswerToGrade, LanguageJudge, MatchJudge, calibrate, read_rating
from blm.evaluation.digital.runner import evaluate_digital
from blm.types import BlmError, Message, Question


@pytest.mark.parametrize(
    "reply, rating",
    [
        ("Rating: [[1]]", 1.0),
        ("Rating: [[0.5]]", 0.5),
        ("Half right.\nRating: [[0.50]]", 0.5),
        ("[[0]]", 0.0),
        ("[[1]] .. so again: [[1.0]]", 1.0),
        ("<think>[[0]]?</think> Rating: [[1]]", 1.0),
        ("Answer: wrong\nRating: [[0]]", 0.0),
        ("Rating: [[ 1 ]]", 1.0),
        ("Rating: [[1]] or Rating: [[0.5]] or Rating: [[0]]\nIt is wrong.\nRating: [[0]]", 0.0),
        ("[[1]], [[0.5]], [[0]]: I choose [[0.5]]", 0.5),
        ("[[1]] if it is the same, [[0.5]] if partly, [[0]] if wrong.\n\nRating: [[1]]", 1.0),
        ("Rating: [[1]] or Rating: [[0.5]] or Rating: [[0]]", None),
        ("[[1]] if it is the same, [[0.5]] if partly, [[0]] if wrong.", None),
        ("Rating: [[1]] or Rating: [[0]]", None),
        ("<think>[[0]]", None),
        ("[[0]] or [[1]]", None),
        ("[[0.7]]", None),
        ("[[2]]", None),
        ("[[-1]]", None),
        ("[1]", None),
        ("1", None),
        ("Rating: [[one]]", None),
        ("", None),
    ],
)
def test_rating_is_strict(reply: str, rating: float | None) -> None:
    assert read_rating(reply) == rating


class Oracle:
    """Grades the calibration set rightly but for some entries, and everything else by `otherwise`."""

    def __init__(self, otherwise: str = "[[1]]", wrong: int = 0, silent: int = 0) -> None:
        self.otherwise, self.asked = otherwise, 0
        labels = [f"Rating: [[{label:g}]]" for *_, label in CALIBRATION]
        labels[:wrong] = ["Rating: [[0.5]]"] * wrong
        labels[wrong : wrong + silent] = ["I would rather not say."] * silent
        self.known = {entry[:3]: label for entry, label in zip(CALIBRATION, labels, strict=True)}

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        self.asked += 1
        found = re.search(
            r"Question: (.*)\n\nReference answer: (.*)\n\nAnswer to grade: (.*)", messages[-1].text
        )
        assert found and messages[0].role == "system"
        if found[3] == "filtered":
            raise AnswerError("content filter")
        return self.known.get((found[1], found[2], found[3]), self.otherwise)


def test_calibration_covers_all_grades() -> None:
    assert len(CALIBRATION) >= 20 and len({entry[:3] for entry in CALIBRATION}) == len(CALIBRATION)
    labels = [label for *_, label in CALIBRATION]
    assert {*labels} == {0.0, 0.5, 1.0} and max(map(labels.count, labels)) < 0.6 * len(labels)
    n = len(CALIBRATION)
    assert calibrate(LanguageJudge(Oracle(), "good")).agree == n
    worse = calibrate(LanguageJudge(Oracle(wrong=2, silent=3), "worse"))
    assert (worse.n, worse.agree, worse.failed) == (n, n - 5, 3) and worse.mean_gap > 0
    matched = calibrate(MatchJudge())
    assert 0 < matched.agree < n and matched.failed == 0  # comparing words is no judge


def test_judge_asks_once_and_keeps_the_replies(tmp_path: Path) -> None:
    oracle, asked = (
        Oracle("[[0.5]]"),
        [AnswerToGrade("q", "r", "a"), AnswerToGrade("q", "r", "b"), AnswerToGrade("q", "r", "a")],
    )
    judge = LanguageJudge(oracle, "m", cache=tmp_path)
    assert [verdict.score for verdict in judge.grade(asked)] == [0.5] * 3 and oracle.asked == 2
    judge.grade(asked)
    LanguageJudge(oracle, "m", cache=tmp_path).grade(asked)
    assert oracle.asked == 2
    LanguageJudge(oracle, "another model", cache=tmp_path).grade(asked)
    assert oracle.asked == 4
    unclear = LanguageJudge(Oracle("who knows"), "m2", cache=tmp_path)
    assert unclear.grade(asked[:1])[0].score is None
    unclear.grade(asked[:1])
    assert unclear.chat.asked == 1  # a failed judgement is not asked again until it pleases
    assert judge.grade([AnswerToGrade("q", "r", "{braces} [[1]]")])[0].score == 0.5


def test_damaged_cache_is_named(tmp_path: Path) -> None:
    judge = LanguageJudge(Oracle(), "m", cache=tmp_path)
    judge.grade([AnswerToGrade("q", "r", "a")])
    next(tmp_path.rglob("*.json")).write_text("{")
    with pytest.raises(BlmError, match=r"damaged .* move it away"):
        judge.grade([AnswerToGrade("q", "r", "a")])


def free(index: int, kind: str = "planning") -> Question:
    messages = (Message("user", (f"question {index}",)),)
    return Question(id=str(index), kind=kind, messages=messages, answer="r", group=str(index), scorer="judge")


class Says:
    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        return self.answers[int(messages[-1].text.split()[-1])]


def test_judged_run(tmp_path: Path) -> None:
    """Ratings become scores; failed judgements, empty and filtered answers are wrong and counted."""
    questions = [free(index) for index in range(5)]
    judge = LanguageJudge(Oracle("Rating: [[0.5]]"), "judge-1", cache=tmp_path / "cache")
    says = Says("r", "", "<think>r", "filtered", "x")
    result = evaluate_digital(says, questions, tmp_path / "a", model="m", judge=judge)
    assert [p.score for p in result.predictions] == [0.5, 0, 0, 0, 0.5]
    overall = result.summary.overall
    assert (overall.hits, overall.n, overall.unread, overall.unjudged) == (1.0, 5, 2, 1)
    assert result.judge.model == "judge-1" and result.judge.calibration.agree == len(CALIBRATION)
    assert result.protocol.judge == "judge-1" and result.protocol.judge_prompt == judge.prompt
    assert load_result(tmp_path / "a") == result
    better = evaluate_digital(Says(*"rxxxx"), questions, tmp_path / "b", model="n", judge=judge)
    gain = compare(better, result)
    assert gain.difference == pytest.approx(0.3) and gain.only_first == 3 and gain.p_value is not None
    other = LanguageJudge(Oracle(), "judge-2")
    with pytest.raises(BlmError, match="judge: 'judge-1' here, 'judge-2' there"):
        compare(result, evaluate_digital(says, questions, tmp_path / "c", model="m", judge=other))


def test_free_answers_need_a_judge(tmp_path: Path) -> None:
    with pytest.raises(BlmError, match=r"1 of 1 questions .* --judge match .* not the paper's metric"):
        evaluate_digital(Says("r"), [free(0)], tmp_path, model="m")
    result = evaluate_digital(Says("The R!"), [free(0)], tmp_path, model="m", judge=MatchJudge())
    assert result.summary.overall.rate == 1 and "not the paper's metric" in result.protocol.judge
