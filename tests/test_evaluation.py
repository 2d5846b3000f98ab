"""Evaluation: intervals against known values and simulation, scoring, digital runs, comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blm.evaluation import DigitalProtocol, compare, evaluate_digital, format_comparison, load_result
from blm.evaluation.digital.scoring import extract, normalise, parse_point, score
from blm.evaluation.intervals import effective_size, holm, mcnemar, paired_difference, success_rate, wilson
from blm.types import BlmError, ContractError, Image, Message, Question

# --- intervals ---


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(hits: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 - hits / n, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_wilson_covers_the_truth(p: float) -> None:
    hits = np.random.default_rng(0).binomial(40, p, 4000)
    covered = [low <= p <= high for low, high in (wilson(h / 40, 40) for h in hits)]
    assert 0.93 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("alike", [0.05, 1.0])
def test_clustered_interval_covers_the_truth_where_wilson_does_not(alike: float) -> None:
    """40 scenes of 6 questions; the scene's own rate is beta distributed around 0.6."""
    rng, groups = np.random.default_rng(1), [str(i // 6) for i in range(240)]
    covered, naive = [], []
    for rates in rng.beta(0.6 / alike, 0.4 / alike, (400, 40)):
        outcomes = list(rng.random(240) < np.repeat(rates, 6))
        clustered, plain = success_rate(outcomes, groups), success_rate(outcomes)
        covered.append(clustered.low <= 0.6 <= clustered.high)
        naive.append(plain.low <= 0.6 <= plain.high)
    assert 0.92 <= np.mean(covered) <= 0.985
    assert alike < 1 or np.mean(naive) < 0.85


def test_effective_size_limits() -> None:
    values, groups = np.array([1.0, 0, 1, 0, 1, 0]), list("abcdef")
    assert effective_size(values, groups) == 6  # each its own group: nothing shared
    copies = np.repeat([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 0], 50)
    ten_scenes = [str(i // 50) for i in range(500)]
    assert effective_size(copies, ten_scenes) < 10  # however many questions
    assert effective_size(np.ones(6), list("aabbcc")) == 3
    with pytest.raises(BlmError, match="at least one"):
        success_rate([])


def test_paired_difference() -> None:
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(1000):
        shared = rng.random(50)
        a = (shared < 0.7).tolist()
        b = (np.where(rng.random(50) < 0.3, rng.random(50), shared) < 0.5).tolist()
        difference = paired_difference(a, b)
        covered.append(difference.low <= 0.2 <= difference.high)
        opposite = paired_difference(b, a)
        assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low))
        assert difference.only_first - difference.only_second == round(50 * difference.difference)
    assert 0.93 <= np.mean(covered) <= 0.985
    equal = paired_difference([True] * 10, [True] * 10)
    assert equal.low < 0 < equal.high and equal.p_value == 1.0
    assert paired_difference([True] * 4, [False] * 4, list("aabb")).p_value is None


def test_holm_corrects_for_the_number_of_tests() -> None:
    """Holm 1979: the smallest p times n, the next times n - 1, and never less than one before."""
    assert holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([]) == []


# --- scoring ---


@pytest.mark.parametrize(
    "raw, text",
    [
        ("red", "red"),
        ("<think>Maybe blue? Answer: blue</think> red", "red"),
        ("the prompt opened the tag </think>red", "red"),
        ("<think>I keep thinking about red", ""),
        ("<think>x</think><answer> red </answer> I hope so", "red"),
        ("<answer>blue</answer> no: <answer>red</answer>", "red"),
        ("The cube is near.\n**Answer:** red", "red"),
        ("Final answer: (376, 309)", "(376, 309)"),
        ("**red**", "red"),
        ("", ""),
    ],
)
def test_extract(raw: str, text: str) -> None:
    assert extract(raw) == text


def test_normalise() -> None:
    assert normalise("The Red  cube.") == normalise("red cube") == "red cube"
    assert normalise("Three") == normalise("3.") == "3"
    assert normalise("A") == "a" and normalise("an apple") == "apple"
    assert normalise("-5") != normalise("5") and normalise("0.5") != normalise("5")
    assert normalise("?!") == ""


@pytest.mark.parametrize(
    "text, point",
    [
        ("(376, 309)", (376, 309)),
        ("The cube is at [12,1000]", (12, 1000)),
        ("(0.376, 0.309)", None),
        ("(1200, 3)", None),
        ("376 309", None),
        ("(1, 2) or (3, 4)", (1, 2)),
    ],
)
def test_parse_point(text: str, point: tuple[int, int] | None) -> None:
    assert parse_point(text) == point


def test_point_score_is_a_distance() -> None:
    asked = Question(id="p", kind="point_base", messages=(), answer="(500, 500)", group="g", scorer="point")
    assert score(asked, "(530, 540)", 50.0).error == pytest.approx(50)
    assert score(asked, "(530, 540)", 50.0).correct and not score(asked, "(531, 540)", 50.0).correct
    unread = score(asked, "to the left", 50.0)
    assert not unread.correct and unread.parsed is None and unread.error is None


# --- digital ---


def question(index: int, kind: str, text: str, answer: str, scene: int) -> Question:
    about = {"id": str(index), "kind": kind, "answer": answer, "group": str(scene)}
    messages = (Message("user", (Image(np.full((2, 2, 3), scene, np.uint8)), text)),)
    return Question(**about, messages=messages, scorer="point" if kind == "point" else "exact")


TRAIN = [
    question(0, "color", "What colour is the cube?", "red", 0),
    question(1, "color", "What colour is the cube?", "Red", 1),
    question(2, "color", "What colour is the ball?", "blue", 2),
    question(3, "point", "Point to the cube.", "(100, 200)", 3),
    question(4, "point", "Point to the cube.", "(300, 400)", 4),
    question(5, "point", "Point to the cube.", "(200, 900)", 4),
]
ASKED = [
    question(0, "color", "What colour is the cube?", "red", 100),
    question(1, "color", "What colour is the ball?", "blue", 100),
    question(2, "color", "What colour is the ball?", "green", 101),
    question(3, "point", "Point to the cube.", "(230, 400)", 101),
    question(4, "count", "How many cubes?", "2", 102),
]


class Scripted:
    """Answers by the question's text, and counts how often it is asked."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.asked = answers, 0

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 64) -> str:
        self.asked += 1
        return self.answers[messages[-1].text]


SCRIPT = {
    "What colour is the cube?": "<think>hm</think>Red.",
    "What colour is the ball?": "green",
    "Point to the cube.": "somewhere",
    "How many cubes?": "two",
}


def examine(chat: Scripted, out: Path, asked: Sequence[Question] = ASKED, **options: object) -> dict:
    return evaluate_digital(chat, asked, out, train_questions=TRAIN, **{"model": "script", **options})


def test_digital_scores_every_item_beside_the_baselines(tmp_path: Path) -> None:
    result = examine(Scripted(SCRIPT), tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert [row["correct"] for row in result["rows"]] == [True, False, True, False, True]
    assert result["rows"][0]["raw"] == "<think>hm</think>Red." and result["rows"][0]["parsed"] == "Red."
    assert (result["overall"]["hits"], result["overall"]["n"], result["overall"]["unread"]) == (3, 5, 1)
    kinds = result["kinds"]
    assert {kind: part["n"] for kind, part in kinds.items()} == {"color": 3, "point": 1, "count": 1}
    assert kinds["point"]["unread"] == 1 and kinds["point"]["median_error"] is None
    majority, prior = (result["baselines"][name] for name in ("majority", "question_only"))
    assert (majority["kinds"]["color"]["hits"], prior["kinds"]["color"]["hits"]) == (1, 2)
    assert majority["kinds"]["point"]["hits"] == 1  # (200, 400), the median, is 30 away
    assert majority["kinds"]["point"]["median_error"] == pytest.approx(30)
    assert majority["kinds"]["count"]["hits"] == 0  # never trained: no guess
    gain = prior["model_minus_baseline"]
    assert gain["difference"] == pytest.approx(0.0) and gain["n"] == 5


def test_digital_resumes_and_batches(tmp_path: Path) -> None:
    chat = Scripted(SCRIPT)
    first, again = (examine(chat, tmp_path) for _ in range(2))
    assert chat.asked == 5 and again["rows"] == first["rows"]
    examine(chat, tmp_path, model="other weights")
    assert chat.asked == 10

    class Batched(Scripted):
        def answer_batch(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str]:
            assert max_tokens == 7 and conversations[0][0] == Message("system", ("Be brief.",))
            return [self.answer(messages) for messages in conversations]

    batched = examine(Batched(SCRIPT), tmp_path / "batched", max_tokens=7, prompt="Be brief.")
    assert batched["rows"] == first["rows"]
    with pytest.raises(ContractError, match=r"max_tokens: 7 here, 32 there(.|\n)*prompt: 'Be brief.' here"):
        compare(batched, first)


def test_digital_protocol_names_the_items(tmp_path: Path) -> None:
    base = examine(Scripted(SCRIPT), tmp_path / "a")
    assert DigitalProtocol(**base["protocol"]).count == 5
    repainted = [*ASKED[:4], question(4, "count", "How many cubes?", "2", 103)]
    other = examine(Scripted(SCRIPT), tmp_path / "b", repainted)
    assert other["protocol"]["items"] != base["protocol"]["items"]
    on_disk = replace(ASKED[0], messages=(Message("user", (Image(path="x.png"), "What?")),))
    with pytest.raises(BlmError, match="not in memory"):
        examine(Scripted(SCRIPT), tmp_path / "c", [on_disk])


def test_compare_digital_clusters_by_scene(tmp_path: Path) -> None:
    worse = Scripted({**SCRIPT, "How many cubes?": "9"})
    gain = compare(examine(Scripted(SCRIPT), tmp_path / "a"), examine(worse, tmp_path / "b"))
    assert gain.difference == pytest.approx(0.2) and gain.p_value is None and gain.low < 0 < gain.high
    text = format_comparison(examine(Scripted(SCRIPT), tmp_path / "a"), load_result(tmp_path / "b"))
    assert "correct on the same 5 items" in text and "No p: items share scenes" in text and "count" in text
