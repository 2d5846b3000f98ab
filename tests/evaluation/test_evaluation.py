"""Evaluation: intervals against known values and simulation, scoring, digital runs, comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from blm.evaluation import DigitalProtocol, compare, evaluate_digital, format_comparison, load_result
from blm.evaluation.digital.benchmarks.scene_questions import SCENE
from blm.evaluation.digital.parsers.coordinates import Coordinates
from blm.evaluation.digital.result import DigitalResult
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.digital.scoring import ItemScore, ScoringConfig, overlap, score
from blm.evaluation.digital.summary import balanced_accuracy
from blm.evaluation.statistics import effective_size, holm, mcnemar, paired_difference, success_rate, wilson
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


def test_interval_of_graded_scores_covers_the_truth() -> None:
    """Scores 0, 0.5 and 1, mean 0.55: narrower than for right-or-wrong answers, and still honest."""
    rng, widths = np.random.default_rng(3), []
    for clustered in (False, True):
        covered = []
        for _ in range(1500):
            scores = rng.choice([0.0, 0.5, 1.0], 60, p=[0.2, 0.5, 0.3])
            groups = [str(i // 3) for i in range(60)] if clustered else None
            rate = success_rate(list(scores), groups)
            covered.append(rate.low <= 0.55 <= rate.high)
            widths.append(rate.high - rate.low)
        assert 0.93 <= np.mean(covered) <= 0.985, clustered
    low, high = wilson(0.55, 60)
    assert np.mean(widths) < 0.85 * (high - low)
    assert success_rate([0.5] * 9).low == wilson(0.5, 9)[0]  # no variance seen: as for right-or-wrong


def test_mean_over_strata() -> None:
    """Closed form, and coverage where the strata differ in size and share groups."""
    rate = success_rate([1, 1, 0, 0, 0, 1], strata=list("aaaabb"))
    assert rate.rate == pytest.approx((2 / 4 + 1 / 2) / 2) and (rate.hits, rate.n) == (3, 6)
    same = success_rate([1, 0, 1, 1], strata=list("aaaa"))
    assert (same.low, same.high) == pytest.approx(wilson(0.75, 4))
    always_yes = success_rate([1] * 30 + [0] * 10, strata=["yes"] * 30 + ["no"] * 10)
    assert always_yes.rate == 0.5
    rng, covered = np.random.default_rng(4), []
    strata, groups = ["a"] * 80 + ["b"] * 20, [str(i % 20) for i in range(100)]
    for _ in range(1500):
        scene = rng.normal(0, 0.1, 20)[[i % 20 for i in range(100)]]
        hits = rng.random(100) < np.repeat([0.8, 0.4], [80, 20]) + scene
        rate = success_rate(list(hits), groups, strata)
        covered.append(rate.low <= 0.6 <= rate.high)
    assert 0.92 <= np.mean(covered) <= 0.985


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


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_is_that_of_scipy_where_n_is_whole(hits: int, n: int) -> None:
    """Scipy takes whole counts only; ours takes an effective sample size too."""
    hits = min(hits, n)
    theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_has_its_closed_form(only_first: int, only_second: int) -> None:
    n, fewer = only_first + only_second, min(only_first, only_second)
    exact = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    assert mcnemar(only_first, only_second) == pytest.approx(exact, abs=1e-9)


def test_holm_corrects_for_the_number_of_tests() -> None:
    """Holm 1979: the smallest p times n, the next times n - 1, and never less than one before."""
    assert holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0] and holm([]) == []


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

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        self.asked += 1
        return self.answers[messages[-1].text]


SCRIPT = {
    "What colour is the cube?": "<think>hm</think>Red.",
    "What colour is the ball?": "green",
    "Point to the cube.": "somewhere",
    "How many cubes?": "two",
}


def examine(chat: Scripted, out: Path, asked: Sequence[Question] = ASKED, **options: object) -> DigitalResult:
    return evaluate_digital(chat, asked, out, train_questions=TRAIN, **{"model": "script", **options})


def test_digital_scores_every_item_beside_the_baselines(tmp_path: Path) -> None:
    result = examine(Scripted(SCRIPT), tmp_path)
    assert json.dumps(result.to_json(), indent=1) == (tmp_path / "result.json").read_text()
    assert [p.score for p in result.predictions] == [1, 0, 1, 0, 1]
    assert result.predictions[0].raw == "<think>hm</think>Red." and result.predictions[0].parsed == "Red."
    overall, kinds = result.summary.overall, result.summary.kinds
    assert (overall.hits, overall.n, overall.unread) == (3, 5, 1)
    assert {kind: part.n for kind, part in kinds.items()} == {"color": 3, "point": 1, "count": 1}
    assert kinds["point"].unread == 1 and kinds["point"].median_error is None
    majority, prior = (result.baselines[name].summary.kinds for name in ("majority", "question_only"))
    assert (majority["color"].hits, prior["color"].hits) == (1, 2)
    assert majority["point"].hits == 1  # (200, 400), the median, is 30 away
    assert majority["point"].median_error == pytest.approx(30)
    assert majority["count"].hits == 0  # never trained: no guess
    gain = result.baselines["question_only"].model_minus_baseline
    assert gain.difference == pytest.approx(0.0) and gain.n == 5


def test_digital_resumes_and_batches(tmp_path: Path) -> None:
    chat = Scripted(SCRIPT)
    first, again = (examine(chat, tmp_path) for _ in range(2))
    assert chat.asked == 5 and again.predictions == first.predictions
    examine(chat, tmp_path, model="other weights")
    assert chat.asked == 10

    class Batched(Scripted):
        def answer_batch(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str]:
            assert max_tokens == 7 and conversations[0][0] == Message("system", ("Be brief.",))
            return [self.answer(messages) for messages in conversations]

    brief = replace(SCENE, max_tokens=7, system="Be brief.")
    batched = examine(Batched(SCRIPT), tmp_path / "batched", benchmark=brief)
    assert batched.predictions == first.predictions
    with pytest.raises(ContractError, match=r"max_tokens: 7 here, 128 there(.|\n)*prompt: 'Be brief.' here"):
        compare(batched, first)


def test_digital_protocol_names_the_items(tmp_path: Path) -> None:
    base = examine(Scripted(SCRIPT), tmp_path / "a")
    assert base.protocol.count == 5
    repainted = [*ASKED[:4], question(4, "count", "How many cubes?", "2", 103)]
    other = examine(Scripted(SCRIPT), tmp_path / "b", repainted)
    assert other.protocol.items != base.protocol.items
    on_disk = replace(ASKED[0], messages=(Message("user", (Image(path="x.png"), "What?")),))
    with pytest.raises(BlmError, match="not in memory"):
        examine(Scripted(SCRIPT), tmp_path / "c", [on_disk])


def test_pictures_come_from_the_folder(tmp_path: Path) -> None:
    """Loaded when they are asked about; the item hash is that of the file, without decoding it."""
    (tmp_path / "images").mkdir()
    paths = [f"images/{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        PIL.Image.fromarray(np.full((2, 2, 3), index, np.uint8)).save(tmp_path / path)

    class Sees:
        def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
            return str(messages[-1].images[0].pixels[0, 0, 0])

    asked = [
        Question(id=p, kind="k", group=p, answer=str(i), messages=(Message("user", (Image(path=p), "?")),))
        for i, p in enumerate(paths)
    ]
    config = DigitalEvalConfig(root=tmp_path, batch=2)
    result = evaluate_digital(Sees(), asked, tmp_path / "a", model="m", config=config)
    assert result.summary.overall.rate == 1 and result.baselines == {}
    PIL.Image.fromarray(np.full((2, 2, 3), 9, np.uint8)).save(tmp_path / paths[0])
    other = evaluate_digital(Sees(), asked, tmp_path / "b", model="m", config=config)
    assert other.protocol.items != result.protocol.items and other.summary.overall.hits == 2
    (tmp_path / paths[0]).unlink()
    with pytest.raises(BlmError, match=r"question 'images/0.png': cannot read image .*0.png"):
        evaluate_digital(Sees(), asked, tmp_path / "c", model="m", config=config)


def letter(index: int, kind: str = "k", answer: str = "B") -> Question:
    options = ("red", "blue")
    text = Message("user", (f"question {index}\n(A) red\n(B) blue",))
    about = {"id": str(index), "kind": kind, "answer": answer, "group": str(index // 2)}
    return Question(**about, messages=(text,), options=options, scorer="choice")


class Constant:
    def __init__(self, text: str) -> None:
        self.text, self.limits = text, []

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        self.limits.append(max_tokens)
        return self.text


def test_another_parser_reuses_the_answers(tmp_path: Path) -> None:
    chat, questions = Constant("The answer is (B)."), [letter(index) for index in range(4)]
    ours = evaluate_digital(chat, questions, tmp_path, model="m")
    compat = DigitalEvalConfig(compat="cosmos_letter")
    theirs = evaluate_digital(chat, questions, tmp_path, model="m", config=compat)
    assert (ours.summary.overall.rate, theirs.summary.overall.rate, len(chat.limits)) == (1, 0, 4)
    assert theirs.predictions[0].parsed == "T"
    with pytest.raises(ContractError, match="compat: '' here, 'cosmos_letter' there"):
        compare(ours, theirs)
    with pytest.raises(BlmError, match=r"unknown compat parser 'cosmos'.*cosmos_letter"):
        evaluate_digital(chat, questions, tmp_path, model="m", config=DigitalEvalConfig(compat="cosmos"))
    with pytest.raises(BlmError, match="'egothink' reads judge answers; these questions need choice"):
        evaluate_digital(chat, questions, tmp_path, model="m", config=DigitalEvalConfig(compat="egothink"))


def test_a_benchmark_defines_token_limits_and_the_average(tmp_path: Path) -> None:
    questions = [letter(0), letter(1), letter(2), letter(3, "plan", "A"), letter(4)]
    chat, benchmark = Constant("B"), replace(SCENE, long={"plan": 300}, average="kinds", max_tokens=5)
    result = evaluate_digital(chat, questions, tmp_path, model="m", benchmark=benchmark)
    assert sorted(chat.limits) == [5, 5, 5, 5, 300]
    assert [p.id for p in result.predictions] == ["0", "1", "2", "3", "4"]
    assert result.summary.overall.rate == 0.8 and result.summary.headline.rate == 0.5
    assert load_result(tmp_path) == result
    with pytest.raises(BlmError, match="no questions"):
        evaluate_digital(chat, [], tmp_path, model="m")
    with pytest.raises(BlmError, match="'0' occurs more than once"):
        evaluate_digital(chat, [letter(0), letter(0)], tmp_path, model="m")


def test_balanced_accuracy_differs_from_the_mean(tmp_path: Path) -> None:
    """A model that always says no is right on 3 of 4 questions and no better than a coin."""
    answers = ["no"] * 6 + ["yes"] * 2
    kinds = ["success_negative"] * 6 + ["success_positive"] * 2
    questions = [
        Question(id=str(i), kind=kind, answer=answer, group=str(i), messages=(Message("user", ("?",)),))
        for i, (kind, answer) in enumerate(zip(kinds, answers, strict=True))
    ]
    result = evaluate_digital(Constant("No, it does not."), questions, tmp_path, model="m")
    assert result.summary.overall.rate == 0.75
    part = result.summary.balanced["success"]
    assert (part.rate, part.yes.rate, part.no.rate, part.said_yes) == (0.5, 0, 1, 0)
    assert [*result.summary.balanced] == ["success"]
    assert balanced_accuracy([p for p in result.predictions if p.reference == "no"]) == {}


# --- scorers ---


def scored(scorer: str, answer: str, raw: str, coordinates: str = "thousandths", **more: object) -> ItemScore:
    asked = Question(id="q", kind="k", messages=(), answer=answer, group="g", scorer=scorer, **more)  # type: ignore[arg-type]
    protocol = DigitalProtocol(items="", count=1, max_tokens=8, prompt="")
    return score(asked, raw, ScoringConfig(protocol, Coordinates.parse(coordinates)))


def test_distances() -> None:
    hit = scored("point", "(500, 500)", "(530, 540)")
    assert hit.error == pytest.approx(50) and hit.score == 1
    assert scored("point", "(500, 500)", "(531, 540)").score == 0
    unread = scored("point", "(500, 500)", "to the left")
    assert (unread.score, unread.parsed, unread.error) == (0, None, None)
    assert scored("point", "(500, 500)", "(1200, 3)").parsed is None
    assert scored("metric", "12 cm", "0.14 m").score == 1 and scored("metric", "12 cm", "14.1 cm").score == 0
    vector = scored("metric", "(12, -3, 20) cm", "(12, -3, 21) cm")
    assert vector.score == 1 and vector.error == pytest.approx(1)
    assert scored("metric", "(12, -3, 20) cm", "12 cm").parsed is None  # another form
    with pytest.raises(BlmError, match="reference 'left' is not a point"):
        scored("point", "left", "(1, 2)")


@pytest.mark.parametrize("shift, right", [(0, 1), (100, 1), (150, 0), (600, 0)])
def test_boxes(shift: int, right: int) -> None:
    """Two boxes 400 wide, moved by s along x: IoU (400 - s) / (400 + s), 0.6 and 0.45."""
    found = scored("box", "(0, 0, 400, 300)", f"({shift}, 0, {400 + shift}, 300)")
    assert found.score == right
    assert overlap((0, 0, 400, 300), (100, 0, 500, 300)) == pytest.approx(300 / 500)
    assert scored("box", "(0, 0, 400, 300)", "(400, 0, 0, 300)").parsed is None


def test_points_on_a_mask(rng: np.random.Generator) -> None:
    """The share on white equals a slow count over pixels; outside is a miss; edges belong to the picture."""
    white = rng.random((30, 50)) < 0.4
    mask = Image(np.repeat((white * 255).astype(np.uint8)[..., None], 3, axis=2))
    places = rng.integers(0, 1001, (40, 2))
    text = ", ".join(f"({x}, {y})" for x, y in places)
    slow = [white[min(y * 30 // 1000, 29), min(x * 50 // 1000, 49)] for x, y in places]
    found = scored("points", "", text, mask=mask)
    assert found.score == pytest.approx(np.mean(slow)) and found.points == 40
    pixels = " ".join(f"({x}, {y})" for y, x in np.argwhere(white))
    assert scored("points", "", pixels, "pixels:original", mask=mask).score == 1
    n, more = int(white.sum()), f"{pixels} (900, 900)"
    assert scored("points", "", more, "pixels:50x30", mask=mask).score == pytest.approx(n / (n + 1))
    none = scored("points", "", "there", mask=mask)
    assert (none.score, none.parsed, none.points) == (0, None, 0)
    with pytest.raises(BlmError, match="has no mask"):
        scored("points", "", "(1, 2)")


def test_words() -> None:
    assert scored("exact", "red cube", "The red cube.").score == 1
    assert scored("exact", "3", "three").score == 1 and scored("exact", "3", "").parsed is None
    assert (
        scored("exact", "yes", "Yes, it is.").score == 1
        and scored("exact", "yes", "Yes or no").parsed is None
    )
    assert scored("choice", "(b)", "blue", options=("red", "blue")).score == 1


def test_compare_digital_clusters_by_scene(tmp_path: Path) -> None:
    worse = Scripted({**SCRIPT, "How many cubes?": "9"})
    gain = compare(examine(Scripted(SCRIPT), tmp_path / "a"), examine(worse, tmp_path / "b"))
    assert gain.difference == pytest.approx(0.2) and gain.p_value is None and gain.low < 0 < gain.high
    text = format_comparison(examine(Scripted(SCRIPT), tmp_path / "a"), load_result(tmp_path / "b"))
    assert "score on the same 5 items" in text and "No p: items share scenes" in text and "count" in text


def test_the_name_of_a_kind_does_not_reveal_the_answer() -> None:
    from blm.evaluation.digital.text_baselines import text_baselines

    def ask(kind: str, answer: str, number: int) -> Question:
        words = (Message("user", ("Is it done?",)),)
        return Question(id=f"{kind}{number}", kind=kind, messages=words, answer=answer, group="g")

    train = [ask("success_positive", "yes", n) for n in range(3)] + [
        ask("success_negative", "no", n) for n in range(2)
    ]
    for guess in text_baselines(train).values():
        assert guess(train[0]) == guess(train[-1]) == "yes"
