"""Scene questions: answers against the simulator's state, balance, wordings, steps, and the built corpus."""

from __future__ import annotations

import re
import string
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from blm.backbone.prompt import control_prompt
from blm.corpora import SceneCorpusConfig, build_scene_corpus, read_corpus
from blm.corpora.format.messages import (
    CORPUS_FILE,
    options_of,
    read_questions,
    without_thought,
)
from blm.corpora.format.scan import CorpusFacts
from blm.corpora.scenes import build
from blm.corpora.scenes.annotations import LETTERS, Annotation, QuestionSampler, by_kind, to_messages
from blm.corpora.scenes.build import _episode_conversations
from blm.corpora.scenes.episodes import read_steps
from blm.corpora.scenes.observation import (
    SceneObject,
    SceneObservation,
    SceneObserver,
    box_of,
    rearrange,
)
from blm.corpora.scenes.questions import (
    POINT_SCALE,
    control_turn,
    format_box,
    format_point,
    format_vector,
    main_direction,
    read_scan,
    scan_turns,
    scene_annotations,
    scene_turns,
)
from blm.corpora.scenes.report import describe
from blm.corpora.scenes.templates import TEMPLATES
from blm.tasks import Env
from blm.tasks.variation import CameraShift, Variation
from blm.tasks.wordings import expand
from blm.types import BlmError, Episode, base_kind
from tests.support.episodes import write
from tests.support.recorded import recorded

PAIRS = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
CAMERAS = ("base", "wrist")


def thing(color, kind, x, y, role="distractor"):
    return SceneObject(f"{color}_{kind}", f"{color} {kind}", kind, color, np.array([x, y, 0.02]), role)


def flat_scene(*things, tcp=(0.1, -0.1, 0.1)):
    points = {"base": {"gripper": (0.5, 0.5)}}
    return SceneObservation(things, np.array(tcp), points, {}, {"base": {}}, np.zeros(3), np.zeros(2))


SCENE = flat_scene(thing("red", "cube", 0.0, 0.1, "object"), thing("blue", "ball", 0.1, -0.1))


def asked(scene, kind):
    return {
        tuple(annotation.words.values()): annotation.answer
        for annotation in scene_annotations(scene)
        if annotation.kind == kind
    }


@pytest.fixture(scope="module")
def observed():
    """Scenes of two arms and all tasks in all arrangements, with the environment's own numbers."""
    found = []
    for robot, task in [("panda", "stack_cube"), ("panda", "push_cube"), ("widowxai", "pick_cube")]:
        with Env(robot, task, cameras=(), distractors=2) as env:
            observer, rng = SceneObserver(env, CAMERAS), np.random.default_rng(0)
            for seed in range(12):
                env.reset(seed=seed, options={"arm": "random"})
                scene = observer.observe(rearrange(env, rng))
                masks = {c: {k: env.mask(k, c) for k in env.objects()} for c in CAMERAS} if seed < 3 else {}
                found.append((scene, {k: s.position for k, s in env.objects().items()}, env.tcp()[0], masks))
            observer.close()
    return found


def test_relations_follow_the_robots_view():
    assert asked(SCENE, "left_right")[("red cube", "blue ball")] == "left"
    assert asked(SCENE, "front_behind")[("blue ball", "red cube")] == "behind"
    assert asked(SCENE, "situated_left_right")[("red cube",)] == "left"
    assert asked(SCENE, "comparing_nearest")[("gripper",)] == "blue ball"
    assert main_direction(np.array([0.02, 0.03, -0.2])) == "down"
    assert main_direction(np.array([0.1, 0.09, 0.0])) == "", "two directions are about as far"


def test_relations_are_antisymmetric(observed):
    pairs = 0
    for scene, *_ in observed:
        for kind in ("left_right", "front_behind"):
            answers = asked(scene, kind)
            pairs += len(answers)
            assert all(answers[b, a] == PAIRS[answer] for (a, b), answer in answers.items())
        closer = asked(scene, "comparing_closer")
        assert all(closer[goal, b, a] == answer for (goal, a, b), answer in closer.items())
    assert pairs > 100


def test_answers_are_those_of_the_simulators_state(observed):
    arrangements = Counter()
    for scene, positions, tcp, _ in observed:
        arrangements[scene.arrangement] += 1
        names = {t.label: positions[t.key] for t in scene.objects} | {"gripper": tcp}
        base = scene.base
        for annotation in scene_annotations(scene):
            words = list(annotation.words.values())
            numbers = np.array([int(n) for n in re.findall(r"-?\d+", annotation.answer)])
            if annotation.kind == "metric_position":
                assert np.abs(numbers / 100 - (names[words[0]] - base)).max() <= 0.0051
            elif annotation.kind == "metric_gripper_to_object":
                assert np.abs(numbers / 100 - (names[words[0]] - tcp)).max() <= 0.0051
            elif annotation.kind == "metric_object_to_goal":
                assert np.abs(numbers / 100 - (names[words[1]] - names[words[0]])).max() <= 0.0051
            elif annotation.kind == "metric_goal_distance":
                assert abs(numbers[0] / 100 - np.linalg.norm(names[words[1]] - names[words[0]])) <= 0.0051
            elif annotation.kind == "affordance_held":
                near = np.linalg.norm(names[words[0]] - tcp) < 0.001
                assert (annotation.answer == "yes") == near
            elif annotation.kind == "existence":
                assert (annotation.answer == "yes") == (words[0] in names)
            elif annotation.kind == "counting" and words == ["object"]:
                assert annotation.answer == str(sum(t.solid for t in scene.objects))
    assert len(arrangements) == 4, arrangements


def test_boxes_hold_exactly_the_pixels_of_their_object(observed):
    seen = 0
    for scene, _, _, masks in observed:
        keys = {t.label: t.key for t in scene.objects}
        for camera in masks:
            for name, (left, top, right, bottom) in scene.boxes[camera].items():
                rows, columns = np.nonzero(masks[camera][keys[name]])
                size = len(masks[camera][keys[name]])
                assert (columns.min(), rows.min()) == (round(left * size), round(top * size))
                assert (columns.max() + 1, rows.max() + 1) == (round(right * size), round(bottom * size))
                seen += 1
            for name, (u, v) in scene.points[camera].items():
                if name in scene.boxes[camera]:
                    left, top, right, bottom = scene.boxes[camera][name]
                    assert left - 0.03 <= u <= right + 0.03 and top - 0.03 <= v <= bottom + 0.03
    assert seen > 20


def test_cut_and_empty_masks_have_no_box():
    mask = np.zeros((8, 8), bool)
    assert box_of(mask) is None
    mask[2:4, 3:6] = True
    assert box_of(mask) == (3 / 8, 2 / 8, 6 / 8, 4 / 8)
    mask[2, 7] = True
    assert box_of(mask) is None


def test_formats():
    assert format_point((0.5, 0.25)) == f"({POINT_SCALE // 2}, {POINT_SCALE // 4})"
    assert format_box((0, 0.1, 0.5, 1)) == "(0, 100, 500, 1000)"
    assert format_vector(np.array([0.123, -0.031, 0.2])) == "(12, -3, 20) cm"


def test_hidden_objects_are_not_asked_about():
    hidden = replace(SCENE, objects=(SCENE.objects[0], replace(SCENE.objects[1], seen=False)))
    kinds = {annotation.kind for annotation in scene_annotations(hidden)}
    assert not kinds & {"existence", "counting", "left_right", "comparing_nearest"}
    assert any("gripper" in annotation.thought for annotation in scene_annotations(SCENE))
    for points in ({}, {"base": {}}):
        annotations = list(scene_annotations(replace(SCENE, points=points)))
        assert not [
            annotation
            for annotation in annotations
            if "gripper" in (annotation.thought, *annotation.words.values())
        ]


def test_answers_are_balanced(rng):
    sampler = QuestionSampler(rng, choice=0.0)
    answers = {"existence": Counter(), "situated_move": Counter()}
    for _ in range(600):  # yes is rare, and one direction is the rule
        yes = rng.random(9) < 0.2
        annotations = [
            Annotation("existence", "yes" if y else "no", {"thing": str(i)}) for i, y in enumerate(yes)
        ]
        way = str(rng.choice(["down", "left", "right"], p=[0.9, 0.05, 0.05]))
        for group in (annotations, [Annotation("situated_move", way, {"thing": "cube"})]):
            if (annotation := sampler.sample(group)) is not None:
                answers[annotation.kind][annotation.answer] += 1
                answers.setdefault("/".join(annotation.subject), Counter())[annotation.answer] += 1
    assert abs(answers["existence"]["yes"] / answers["existence"].total() - 0.5) < 0.02
    for subject in (key for key in answers if key.startswith("existence/")):
        assert abs(answers[subject]["yes"] - answers[subject]["no"]) <= 2
    assert answers["situated_move"]["down"] / answers["situated_move"].total() < 0.45


def test_positive_and_negative_kinds_are_balanced_together(rng):
    sampler = QuestionSampler(rng)
    annotations = [
        Annotation("success_positive", "yes", {"step": "a"}),
        Annotation("success_negative", "no", {"step": "a"}),
    ]
    drawn = Counter(sampler.sample(annotations).kind for _ in range(200))
    assert abs(drawn["success_positive"] - 100) <= 2
    assert list(by_kind(annotations)) == ["success"]


def test_options_are_in_random_order(rng):
    sampler = QuestionSampler(rng, choice=1.0)
    wrong = ("green", "blue", "pink", "white")
    turns = [
        sampler.phrase(Annotation("attribute_color", "red", {"thing": "cube"}, wrong)) for _ in range(900)
    ]
    for turn in turns:
        options = options_of(turn.question)
        assert turn.kind == "attribute_color_choice" and len({*options}) == len(options) in (2, 3, 4)
        assert options[LETTERS.index(turn.answer)] == "red"
    for count in (2, 3, 4):
        letters = Counter(t.answer for t in turns if len(options_of(t.question)) == count)
        assert max(letters.values()) / letters.total() < 1 / count + 0.1


def config(**changes):
    return SceneCorpusConfig(
        **{
            "robots": ("panda",),
            "tasks": ("push_cube", "stack_cube"),
            "cameras": CAMERAS,
            "image_size": 64,
            "scenes": 60,
            "first_seed": 10_000,
        }
        | changes
    )


def episodes(folder):
    labels, solved = recorded()
    rng = np.random.default_rng(0)
    numbers = np.arange(len(labels), dtype=np.uint8)
    pictures = np.broadcast_to(4 * numbers[:, None, None, None], (len(labels), 64, 64, 3))
    made = [
        Episode(
            robot="arm",
            task="pick_cube",
            seed=seed,
            instruction="Lift it.",
            states=rng.normal(size=(len(labels), 3)).astype(np.float32),
            actions=rng.normal(size=(len(labels), 3)).astype(np.float32),
            executed=None,
            images={camera: np.ascontiguousarray(pictures) for camera in CAMERAS},
            primitives=tuple(labels),
            metrics={"success_step": int(np.argmax(solved))},
        )
        for seed in range(3)
    ]
    return write(folder, made)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for name, first, wording in (("train", 10_000, "seen"), ("new_words", 20_000, "held_out")):
        made = config(first_seed=first, wording=wording, teach=name == "train")
        build_scene_corpus(made, folder / name, workers=0)
    return folder


def test_only_what_teaches_has_thoughts_scans_and_prompts(corpora):
    for name, teaches in (("train", True), ("new_words", False)):
        rows = read_corpus(corpora / name)
        kinds = {kind for row in rows for kind in row.kinds}
        assert ("<think>" in (corpora / name / CORPUS_FILE).read_text()) == teaches
        assert {"control", "scan_base", "scan_wrist"} <= kinds or not teaches
        assert any(kind.startswith(("control", "scan")) for kind in kinds) == teaches
        questions = read_questions(corpora / name)
        assert len(questions) > 300 and not any(q.kind.startswith(("control", "scan")) for q in questions)
        assert not any("think>" in q.answer + q.messages[0].text for q in questions)


def test_corpus_depends_on_the_configuration_only(corpora, tmp_path):
    small = config(scenes=6, tasks=("push_cube",), turns=3)
    assert build_scene_corpus(small, tmp_path / "one", workers=0) == 6
    assert {row.training for row in read_corpus(tmp_path / "one")} == {"plain"}
    build_scene_corpus(small, tmp_path / "two", workers=0)
    assert (tmp_path / "one" / CORPUS_FILE).read_bytes() == (tmp_path / "two" / CORPUS_FILE).read_bytes()
    rows = read_corpus(tmp_path / "one")
    assert {row.group for row in rows} == {f"scene/panda/push_cube/{seed}" for seed in range(10_000, 10_006)}
    assert not (tmp_path / "one.shards").exists()


def pattern_of(template):
    parts = [re.escape(text) for text, *_ in string.Formatter().parse(template)]
    return re.compile(".+".join(parts) + "$")


def test_held_out_wordings_are_never_trained_on(corpora):
    patterns = {
        kind: [pattern_of(t) for held in w.held_out for t in expand(held)] for kind, w in TEMPLATES.items()
    }
    counts = Counter()
    for name in ("train", "new_words"):
        for row in read_corpus(corpora / name):
            for question in row.questions():
                kind = question.kind.removesuffix("_choice")
                if not kind.startswith(("control", "scan_")):
                    text = question.messages[0].text.split("\n(A)")[0].replace(" an ", " a ")
                    counts[name, any(p.match(text) for p in patterns[kind])] += 1
    assert counts["train", True] == counts["new_words", False] == 0
    assert min(counts["train", False], counts["new_words", True]) > 300


def test_no_kind_can_be_answered_blindly(corpora, tmp_path):
    build_scene_corpus(config(first_seed=30_000), tmp_path / "held_out", workers=0)
    train, held_out = (read_corpus(folder) for folder in (corpora / "train", tmp_path / "held_out"))
    for summary in describe(train, held_out):
        if summary.questions >= 25:
            assert summary.blind is not None and summary.blind < 0.8, summary
    kinds = Counter(base_kind(kind.removesuffix("_choice")) for row in train for kind in row.kinds)
    assert sum(n for kind, n in kinds.items() if kind.startswith(("point", "box", "metric"))) > 200
    choices = sum(kind.endswith("_choice") for row in train for kind in row.kinds)
    assert 0 < choices / (sum(kinds.values()) - kinds["control"]) < 1 / 3
    for row in train:
        texts = [m.text for m in row.messages if m.role == "user"]
        assert len({*texts}) == len(texts) and row.kinds.count("control") <= 1


def test_moments_show_one_to_three_frames_and_their_questions(tmp_path):
    episodes(tmp_path)
    made = config(robots=("arm",), episodes=tmp_path)
    rows = list(_episode_conversations(made, ("arm", "", range(3))))
    assert len(rows) == 18
    for row in rows:
        told = dict(zip(row.kinds, row.messages[1::2], strict=True))
        assert told.pop("scan_step").text in read_steps("pick_cube", *recorded()).names
        assert len(told) == made.frame_turns == len(row.kinds) - 1
        pictures = row.messages[0].images
        frame = int(row.id.split("/")[-1])
        values = [round(float(image.pixels.mean()) / 4) for image in pictures]
        assert len(pictures) in (2, 3, 4) and values == sorted(values), "frames are in order of time"
        assert abs(values[-1] - frame) <= 1, "the moment comes last"
    yes_no = Counter(without_thought(m.text) for row in rows for m in row.messages[1::2])
    assert abs(yes_no["yes"] - yes_no["no"]) <= 6


def test_the_middle_of_the_table_is_straight_ahead(observed):
    assert all(abs(scene.middle[1] - scene.base[1]) < 0.005 for scene, *_ in observed)


def test_the_control_answer_contains_positions(observed):
    scene = observed[0][0]
    turn = control_turn(scene, "Stack it.", "panda", "pictures_first")
    assert re.search(r"base: object \(\d+, \d+\), goal", turn.answer)
    following = {"sampled": "approach", "displaced": "approach", "held": "move", "done": "hold"}
    assert turn.answer.split()[-1] == following[scene.arrangement]
    for camera, scan in zip(CAMERAS, scan_turns(scene), strict=True):
        named = {t.label: t.position for t in scene.objects} | {"gripper": scene.tcp}
        found = read_scan(scan.answer)
        assert found.keys() == scene.points[camera].keys()
        for name, told in found.items():
            assert format_point(scene.points[camera][name]) == str(told[:2])
            assert len(told) == (2 if camera == "wrist" else 5)
            where = format_vector(named[name] - scene.base)
            assert camera == "wrist" or f"{told[2:]} cm" == where
    turns = scene_turns(scene, 10, QuestionSampler(np.random.default_rng(0)), pointing=0.5, metric=0.2)
    assert len(turns) == 10


def test_the_control_prompt_is_the_one_that_stage_two_reads(observed):
    """In both orders, with the same answer."""
    scene = observed[0][0]
    images = [scene.images[camera] for camera in scene.points]
    answers = set()
    for order in ("pictures_first", "text_first"):
        turn = control_turn(scene, "Stack it.", "panda", order)
        asked, answer = to_messages(images, [turn], thoughts=False)
        (wanted,) = control_prompt(
            "Stack it.", "panda", dict(zip(scene.points, images, strict=True)), order=order
        )
        assert [one for one in asked.content if isinstance(one, str)] == [
            one for one in wanted.content if isinstance(one, str)
        ]
        assert [isinstance(one, str) for one in asked.content] == [
            isinstance(one, str) for one in wanted.content
        ]
        answers.add(answer.text)
    assert len(answers) == 1


def test_scenes_without_any_question_are_left_out(tmp_path, monkeypatch):
    """As where nothing is in view and the cameras are moved; a conversation needs a question."""
    asked = build.scene_turns
    empty = iter([False, True, False, False])
    monkeypatch.setattr(build, "scene_turns", lambda *a, **k: [] if next(empty) else asked(*a, **k))
    count = build_scene_corpus(config(scenes=4, teach=False), tmp_path / "out", workers=0)
    rows = list(read_corpus(tmp_path / "out"))
    assert count == len(rows) == 3 and all(row.kinds for row in rows)


def test_a_corpus_with_the_text_first_has_each_control_prompt_alone(tmp_path):
    """All else is the same as with the pictures first."""
    small = config(tasks=("stack_cube",), scenes=4)
    rows = {}
    for order in ("pictures_first", "text_first"):
        build_scene_corpus(replace(small, prompt=order), tmp_path / order, workers=0)
        rows[order] = list(read_corpus(tmp_path / order))
        assert CorpusFacts.of(rows[order]).orders == (order,)
    alone = [row for row in rows["text_first"] if "control" in row.kinds]
    rest = [row for row in rows["text_first"] if "control" not in row.kinds]
    assert len(rows["pictures_first"]) == len(rest) == 4 and len(alone) == 4
    for old, new, control in zip(rows["pictures_first"], rest, alone, strict=True):
        *turns, asked, answer = old.messages
        assert new.messages == tuple(turns) and (new.id, new.kinds) == (old.id, old.kinds[:-1])
        assert control.id == f"{old.id}/control" and control.group == old.group
        assert control.kinds == ("control",) and control.training == old.training
        shown, told = control.messages
        task, *pictures, question = shown.content
        assert f"{task} {question}" == asked.text and told == answer
        assert tuple(pictures) == old.media, "the files are shared"
    assert not [q for q in read_questions(tmp_path / "text_first") if q.kind == "control"]


def test_an_unknown_order_is_refused():
    with pytest.raises(BlmError, match="unknown prompt order 'words'"):
        config(prompt="words")


@pytest.mark.parametrize(
    "change", [{"tasks": ()}, {"pointing": 0.9, "metric": 0.2}, {"choice": 1.5}, {"turns": 0}]
)
def test_impossible_mixtures_are_refused(change):
    with pytest.raises(BlmError):
        config(**change)


def test_moved_cameras_leave_no_questions_in_the_robots_frame():
    moved = replace(SCENE, cameras_known=False)
    kinds = {annotation.kind for annotation in scene_annotations(moved)}
    usual = {annotation.kind for annotation in scene_annotations(SCENE)}
    in_frame = ("metric", "situated", "comparing", "left_right", "front_behind", "location", "forecasting")
    assert kinds < usual and not any(kind.startswith(in_frame) for kind in kinds)
    assert any(kind.startswith("point") for kind in kinds)
    for before, after in zip(scan_turns(SCENE), scan_turns(moved), strict=True):
        assert {n: at[:2] for n, at in read_scan(before.answer).items()} == read_scan(after.answer)
    with closing(Env("panda", "push_cube", cameras=())) as env:
        observer = SceneObserver(env, ("base",))
        for shift in (CameraShift(), CameraShift(azimuth=0.1)):
            env.reset(seed=10_000, options={"variation": Variation(camera=shift)})
            assert observer.observe().cameras_known == (shift == CameraShift())
