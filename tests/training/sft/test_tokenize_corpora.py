"""Several processes read what one reads: the same rows in the same order, counts and complaints."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from blm.backbone import build_nano
from blm.training.loop.distributed import Processes
from blm.training.sft import tokenize_corpora as reading
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource, check_lengths
from blm.types import BlmError, Image, Message
from tests.support.meeting import Meeting


def conversations(count: int, bad: tuple[int, ...] = (), long: tuple[int, ...] = ()) -> list[Any]:
    rng = np.random.default_rng(0)
    pictures = [Image(rng.integers(0, 256, (112, 112, 3), np.uint8)) for _ in range(3)]
    made = []
    for number in range(count):
        picture = (pictures[number % 3],) if number % 2 else ()
        words = "word " * (80 if number in long else 1 + number % 5)
        asked = Message("user", (*picture, f"Question {number}: {words}"))
        made.append([asked] if number in bad else [asked, Message("assistant", (f"Answer {number}.",))])
    return made


def read(count: int, skip_bad: bool = True, **made: Any) -> list[Any]:
    """What each of `count` processes gets: rows and counts, or the complaint."""
    meeting, limits = Meeting(count), TokenizationConfig(max_length=60)
    source = TrainingSource(name="some", conversations=conversations(23, **made))
    backbones = [build_nano(["Question 0: word", "Answer 1."]) for _ in range(count)]

    def work(rank: int) -> Any:
        backbone = backbones[rank]
        processes = meeting.of(rank) if count > 1 else Processes(0, 1, torch.device("cpu"))
        tokenizer = CorpusTokenizer(backbone, limits, processes, skip_bad=skip_bad)
        try:
            return tokenizer.tokenize(source).examples, tokenizer.total_counts()
        except BlmError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def same(one: TokenizedExample, other: TokenizedExample) -> bool:
    arrays = ("tokens", "loss_mask", "segment_ids", "position_ids")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_tokenize_like_one(count, monkeypatch, capsys):
    made = {"bad": (4, 9, 17), "long": (2, 20)}
    ((rows, counts),) = read(1, **made)
    complaints = capsys.readouterr().err
    assert counts["kept"] == len(rows) == 18 and counts["skipped, bad"] == 3
    assert counts["dropped, too long"] == 2
    monkeypatch.setattr(reading, "CONVERSATIONS_PER_EXCHANGE", 4)
    for others, total in read(count, **made):
        assert len(others) == len(rows) and all(map(same, others, rows))
        assert +total == +Counter(counts)
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said == [line for line in complaints.splitlines() if "skipped" in line] and len(said) == 3


def test_the_first_invalid_conversation_ends_all_processes(monkeypatch):
    monkeypatch.setattr(reading, "CONVERSATIONS_PER_EXCHANGE", 4)
    found = read(3, skip_bad=False, bad=(11, 8, 22))
    assert len({*found}) == 1 and "some, conversation 8" in found[0]


def test_an_empty_training_set_is_reported(monkeypatch):
    (found,) = read(1, bad=tuple(range(23)))
    assert "no conversation of 'some'" in found


def test_long_conversations_are_told_of_from_a_sample() -> None:
    backbone, limits = build_nano(["Question 0: word", "Answer 1."]), TokenizationConfig(max_length=60)
    some = TrainingSource(name="some", conversations=conversations(23, bad=(1,), long=(2, 3, 4)))
    warning = check_lengths(backbone, some, limits)
    assert warning.startswith("3 of 22 sampled conversations of 'some' are longer than max_length = 60")
    assert "limits.max_length" in warning and "limits.max_pixels" in warning
    assert check_lengths(backbone, some, TokenizationConfig()) == ""
    everything = TrainingSource(name="all", conversations=conversations(9, long=tuple(range(9))))
    with pytest.raises(BlmError, match="9 of 9 sampled conversations of 'all'"):
        check_lengths(backbone, everything, limits)
    many = TrainingSource(name="many", conversations=conversations(23, long=(2,)) * 30)
    assert " of 32 sampled" in check_lengths(backbone, many, limits)
