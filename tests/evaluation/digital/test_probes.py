"""Probes of what fine-tuning preserves: every check accepts a right answer and rejects wrong ones."""

from __future__ import annotations

import io
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

from blm.app.retention import RetentionResult, print_retention, retention_table
from blm.corpora.curation import replay
from blm.evaluation.digital.instructions import (
    VerifiableInstruction,
    compare_parts,
    dialogue_questions,
    follows,
    run_instructions,
    summarise,
    verifiable_instructions,
)
from blm.io import read_json, write_json
from blm.training.sft.retention import RetentionMeasure
from tests.support.probe_examples import EXAMPLES

PROBES = [*verifiable_instructions(), *dialogue_questions()]


def text_of(probe: VerifiableInstruction) -> str:
    return probe.question.messages[-1].text


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.question.id)
def test_a_check_accepts_a_right_answer_and_rejects_wrong_ones(probe: VerifiableInstruction) -> None:
    right, wrong = EXAMPLES[text_of(probe)]
    assert follows(probe, right)
    assert wrong
    for answer in (*wrong, "", "  \n"):
        assert not follows(probe, answer), answer


def test_there_are_two_hundred_instructions_and_sixty_dialogues_without_duplicates() -> None:
    assert len(verifiable_instructions()) == 200 and len(dialogue_questions()) == 60
    texts = [text_of(probe).lower().strip(" .?!") for probe in PROBES]
    assert len({*texts}) == len(texts) and {text_of(probe) for probe in PROBES} == EXAMPLES.keys()
    ids = [probe.question.id for probe in PROBES]
    assert len({*ids}) == len(ids) and not any(probe.question.messages[-1].images for probe in PROBES)


def test_a_key_is_not_in_its_question() -> None:
    """A model that repeats the question does not pass."""
    echoed = [p for p in PROBES if p.question.kind.startswith(("dialogue_", "instruction_knowledge"))]
    assert [text_of(p) for p in echoed if follows(p, text_of(p))] == []


def test_no_probe_is_among_the_prompts_of_replay() -> None:
    titles = replay.topic_texts(held_out=False)
    pools = [form.format(s) for form in replay.GENERAL for s in replay.SUBJECTS]
    pools += [form.format(title) for form in replay.MANUAL for title in titles]
    pools += replay.ABOUT_PICTURES
    drawn = {text for _, text in islice(replay.replay_prompts(0), 2 * len(pools))}
    assert drawn <= {*pools}, "replay asks other prompts than these"
    used = {prompt.lower().strip(" .?!") for prompt in pools}
    assert [text for text in map(text_of, PROBES) if text.lower().strip(" .?!") in used] == []


class Says:
    """A model that gives one answer to everything."""

    def __init__(self, text: str) -> None:
        self.text = text

    def answer(self, messages: object, *, max_tokens: int) -> str:
        return self.text


def result_of(base: str, tuned: str) -> RetentionResult:
    rows = {"base": run_instructions(Says(base)), "tuned": run_instructions(Says(tuned))}
    gaps = compare_parts(rows["base"], rows["tuned"])
    text = RetentionMeasure(
        kl=0.1,
        kl_low=0.0,
        kl_high=0.2,
        perplexity_base=3.0,
        perplexity=4.0,
        nll_rise=0.1,
        nll_rise_low=0.0,
        nll_rise_high=0.2,
        text_tokens=2,
    )
    return RetentionResult(
        base="b",
        tuned="t",
        text=text,
        probes={side: summarise(answers) for side, answers in rows.items()},
        tuned_minus_base=gaps["all"],
        differences=gaps,
        rows=rows,
    )


def test_the_parts_are_compared_pair_by_pair_and_printed() -> None:
    """ "Paris" is one right answer of knowledge, and "merci" one of dialogue."""
    result = result_of("Paris", "merci")
    gaps = result.differences
    assert gaps.keys() == {"all", "instructions", "knowledge", "dialogue"} == result.probes["base"].keys()
    assert gaps["knowledge"].difference == pytest.approx(-1 / 56)
    assert gaps["dialogue"].difference == pytest.approx(1 / 60)
    console = Console(file=io.StringIO(), width=120)
    print_retention(result, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "probes: dialogue" in shown and "0/60" in shown and "1/60" in shown and "+1.7%" in shown


def test_results_are_read_again_and_those_of_earlier_versions_too(tmp_path: Path) -> None:
    result = result_of("Paris", "merci")
    write_json(tmp_path / "new.json", asdict(result))
    ((_, table),) = retention_table(tmp_path / "new.json").items()
    assert table["probes (dialogue): right answers of the tuned model"] == pytest.approx(1 / 60)
    assert table["probes (dialogue): tuned minus base"] == pytest.approx(1 / 60)
    old = read_json(tmp_path / "new.json")
    del old["differences"]
    for side in ("base", "tuned"):
        del old["probes"][side]["dialogue"]
    write_json(tmp_path / "old.json", old)
    ((_, table),) = retention_table(tmp_path / "old.json").items()
    assert table["probes (all): tuned minus base"] == old["tuned_minus_base"]["difference"]
    assert not any("dialogue" in name for name in table)
    assert retention_table(tmp_path / "none.json") == {}
