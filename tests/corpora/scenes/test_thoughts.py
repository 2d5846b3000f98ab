"""Thoughts: an answer follows from the thought before it, and is judged without it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation, options_of, parse_row, with_thought, without_thought
from blm.corpora.scenes.annotations import LETTERS, QuestionSampler, to_messages
from blm.corpora.scenes.observation import ARRANGEMENTS, SceneObject, SceneObservation
from blm.corpora.scenes.questions import DIRECTIONS, KINDS, scene_annotations
from blm.evaluation.digital.parsers.extraction import final_answer, read_choice
from blm.tasks.spec import PALETTE

ANSWERS = ("yes", "A", "(12, -3, 20) cm", "7 cm", "approach, hold", "red cube", "two\nlines")
THOUGHTS = ("now hold still", "red cube y 3, blue ball y -4", "a\nb", "is it <yes>?", "(A)? no")
AXES = {"left_right": ("left", "right"), "front_behind": ("behind", "front")}


def random_scene(seed: int) -> SceneObservation:
    """Things anywhere above a table before the robot, which itself stands anywhere on it."""
    rng = np.random.default_rng(seed)
    base = rng.uniform((-1, -1, 0), (1, 1, 0))

    def thing(label, role, height=0.02):
        place = base + np.array([rng.uniform(0.1, 0.6), rng.uniform(-0.3, 0.3), height])
        return SceneObject(label, label, label.split()[-1], label.split()[0], place, role)

    things = [thing("red cube", "object")]
    if rng.random() < 0.5:
        place = base + np.array([0.3, 0, rng.uniform(0, 0.2)])
        things.append(SceneObject("goal", "goal", "sphere", "green", place, "goal"))
    else:
        things.append(thing("white bin", "goal"))
    names = rng.choice([f"{color} {kind}" for color in PALETTE for kind in KINDS], 3, replace=False)
    things += [thing(str(name), "distractor") for name in names if name != "red cube"]
    tcp = base + rng.uniform((0.1, -0.3, 0.0), (0.6, 0.3, 0.3))
    arrangements = [name for name in ARRANGEMENTS if name != "done" or things[1].solid]
    arrangement = str(rng.choice(arrangements))
    points = {"base": {"gripper": (0.5, 0.5)}}
    return SceneObservation(tuple(things), tcp, points, {}, {"base": {}}, base, base[:2], arrangement)


FACTS = [annotation for seed in range(200) for annotation in scene_annotations(random_scene(seed))]


def of(*kinds: str):
    found = [annotation for annotation in FACTS if annotation.kind in kinds]
    assert len(found) >= 50 and len({annotation.answer for annotation in found}) > 1
    return [(annotation, [*annotation.words.values()]) for annotation in found]


def numbers(text: str) -> np.ndarray:
    return np.array([int(n) for n in re.findall(r"-?\d+", text)])


def spots(thought: str) -> dict[str, np.ndarray]:
    """Name -> place [cm]."""
    return {name: numbers(at) for name, at in re.findall(r"([a-z][a-z ]*) (\([^)]*\))", thought)}


def along(thought: str, axis: str) -> dict[str, int]:
    """Name -> place on one axis [cm]."""
    found = dict(re.findall(rf"([a-z][a-z ]*) {axis} (-?\d+)(?:, |$)", thought))
    return {name: int(number) for name, number in found.items()}


# --- with and without --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
def test_thoughts_are_not_part_of_the_answer(answer):
    for thought in ("", *THOUGHTS):
        both = with_thought(thought, answer)
        assert without_thought(both) == without_thought(without_thought(both)) == final_answer(both) == answer
        assert (both == answer) == (not thought) and thought in both


@pytest.mark.parametrize("answer", ["<think>so</think>", " <think>so\n</think> \n", "<think></think>"])
def test_a_thought_alone_is_no_answer(answer):
    row = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]}
    with pytest.raises(RowError, match="empty answer"):
        parse_row(row, 1)
    row["messages"][1]["content"] += "so"
    (question,) = parse_row(row, 1).questions()
    assert question.answer == "so"


def test_only_a_corpus_that_teaches_shows_thoughts(rng):
    annotations = [annotation for annotation in FACTS if annotation.thought][:100]
    turns = [QuestionSampler(rng).phrase(annotation) for annotation in annotations]
    for thoughts in (True, False):
        messages = to_messages([], turns, thoughts=thoughts)
        assert all(("<think>" in message.text) == thoughts for message in messages[1::2])
        kinds = tuple(turn.kind for turn in turns)
        row = Conversation(id="a", group="a", source="a", kinds=kinds, messages=messages)
        assert [question.answer for question in row.questions()] == [turn.answer for turn in turns]


def test_a_choice_has_the_thought_of_the_open_question(rng):
    asked, taught = (QuestionSampler(rng, choice=1.0, letters=letters) for letters in (True, False))
    for annotation in (annotation for annotation in FACTS[::20] if annotation.wrong):
        turn = asked.phrase(annotation)
        assert turn.thought == annotation.thought
        assert options_of(turn.question)[LETTERS.index(turn.answer)] == annotation.answer
        turn = taught.phrase(annotation)
        assert turn.thought == annotation.thought and turn.answer == annotation.answer
        letter = LETTERS[options_of(turn.question).index(annotation.answer)]
        assert read_choice(turn.answer, options_of(turn.question)) == letter, "extraction reads the words too"


# --- scenes ------------------------------------------------------------------------------------------------


def test_relations_follow_from_places_along_one_axis():
    for kind, words in AXES.items():
        for annotation, (thing, other) in of(kind):
            place = along(annotation.thought, "y" if kind == "left_right" else "x")
            assert place.keys() == {thing, other}
            assert annotation.answer == words[place[thing] < place[other]]
        for annotation, (thing,) in of(f"situated_{kind}"):
            place = along(annotation.thought, "y" if kind == "left_right" else "x")
            assert place.keys() == {thing, "gripper"}
            assert annotation.answer == words[place[thing] < place["gripper"]]
    for annotation, (thing,) in of("above"):
        place = along(annotation.thought, "z")
        assert annotation.answer == ("above" if place["gripper"] > place[thing] else "below")
    for annotation, (thing,) in of("location_table"):
        (y,) = along(annotation.thought, "y").values()
        assert annotation.answer == ("middle" if abs(y) < 5 else "left" if y > 0 else "right"), thing


def test_comparisons_follow_from_distances():
    pick = {"comparing_nearest": min, "comparing_farthest": max, "comparing_closer": min}
    for annotation, (mark, *two) in of(*pick):
        place = spots(annotation.thought)
        assert next(iter(place)) == mark
        told = re.findall(r"([a-z][a-z ]*) \([^)]*\): \([^)]*\) ([a-z ]+) (\d+)", annotation.thought)
        far = {name: number for name, _, number in told}
        assert all(name == again for name, again, _ in told)
        assert far.keys() == place.keys() - {mark} and (not two or far.keys() == {*two})
        for name, distance in far.items():
            assert abs(np.linalg.norm(place[name] - place[mark]) - int(distance)) < 2.3
        assert annotation.answer == pick[annotation.kind](far, key=lambda name: int(far[name]))
        word = "farthest" if annotation.kind == "comparing_farthest" else "nearest"
        assert annotation.thought.endswith(f"; {word} {annotation.answer}")


def test_existence_follows_from_a_list_of_objects():
    for annotation, words in of(
        "counting", "existence", "attribute_color", "attribute_shape", "affordance_roll"
    ):
        listed, _, picked = annotation.thought.partition("; ")
        names = listed.split(", ")
        assert names == sorted({*names})
        if picked:
            word, _, rest = picked.partition(": ")
            assert word in [*annotation.words.values(), "ball"] or word in words[0].split()
            assert rest == (", ".join(name for name in names if word in name.split()) or "nothing")
        if annotation.kind == "counting":
            assert annotation.answer == str(sum(words[0] in ("object", name.split()[-1]) for name in names))
        elif annotation.kind == "existence":
            assert annotation.answer == ("yes" if words[0] in names else "no")
        elif annotation.kind == "affordance_roll":
            assert [annotation.answer] == [name for name in names if name.endswith("ball")]
        else:
            rest = [{*name.split()} - {*words} for name in names if {*words} & {*name.split()}]
            assert rest == [{annotation.answer}]


def test_room_follows_from_the_way_to_it():
    for annotation, _ in of("affordance_room"):
        places, way = annotation.thought.split(": ")
        start, end = spots(places).values()
        assert np.abs(numbers(way) - (end - start)).max() <= 1


def test_where_the_goal_is_follows_from_its_height():
    for annotation, (goal,) in of("location_goal"):
        (name, height), *more = along(annotation.thought, "z").items()
        assert (
            name == goal
            and not more
            and annotation.answer == ("on the table" if height < 5 else "in the air")
        )


def test_ways_and_distances_follow_from_places():
    to = (
        "metric_gripper_to_object",
        "metric_object_to_goal",
        "metric_gripper_distance",
        "metric_goal_distance",
    )
    for annotation, words in of(*to):
        start, end = words if len(words) == 2 else ["gripper", *words]
        place = spots(annotation.thought)
        assert [*place] == [start, end]
        way, told = place[end] - place[start], numbers(annotation.thought.split(": ")[1])
        assert np.abs(told - way).max() <= 1
        if annotation.kind.endswith("distance"):
            assert abs(np.linalg.norm(told) - numbers(annotation.answer)[0]) < 1.4
        else:
            assert (numbers(annotation.answer) == told).all()


def test_answers_follow_exactly_from_positions_in_centimetres():
    for seed in range(40):
        scene = random_scene(seed)
        told = scene.in_centimetres()
        assert abs(told.tcp - scene.tcp).max() <= 0.005 + 1e-9
        for annotation in scene_annotations(told):
            if annotation.kind.startswith("metric_") and annotation.thought:
                places, way = annotation.thought.split(": ")
                start, end = spots(places).values()
                assert (numbers(way) == end - start).all()
                distance = annotation.kind.endswith("distance")
                assert numbers(annotation.answer).tolist() == (
                    [round(float(np.linalg.norm(end - start)))] if distance else (end - start).tolist()
                )


def test_directions_follow_from_ways():
    for annotation, words in of("situated_move", "forecasting_direction"):
        start, end = words if len(words) == 2 else ["gripper", *words]
        places, told = annotation.thought.split(": ")
        place, way = spots(places), numbers(told)
        assert [*place] == [start, end] and np.abs(way - (place[end] - place[start])).max() <= 1
        asked = way[:2] if annotation.kind == "forecasting_direction" else way
        axis = int(np.abs(asked).argmax())
        assert annotation.answer == (
            DIRECTIONS[2 * axis + (asked[axis] < 0)] if axis < 2 else DIRECTIONS[4 + (way[2] > 0)]
        )


def test_questions_that_need_reasoning_have_a_thought():
    missing = Counter(annotation.kind for annotation in FACTS if not annotation.thought)
    seen = ("point", "affordance_held", "location_state", "metric_position", "metric_height")
    assert all(kind.startswith(seen) for kind in missing), missing
