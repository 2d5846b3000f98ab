"""What is missing to reproduce a row: exactly what a row lacks is named, with a place to get it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from blm.evaluation.digital import evaluate_digital
from blm.evaluation.digital.benchmarks import published
from blm.evaluation.digital.judge import MatchJudge
from blm.evaluation.digital.reproduction import COLUMNS, DATA, JUDGED, MODELS, UNSTATED, gap_cells, gaps
from blm.evaluation.digital.result import DigitalResult
from blm.types import Message, Question
from tests.support.commands import run_command


class Silent:
    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        return ""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DigitalResult:
    question = Question(id="0", kind="k", messages=(Message("user", ("?",)),), answer="a", group="0")
    return evaluate_digital(Silent(), [question], tmp_path_factory.mktemp("r"), model="mine")


def as_whole(result: DigitalResult, name: str) -> DigitalResult:
    """The result as if the whole benchmark had been run with a language model as judge."""
    whole = replace(result.protocol, benchmark=name, count=COLUMNS[name][1], judge="openai:gpt-4o")
    return replace(result, protocol=whole)


def test_a_row_lacks_nothing_but_what_nobody_has_published(result: DigitalResult) -> None:
    mine, *_ = gaps([("mine", as_whole(result, name)) for name in COLUMNS])
    assert mine.row == "mine" and not mine.published
    assert mine.missing == (UNSTATED[-1],), "ShareRobot's split"


@pytest.mark.parametrize("name", COLUMNS)
def test_each_thing_that_is_missing_is_named(result: DigitalResult, name: str) -> None:
    title, count = COLUMNS[name][0].title, COLUMNS[name][1]
    others = [("mine", as_whole(result, other)) for other in COLUMNS if other != name]
    ran = as_whole(result, name)

    def named(changed: DigitalResult | None) -> set[tuple[str, str]]:
        mine, *_ = gaps([*others, *([("mine", changed)] if changed else [])])
        return {(one.part, one.what) for one in mine.missing if one not in UNSTATED}

    assert named(ran) == set()
    assert named(None) == {("data", f"{title} was not run")}
    fewer = replace(ran, protocol=replace(ran.protocol, count=count - 1))
    assert named(fewer) == {("split", f"{title}: {count - 1} of {count} questions")}
    compat = replace(ran, protocol=replace(ran.protocol, compat="lmms_eval"))
    assert {part for part, _ in named(compat)} == {"prompt"}
    for judge in ("", MatchJudge.name):
        no_judge = replace(ran, protocol=replace(ran.protocol, judge=judge))
        assert {part for part, _ in named(no_judge)} == ({"judge"} if name in JUDGED else set())


def test_every_published_row_has_its_model_and_a_source() -> None:
    rows = gaps([])
    assert [row.row for row in rows] == list(published.DIGITAL) == list(MODELS)
    assert all(one.what and one.source for row in rows for one in row.missing)
    assert {one.part for row in rows for one in row.missing} == {
        *("data", "split", "judge", "prompt", "model family")
    }
    cells = gap_cells(rows)
    assert len(cells) == len(MODELS) + len(DATA) + len(UNSTATED), "what all rows share stands once"


def test_the_table_is_shown_without_any_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("eval table", ["--out", str(tmp_path / "t.md")])
    assert "nobody has published it" in " ".join(capsys.readouterr().out.split())
    text = (tmp_path / "t.md").read_text()
    assert text.count("\n### ") == 3 and "| all published rows | data | RoboVQA: 110 questions |" in text
