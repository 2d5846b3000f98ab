"""Reading answers: real outputs with where they come from, ours and the upstream parsers side by side."""

from __future__ import annotations

import numpy as np
import pytest

from blm.evaluation.digital.parsers.compat import COMPAT, mean_mask_value
from blm.evaluation.digital.parsers.coordinates import Coordinates, read_metric, read_numbers
from blm.evaluation.digital.parsers.extraction import final_answer, normalise, read_choice, read_yes_no
from blm.types import BlmError

OPTIONS = ("pick up the red cup", "open the drawer", "place the cup in the drawer", "close the drawer")

CHOICES: list[tuple[str, str | None]] = [
    # letters alone, as Cosmos-Reason1's "answer with the option's letter" prompt asks for
    ("B", "B"),
    ("(B)", "B"),
    ("b", "B"),
    ("(b)", "B"),
    ("B.", "B"),
    ("[B]", "B"),
    ('"B"', "B"),
    ("**B**", "B"),
    ("Option B", "B"),
    ("answer: b", "B"),
    ("（Ｂ）", "B"),
    ("\\boxed{B}", "B"),
    ("$\\boxed{\\text{B}}$", "B"),
    # with the option's text behind, usual for Qwen2.5-VL and LLaVA-OneVision
    ("B. open the drawer", "B"),
    ("(B) open the drawer", "B"),
    ("b) open the drawer", "B"),
    ("B: open the drawer.", "B"),
    ("B - open the drawer", "B"),
    ("B\nThe drawer is closed in the last frame.", "B"),
    ("B, because the drawer is still closed.", "B"),
    ("B. The drawer is closed, so A and C are not possible yet.", "B"),
    # declared; the first two are defects 1 and 2 of the Cosmos-Reason1 parsers
    ("The answer is (B).", "B"),
    ("Based on the clip, C is correct", "C"),
    ("**Answer:** B", "B"),
    ("The correct answer is **B. open the drawer**", "B"),
    ("The answer is A.", "A"),
    ("the answer is b", "B"),
    ("The answer is: option (c)", "C"),
    ("The most plausible next immediate subtask is (D) close the drawer.", "D"),
    ("I would choose option B here", "B"),
    ("So the final answer: B.", "B"),
    ("Option C seems the most plausible.", "C"),
    ("The answer is B. Wait, no. The answer is C.", "C"),
    ('{"answer": "B"}', "B"),
    ("答案是B", "B"),
    ("The robot holds the cup.\nIt should put it down.\n\nC", "C"),
    ("Let me compare (A) with the clip.\nAnswer: D", "D"),
    # reasoning, in Cosmos-Reason1's own format and cut short
    ("<think>A is wrong. B?</think> <answer>B</answer>", "B"),
    ("<think>A or B</think>\n\n<answer>\nBased on the clip, C is correct\n</answer>", "C"),
    ("<think>Maybe A.</think>B", "B"),
    ("<think>The answer is A", None),
    ("<think>Maybe A.</think><answer>B", "B"),
    ("The prompt opened it: A?</think> The answer is (D)", "D"),
    ("<answer>A</answer> no, wait: <answer>B</answer>", "B"),
    ("◁think▷A◁/think▷(B)", "B"),
    # the option's words in place of its letter
    ("open the drawer", "B"),
    ("Open the drawer.", "B"),
    ("The robot should open the drawer next.", "B"),
    ("The answer is place the cup in the drawer", "C"),
    ("It should not open the drawer", None),
    ("open the drawer, then close the drawer", None),
    # articles and pronouns are no letters
    ("A robot arm reaches for something.", None),
    ("A definitive answer cannot be given", None),
    ("The answer is a matter of opinion", None),
    ("The answer is A robot", None),
    # several, denied, refused, not offered
    ("A or B", None),
    ("A, B", None),
    ("(A) and (B)", None),
    ("The answer is A or B.", None),
    ("B/C", None),
    ("A. pick up\nB. open\nC. place\nD. close", None),
    ("The answer is not B", None),
    ("(B) is wrong.", None),
    ("It is not (B)", None),
    ("None of these can be determined", None),
    ("Sorry, I cannot help with (A).", None),
    ("I cannot choose between the options", None),
    ("E", None),
    ("The answer is (Z).", None),
    ("", None),
    ("3", None),
    ("Paris", None),
]


@pytest.mark.parametrize("raw, letter", CHOICES)
def test_choice(raw: str, letter: str | None) -> None:
    assert read_choice(final_answer(raw), OPTIONS) == letter


def test_choice_without_options_knows_letters_only() -> None:
    assert read_choice("(F)") == "F" and read_choice("the drawer") is None
    assert read_choice("None of the above", ("red", "None of the above")) == "B"  # here it is no refusal


@pytest.mark.parametrize("raw, _", CHOICES)
def test_choice_is_stable(raw: str, _: str | None) -> None:
    """White space around and a reasoning block before change nothing; a letter that is read reads itself."""
    letter = read_choice(final_answer(raw), OPTIONS)
    if "<think>" not in raw and "</think>" not in raw and "think▷" not in raw:
        assert read_choice(final_answer(f"<think>(A)? (B)? I say C.</think>\n {raw}\n"), OPTIONS) == letter
    assert letter is None or read_choice(letter, OPTIONS) == letter


@pytest.mark.parametrize(
    "raw, text",
    [
        ("red", "red"),
        ("<think>Maybe blue? Answer: blue</think> red", "red"),
        ("the prompt opened the tag </think>red", "red"),
        ("<think>I keep thinking about red", ""),
        ("<think>x</think><answer> red </answer> I hope so", "red"),
        ("<think>x</think><answer> red", "red"),
        ("<answer>blue</answer> no: <answer>red</answer>", "red"),
        ("<think>a</think> blue <think>b</think> red", "red"),
        ("<think>a</think> blue <think>b", ""),
        ("The cube is near.\n**Answer:** red", "red"),
        ("Final answer: (376, 309)", "(376, 309)"),
        ("**red**", "red"),
        ("", ""),
    ],
)
def test_final_answer(raw: str, text: str) -> None:
    assert final_answer(raw) == text


def test_normalise() -> None:
    assert normalise("The Red  cube.") == normalise("red cube") == "red cube"
    assert normalise("Three") == normalise("3.") == "3"
    assert normalise("A") == "a" and normalise("an apple") == "apple"
    assert normalise("-5") != normalise("5") and normalise("0.5") != normalise("5")
    assert normalise("?!") == ""


@pytest.mark.parametrize(
    "text, word",
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("**Yes**, it can.", "yes"),
        ("Yes, there is no obstacle", "yes"),
        ("The answer is no", "no"),
        ("Yes and no", None),
        ("yes/no", None),
        ("no or yes", None),
        ("Nothing is there", None),
        ("I know", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_yes_no(text: str, word: str | None) -> None:
    assert read_yes_no(text) == word


# --- coordinates ---


@pytest.mark.parametrize(
    "text, convention, places",
    [
        ("(376, 309)", "thousandths", [(376, 309)]),
        ("The cube is at [12,1000]", "thousandths", [(12, 1000)]),
        ("(0.376, 0.309)", "thousandths", [(376, 309)]),  # nobody writes thousandths of a thousandth
        ("(0.376, 309)", "thousandths", []),
        ("376 309", "thousandths", [(376, 309)]),
        ("3/4, 1/2", "thousandths", []),
        ("1:2", "thousandths", []),
        ("(35%, 62%)", "pixels", [(350, 620)]),
        ('{"y": 309, "x": 376}', "yx1000", [(376, 309)]),
        ("1. (1, 2)\n2. (3, 4)", "thousandths", [(1, 2), (3, 4)]),
        ("(1, 2) or (3, 4)", "thousandths", [(1, 2), (3, 4)]),
        ("[(0.376, 0.309)]", "unit", [(376, 309)]),
        ("(1, 0)", "unit", [(1000, 0)]),
        ("(376, 309)", "unit", []),
        ('[{"point": [309, 376], "label": "cube"}]', "yx1000", [(376, 309)]),
        ('[{"point_2d": [309, 376]}]', "thousandths", [(309, 376)]),
        ("(320, 120)", "pixels:640x480", [(500, 250)]),
        ("(320, 120)", "pixels", [(500, 500)]),
        ('<point x="37.6" y="30.9" alt="cube">cube</point>', "thousandths", [(376, 309)]),
        ('<points x1="10" y1="20" x2="30" y2="40">', "unit", [(100, 200), (300, 400)]),
    ],
)
def test_points(text: str, convention: str, places: list[tuple[float, float]]) -> None:
    read = read_numbers(text, 2, Coordinates.parse(convention), (640, 240))
    assert read == [pytest.approx(place) for place in places]


@pytest.mark.parametrize("size", [(640, 480), (112, 112), (33, 77)])
def test_conventions_agree(size: tuple[int, int], rng: np.random.Generator) -> None:
    """The same place written in each of them is the same place."""
    x, y = (int(v) for v in rng.integers(0, 1001, 2))
    width, height = size
    written = {
        "thousandths": f"({x}, {y})",
        "yx1000": f"({y}, {x})",
        "unit": f"({x / 1000}, {y / 1000})",
        "pixels": f"({x * width / 1000}, {y * height / 1000})",
        f"pixels:{width}x{height}": f"({x * width / 1000:.6f}, {y * height / 1000:.6f})",
    }
    for convention, text in written.items():
        assert read_numbers(text, 2, Coordinates.parse(convention), size) == [pytest.approx((x, y), abs=1e-3)]


def test_boxes_and_bad_conventions() -> None:
    assert read_numbers("(1, 2, 3, 4)", 4) == [(1, 2, 3, 4)] and read_numbers("(1, 2, 3, 4)", 2) == []
    assert read_numbers("[1, 2, 3, 4]", 4, Coordinates.parse("yx1000")) == [(2, 1, 4, 3)]
    for bad in ("percent", "pixels:0x3", "pixels:3", ""):
        with pytest.raises(BlmError, match="valid: thousandths"):
            Coordinates.parse(bad)


@pytest.mark.parametrize(
    "text, value",
    [
        ("12 cm", (12,)),
        ("12", (12,)),
        ("about 12.5cm.", (12.5,)),
        ("0.12 m", (12,)),
        ("120 mm", (12,)),
        ("12 centimeters", (12,)),
        ("1.2 metres", (120,)),
        ("(12, -3, 20) cm", (12, -3, 20)),
        ("[0.12, -0.03, 0.2] m", (12, -3, 20)),
        ("(12, -3, 20)", (12, -3, 20)),
        ("It is 12 cm, that is 12 cm.", (12,)),
        ("The 2 cubes are 12 cm apart", (12,)),
        ("5 inches", (12.7,)),
        ("1/2 m", (50,)),
        ("1½ ft", (45.72,)),
        ("1,200 mm", (120,)),
        ("−5 cm", (-5,)),
        ("0,3 m", (30,)),
        ("1 m 20 cm", (120,)),
        ("12–15 cm", None),
        ("more than 12 cm", None),
        ("12 cm/s", None),
        ("12 cm or 15 cm", None),
        ("10 to 12", None),
        ("far", None),
    ],
)
def test_metric(text: str, value: tuple[float, ...] | None) -> None:
    assert read_metric(final_answer(text)) == (value if value is None else pytest.approx(value))


# --- upstream parsers: what each makes of the same strings, from the functions at the commits in COMPAT ---

UPSTREAM: list[tuple[str, str | None, str | None, str | None, str | None]] = [
    # answer, cosmos letter, cosmos reasoning, lmms-eval, VLMEvalKit
    ("B", "B", None, "B", "B"),
    ("The answer is (B).", "T", None, "B", "B"),
    ("Based on the clip, C is correct", "B", None, "C", "C"),
    ("**Answer:** B", "A", None, "B", "B"),
    ("None of these can be determined", "N", None, None, None),
    ("A robot arm reaches for something.", "A", None, "A", None),
    ("<think>A is wrong. B?</think> <answer>B</answer>", "A", "B", "A", None),
    ("<think>The answer is A", "T", None, "A", "A"),
    ("open the drawer", None, None, None, "B"),
    ("b", None, None, None, None),
    ("(A) and (B)", "A", None, "B", None),
    ("<answer>Based on the clip, C is correct</answer>", "B", "B", "C", "C"),
    ("I'm sorry, but without the image provided I cannot say.", "I", None, None, "Z"),
    ("Option C seems the most plausible, because the drawer is still open.", "O", None, "C", None),
]


@pytest.mark.parametrize("answer, letter, reasoning, lmms, vlm", UPSTREAM)
def test_upstream_letters(
    answer: str, letter: str | None, reasoning: str | None, lmms: str | None, vlm: str | None
) -> None:
    names = ("cosmos_letter", "cosmos_reasoning", "lmms_eval", "vlmevalkit")
    read = [COMPAT[name].choice for name in names]
    assert [choice and choice(answer, OPTIONS) for choice in read] == [letter, reasoning, lmms, vlm]


@pytest.mark.parametrize(
    "answer, lmms, flag, robo",
    [
        ("(0.5, 0.25)", [(5, 2)], [(5, 2)], [(5, 2)]),
        ("(3, 4)", [(30, 32)], [(3, 4)], [(3, 4)]),  # integers are scaled too by one of them
        ("(1, 0)", [(10, 0)], [(1, 0)], [(1, 0)]),
        ("(1, 0.5)", [(10, 4)], [(10, 4)], [(10, 4)]),
        ("(3, 4)\n(1, 2)", [(30, 32), (10, 16)], [(1, 2)], [(3, 4), (1, 2)]),  # the last line only
        ("(1, 1, 3, 2)", [], [(1, 1), (2, 1)], None),  # a box: none, its pixels, relative for sure
        ("[3, 4]", [], [], []),
        ("(1, 2, 3)", [], [], []),
    ],
)
def test_upstream_points(answer: str, lmms: list, flag: list, robo: list | None) -> None:
    expected = {"lmms_eval": lmms, "flagevalmm": flag, "roborefer": robo}
    for name, points in expected.items():
        read = COMPAT[name].points
        assert read is not None
        if points is not None:
            assert read(answer, 10, 8) == points, name
    assert len(COMPAT["roborefer"].points("(1, 1, 3, 2)", 10, 8)) == 20 * 8


def test_upstream_masks_and_shares() -> None:
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    worth = {name: COMPAT[name].mask(grey) for name in ("lmms_eval", "flagevalmm", "roborefer")}
    assert worth["lmms_eval"].tolist() == [[0, 0], [1, 1]]
    assert worth["flagevalmm"][0, 1] == pytest.approx(100 / 255)  # JPEG edges count in part
    assert worth["roborefer"].tolist() == [[0, 1], [1, 1]]
    assert mean_mask_value([(0, 1), (1, 1), (5, 5), (0, 0)], worth["lmms_eval"]) == 0.5
    assert mean_mask_value([], worth["lmms_eval"]) == 0


def test_upstream_rating() -> None:
    read = COMPAT["egothink"].rating
    assert read is not None
    assert read("Rating: [[0.5]]") == 0.5 and read("as said in [1], Rating: 0") == 1  # a citation counts
    assert read("[[1]] or rather [[0]]") == 1 and read("no idea") is None


def test_every_upstream_parser_names_its_source() -> None:
    for name, upstream in COMPAT.items():
        assert "/" in upstream.source and any((upstream.choice, upstream.points, upstream.rating)), name
