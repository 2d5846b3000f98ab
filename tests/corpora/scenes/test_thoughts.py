"""Thoughts: an answer follows from the thought before it, and is judged without it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import Conversation, options_of, parse_row, spoken, spoken_after
from blm.corpora.scenes.facts import LETTERS, Drawer, to_messages
from blm.corpora.scenes.questions import KINDS, WAYS, scene_facts
from blm.corpora.scenes.view import STAGINGS, Scene, Thing
from blm.evaluation.digital.parsers.extraction import final_answer, read_choice
from blm.tasks.spec import PALETTE

ANSWERS = ("yes", "A", "(12, -3, 20) cm", "7 cm", "approach, hold", "red cube", "two\nlines")
THOUGHTS = ("now hold still", "red cube y 3, blue ball y -4", "a\nb", "is it <yes>?", "(A)? no")
AXES = {"left_right": ("left", "right"), "front_behind": ("behind", "front")}


def random_scene(seed: int) -> Scene:
    """Things anywhere above a table before the robot, which itself stands anywhere on it."""
    rng = np.random.default_rng(seed)
    base = rng.uniform((-1, -1, 0), (1, 1, 0))

    def thing(label, role, height=0.02):
        place = base + np.array([rng.uniform(0.1, 0.6), rng.uniform(-0.3, 0.3), height])
        return Thing(label, label, label.split()[-1], label.split()[0], place, role)

    things = [thing("red cube", "object")]
    if rng.random() < 0.5:
        place = base + np.array([0.3, 0, rng.uniform(0, 0.2)])
        things.append(Thing("goal", "goal", "sphere", "green", place, "goal"))
    else:
        things.append(thing("white bin", "goal"))
    names = rng.choice([f"{color} {kind}" for color in PALETTE for kind in KINDS], 3, replace=False)
    things += [thing(str(name), "distractor") for name in names if name != "red cube"]
    tcp = base + rng.uniform((0.1, -0.3, 0.0), (0.6, 0.3, 0.3))
    stagings = [name for name in STAGINGS if name != "done" or things[1].solid]
    staging = str(rng.choice(stagings))
    points = {"base": {"gripper": (0.5, 0.5)}}
    return Scene(tuple(things), tcp, points, {}, {"base": {}}, base, base[:2], staging)


FACTS = [fact for seed in range(200) for fact in scene_facts(random_scene(seed))]


def of(*kinds: str):
    found = [fact for fact in FACTS if fact.kind in kinds]
    assert len(found) >= 50 and len({fact.answer for fact in found}) > 1
    return [(fact, [*fact.words.values()]) for fact in found]


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
def test_what_is_spoken_is_the_answer_alone(answer):
    for thought in ("", *THOUGHTS):
        both = spoken_after(thought, answer)
        assert spoken(both) == spoken(spoken(both)) == final_answer(both) == answer
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
    facts = [fact for fact in FACTS if fact.thought][:100]
    turns = [Drawer(rng).word(fact) for fact in facts]
    for thoughts in (True, False):
        messages = to_messages([], turns, thoughts=thoughts)
        assert all(("<think>" in message.text) == thoughts for message in messages[1::2])
        kinds = tuple(turn.kind for turn in turns)
        row = Conversation(id="a", group="a", source="a", kinds=kinds, messages=messages)
        assert [question.answer for question in row.questions()] == [turn.answer for turn in turns]


def test_a_choice_is_thought_of_as_the_free_question_is(rng):
    asked, taught = (Drawer(rng, choice=1.0, letters=letters) for letters in (True, False))
    for fact in (fact for fact in FACTS[::20] if fact.wrong):
        turn = asked.word(fact)
        assert turn.thought == fact.thought
        assert options_of(turn.question)[LETTERS.index(turn.answer)] == fact.answer
        turn = taught.word(fact)
        assert turn.thought == fact.thought and turn.answer == fact.answer
        letter = LETTERS[options_of(turn.question).index(fact.answer)]
        assert read_choice(turn.answer, options_of(turn.question)) == letter, "extraction reads the words too"


# --- scenes ------------------------------------------------------------------------------------------------


def test_relations_follow_from_places_along_one_axis():
    for kind, words in AXES.items():
        for fact, (thing, other) in of(kind):
            place = along(fact.thought, "y" if kind == "left_right" else "x")
            assert place.keys() == {thing, other}
            assert fact.answer == words[place[thing] < place[other]]
        for fact, (thing,) in of(f"situated_{kind}"):
            place = along(fact.thought, "y" if kind == "left_right" else "x")
            assert place.keys() == {thing, "gripper"}
            assert fact.answer == words[place[thing] < place["gripper"]]
    for fact, (thing,) in of("above"):
        place = along(fact.thought, "z")
        assert fact.answer == ("above" if place["gripper"] > place[thing] else "below")
    for fact, (thing,) in of("location_table"):
        (y,) = along(fact.thought, "y").values()
        assert fact.answer == ("middle" if abs(y) < 5 else "left" if y > 0 else "right"), thing


def test_comparisons_follow_from_distances():
    pick = {"comparing_nearest": min, "comparing_farthest": max, "comparing_closer": min}
    for fact, (mark, *two) in of(*pick):
        place = spots(fact.thought)
        assert next(iter(place)) == mark
        told = re.findall(r"([a-z][a-z ]*) \([^)]*\): \([^)]*\) ([a-z ]+) (\d+)", fact.thought)
        far = {name: number for name, _, number in told}
        assert all(name == again for name, again, _ in told)
        assert far.keys() == place.keys() - {mark} and (not two or far.keys() == {*two})
        for name, distance in far.items():
            assert abs(np.linalg.norm(place[name] - place[mark]) - int(distance)) < 2.3
        assert fact.answer == pick[fact.kind](far, key=lambda name: int(far[name]))
        word = "farthest" if fact.kind == "comparing_farthest" else "nearest"
        assert fact.thought.endswith(f"; {word} {fact.answer}")


def test_what_there_is_follows_from_a_list_of_it():
    for fact, words in of("counting", "existence", "attribute_color", "attribute_shape", "affordance_roll"):
        listed, _, picked = fact.thought.partition("; ")
        names = listed.split(", ")
        assert names == sorted({*names})
        if picked:
            word, _, rest = picked.partition(": ")
            assert word in [*fact.words.values(), "ball"] or word in words[0].split()
            assert rest == (", ".join(name for name in names if word in name.split()) or "nothing")
        if fact.kind == "counting":
            assert fact.answer == str(sum(words[0] in ("object", name.split()[-1]) for name in names))
        elif fact.kind == "existence":
            assert fact.answer == ("yes" if words[0] in names else "no")
        elif fact.kind == "affordance_roll":
            assert [fact.answer] == [name for name in names if name.endswith("ball")]
        else:
            rest = [{*name.split()} - {*words} for name in names if {*words} & {*name.split()}]
            assert rest == [{fact.answer}]


def test_room_follows_from_the_way_to_it():
    for fact, _ in of("affordance_room"):
        places, way = fact.thought.split(": ")
        start, end = spots(places).values()
        assert np.abs(numbers(way) - (end - start)).max() <= 1


def test_where_the_goal_is_follows_from_its_height():
    for fact, (goal,) in of("location_goal"):
        (name, height), *more = along(fact.thought, "z").items()
        assert name == goal and not more and fact.answer == ("on the table" if height < 5 else "in the air")


def test_ways_and_distances_follow_from_places():
    to = (
        "metric_gripper_to_object",
        "metric_object_to_goal",
        "metric_gripper_distance",
        "metric_goal_distance",
    )
    for fact, words in of(*to):
        start, end = words if len(words) == 2 else ["gripper", *words]
        place = spots(fact.thought)
        assert [*place] == [start, end]
        way, told = place[end] - place[start], numbers(fact.thought.split(": ")[1])
        assert np.abs(told - way).max() <= 1
        if fact.kind.endswith("distance"):
            assert abs(np.linalg.norm(told) - numbers(fact.answer)[0]) < 1.4
        else:
            assert (numbers(fact.answer) == told).all()


def test_in_centimetres_all_that_is_said_follows_exactly():
    for seed in range(40):
        scene = random_scene(seed)
        told = scene.in_centimetres()
        assert abs(told.tcp - scene.tcp).max() <= 0.005 + 1e-9
        for fact in scene_facts(told):
            if fact.kind.startswith("metric_") and fact.thought:
                places, way = fact.thought.split(": ")
                start, end = spots(places).values()
                assert (numbers(way) == end - start).all()
                distance = fact.kind.endswith("distance")
                assert numbers(fact.answer).tolist() == (
                    [round(float(np.linalg.norm(end - start)))] if distance else (end - start).tolist()
                )


def test_directions_follow_from_ways():
    for fact, words in of("situated_move", "forecasting_direction"):
        start, end = words if len(words) == 2 else ["gripper", *words]
        places, told = fact.thought.split(": ")
        place, way = spots(places), numbers(told)
        assert [*place] == [start, end] and np.abs(way - (place[end] - place[start])).max() <= 1
        asked = way[:2] if fact.kind == "forecasting_direction" else way
        axis = int(np.abs(asked).argmax())
        assert fact.answer == (WAYS[2 * axis + (asked[axis] < 0)] if axis < 2 else WAYS[4 + (way[2] > 0)])


def test_what_has_to_be_worked_out_has_a_thought():
    missing = Counter(fact.kind for fact in FACTS if not fact.thought)
    seen = ("point", "affordance_held", "location_state", "metric_position", "metric_height")
    assert all(kind.startswith(seen) for kind in missing), missing
