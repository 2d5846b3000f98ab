"""Questions about the same pictures share them; each is still trained as if it were asked alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from blm.backbone import Backbone
from blm.corpora import ConverterConfig, convert, read_corpus
from blm.corpora.format.messages import Conversation
from blm.corpora.format.turns import split_turns
from blm.corpora.grouping import group_corpus
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.types import BlmError
from tests.support.backbones import tiny_qwen
from tests.support.robot_rows import row, write_robot_rows

QUESTIONS = 20
"""Questions about an episode of ShareRobot, on average."""


def write_sharerobot(folder: Path, episodes: int = 3, frames: int = 8) -> Path:
    """Write planning rows in ShareRobot's own layout, shuffled; return the folder."""
    rows = []
    for episode in range(episodes):
        place = f"rt_frames_success/shard_0/{episode}"
        (folder / place).mkdir(parents=True)
        for frame in range(frames):
            picture = np.random.default_rng(frame + 100 * episode).integers(0, 256, (56, 56, 3), np.uint8)
            PIL.Image.fromarray(picture).save(folder / place / f"frame_{frame}.png")
        images = [f"/mnt/publisher/{place}/frame_{frame}.png" for frame in range(frames)]
        for number in range(QUESTIONS):
            asked = f"<image 0-{frames - 1}> What does the robot do after step {number}?"
            talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It lifts {number}."}]
            own = {"id": place, "task": "Future_Prediction_Task", "selected_step": number}
            rows.append({**own, "conversations": talk, "image": images})
    (folder / "planning/train").mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(rows))
    (folder / "planning/train/part.json").write_text(json.dumps([rows[place] for place in order]))
    return folder


def tokenized(backbone: Backbone, rows: list[Conversation], root: Path) -> list[TokenizedExample]:
    limits = TokenizationConfig(max_length=10**6)
    found = [
        tokenize_conversation(backbone, one.messages, limits, root, Counter(), independent=one.independent)
        for one in rows
    ]
    return [one for one in found if one is not None]


def test_sharerobot_reads_its_frames_once(tmp_path: Path) -> None:
    raw = write_sharerobot(tmp_path / "raw")
    convert("sharerobot", raw / "planning/train", tmp_path / "flat", ConverterConfig(media=raw))
    done = group_corpus(tmp_path / "flat", tmp_path / "grouped")
    assert (done.rows, done.conversations, done.alone) == (60, 3, 0) and done.factor == QUESTIONS
    assert json.loads((tmp_path / "grouped/grouping.json").read_text())["shared_pictures"] == 24
    qwen = tiny_qwen("2.5")
    examples = {
        name: tokenized(qwen, read_corpus(tmp_path / name), tmp_path / name) for name in ("flat", "grouped")
    }
    pictures = {
        name: sum(int((one.tokens == qwen.placeholder_id).sum()) for one in found)
        for name, found in examples.items()
    }
    answers = {name: sum(int(one.loss_mask.sum()) for one in found) for name, found in examples.items()}
    assert pictures["flat"] >= 5 * pictures["grouped"], "the aim; here it is 20 times"
    assert answers["flat"] == answers["grouped"], "every answer token is still learnt"
    lengths = {name: sum(map(len, found)) for name, found in examples.items()}
    assert lengths["flat"] > 2 * lengths["grouped"]


def test_every_question_is_trained_as_before(tmp_path: Path) -> None:
    flat = write_robot_rows(tmp_path / "flat", episodes=3, questions=5)
    group_corpus(flat, tmp_path / "grouped", turns=3)
    before = {one.messages for one in read_corpus(flat)}
    merged = read_corpus(tmp_path / "grouped")
    assert [len(one.kinds) for one in merged] == [3, 2] * 3 and all(one.independent for one in merged[::2])
    assert {turn for one in merged for turn in split_turns(one.messages)} == before


def test_only_independent_questions_about_equal_pictures_are_merged(tmp_path: Path) -> None:
    flat = write_robot_rows(tmp_path / "flat", episodes=1, questions=2)
    shown, other = ["frames/0-0.png", "frames/0-1.png"], ["frames/0-1.png", "frames/0-0.png"]

    def talk(name: str, **fields: Any) -> dict[str, Any]:
        made = row(name, shown, "Who?", "He.", **fields)
        made["messages"] += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
        return made

    system = row("system", shown, "Who?", "He.", group="messages/frames/0-0.png")
    system["messages"].insert(0, {"role": "system", "content": "Be brief."})
    apart = [
        row("other order", other, "Who?", "He."),
        row("words", [], "Hello?", "Yes."),
        talk("dialogue"),
        system,
    ]
    added = [*apart, talk("independent", independent=True)]
    with (flat / "corpus.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in added)
    done = group_corpus(flat, tmp_path / "grouped")
    found = {one.id: one for one in read_corpus(tmp_path / "grouped")}
    assert [*found] == ["0/0", "other order", "words", "dialogue", "system"] and done.alone == 2
    assert len(found["0/0"].kinds) == 4 and not found["dialogue"].independent
    with pytest.raises(BlmError, match="exists"):
        group_corpus(flat, tmp_path / "grouped")
    with pytest.raises(BlmError, match="turns is 0"):
        group_corpus(flat, tmp_path / "x", turns=0)
