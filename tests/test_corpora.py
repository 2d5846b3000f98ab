"""The corpus format, curation, and scene questions checked against the simulator's state."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from blm.corpora import SceneCorpusConfig, build_scene_corpus, curate, read_corpus, write_corpus
from blm.corpora.messages import CORPUS_FILE, Conversation
from blm.corpora.questions import (
    ASKERS,
    POINT_SCALE,
    Scene,
    Thing,
    ask_existence,
    ask_nearest,
    ask_relation,
    format_point,
    observe_scene,
    scene_turns,
)
from blm.media import with_pixels
from blm.tasks import Env
from blm.types import BlmError, Image, Message


def conversation(name="a", value=0, group="g"):
    picture = np.full((4, 4, 3), value, np.uint8)
    messages = (
        Message("user", (Image(picture), "How many cubes?")),
        Message("assistant", ("2",)),
        Message("user", ("Where is the cube?",)),
        Message("assistant", ("(10, 20)",)),
    )
    return Conversation(id=name, group=group, source="test", kinds=("count", "point_base"), messages=messages)


def thing(color, kind, x, y):
    return Thing(f"{color}_{kind}", f"{color} {kind}", kind, color, np.array([x, y, 0.02]))


SCENE = Scene(
    (thing("red", "cube", 0.0, 0.1), thing("blue", "ball", 0.1, -0.1)), np.array([0.1, -0.1, 0.1]), {}, {}
)


def test_corpus_round_trip(tmp_path):
    rows = [conversation("a", 0), conversation("b", 7)]
    assert write_corpus(tmp_path / "c", rows) == 2
    back = read_corpus(tmp_path / "c")
    assert [row.id for row in back] == ["a", "b"]
    assert len(list((tmp_path / "c/images").iterdir())) == 2
    loaded = with_pixels(back[1].messages, tmp_path / "c")
    assert np.array_equal(loaded[0].images[0].pixels, rows[1].messages[0].images[0].pixels)
    assert [m.text for m in loaded] == [m.text for m in rows[1].messages]
    with pytest.raises(BlmError, match="exists"):
        write_corpus(tmp_path / "c", rows)


def test_questions_stand_alone():
    first, second = conversation().questions()
    assert (first.kind, first.answer, first.scorer) == ("count", "2", "exact")
    assert (second.scorer, second.answer) == ("point", "(10, 20)")
    assert second.messages[0].images and second.messages[0].text == "Where is the cube?"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda row: row["messages"][0].update(role="robot"), "role 'robot'"),
        (lambda row: row.update(kinds=["count"]), "1 kinds for 2"),
        (lambda row: row["messages"][0]["content"][0].update(type="audio"), "'audio'"),
        (lambda row: row.pop("group"), "group"),
    ],
)
def test_broken_rows_are_named(tmp_path, change, complaint):
    write_corpus(tmp_path / "c", [conversation()])
    file = tmp_path / "c" / CORPUS_FILE
    row = json.loads(file.read_text())
    change(row)
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(BlmError, match=rf"corpus.jsonl:1: .*{complaint}"):
        read_corpus(tmp_path / "c")


def test_pictures_that_are_none_are_refused(tmp_path):
    write_corpus(tmp_path / "c", [conversation()])
    (row,) = read_corpus(tmp_path / "c")
    path = tmp_path / "c" / row.messages[0].images[0].path
    path.write_text("not a picture")
    with pytest.raises(BlmError, match="cannot read image"):
        with_pixels(row.messages, tmp_path / "c")
    outside = (Message("user", (Image(path="../../etc/passwd"),)),)
    with pytest.raises(BlmError, match="outside"):
        with_pixels(outside, tmp_path / "c")


def test_curation_counts_every_reason(tmp_path):
    rows = [
        conversation("a", 0),
        conversation("copy", 0),
        conversation("b", 7),
        conversation("leak", 9, "eval"),
    ]
    write_corpus(tmp_path / "c", rows)
    stored = read_corpus(tmp_path / "c")
    (tmp_path / "c" / stored[2].messages[0].images[0].path).unlink()
    kept, report = curate(stored, tmp_path / "c", evaluation_groups=["eval"])
    assert [row.id for row in kept] == ["a"]
    assert sorted(report.dropped.values()) == [1, 1, 1] and report.kept == 1
    assert report.answers == {"count": {"2": 1}}


def test_relations_follow_the_robots_view(rng):
    turns = {ask_relation(SCENE, rng) for _ in range(60)} - {None}
    answers = {turn.question: turn.answer for turn in turns}
    assert answers["Is the red cube left or right of the blue ball?"] == "left"
    assert answers["Is the blue ball left or right of the red cube?"] == "right"
    assert answers["Is the blue ball in front of or behind the red cube?"] == "behind"


def test_nearest_and_existence(rng):
    assert ask_nearest(SCENE, rng).answer == "blue ball"
    turns = [ask_existence(SCENE, rng) for _ in range(400)]
    assert 0.4 < np.mean([turn.answer == "yes" for turn in turns]) < 0.6
    for turn in turns:
        named = re.search(r"a (\w+ \w+) on", turn.question).group(1)
        assert (turn.answer == "yes") == (named in {t.label for t in SCENE.things})


def test_point_format_spans_the_scale():
    assert format_point((0.5, 0.25)) == f"({POINT_SCALE // 2}, {POINT_SCALE // 4})"


@pytest.mark.parametrize("robot", ["panda", "widowxai"])
def test_scene_questions_agree_with_the_simulator(robot, rng):
    with Env(robot, "pick_cube", cameras=("base", "wrist"), distractors=2) as env:
        env.reset(seed=10_000, options={"arm": "random"})
        scene = observe_scene(env, ("base", "wrist"))
    assert {"red cube", "gripper"} <= set(scene.points["base"])
    turns = scene_turns(scene, 8, rng)
    assert len({turn.question for turn in turns}) == len(turns) >= 5
    solids = [t for t in scene.things if t.kind in ("cube", "ball", "cylinder")]
    assert len(solids) == 3
    for turn in (ASKERS["count"](scene, rng) for _ in range(20)):
        if "objects" in turn.question:
            assert turn.answer == "3"
    u, v = scene.points["base"]["red cube"]
    size = env.image_size
    patch = scene.images["base"][int(v * size), int(u * size)].astype(int)
    assert patch[0] > patch[1] + 30 and patch[0] > patch[2] + 30, "the named pixel is not red"


def test_building_resumes_and_depends_on_the_configuration_only(tmp_path):
    config = SceneCorpusConfig(
        robots=("panda",),
        tasks=("push_cube",),
        cameras=("base",),
        image_size=64,
        scenes=4,
        first_seed=10_000,
        turns=3,
    )
    assert build_scene_corpus(config, tmp_path / "one", workers=0) == 4
    build_scene_corpus(config, tmp_path / "two", workers=0)
    assert (tmp_path / "one" / CORPUS_FILE).read_bytes() == (tmp_path / "two" / CORPUS_FILE).read_bytes()
    rows = read_corpus(tmp_path / "one")
    assert {row.group for row in rows} == {f"scene/panda/push_cube/{seed}" for seed in range(10_000, 10_004)}
    assert not (tmp_path / "one.shards").exists()
