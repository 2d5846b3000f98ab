"""`blm train stage1`: from corpora to a stock folder, with what was learnt and kept on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blm.backbone import Backbone
from blm.cli.training import split_weight
from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.types import BlmError, Image, Message
from tests.support.commands import run_command

FLAGS = ["--loop.steps=4", "--loop.batch-size=4", "--loop.eval-every=2", "--lora.rank=2", "--pack-length=128"]


def conversation(name: str, question: tuple[str | Image, ...], answer: str) -> Conversation:
    messages = (Message("user", question), Message("assistant", (answer,)))
    return Conversation(id=name, group=name, source="made", kinds=("colour",), messages=messages)


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    for name, colours in (("scenes", (0, 1, 2)), ("held_out", (1,))):
        pictures = [np.full((112, 112, 3), 80 * colour, np.uint8) for colour in colours]
        rows = [conversation(f"{name}{i}", (Image(p), "How bright?"), str(i)) for i, p in enumerate(pictures)]
        write_corpus(tmp_path / name, rows)
    write_corpus(tmp_path / "replay", [conversation("hello", ("Hello.",), "Good day.")])
    (tmp_path / "text.txt").write_text("A cube is on the table.\n\nIt is red, and a robot moves it.\n")
    return tmp_path


def test_it_trains_evaluates_and_resumes(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpora / "out"
    arguments = [str(out), "--corpus", f"{corpora / 'scenes'}:3", "--replay", str(corpora / "replay")]
    arguments += [
        "--held-out",
        str(corpora / "held_out"),
        "--retention-text",
        str(corpora / "text.txt"),
        *FLAGS,
    ]
    run_command("train stage1", arguments)
    shown = capsys.readouterr().out
    assert "kept: 4" in shown and "perplexity" in shown and "held-out loss" in shown
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all({"held_out_loss", "kl", "perplexity", "padding_share"} <= row.keys() for row in rows)
    assert rows[-1]["kl"] > 0
    assert json.loads((out / "command.json").read_text())["pack_length"] == 128
    weights = (out / "backbone/model.safetensors").read_bytes()
    assert (out / "adapter/adapter_model.safetensors").exists() and Backbone.load(out / "backbone")
    run_command("train stage1", arguments)
    assert (out / "backbone/model.safetensors").read_bytes() == weights


def test_an_invalid_corpus_is_refused_by_line_or_skipped_with_a_report(
    corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = corpora / "scenes/corpus.jsonl"
    file.write_text(file.read_text() + '{"messages": [{"role": "user"')
    arguments = [str(corpora / "out"), "--corpus", str(corpora / "scenes"), *FLAGS]
    with pytest.raises(BlmError, match=r"scenes.corpus.jsonl:4"):
        run_command("train stage1", arguments)
    run_command("train stage1", [*arguments, "--skip-bad"])
    assert "corpus.jsonl:4" in "".join(capsys.readouterr()).replace("\n", "")  # the path may be wrapped


def test_weights_of_corpora(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert split_weight(f"{tmp_path}:2.5") == (tmp_path, 2.5)
    assert split_weight("corpora/scenes") == (Path("corpora/scenes"), 1.0)
    assert split_weight(str(tmp_path / "a:b")) == (tmp_path / "a:b", 1.0)
    with pytest.raises(BlmError, match="FOLDER:WEIGHT"):
        split_weight("scenes:much")


def test_validation_is_prepared_and_shows_long_rows_first(
    corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(corpora / "out"), "--corpus", str(corpora / "scenes"), "--backbone=blm-nano-2", *FLAGS]
    run_command("train stage1", [*arguments, "--validate-only"])
    assert not (corpora / "out/log.jsonl").exists() and list((corpora / "scenes/validated").iterdir())
    (corpora / "scenes/corpus.jsonl").write_text((corpora / "scenes/corpus.jsonl").read_text() + "broken")
    with pytest.raises(BlmError, match="3 of 3 sampled conversations of 'scenes' are longer than max_length"):
        run_command("train stage1", [*arguments, "--limits.max-length=4"])
    assert "sampled conversations have" in capsys.readouterr().err, "before the broken line is found"
