"""Converters on made rows in each published layout: what arrives, and that faults are named by row."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from blm.corpora import CONVERTERS, ConverterConfig, convert, read_corpus, validate_corpus
from blm.corpora.converters.easy_vqa import package_folder
from blm.corpora.converters.rows import evenly_spaced
from blm.corpora.converters.sharerobot import task_kind
from blm.corpora.format.messages import CORPUS_FILE
from blm.datasets import video
from blm.io import read_json
from blm.media import load_pixels
from blm.types import BlmError, Message
from tests.support.foreign_datasets import LENGTHS, TEXTS, write_v2, write_v3


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((16, 24, 3), value, np.uint8)).save(path)


def clip(path, frames=20):
    """Grey that grows by ten levels a frame, at 10 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
    video.encode(path, np.broadcast_to(levels, (frames, 16, 16, 3)), 10)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def only(folder):
    (row,) = read_corpus(folder)
    assert validate_corpus(folder).clean
    return row


def human(text, answer="A cup."):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


# --- ShareRobot ---------------------------------------------------------------------------------------------

EPISODE = "rt_frames_success/rtx_frames_success_4/6_robo_set#episode_15"


def share(frames, **changes):
    """A row as the hub has it: the publisher's paths, one tag a frame."""
    return {
        "id": f"/mnt/disk/{EPISODE}",
        "task": "Discriminative_Affordance_(Positive)_Task",
        "selected_step": 1,
        "conversations": human("<image> " * frames + "\nCan you <lift the lid> now?", "yes"),
        "image": [f"/mnt/disk/{EPISODE}/frame_{i}.png" for i in range(frames)],
    } | changes


@pytest.fixture
def share_robot(tmp_path):
    for i in range(30):
        picture(tmp_path / "planning/images" / EPISODE / f"frame_{i}.png", i)
    return tmp_path


@pytest.mark.parametrize("tags", ["<image> " * 30 + "\n", "<image 0-29> ", "<image>" * 30])
@pytest.mark.parametrize("frames", [8, 1, 0])
def test_sharerobot_rows(share_robot, tags, frames):
    rows = [share(30, conversations=human(f"{tags}Can you <lift the lid> now?", "yes"))]
    write(share_robot / "planning/train/a.json", rows)
    settings = ConverterConfig(frames=frames)
    convert("sharerobot", share_robot / "planning/train", share_robot / "out", settings)
    row = only(share_robot / "out")
    assert (row.kinds, row.source) == (("discriminative_affordance_positive",), "sharerobot")
    assert row.group == EPISODE.removeprefix("rt_frames_success/"), (
        "questions about one episode stay together"
    )
    assert row.messages[0].text == "Can you <lift the lid> now?" and row.messages[1].text == "yes"
    seen = [int(load_pixels(image, share_robot / "out")[0, 0, 0]) for image in row.media]
    assert len(seen) == (frames or 30) and seen == sorted(seen) and seen[-1] == 29, "the present is shown"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": []}, "wrong media count"),
        ({"image": [f"{EPISODE}/frame_0.png"]}, "wrong media count"),
        ({"image": [f"{EPISODE}/frame_{i}.png" for i in (0, 99)]}, "media missing"),
        ({"image": ["../../x.png", "../../y.png"]}, "media outside the folder"),
        ({"conversations": human("<image> Now? <image>")}, "wrong media count"),
        ({"conversations": human("<image><image>", "")}, "empty answer"),
        ({"conversations": []}, "roles out of order"),
        ({"conversations": [{"from": "robot", "value": "?"}]}, "unknown role"),
        ({"task": None}, "malformed row"),
    ],
)
def test_sharerobot_faults_are_named(share_robot, change, reason):
    file = write(share_robot / "planning/train/a.json", [share(2), share(2, **change), share(3)])
    out = share_robot / "out"
    with pytest.raises(BlmError, match=rf"(?s)1 of 3 rows.*1 x {reason} .*a\.json:2"):
        convert("sharerobot", file, out, ConverterConfig(media=share_robot / "planning/images"))
    assert not out.exists()
    done = convert("sharerobot", file.parent, out, skip_bad=True)
    assert (done.read, done.written) == (3, 2)
    (fault,) = done.skipped
    assert fault.reason == reason and fault.where == f"{file}:2"
    assert [row.id for row in read_corpus(out)] == ["sharerobot/a.json:1", "sharerobot/a.json:3"]


def test_sharerobot_kinds_and_frames():
    assert task_kind("Success_(Negative)_Task") == "success_negative"
    assert task_kind("Planning_with_Context_Task") == "planning_with_context"
    names = [str(i) for i in range(30)]
    for count in range(1, 31):
        some = evenly_spaced(names, count)
        assert len(set(some)) == count and some[-1] == "29" and (count == 1 or some[0] == "0")
    assert evenly_spaced(names, 0) == evenly_spaced(names, 40) == names


# --- Cosmos-Reason1 -----------------------------------------------------------------------------------------


def test_cosmos_conversations_and_choices(tmp_path):
    clip(tmp_path / "robovqa/clips/a.mp4")
    clip(tmp_path / "robovqa/elsewhere/b.mp4")
    system = {"role": "system", "content": "Answer the questions."}
    asked = [{"role": "user", "content": "What next?"}, {"role": "assistant", "content": "Lift the lid."}]
    thought = [asked[0], {"role": "assistant", "content": "<think>a lid</think><answer>Lift it.</answer>"}]
    choice = {"question": "What next?", "index2ans": {"B": "wait", "A": "lift"}, "answer": "B"}
    rows = [
        {"video": "clips/a.mp4", "conversations": [system, *asked]},
        {"video": "clips/b.mp4", "conversations": thought},
        {"video": "clips/a.mp4", "qa_pairs": [choice, choice | {"correct_answer": "A"}]},
    ]
    write(tmp_path / "robovqa/sft.json", rows)
    convert("cosmos_reason1", tmp_path / "robovqa", tmp_path / "out", ConverterConfig(frames=4))
    found = read_corpus(tmp_path / "out")
    assert validate_corpus(tmp_path / "out").clean and len(found) == 4
    kinds = ["robovqa", "robovqa_reasoning", "robovqa_choice", "robovqa_choice"]
    assert [row.kinds for row in found] == [(kind,) for kind in kinds]
    assert [m.role for m in found[0].messages] == ["system", "user", "assistant"]
    assert found[0].group == "robovqa/clips/a.mp4"
    levels = [int(load_pixels(image, tmp_path / "out").mean()) for image in found[1].media]
    assert levels == sorted(levels) and len(set(levels)) == 4, "frames in order, from the whole clip"
    (question,) = found[2].questions()
    assert (question.scorer, question.options, question.answer) == ("choice", ("lift", "wait"), "B")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "clips/none.mp4", "conversations": []}, "media missing"),
        ({"video": "clips/twice.mp4", "conversations": []}, "media missing"),
        (
            {"video": "clips/broken.mp4", "conversations": [{"role": "user", "content": "?"}]},
            "media unreadable",
        ),
        ({"video": "clips/a.mp4", "conversations": [{"role": "user", "content": "?"}]}, "roles out of order"),
        (
            {"video": "clips/a.mp4", "qa_pairs": {"question": "?", "index2ans": {"A": "x"}, "answer": "B"}},
            "malformed row",
        ),
        ({"conversations": []}, "malformed row"),
        (7, "malformed row"),
    ],
)
def test_cosmos_faults_are_named(tmp_path, row, reason):
    for name in ("clips/a.mp4", "x/twice.mp4", "y/twice.mp4"):
        clip(tmp_path / "agibot" / name, 2)
    (tmp_path / "agibot/clips/broken.mp4").write_bytes((tmp_path / "agibot/clips/a.mp4").read_bytes()[:99])
    file = write(tmp_path / "agibot/sft.json", [row])
    with pytest.raises(BlmError, match=rf"(?s)1 x {reason} .*sft\.json:1"):
        convert("cosmos_reason1", file, tmp_path / "out")


# --- chats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("media", [{"image": "i/a.png"}, {"image": ["i/a.png"]}, {"images": ["i/a.png"]}])
def test_llava_pictures(tmp_path, media, suffix):
    picture(tmp_path / "i/a.png")
    turns = [*human("<image>\nWhat is it?"), *human("Where?", "On the table.")]
    file = write(tmp_path / f"rows.{suffix}", [{"id": 7, "conversations": turns, **media}])
    convert("llava", file, tmp_path / "out")
    row = only(tmp_path / "out")
    assert row.messages[0] == Message("user", (row.media[0], "What is it?"))
    assert (row.kinds, row.group) == (("llava", "llava"), "llava/i/a.png")


def test_sharegpt_mixes_pictures_videos_and_system(tmp_path):
    picture(tmp_path / "1.png")
    clip(tmp_path / "v.mp4")
    row = {
        "messages": [
            {"role": "user", "content": "First <video> then <image> what changed?"},
            {"role": "assistant", "content": "The light."},
        ],
        "images": ["1.png"],
        "videos": ["v.mp4"],
        "system": "Be brief.",
    }
    convert(
        "sharegpt",
        write(tmp_path / "r.json", [row]),
        tmp_path / "out",
        ConverterConfig(frames=3, source="demo"),
    )
    got = only(tmp_path / "out")
    assert (got.source, got.kinds) == ("demo", ("demo",))
    assert [m.role for m in got.messages] == ["system", "user", "assistant"]
    shape = [p if isinstance(p, str) else p.path.split("#")[0] for p in got.messages[1].content]
    assert shape == ["First", "v.mp4", "v.mp4", "v.mp4", "then", "1.png", "what changed?"]


def test_messages_with_parts_and_text_only_rows(tmp_path):
    picture(tmp_path / "1.png")
    parts = [
        {"type": "image_url", "image_url": {"url": "1.png"}},
        {"type": "text", "text": "What?"},
        {"type": "image", "image": "1.png"},
    ]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cup."}]},
        {"messages": [{"role": "user", "content": " 1 < 2\n"}, {"role": "assistant", "content": "Yes."}]},
    ]
    convert("messages", write(tmp_path / "r.jsonl", rows), tmp_path / "out")
    seen, text = read_corpus(tmp_path / "out")
    assert [type(part).__name__ for part in seen.messages[0].content] == ["Image", "str", "Image"]
    assert text.messages[0].text == " 1 < 2\n" and not text.media, "a text without media is kept as it is"


@pytest.mark.parametrize("name", ["llava", "sharegpt", "messages"])
@pytest.mark.parametrize(
    ("text", "media", "reason"),
    [
        ("<image><image> what?", {"images": ["a.png"]}, "wrong media count"),
        ("<image> what?", {}, "wrong media count"),
        ("what?", {"images": ["a.png"]}, "wrong media count"),
        ("<image> what?", {"videos": ["v.mp4"]}, "wrong media count"),
        ("<image> what?", {"images": ["b.png"]}, "media missing"),
        ("<image> what?", {"images": ["https://x.org/a.png"]}, "media outside the folder"),
        ("<image> what?", {"images": ["/etc/passwd"]}, "media outside the folder"),
        ("<image> what?", {"images": ["bomb.png"]}, "media too large"),
        ("<image> what?", {"images": 7}, "malformed row"),
        ("<audio> what?", {"audios": ["a.wav"]}, "unsupported content"),
        ("", {}, "empty question"),
        (None, {}, "malformed row"),
    ],
)
def test_faults_of_chats_are_named(tmp_path, name, text, media, reason):
    picture(tmp_path / "a.png")
    PIL.Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    key = "messages" if name == "messages" else "conversations"
    file = write(tmp_path / "r.json", [{key: human("Fine?")}, {key: human(text)} | media])
    with pytest.raises(BlmError, match=rf"(?s)1 of 2 rows.*1 x {reason} .*r\.json:2"):
        convert(name, file, tmp_path / "out")
    assert convert(name, file, tmp_path / "out", skip_bad=True).written == 1


def test_rows_without_tags_are_shown_first_when_asked(tmp_path):
    picture(tmp_path / "a.png")
    file = write(tmp_path / "r.json", [{"messages": [*human("What?"), *human("Why?")], "images": ["a.png"]}])
    convert("sharegpt", file, tmp_path / "out", ConverterConfig(untagged="first"))
    row = only(tmp_path / "out")
    assert [len(message.images) for message in row.messages] == [1, 0, 0, 0]


@pytest.mark.parametrize("answer", ["<image> a cup", "see <video>"])
def test_a_tag_in_an_answer_is_a_word_unless_a_file_belongs_to_it(tmp_path, answer):
    picture(tmp_path / "a.png")
    file = write(tmp_path / "r.json", [{"conversations": human("What?", answer)}])
    convert("llava", file, tmp_path / "out")
    assert only(tmp_path / "out").messages[1].text == answer
    file = write(tmp_path / "s.json", [{"conversations": human("What?", answer), "images": ["a.png"]}])
    with pytest.raises(BlmError, match="0 tags <image> for 1 files"):
        convert("llava", file, tmp_path / "no")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[1, 2", "truncated or altered"),
        (b"{}", "not a list of rows"),
        (b"[]", "no row that can be converted"),
    ],
)
def test_files_without_rows_are_refused(tmp_path, content, complaint):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(BlmError, match=complaint):
        convert("llava", tmp_path / "r.json", tmp_path / "out")
    with pytest.raises(BlmError, match="does not exist"):
        convert("llava", tmp_path / "none.json", tmp_path / "out")


def test_a_truncated_jsonl_line_is_named(tmp_path):
    file = write(tmp_path / "r.jsonl", [{"conversations": human("What?")}] * 2)
    file.write_bytes(file.read_bytes()[:-5])
    done = convert("llava", file, tmp_path / "out", skip_bad=True)
    assert [(fault.where, fault.reason) for fault in done.skipped] == [(f"{file}:2", "truncated last line")]


def test_unknown_converters_and_settings():
    with pytest.raises(BlmError, match="Did you mean 'sharerobot'"):
        convert("share_robot", None, None)
    with pytest.raises(BlmError, match="frame"):
        ConverterConfig(frames=-1)
    assert all(converter.reads and converter.origin for converter in CONVERTERS.values())


# --- easy-VQA and LeRobot -----------------------------------------------------------------------------------


def test_easy_vqa_keeps_every_question_and_shares_pictures(tmp_path):
    pytest.importorskip("easy_vqa")
    done = convert("easy_vqa", type(tmp_path)("test"), tmp_path / "out")
    rows = read_corpus(tmp_path / "out")
    published = read_json(package_folder() / "data/test/questions.json")
    asked = Counter((q.messages[-1].text, q.answer, q.group) for row in rows for q in row.questions())
    assert asked == Counter((text, answer, f"data/test/images/{n}.png") for text, answer, n in published)
    assert done.written == len(rows) == 1000 and sum(asked.values()) == 9673
    assert {kind for row in rows for kind in row.kinds} == {"yes_no", "shape", "colour"}
    with pytest.raises(BlmError, match="train, test"):
        convert("easy_vqa", type(tmp_path)("dev"), tmp_path / "dev")


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_episodes_of_other_programs(tmp_path, version):
    """In v2 each episode has its video, so frames are references; in v3 they share one and are stored."""
    source = (write_v2 if version == "v2" else write_v3)(tmp_path / "robot")
    convert("lerobot", source, tmp_path / "out", ConverterConfig(frames=3, cameras=("observation.image",)))
    rows = read_corpus(tmp_path / "out")
    assert validate_corpus(tmp_path / "out").clean and len(rows) == 4 * len(LENGTHS)
    assert all(("#t=" in image.path) == (version == "v2") for row in rows for image in row.media)
    told = [q for row in rows for q in row.questions() if q.kind == "instruction"]
    assert [q.answer for q in told] == [TEXTS[i % 2] for i in range(4)] and len({q.group for q in told}) == 4
    progress = [q.answer for row in rows for q in row.questions() if q.kind == "progress"]
    assert progress == ["25%", "50%", "75%", "100%"] * 4
    last = sum(LENGTHS) - 1
    end = [q for row in rows for q in row.questions()][-1].messages[-1].images[-1]
    assert abs(int(load_pixels(end, tmp_path / "out")[0, 0, 0]) - (20 + 8 * last)) <= 4, "the last frame"
    with pytest.raises(BlmError, match="lacks wrist"):
        convert("lerobot", source, tmp_path / "no", ConverterConfig(cameras=("wrist",)))


def test_converting_twice_gives_the_same_bytes(tmp_path):
    clip(tmp_path / "in/v.mp4")
    write(tmp_path / "in/r.jsonl", [{"conversations": human("<video> What?"), "video": "v.mp4"}])
    for name in ("a", "b"):
        convert("llava", tmp_path / "in", tmp_path / name)
    assert (tmp_path / "a" / CORPUS_FILE).read_bytes() == (tmp_path / "b" / CORPUS_FILE).read_bytes()
    assert (tmp_path / "a/v.mp4").samefile(tmp_path / "in/v.mp4"), "media are linked, not copied"


def test_converting_our_own_format_changes_only_names(tmp_path):
    write(tmp_path / "r.jsonl", [{"conversations": human("What?"), "kinds": ["count"], "group": "scene/1"}])
    convert("sharegpt", tmp_path / "r.jsonl", tmp_path / "a")
    convert("messages", tmp_path / "a", tmp_path / "b")
    first, second = (only(tmp_path / name) for name in ("a", "b"))
    assert (first.kinds, first.group) == (second.kinds, second.group) == (("count",), "scene/1")
    assert first.messages == second.messages
    file = write(tmp_path / "s.json", [{"conversations": human("What?"), "kinds": ["a", "b"]}])
    with pytest.raises(BlmError, match="wrong number of kinds"):
        convert("sharegpt", file, tmp_path / "c")


def test_media_are_copied_where_the_disk_cannot_link(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("another disk")

    monkeypatch.setattr("os.link", refuse)
    picture(tmp_path / "in/a.png", 7)
    bad = {"conversations": human("<image> What?"), "image": "b.png"}
    good = {"conversations": human("<image> What?"), "image": "a.png"}
    file = write(tmp_path / "in/r.json", [good, bad])
    with pytest.raises(BlmError, match="media missing"):
        convert("llava", file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "a failed conversion leaves nothing"
    assert convert("llava", file, tmp_path / "out", skip_bad=True).written == 1
    assert (tmp_path / "out/a.png").read_bytes() == (tmp_path / "in/a.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_media_that_a_stopped_conversion_copied_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    picture(tmp_path / "in/a.png", 7)
    file = write(tmp_path / "in/r.json", [{"conversations": human("<image> What?"), "image": "a.png"}] * 2)

    def stopped(source, target):
        copied(source, target)
        raise KeyboardInterrupt

    copied = shutil.copy2
    monkeypatch.setattr("shutil.copy2", stopped)
    for _ in range(2):  # stopped in the middle of the first picture, twice
        with pytest.raises(KeyboardInterrupt):
            convert("llava", file, tmp_path / "out")
    monkeypatch.setattr("shutil.copy2", copied)
    assert convert("llava", file, tmp_path / "out").written == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
