"""Coordinates of published rows become integers 0..1000, wherever they are written."""

from __future__ import annotations

import re

import numpy as np
import pytest

from blm.corpora import convert, read_corpus
from blm.corpora.converters.grounding import coordinates, from_unit
from blm.corpora.converters.turns import Turn
from blm.corpora.format.faults import RowError
from blm.types import BlmError
from tests.corpora.converters.test_converters import human, only, picture, write


def grounded(objects, answer="<ref-object> at <bbox>.", count=1):
    turns = [
        {"role": "user", "content": "<image>" * count + "Where?"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "images": ["a.png"] * count, "objects": objects}


def answer_of(tmp_path, row):
    picture(tmp_path / "a.png")  # 24 x 16 px
    convert("messages", write(tmp_path / "r.json", [row]), tmp_path / "out")
    return only(tmp_path / "out").messages[1].text


@pytest.mark.parametrize(
    ("objects", "answer", "wanted"),
    [
        (
            {"ref": ["cup"], "bbox": [[6, 4, 12, 8]]},
            "<ref-object> at <bbox>.",
            "cup at (250, 250, 500, 500).",
        ),
        ({"ref": ["cup"], "bbox": [[6, 4]]}, "<ref-object>: <bbox>", "cup: (250, 250)"),
        ({"ref": [], "bbox": [[0, 0, 1, 1]], "bbox_type": "norm1"}, "<bbox>", "(0, 0, 1000, 1000)"),
        ({"bbox": [[0.5, 0.25], [1, 0]], "bbox_type": "norm1"}, "<bbox><bbox>", "(500, 250)(1000, 0)"),
        ({"bbox": [[48, 16]], "width": 48, "height": 32}, "<bbox>", "(1000, 500)"),
        ({"bbox": [[6, 4]]}, '[{"point": <bbox>}]', '[{"point": [250, 250]}]'),
        ([{"caption": "cup", "bbox": [6, 4], "bbox_type": "real", "image": 0}], "<bbox>", "(250, 250)"),
        ('[{"caption": "cup", "bbox": [6, 4]}]', "<ref-object><bbox>", "cup(250, 250)"),
    ],
)
def test_objects_fill_their_tags(tmp_path, objects, answer, wanted):
    assert answer_of(tmp_path, grounded(objects, answer)) == wanted


@pytest.mark.parametrize(
    ("objects", "complaint"),
    [
        (None, "0 names and 0 boxes"),
        ({"ref": ["cup"], "bbox": []}, "1 names and 0 boxes"),
        ({"ref": ["cup"], "bbox": [[1, 2, 3]]}, "a point has 2 numbers"),
        ({"ref": ["cup"], "bbox": [[1, 2, 300, 4]]}, "outside of 24 x 16"),
        ({"ref": ["cup"], "bbox": [[9, 2, 3, 4]]}, "first corner"),
        ({"ref": ["cup"], "bbox": [[1, 2, 3, 4]], "bbox_type": "odd"}, "bbox_type"),
        ({"ref": ["cup"], "bbox": [[1, 2, 3, 4]], "image_id": [3]}, "whose size is not known"),
        ({"ref": ["cup"], "bbox": ["here"]}, "a box is 'here'"),
        ("cup", "no JSON"),
        (7, "no object"),
        ({"ref": "cup", "bbox": [[1, 2]]}, "needs lists"),
    ],
)
def test_objects_that_do_not_fit_are_refused(tmp_path, objects, complaint):
    with pytest.raises(BlmError, match=f"unclear coordinates.*{complaint}"):
        answer_of(tmp_path, grounded(objects))


def test_boxes_of_several_pictures_need_their_picture(tmp_path):
    objects = {"ref": ["cup"], "bbox": [[6, 4]]}
    with pytest.raises(BlmError, match="image_id"):
        answer_of(tmp_path, grounded(objects, count=2))
    assert answer_of(tmp_path, grounded(objects | {"image_id": [1]}, count=2)) == "cup at (250, 250)."


def test_coordinates_do_not_depend_on_the_unit(rng):
    """Of pixels, shares and thousandths of any picture the same place comes out, to rounding."""
    for _ in range(100):
        box = np.sort(rng.random((2, 2)), axis=0).ravel()
        size = rng.integers(10, 4000, 2)
        written = [
            coordinates(list(box * np.tile(size, 2)), tuple(size)),
            coordinates(list(box), (1.0, 1.0)),
            coordinates(list(box * 1000), (1000, 1000)),
        ]
        numbers = np.array([[int(n) for n in re.findall(r"\d+", text)] for text in written])
        assert (np.ptp(numbers, axis=0) <= 1).all() and np.abs(numbers[0] / 1000 - box).max() <= 0.0006


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<ref>the cup</ref><box>[[100, 200, 300, 400]]</box>", "the cup (100, 200, 300, 400)"),
        ("<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", "(1, 2, 3, 4), (5, 6, 7, 8)"),
        ("<ref>cup</ref><box>(10,20),(30,40)</box>", "cup (10, 20, 30, 40)"),
    ],
)
def test_marks_of_internvl_and_qwen_vl(tmp_path, text, wanted):
    file = write(tmp_path / "r.json", [{"conversations": human("Where?", text)}])
    convert("internvl", file, tmp_path / "out")
    assert only(tmp_path / "out").messages[1].text == wanted


RULE = "The coordinates should be between 0 and 1, indicating normalized locations."


def test_points_of_robopoint(tmp_path):
    rows = [
        {"conversations": human(f"Point. {RULE}", "[(0.25, 0.5), (1, 0.004)]")},
        {"conversations": human(f"Box. {RULE}", "[(0.1, 0.2, 0.3, 0.45)]")},
        {"conversations": human("Is it between 0 and 1?", "Yes, (1, 0).")},
    ]
    convert("robopoint", write(tmp_path / "r.json", rows), tmp_path / "out")
    points, box, other = read_corpus(tmp_path / "out")
    assert points.messages[1].text == "[(250, 500), (1000, 4)]"
    assert "between 0 and 1000," in points.messages[0].text
    assert box.messages[1].text == "[(100, 200, 300, 450)]"
    assert [message.text for message in other.messages] == ["Is it between 0 and 1?", "Yes, (1, 0)."]
    with pytest.raises(RowError, match="above 1"):
        from_unit([Turn("assistant", "[(0.5, 1.5)]")])


def placed(**changes):
    row = {
        "id": "bridge/a.png",
        "meta_data": {"original_dataset": "bridge", "original_width": 48, "original_height": 32},
        "instruction": "lift the cup",
    }
    return row | changes


def test_affordance_and_trajectory_of_sharerobot(tmp_path):
    picture(tmp_path / "images/bridge/a.png")  # stored at half the size of the original
    area = {"x": 12, "y": 8.0, "width": 12, "height": 8}
    convert("sharerobot_affordance", write(tmp_path / "a.json", [placed(affordance=area)]), tmp_path / "a")
    row = only(tmp_path / "a")
    assert row.messages[1].text == "(250, 250, 500, 500)" and "lift the cup" in row.messages[0].text
    (question,) = row.questions()
    assert question.scorer == "box"
    points = [[0, 0], [24, 16], [48.0, 32.0]]
    convert("sharerobot_trajectory", write(tmp_path / "t.json", [placed(points=points)]), tmp_path / "t")
    assert only(tmp_path / "t").messages[1].text == "(0, 0), (500, 500), (1000, 1000)"
    for bad in (
        placed(points=[[1, 1]]),
        placed(affordance=area | {"x": 90}),
        placed(affordance=area, meta_data={"original_width": 48, "original_height": 48}),
        placed(affordance=area, id=7),
        placed(),
    ):
        with pytest.raises(BlmError, match="1 of 1 rows"):
            convert("sharerobot_affordance", write(tmp_path / "b.json", [bad]), tmp_path / "b")
