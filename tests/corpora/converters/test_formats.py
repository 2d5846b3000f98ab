"""Rows as other programs publish them: each arrives whole, or is refused by name."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from blm.corpora import ConverterConfig, convert, read_corpus, validate_corpus
from blm.corpora.converters import CONVERSION_FILE
from blm.corpora.format.messages import CORPUS_FILE
from blm.io import read_json
from blm.media import load_pixels
from blm.types import BlmError
from tests.corpora.converters.test_converters import clip, human, only, picture, write


def encoded(value=0, kind="PNG"):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((16, 24, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def shape(row):
    """Roles with their parts, a picture as *."""
    return [(m.role[0], *(p if isinstance(p, str) else "*" for p in m.content)) for m in row.messages]


def ask(parts, answer="A cup.", **switches):
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer, **switches}]


TEXT = {"type": "text", "text": "What?"}
ROWS = {
    "LLaMA-Factory v1": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "value": "a.png"},
                                             {"type": "text", "value": "What?"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "A cup."}], "loss_weight": 1.0},
            ]
        },
    ),
    "LLaMA-Factory multimodal": ("messages", {"messages": ask("<image>What?"), "images": ["a.png"]}),
    "LLaMA-Factory alpaca": (
        "alpaca",
        {"instruction": "<image>What?", "input": "", "output": "A cup.", "images": ["a.png"]},
    ),
    "TRL prompt and completion": (
        "messages",
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "A cup."}]}],
        },
    ),
    "TRL messages": (
        "messages",
        {"images": ["a.png"], "messages": ask([{"type": "image", "text": None}, TEXT])},
    ),
    "TRL image column": (
        "messages",
        {"image": {"path": "a.png"}, "messages": ask([{"type": "image"}, TEXT])},
    ),
    "axolotl path": ("messages", {"messages": ask([{"type": "image", "path": "a.png"}, TEXT])}),
    "axolotl url": ("messages", {"messages": ask([{"type": "image", "url": "a.png"}, TEXT])}),
    "axolotl base64": (
        "messages",
        {"messages": ask([{"type": "image", "base64": base64.b64encode(encoded()).decode()}, TEXT])},
    ),
    "data URL": (
        "messages",
        {
            "messages": ask(
                [{"type": "image_url",
                  "image_url": {"url": "data:image;base64," + base64.b64encode(encoded()).decode()}}, TEXT]
            )
        },
    ),
    "file address": ("messages", {"messages": ask([{"type": "image", "image": "file://HERE/a.png"}, TEXT])}),
    "OpenAI": (
        "messages",
        {
            "messages": ask(
                [{"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, TEXT], weight=1
            )
        },
    ),
    "ms-swift": ("messages", {"messages": ask("<image>What?"), "images": ["a.png"], "objects": {}}),
    "ms-swift query": ("messages", {"query": "<image>What?", "response": "A cup.", "images": ["a.png"]}),
    "ShareGPT4V": ("llava", {"id": "1", "image": "a.png", "conversations": human("<image>\nWhat?")}),
    "tag behind": ("llava", {"id": "1", "image": "a.png", "conversations": human("What?\n<image>")}),
    "InternVL": (
        "internvl",
        {"id": 0, "image": "a.png", "width": 24, "height": 16, "conversations": human("<image>\nWhat?")},
    ),
    "RoboPoint": ("robopoint", {"id": "x", "image": "a.png", "conversations": human("<image>\nWhat?")}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_one_row_of_each_program_arrives(tmp_path, name):
    converter, row = ROWS[name]
    picture(tmp_path / "in/a.png")
    text = json.dumps([row]).replace("HERE", str(tmp_path / "in"))
    (tmp_path / "in/r.json").write_text(text)
    convert(converter, tmp_path / "in/r.json", tmp_path / "out")
    got = only(tmp_path / "out")
    wanted = ("u", "What?", "*") if name == "tag behind" else ("u", "*", "What?")
    assert shape(got) == [wanted, ("a", "A cup.")]
    assert load_pixels(got.media[0], tmp_path / "out").shape == (16, 24, 3)
    assert got.learnt == (True,) and not got.independent
    report = read_json(tmp_path / "out" / CONVERSION_FILE)
    assert report["read"] == report["written"] == report["pictures"] == 1
    assert report["answers"] == {"learnt": 1, "context only": 0}
    used = {"id", "width", "height"} | {"objects"}
    fields = {key: counts for key, counts in report["fields"].items() if not key.startswith("turn.")}
    assert {key for key, counts in fields.items() if "not used" in counts} <= used
    assert fields.keys() == {key for key, value in row.items() if value not in ("", {})}, (
        "every field is in the report"
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rejected_response": "No."}, "'rejected_response'"),
        ({"chosen": [], "rejected": "x"}, "'rejected'"),
        ({"label": False}, "KTO"),
        ({"tools": "[{}]"}, "'tools'"),
        ({"audios": ["a.mp3"]}, "'audios'"),
        ({"weight": 0}, "nothing to learn"),
        ({"messages": ask("What?", loss=0.3)}, "unclear loss switch"),
        ({"messages": ask("What?", "", tool_calls=[{}])}, "tool_calls"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "unknown role"),
        ({"messages": ask([{"type": "input_audio"}])}, "part of type 'input_audio'"),
        ({"messages": ask("Picture 1: <img>a.png</img> What?")}, "a file inside a text"),
        ({"messages": ask("<image>"), "images": ["http://x.org/a.png"]}, "download it"),
        ({"messages": ask("What?", "<|box_start|>(1,2),(3,4)<|box_end|>")}, "mark"),
        ({"messages": ask("Where?", "<bbox>")}, "1 tags <bbox>"),
        ({"messages": ask([{"type": "image", "image": "a.png", "crop": 3}, TEXT])}, "crop of a picture"),
        ({"messages": ask([{"type": "image", "image": "a.png", "max_pixels": "few"}, TEXT])}, "max_pixels"),
    ],
)
def test_what_cannot_be_trained_as_meant_is_refused_by_name(tmp_path, change, complaint):
    picture(tmp_path / "a.png")
    rows = [{"messages": ask("Fine?")}, {"messages": ask("What?"), **change}]
    file = write(tmp_path / "r.json", rows)
    with pytest.raises(BlmError, match=r"(?s)1 of 2 rows.*r\.json:2") as caught:
        convert("messages", file, tmp_path / "out")
    assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_loss_switches_and_thoughts_arrive(tmp_path, name):
    turns = [
        *ask("One?", "1", loss=False),
        *ask("Two?", "2", reasoning_content="one more"),
        *ask("Three?", "3"),
    ]
    rows = [{"messages": turns}, {"messages": turns, "loss_mask": [1, 1, 0]}]
    convert(name, write(tmp_path / "r.json", rows), tmp_path / "out")
    first, second = read_corpus(tmp_path / "out")
    assert first.learnt == (False, True, True) and second.learnt == (False, True, False)
    assert first.messages[3].text == "<think>one more</think>2"
    assert read_json(tmp_path / "out" / CONVERSION_FILE)["answers"] == {"learnt": 3, "context only": 3}


def test_only_the_completion_of_a_prompt_is_learnt(tmp_path):
    row = {"prompt": [*ask("One?", "1"), {"role": "user", "content": "Two?"}], "completion": "2"}
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out")
    assert only(tmp_path / "out").learnt == (False, True)


def test_history_and_system_of_alpaca_rows(tmp_path):
    row = {"instruction": "Add.", "input": "3", "output": "5", "system": "Sum.", "history": [["Add.", "2"]]}
    convert("alpaca", write(tmp_path / "r.json", [row]), tmp_path / "out")
    wanted = [("s", "Sum."), ("u", "Add."), ("a", "2"), ("u", "Add.\n3"), ("a", "5")]
    assert shape(only(tmp_path / "out")) == wanted


@pytest.mark.parametrize(
    ("text", "files", "wanted"),
    [
        ("<image>\nWhat does the tag <image> do?", 1, ("u", "*", "What does the tag <image> do?")),
        ("What does the tag <image> do in SVG?", 0, ("u", "What does the tag <image> do in SVG?")),
        ("Compare <image> with <image>.", 2, ("u", "Compare", "*", "with", "*", ".")),
        ("Write <video> and <image>!\n<image>", 1, ("u", "Write <video> and <image>!", "*")),
    ],
)
def test_a_tag_inside_a_sentence_is_a_word_where_the_files_say_so(tmp_path, text, files, wanted):
    picture(tmp_path / "a.png")
    row = {"messages": ask(text, "Write <image>."), "images": ["a.png"] * files}
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out")
    assert shape(only(tmp_path / "out")) == [wanted, ("a", "Write <image>.")]


def test_tags_beside_parts_are_words(tmp_path):
    picture(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image> is what?"}]
    convert("messages", write(tmp_path / "r.json", [{"messages": ask(parts)}]), tmp_path / "out")
    assert shape(only(tmp_path / "out"))[0] == ("u", "*", "<image> is what?")


# --- media --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in/a.png", "in/images/a.png", "a.png", "in/deep/a.png"])
def test_media_are_found_around_the_rows(tmp_path, place):
    """Demo rows are relative to their folder, to the folder above, or to a folder of pictures."""
    home = tmp_path / "project"
    picture(home / place, 9)
    reference = "deep/a.png" if "deep" in place else "a.png"
    write(home / "in/rows/r.json", [{"conversations": human("<image>What?"), "image": reference}])
    source = home / "in/rows/r.json"
    convert("llava", source, tmp_path / "out")
    assert load_pixels(only(tmp_path / "out").media[0], tmp_path / "out").mean() == 9
    with pytest.raises(BlmError, match=r"media missing|outside"):
        convert("llava", source, tmp_path / "no", ConverterConfig(media=tmp_path / "elsewhere"))


def test_nearer_media_win_and_two_files_never_share_a_name(tmp_path):
    for place, value in (("x/in/a.png", 1), ("x/a.png", 2)):
        picture(tmp_path / place, value)
    write(tmp_path / "x/in/r.json", [{"conversations": human("<image>What?"), "image": "a.png"}])
    convert("llava", tmp_path / "x/in/r.json", tmp_path / "out")
    assert load_pixels(only(tmp_path / "out").media[0], tmp_path / "out").mean() == 1
    both = {"conversations": human("<image><image>What?"), "images": ["a.png", f"file://{tmp_path}/x/a.png"]}
    with pytest.raises(BlmError, match="are both"):
        convert("llava", write(tmp_path / "x/in/s.json", [both]), tmp_path / "no")


@pytest.mark.parametrize("key", ["part", "videos", "video"])
def test_a_list_of_frames_is_a_video(tmp_path, key):
    names = [f"f/{number:02}.png" for number in range(12)]
    for number, name in enumerate(names):
        picture(tmp_path / name, number)
    row = {"messages": ask("<video>What?"), key: names if key == "video" else [names]}
    if key == "part":
        row = {"messages": ask([{"type": "video", "video": [f"file://{tmp_path}/{n}" for n in names]}, TEXT])}
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out", ConverterConfig(frames=4))
    got = only(tmp_path / "out")
    assert [int(load_pixels(image, tmp_path / "out").mean()) for image in got.media] == [0, 4, 7, 11]


@pytest.mark.parametrize(
    ("settings", "frames", "size"),
    [
        ({"fps": 5}, 10, (16, 16)),
        ({"fps": 5, "max_frames": 3}, 3, (16, 16)),
        ({"nframes": 2, "video_start": 1.0}, 2, (16, 16)),
        ({"max_pixels": 64}, 4, (8, 8)),
        ({"min_pixels": 1024, "fps": 1}, 2, (32, 32)),
        ({"max_pixels": 10_000}, 4, (16, 16)),
    ],
)
def test_settings_of_a_video_are_applied(tmp_path, settings, frames, size):
    clip(tmp_path / "v.mp4")
    row = {"messages": ask([{"type": "video", "video": "v.mp4", **settings}, TEXT])}
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out", ConverterConfig(frames=4))
    shown = [load_pixels(image, tmp_path / "out") for image in only(tmp_path / "out").media]
    assert len(shown) == frames and {pixels.shape[:2] for pixels in shown} == {size}
    levels = [pixels.mean() for pixels in shown]
    assert levels == sorted(levels) and (levels[0] > 90 or "video_start" not in settings)


@pytest.mark.parametrize("settings", [{"max_pixels": 96}, {"resized_width": 12, "resized_height": 8}])
def test_settings_of_a_picture_are_applied(tmp_path, settings):
    picture(tmp_path / "a.png", 7)
    row = {"messages": ask([{"type": "image", "image": "a.png", **settings}, TEXT])}
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out")
    pixels = load_pixels(only(tmp_path / "out").media[0], tmp_path / "out")
    assert pixels.shape == (8, 12, 3) and (pixels == 7).all()
    notes = read_json(tmp_path / "out" / CONVERSION_FILE)["notes"]
    assert notes["pictures and frames scaled as their settings say"] == 1


# --- parquet and tables -------------------------------------------------------------------------------------


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_parquet_of_llava_onevision_and_finevision(tmp_path):
    stored = {"bytes": encoded(5, "JPEG"), "path": "somewhere.jpg"}
    rows = [{"id": str(n), "image": stored, "conversations": human("<image>\nWhat?"), "data_source": "x"}
            for n in range(40)]  # fmt: skip
    convert("llava", parquet(tmp_path / "ov/a.parquet", rows).parent, tmp_path / "a")
    got = read_corpus(tmp_path / "a")
    assert len(got) == 40 and validate_corpus(tmp_path / "a").clean
    (name,) = (tmp_path / "a/images").iterdir()
    assert name.read_bytes() == stored["bytes"], "the picture's own bytes are stored, once"
    texts = [{"user": "What?", "assistant": "A cup."}, {"user": "Where?", "assistant": "Here."}]
    vision = [{"images": [stored, stored], "texts": texts, "source": "x", "relevance_min": 3}]
    convert("finevision", parquet(tmp_path / "f.parquet", vision), tmp_path / "b")
    wanted = [("u", "*", "*", "What?"), ("a", "A cup."), ("u", "Where?"), ("a", "Here.")]
    assert shape(only(tmp_path / "b")) == wanted
    assert read_json(tmp_path / "b" / CONVERSION_FILE)["fields"]["relevance_min"] == {"not used": 1}
    (tmp_path / "f.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    with pytest.raises(BlmError, match="truncated or altered"):
        convert("finevision", tmp_path / "f.parquet", tmp_path / "c")


def table(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_tables_of_vlmevalkit(tmp_path):
    coded = [base64.b64encode(encoded(value)).decode() for value in (3, 4)]
    choice = {"question": "Which\ncolour?", "A": "red", "B": "blue", "answer": "B", "category": "Colour Test"}
    rows = [
        {"index": 1, "image": coded[0], **choice},
        {"index": 1000001, "image": 1, **choice},
        {"index": 2, "image": json.dumps(coded), "question": "What?", "answer": "A cup.", "hint": "Look."},
        {"index": 3, "image": 99, "question": "What?", "answer": "A cup."},
    ]
    file = table(tmp_path / "t.tsv", rows)
    done = convert("vlmevalkit", file, tmp_path / "out", skip_bad=True)
    assert [fault.reason for fault in done.skipped] == ["media missing"]
    first, again, two = read_corpus(tmp_path / "out")
    assert first.kinds == ("colour_test_choice",) and first.messages == again.messages
    (question,) = first.questions()
    assert (question.options, question.answer, question.scorer) == (("red", "blue"), "B", "choice")
    assert shape(two)[0] == ("u", "*", "*", "Look.\nWhat?")
    levels = [int(load_pixels(image, tmp_path / "out").mean()) for image in two.media]
    assert levels == [3, 4] and two.kinds == ("vlmevalkit",)


# --- meta files, folders and the report ---------------------------------------------------------------------


def test_a_file_that_lists_the_sets_of_internvl(tmp_path):
    picture(tmp_path / "data/pictures/a.png")
    write(tmp_path / "data/r.jsonl", [{"image": "a.png", "conversations": human("<image>\nWhat?")}])
    listed = {"mine": {"root": "data/pictures", "annotation": "data/r.jsonl", "repeat_time": 2}}
    (tmp_path / "shell").mkdir()
    (tmp_path / "shell/meta.json").write_text(json.dumps(listed))
    convert("internvl", tmp_path / "shell/meta.json", tmp_path / "out")
    assert only(tmp_path / "out").source == "internvl/mine"
    assert "mine: not used: repeat_time" in read_json(tmp_path / "out" / CONVERSION_FILE)["notes"]
    (tmp_path / "shell/meta.json").write_text(json.dumps({"mine": {"root": "none", "annotation": "none"}}))
    with pytest.raises(BlmError, match="not near it"):
        convert("internvl", tmp_path / "shell/meta.json", tmp_path / "no")


def test_descriptions_beside_the_rows_are_noted(tmp_path):
    write(tmp_path / "in/r.json", [{"messages": ask("What?"), "difficulty": 3, "empty": []}])
    (tmp_path / "in/dataset_info.json").write_text("{}")
    convert("messages", tmp_path / "in", tmp_path / "out")
    report = read_json(tmp_path / "out" / CONVERSION_FILE)
    assert report["notes"] == {"not read, it holds no rows: dataset_info.json": 1}
    fields = {"messages": {"turns": 1}, "difficulty": {"not used": 1}}
    assert {key: value for key, value in report["fields"].items() if "turn." not in key} == fields


def test_rows_are_independent_only_if_told(tmp_path):
    turns = [*ask("What?"), *ask("And now?")]
    file = write(tmp_path / "r.json", [{"messages": turns}, {"messages": turns, "independent": True}])
    for told in (False, True):
        convert("messages", file, tmp_path / f"{told}", ConverterConfig(independent=told))
        assert [row.independent for row in read_corpus(tmp_path / f"{told}")] == [told, True]
    stored = (tmp_path / "True" / CORPUS_FILE).read_text()
    assert stored.count('"independent": true') == 2


JUNK = [None, 7, -1.5, True, "", "x", "<image>", [], [7], {}, {"type": "image"}, [[]], {"url": 7}, [{}]]


def altered(value, rng):
    """The value with one of its parts replaced by junk."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(rng.integers(len(keys)))]
        copy = value.copy()
        copy[key] = altered(value[key], rng)
        return copy
    return JUNK[int(rng.integers(len(JUNK)))]


@pytest.mark.parametrize(
    "converter",
    ["messages", "robopoint", "vlmevalkit", "sharerobot_affordance", "sharerobot", "cosmos_reason1"],
)
def test_rows_with_junk_are_converted_or_refused_by_name(tmp_path, rng, converter):
    """No field of a row can end a conversion otherwise than by the fault of its row."""
    picture(tmp_path / "a.png")
    clip(tmp_path / "v.mp4", 3)
    grounding = {"ref": ["cup"], "bbox": [[6, 4, 12, 8]], "bbox_type": "real", "image_id": [0]}
    video = {"type": "video", "video": "v.mp4", "fps": 2, "max_pixels": 64, "video_end": 0.2}
    plain = [row for _, row in ROWS.values()]
    plain += [
        {"messages": ask([video, TEXT], loss=True), "loss_mask": [1]},
        {"messages": ask("<image>?", "<ref-object><bbox>"), "images": ["a.png"], "objects": grounding},
        {"instruction": "x", "affordance": {"x": 1, "y": 1, "width": 2, "height": 2}, "id": "a.png",
         "meta_data": {"original_width": 24, "original_height": 16}},
        {"instruction": "x", "points": [[1, 1], [2, 3]], "image": "a.png"},
        {"video": "v.mp4", "conversations": ask("What?")},
        {"video": "v.mp4", "qa_pairs": {"question": "?", "index2ans": {"A": "x"}, "answer": "A"}},
        {"id": "a", "task": "Planning_Task", "conversations": human("<image> ?"), "image": ["a.png"]},
        {"question": "?", "A": "x", "answer": "A", "image_path": "a.png", "index": 3, "category": "c"},
        {"query": "<image>", "response": "x", "history": [["a", "b"]], "system": "s", "images": ["a.png"]},
    ]  # fmt: skip
    rows = [altered(plain[int(rng.integers(len(plain)))], rng) for _ in range(600)]
    file = write(tmp_path / "r.json", [*rows, *plain])
    done = convert(converter, file, tmp_path / "out", skip_bad=True)
    assert done.read == len(rows) + len(plain) and done.written + len(done.skipped) == done.read
    assert validate_corpus(tmp_path / "out").clean
