"""A whole corpus checked before training: counts per reason with file and line, and what is skipped."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import PIL.Image
import pytest

from blm.backbone import build_nano
from blm.corpora import clean_corpus, read_corpus, validate_corpus, write_corpus
from blm.corpora.format.faults import REASONS
from blm.corpora.format.messages import CORPUS_FILE, Conversation
from blm.corpora.format.validate import check_with_backbone, reserved_tokens
from blm.datasets import video
from blm.types import BlmError, Image, Message
from tests.support.backbones import MAKERS
from tests.support.commands import run_command

PICTURES = {
    "media missing": "images/none.png",
    "media unreadable": "images/broken.png",
    "media too large": "images/bomb.png",
    "media outside the folder": "../secret.png",
    "time after the end": "clip.mp4#t=99",
}
UNREADABLE = ("clip.mp4", "images", "images/broken.mp4#t=1", "images/a.png#t=x")


@cache
def nano():
    return build_nano(["What is it? A cup. yes no"])


def row(url="images/a.png", text="What is it?", answer="A cup."):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A corpus with one good picture, and media of every bad sort."""
    (tmp_path / "c/images").mkdir(parents=True)
    PIL.Image.new("RGB", (20, 20), "red").save(tmp_path / "c/images/a.png")
    PIL.Image.new("1", (9000, 8000)).save(tmp_path / "c/images/bomb.png")
    whole = (tmp_path / "c/images/a.png").read_bytes()
    (tmp_path / "c/images/broken.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "secret.png").write_bytes(whole)
    video.encode(tmp_path / "c/clip.mp4", np.zeros((10, 16, 16, 3), np.uint8), 10)
    (tmp_path / "c/images/broken.mp4").write_bytes((tmp_path / "c/clip.mp4").read_bytes()[:200])
    (tmp_path / "c" / CORPUS_FILE).write_text(row())
    return tmp_path / "c"


def test_a_good_corpus_is_clean(folder):
    (folder / CORPUS_FILE).write_text(row() + row("clip.mp4#t=0.95"))
    assert validate_corpus(folder, backbone=nano()).clean
    assert clean_corpus(folder, backbone=nano()) == read_corpus(folder)


def test_every_fault_is_counted_with_its_line(folder, capsys):
    lines = [row(), *(row(url) for url in PICTURES.values()), "{\n", row(answer=" "), row()]
    (folder / CORPUS_FILE).write_text("".join(lines))
    result = validate_corpus(folder)
    assert not result.clean and result.rows == len(lines)
    expected = [*PICTURES, "malformed JSON", "empty answer"]
    assert [fault.reason for fault in result.faults] == expected
    assert [fault.where for fault in result.faults] == [f"{folder / CORPUS_FILE}:{n}" for n in range(2, 9)]
    assert result.counts == dict.fromkeys(expected, 1) and set(expected) <= set(REASONS)
    with pytest.raises(BlmError, match=r"(?s)7 of 9 rows.*1 x media missing.*corpus\.jsonl:2"):
        clean_corpus(folder)
    capsys.readouterr()
    kept = clean_corpus(folder, skip_bad=True)
    assert [r.id for r in kept] == ["row-1", "row-9"]
    printed = "".join(capsys.readouterr().err.split())
    assert all("".join(fault.where.split()) in printed for fault in result.faults), "what is skipped is shown"


@pytest.mark.parametrize("url", UNREADABLE)
def test_media_that_are_no_picture_are_refused(folder, url):
    (folder / CORPUS_FILE).write_text(row(url))
    (fault,) = validate_corpus(folder).faults
    assert fault.reason in ("media unreadable", "media missing")
    with pytest.raises(BlmError, match="no row is left"):
        clean_corpus(folder, skip_bad=True)


@pytest.mark.parametrize("text", ["Is <image> red?", "end <|end|>", "<|assistant|>", "<pad>"])
def test_reserved_tokens_are_found_in_questions_and_answers(folder, text):
    (folder / CORPUS_FILE).write_text(row() + row(text=text) + row(answer=text))
    assert validate_corpus(folder).clean, "only a backbone knows its tokens"
    faults = validate_corpus(folder, backbone=nano()).faults
    assert [(f.where[-2:], f.reason) for f in faults] == [
        (":2", "reserved token in text"),
        (":3", "reserved token in text"),
    ]


def test_token_limits(folder):
    context = nano().decoder.config.max_position_embeddings
    (folder / CORPUS_FILE).write_text(row() + row(text="? " * context) + row(text="? " * 64))
    (fault,) = validate_corpus(folder, backbone=nano()).faults
    assert (fault.where[-2:], fault.reason) == (":2", "too long"), "longer than the context"
    faults = validate_corpus(folder, backbone=nano(), max_tokens=64).faults
    assert [fault.where[-2:] for fault in faults] == [":2", ":3"]
    with pytest.raises(BlmError, match="needs a backbone"):
        validate_corpus(folder, max_tokens=64)


class Strange:
    """A backbone in whose hands a conversation goes wrong in one way."""

    def __init__(self, way):
        self.way, self.processor = way, nano().processor

    def render(self, messages, *, prompt):
        if self.way == "answer not learnt" and not prompt:  # as templates do that cut what was thought
            messages = [Message(m.role, ("..",)) if m.role == "assistant" else m for m in messages]
        return nano().render(messages, prompt=prompt)

    def process(self, texts, images):
        if self.way == "placeholders differ from features":
            texts = [text.replace("<image>", "", 1) for text in texts]
        return nano().process(texts, images)


@pytest.mark.parametrize("way", ["answer not learnt", "placeholders differ from features"])
def test_conversations_that_a_model_would_misread_are_found(folder, way):
    (found,) = read_corpus(folder)
    check_with_backbone(found, folder, nano(), reserved_tokens(nano()))
    with pytest.raises(BlmError, match=way):
        check_with_backbone(found, folder, Strange(way), reserved_tokens(nano()))


def test_text_only_rows_are_valid(tmp_path):
    messages = (Message("user", ("What is it?",)), Message("assistant", ("A cup.",)))
    rows = [Conversation(id="a", group="a", source="s", kinds=("chat",), messages=messages)]
    write_corpus(tmp_path / "c", rows)
    assert validate_corpus(tmp_path / "c", backbone=nano()).clean


# --- commands -----------------------------------------------------------------------------------------------


def run(name, *arguments):
    try:
        run_command(f"corpus {name}", [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def test_the_exit_status_of_validate_reflects_faults(folder, capsys):
    assert run("validate", folder, "--backbone", "nano") == 0
    (folder / CORPUS_FILE).write_text(row() + row("images/none.png"))
    assert run("validate", folder) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 rows are good" in printed and "media missing" in printed and "corpus.jsonl:2" in printed


def test_convert_and_curate_commands(tmp_path, capsys):
    assert run("convert") == 0 and "sharerobot" in capsys.readouterr().out
    turns = [{"from": "human", "value": "<image> Red?"}, {"from": "gpt", "value": "yes"}]
    rows = [{"image": f"{i}.png", "conversations": turns} for i in range(5)]
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    with pytest.raises(BlmError, match="1 of 5 rows"):
        run("convert", "llava", tmp_path / "r.json", tmp_path / "c")
    assert run("convert", "llava", tmp_path / "r.json", tmp_path / "c", "--skip-bad") == 0
    assert "4 of 5 rows" in capsys.readouterr().out
    assert run("curate", tmp_path / "out", f"{tmp_path / 'c'}=2", "--max-per-kind", "3") == 0
    printed = capsys.readouterr().out
    assert "4 -> 3" in printed and "100.0%" in printed
    assert len(read_corpus(tmp_path / "out/c")) == 3
    with pytest.raises(BlmError, match="not a number"):
        run("curate", tmp_path / "no", f"{tmp_path / 'c'}=much")


def test_build_needs_a_folder():
    with pytest.raises(BlmError, match="blm corpus build OUT"):
        flags = ("--robots", "panda", "--tasks", "push_cube", "--cameras", "base", "--image-size", "64")
        run("build", *flags, "--scenes", "1", "--first-seed", "10000")


def test_pictures_in_memory_need_no_folder(tmp_path):
    picture = Image(np.zeros((8, 8, 3), np.uint8))
    messages = (Message("user", (picture, "What is it?")), Message("assistant", ("A cup.",)))
    row = Conversation(id="a", group="a", source="s", kinds=("chat",), messages=messages)
    check_with_backbone(row, tmp_path, nano(), reserved_tokens(nano()))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_good_dialogues_are_good_for_every_architecture(folder, name):
    backbone = MAKERS[name]()
    picture, system = Image(path="images/a.png"), Message("system", ("Be brief.",))
    first = (Message("user", (picture, "What is it?", picture)), Message("assistant", ("A cup.",)))
    second = (Message("user", ("Is it red?",)), Message("assistant", ("yes",)))
    for messages in ((*first, *second), (system, *first), (system, *second)):
        kinds = ("chat",) * sum(message.role == "assistant" for message in messages)
        row = Conversation(id="a", group="a", source="s", kinds=kinds, messages=messages)
        check_with_backbone(row, folder, backbone, reserved_tokens(backbone))
        with pytest.raises(BlmError, match="too long"):
            check_with_backbone(row, folder, backbone, reserved_tokens(backbone), max_tokens=5)
