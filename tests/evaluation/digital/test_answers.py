"""The labelled answers: what they cover, how many are read right, and what must not change a reading."""

from __future__ import annotations

import hashlib
import random
import time

import pytest

from benchmarks.extraction import ANSWERS, LabelledAnswer, load, measure, read
from blm.evaluation.digital.parsers.coordinates import Coordinates, read_metric, read_numbers
from blm.evaluation.digital.parsers.extraction import (
    final_answer,
    read_choice,
    read_count,
    read_words,
    read_yes_no,
    short_answer,
)

FROZEN, DEVELOPMENT = load("frozen"), load("development")
KINDS = {"choice", "yes_no", "length", "count", "word", "point", "points", "box"}


def test_halves_are_large_disjoint_and_alike() -> None:
    assert len(FROZEN) + len(DEVELOPMENT) >= 400
    keys = [(one.kind, one.answer, one.options, one.coordinates) for one in FROZEN + DEVELOPMENT]
    assert len(set(keys)) == len(keys)
    for half in (FROZEN, DEVELOPMENT):
        assert {one.kind for one in half} == KINDS
        assert all(one.why and one.style and one.question for one in half)
        assert sum(one.reading is None for one in half) >= len(half) / 8


def test_frozen_half_is_as_it_was_written() -> None:
    """The numbers below are about exactly these answers and labels."""
    digest = hashlib.sha256((ANSWERS / "frozen.jsonl").read_bytes()).hexdigest()
    assert digest.startswith("770ec9c171af16da")


@pytest.mark.parametrize("half", [FROZEN, DEVELOPMENT], ids=["frozen", "development"])
def test_recall_and_wrong_readings(half: list[LabelledAnswer]) -> None:
    overall = measure(half)["all"]
    assert overall.recall >= 0.90
    assert overall.wrong <= 0.01 * overall.answers


def with_answer(one: LabelledAnswer, answer: str) -> LabelledAnswer:
    return LabelledAnswer(**{**vars(one), "answer": answer})


@pytest.mark.parametrize("one", DEVELOPMENT[::3], ids=lambda one: one.answer[:30])
def test_wrapping_does_not_change_a_reading(one: LabelledAnswer) -> None:
    reading = read(one)
    assert read(with_answer(one, f"\n  {one.answer} \n\n")) == reading
    if "think>" not in one.answer and one.answer:
        assert read(with_answer(one, f"<think>A? No: yes. (9, 9) 9 cm</think>\n{one.answer}")) == reading
        assert read(with_answer(one, f"{one.answer}</s>")) == reading


@pytest.mark.parametrize("one", [o for o in DEVELOPMENT if o.kind in ("yes_no", "length", "count")][::3])
def test_case_does_not_change_yes_no_and_numbers(one: LabelledAnswer) -> None:
    if "\\" not in one.answer:  # LaTeX commands have a case
        assert read(with_answer(one, one.answer.upper())) == read(one)


def read_all(text: str, options: tuple[str, ...] = ("red", "not visible", "2 cups")) -> list[object]:
    places = [
        read_numbers(text, count, Coordinates.parse(kind), (640, 480))
        for count in (2, 4)
        for kind in ("thousandths", "unit", "pixels", "yx1000")
    ]
    words = [read(text) for read in (read_yes_no, read_metric, read_count, read_words)]
    return [read_choice(text, options), *words, *places]


FRAGMENTS = [
    *"()[]{}<>\"'`*_|\\/%.,;:!?=+-~±½²−–—…AB01 \n\t\x00",
    "\\boxed{", "<think>", "</think>", "<answer>", '{"answer":', "[[", "1e999", "9" * 400, "1/0", "٣", "一二",
    "🎉", "<|im_end|>", '<point x="1" y=', "x=1, y=", "nan", "not", "or", "answer is", "yes", "no", "between",
    "cm", "选",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_any_text_is_read_without_error(seed: int) -> None:
    """Random mixtures of answers and markup: no exception, and a final answer is final."""
    rng = random.Random(seed)
    pieces = FRAGMENTS + [word for one in DEVELOPMENT for word in one.answer.split(" ")]
    for _ in range(60):
        text = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 14)))
        answer = final_answer(text)
        assert final_answer(answer) == answer
        letter, truth, *_ = read_all(answer)
        assert letter in (None, "A", "B", "C") and truth in (None, "yes", "no")
        assert letter is None or read_choice(str(letter), ("", "", "")) == letter
        assert truth is None or read_yes_no(str(truth)) == truth


@pytest.mark.parametrize(
    "unit",
    [
        "A ",
        "(",
        "1, ",
        "1",
        "[[1,",
        '{"a":',
        " ",
        "the answer is ",
        "A or ",
        "not ",
        "\n",
        "1 1/",
        "no, ",
        "'",
        "2 cm ",
    ],
)
def test_long_hostile_answers_take_little_time(unit: str) -> None:
    started = time.process_time()
    read_all(short_answer(unit * (40_000 // len(unit))))
    assert time.process_time() - started < 5
