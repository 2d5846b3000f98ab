"""Loss switches, independence and settings of rows: nothing is trained that its author excluded."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

from blm.corpora import Conversation, CurationConfig, curate, read_corpus, validate_corpus, write_corpus
from blm.corpora.format.faults import RowError
from blm.corpora.format.loss import EXCLUDED, TRAINED, read_loss
from blm.corpora.format.messages import CORPUS_FILE, SETTINGS, parse_row
from blm.media import load_pixels
from blm.types import BlmError, Image, Message


def turns(*switches):
    rows = []
    for number, switch in enumerate(switches):
        rows += [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": f"Answer {number}.", **switch},
        ]
    return rows


@pytest.mark.parametrize("key", [*TRAINED, *EXCLUDED])
@pytest.mark.parametrize("value", [True, False, 0, 1, 0.0, 1.0, None])
def test_every_switch_is_followed(key, value):
    row = parse_row({"messages": turns({}, {key: value})}, 1)
    wanted = value is None or bool(value) == (key in TRAINED)
    assert row.learnt == (True, wanted)
    asked = [question.answer for question in row.questions()]
    assert asked == [f"Answer {number}." for number, learnt in enumerate(row.learnt) if learnt]


@pytest.mark.parametrize(
    "switch",
    [{"weight": 0.5}, {"loss": "no"}, {"loss_scale": 2}, {"mask": 1}, {"train_detail": [{"begin": 0}]}],
)
def test_a_switch_that_cannot_be_followed_is_a_fault(switch):
    with pytest.raises(RowError, match="unclear loss switch"):
        parse_row({"messages": turns(switch, {})}, 1)


@pytest.mark.parametrize(
    ("mask", "learnt"),
    [
        ({"loss_mask": [1, 0]}, (True, False)),
        ({"loss_mask": [0, 0, 0, 1]}, (False, True)),
        ({"weight": 1}, (True, True)),
        ({"training": "plain"}, (True, True)),
    ],
)
def test_masks_of_a_row(mask, learnt):
    assert parse_row({"messages": turns({}, {}), **mask}, 1).learnt == learnt


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"loss_mask": [1, 0, 1]}, "unclear"),
        ({"masks": [1, 0]}, "unclear"),
        ({"weight": 0}, "nothing to learn"),
        ({"loss_mask": [0, 0]}, "nothing to learn"),
    ],
)
def test_masks_that_leave_nothing_or_are_unclear(mask, reason):
    with pytest.raises(RowError, match=reason):
        parse_row({"messages": turns({}, {}), **mask}, 1)


@pytest.mark.parametrize(
    ("row", "turn"),
    [
        ({"rejected_response": "No."}, {}),
        ({"label": False}, {}),
        ({"tools": [{}]}, {}),
        ({"objects": {"bbox": [[1, 2]]}}, {}),
        ({}, {"tool_calls": [{}]}),
        ({}, {"reasoning_content": "so"}),
    ],
)
def test_a_row_that_means_something_else_is_a_fault(row, turn):
    with pytest.raises(RowError, match=r"unsupported content|unclear coordinates"):
        parse_row({"messages": turns(turn), **row}, 1)


def test_any_switch_excludes():
    assert read_loss({"loss": True, "weight": 0}) is False
    assert read_loss({"role": "user"}) is True
    row = parse_row({"messages": [{"role": "user", "content": "?", "loss": False}, *turns({})[1:]]}, 1)
    assert all(message.loss for message in row.messages), "only answers are ever learnt"


def test_switches_and_independence_survive_writing(tmp_path):
    row = parse_row({"messages": turns({}, {"loss": False}), "independent": True}, 1)
    whole = parse_row({"messages": turns({}, {"weight": 0}), "id": "easy_vqa/1", "independent": False}, 1)
    write_corpus(tmp_path / "c", [row, whole])
    assert read_corpus(tmp_path / "c") == [row, whole]


@pytest.mark.parametrize(
    ("row", "independent"),
    [
        ({}, False),
        ({"independent": True}, True),
        ({"id": "scene/panda/push/7", "group": "scene/panda/push/7", "source": "scene"}, True),
        ({"id": "episode/panda/0/7", "group": "episode/panda/push/-1", "source": "episode"}, True),
        ({"id": "easy_vqa/train/3", "source": "easy_vqa"}, True),
        ({"source": "scene", "group": "scene/1"}, False),
        ({"source": "llava", "id": "llava/a.json:1"}, False),
    ],
)
def test_independence_is_marked_or_follows_from_our_names(row, independent):
    assert parse_row({"messages": turns({}, {}), **row}, 1).independent == independent


def test_questions_of_a_dialogue_keep_what_was_said_before():
    rows = [parse_row({"messages": turns({}, {}, {}), "independent": value}, 1) for value in (True, False)]
    lengths = [[len(question.messages) for question in row.questions()] for row in rows]
    assert lengths == [[1, 1, 1], [1, 3, 5]]
    assert [q.answer for q in rows[0].questions()] == [q.answer for q in rows[1].questions()]


def test_curation_keeps_what_a_dialogue_refers_to(tmp_path):
    """A surplus turn of a dialogue becomes context; of independent turns it is dropped."""
    for independent in (True, False):
        rows = []
        for number in range(6):
            answers = ("yes" if number < 4 else "no", f"because of {number}")
            messages = tuple(
                Message("user" if i % 2 == 0 else "assistant", (text,))
                for i, text in enumerate((f"Is {number} so?", answers[0], f"Why {number}?", answers[1]))
            )
            rows.append(
                Conversation(
                    id=str(number),
                    group=str(number),
                    source="s",
                    kinds=("is", "why"),
                    messages=messages,
                    independent=independent,
                )
            )
        kept, report = curate(rows, tmp_path, config=CurationConfig(balance="kind"))
        assert report.steps[-1].turns_out == 10 == sum(sum(row.learnt) for row in kept)
        assert {len(row.messages) for row in kept} == ({2, 4} if independent else {4})
        again, second = curate(kept, tmp_path, config=CurationConfig(balance="kind"))
        assert again == kept and second.steps[-1].turns_in == second.steps[-1].turns_out


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_of_a_picture_are_not_dropped(key):
    part = {"type": "image_url", "image_url": {"url": "a.png", key: 3}}
    beside = {"type": "image_url", "image_url": {"url": "a.png"}, key: 3}
    for one in (part, beside):
        messages = [{"role": "user", "content": [one]}, {"role": "assistant", "content": "Yes."}]
        with pytest.raises(RowError, match=f"unsupported setting: {key} 3"):
            parse_row({"messages": messages}, 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, dtype):
    (tmp_path / "c").mkdir()
    depth = np.linspace(0, 3000, 64 * 64).reshape(64, 64).astype(dtype)
    name = "depth.png" if dtype == np.uint16 else "depth.tiff"
    PIL.Image.fromarray(depth).save(tmp_path / "c" / name)
    with pytest.raises(BlmError, match="16 or more bits"):
        load_pixels(Image(path=name), tmp_path / "c")
    part = {"type": "image_url", "image_url": {"url": name}}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A wall."}]
    (tmp_path / "c" / CORPUS_FILE).write_text(json.dumps({"messages": messages}) + "\n")
    (fault,) = validate_corpus(tmp_path / "c").faults
    assert fault.reason == "media unreadable" and "16 or more bits" in fault.detail
