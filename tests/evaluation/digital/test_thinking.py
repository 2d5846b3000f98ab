"""Thinking models get tokens for their thoughts; cut answers and broken pictures are shown as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from blm.backbone import Backbone
from blm.evaluation.digital import BENCHMARKS, evaluate_digital
from blm.evaluation.digital.answers import Answer, AnswerError, complete_all
from blm.evaluation.digital.benchmarks import published
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.evaluation.digital.thinking import THINKING_TOKENS, thinking_mode
from blm.evaluation.result_files import load_result
from blm.types import BlmError, Image, Message, Question
from tests.support.backbones import MAKERS

OPENED = "{% if add_generation_prompt %}<think>\n{% endif %}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


@dataclass
class Speaker:
    """A model that says what it is told to, cut at its limit of (here) words."""

    says: str
    limits: list[int] = field(default_factory=list)
    thinks: bool = False
    longest_answer: int | None = None

    def set_thinking(self, on: bool) -> None:
        self.thinks = on

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        return self.complete([messages], max_tokens=max_tokens)[0][0]

    def complete(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128
    ) -> list[tuple[str, bool]]:
        self.limits += [max_tokens] * len(conversations)
        words = self.says.split()
        return [(" ".join(words[:max_tokens]), len(words) <= max_tokens) for _ in conversations]


def questions(count: int = 2, **more: object) -> list[Question]:
    return [
        Question(
            id=str(n),
            kind="choice",
            messages=(Message("user", (f"Which? {n}\n(A) red\n(B) blue",)),),
            answer="B",
            group=str(n),
            scorer="choice",
            options=("red", "blue"),
        )
        for n in range(count)
    ]


ROBOVQA = BENCHMARKS["robovqa"]
THOUGHT = "<think> It may be A , red . The answer is A . No wait : blue . </think> B"


@pytest.mark.parametrize(
    ("wanted", "longest", "limit", "right"),
    [
        ("auto", None, ROBOVQA.max_tokens, 0.0),
        ("off", None, ROBOVQA.max_tokens, 0.0),
        ("on", None, ROBOVQA.max_tokens + THINKING_TOKENS, 1.0),
        ("on", 300, ROBOVQA.max_tokens + 300, 1.0),
    ],
)
def test_a_thinking_model_gets_tokens_for_its_thoughts(
    tmp_path: Path, wanted: str, longest: int | None, limit: int, right: float
) -> None:
    chat = Speaker(THOUGHT, longest_answer=longest)
    config = DigitalEvalConfig(thinking=wanted)  # type: ignore[arg-type]
    result = evaluate_digital(chat, questions(), tmp_path, model="m", benchmark=ROBOVQA, config=config)
    assert chat.limits == [limit] * 2 and result.protocol.max_tokens == limit
    assert result.protocol.thinking == (wanted == "on")
    assert result.summary.overall.rate == right
    assert result.summary.overall.truncated == (0 if right else 2)
    assert load_result(tmp_path) == result


@pytest.mark.parametrize(("thinks", "parsed"), [(True, None), (False, "A")])
def test_an_answer_that_is_cut_among_thoughts_is_unread_and_shown_as_cut(
    tmp_path: Path, thinks: bool, parsed: str | None
) -> None:
    """A template may open the thoughts, so they need not begin with <think>; a verbose answer, cut
    behind its letter, is read."""
    chat = Speaker("The answer is A because the robot has seen the red cube first of all", thinks=thinks)
    config = DigitalEvalConfig(max_tokens=5)
    result = evaluate_digital(chat, questions(), tmp_path, model="m", benchmark=ROBOVQA, config=config)
    assert chat.limits == [5, 5]
    assert [p.parsed for p in result.predictions] == [parsed] * 2
    assert all(p.truncated for p in result.predictions) and result.summary.overall.truncated == 2
    assert result.summary.overall.unread == (2 if thinks else 0)


def test_max_tokens_replaces_the_limits_of_all_kinds(tmp_path: Path) -> None:
    kind = published.EGOTHINK_KINDS[7]
    assert kind in BENCHMARKS["egothink"].long
    asked = [Question(**{**vars(one), "kind": kind}) for one in questions()]
    chat, config = Speaker("B"), DigitalEvalConfig(max_tokens=7)
    evaluate_digital(chat, asked, tmp_path, model="m", benchmark=BENCHMARKS["egothink"], config=config)
    assert chat.limits == [7, 7]
    with pytest.raises(BlmError, match="max_tokens is 0; it must be 1 to"):
        DigitalEvalConfig(max_tokens=0)


def test_a_picture_that_cannot_be_decoded_fails_its_question_alone(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    asked = [
        Question(
            **{**vars(one), "messages": (Message("user", (Image(path=f"{name}.png"), "Which?")),)}  # type: ignore[arg-type]
        )
        for one, name in zip(questions(3), "abc", strict=True)
    ]
    chat, config = Speaker("B"), DigitalEvalConfig(root=tmp_path, coordinates="pixels:original")
    result = evaluate_digital(chat, asked, tmp_path / "out", model="m", benchmark=ROBOVQA, config=config)
    first, bad, last = result.predictions
    assert first.score == last.score == 1 and first.failure is last.failure is None
    assert bad.score == 0 and bad.failure is not None
    assert "question '1'" in bad.failure and "b.png" in bad.failure
    assert result.summary.overall.refused == 1 and len(chat.limits) == 2


def test_backbones_say_whether_they_think_and_can_be_told() -> None:
    plain, opened, switched = (MAKERS["qwen2.5"]() for _ in range(3))
    opened.processor.chat_template += OPENED
    switched.processor.chat_template += SWITCH
    assert [backbone.thinks for backbone in (plain, opened, switched)] == [False, True, True]
    assert plain.render([Message("user", ("?",))], prompt=True).count("think") == 0
    switched.set_thinking(False)
    assert not switched.thinks
    assert switched.render([Message("user", ("?",))], prompt=True).endswith("</think>\n\n")
    for backbone, on, word in ((plain, True, "never opens thoughts"), (opened, False, "always thinks")):
        with pytest.raises(BlmError, match=f"thinking cannot be switched .*{word}"):
            backbone.set_thinking(on)
        backbone.set_thinking(not on)
    opened.model.generation_config.max_new_tokens = 77
    assert thinking_mode(opened, "auto").tokens == 77
    assert thinking_mode(plain, "auto").tokens == 0


def test_a_backbone_says_which_of_its_answers_were_cut() -> None:
    backbone: Backbone = MAKERS["qwen2.5"]()
    asked = [(Message("user", ("What do you see?",)),)] * 2
    (short, *_), (long, *_) = (complete_all(backbone, asked, tokens) for tokens in (1, 400))
    assert isinstance(short, Answer) and isinstance(long, Answer)
    ended = len(backbone.processor.tokenizer(long.text)["input_ids"]) < 380
    assert short.truncated and long.truncated != ended
    assert not isinstance(short, AnswerError)
