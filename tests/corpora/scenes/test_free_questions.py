"""Free questions: their answers are right by their key facts, and flipped answers are wrong."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from blm.corpora import SceneCorpusConfig, build_scene_corpus, read_corpus, read_questions
from blm.corpora.format.messages import CORPUS_FILE, scorer_of
from blm.corpora.scenes.build import _sampler
from blm.corpora.scenes.free_questions import FREE_TEMPLATES, STRANGE, free_questions, free_turns, phrase
from blm.corpora.scenes.free_talk_templates import REFUSAL_TEMPLATES
from blm.corpora.scenes.free_words import counted
from blm.corpora.scenes.observation import SceneObserver, rearrange
from blm.corpora.scenes.questions import scene_turns
from blm.corpora.scenes.templates import TEMPLATES
from blm.evaluation.digital.facts import check_facts
from blm.evaluation.digital.parsers.claims import OBJECT, clauses, mentions
from blm.robots import ROBOTS
from blm.tasks import Env
from blm.tasks.spec import PALETTE
from blm.tasks.wordings import expand
from blm.types import BlmError
from tests.corpora.scenes.test_questions import SCENE
from tests.corpora.scenes.test_thoughts import random_scene

CELLS = (
    ("panda", "words_stack_cube"),
    ("xarm6", "words_push_cube"),
    ("widowxai", "words_place_sphere"),
    ("xarm7", "words_lift_peg_upright"),
    ("panda", "push_cube"),
    ("widowxai", "pick_cube"),
)
SEEN, HELD_OUT = (
    {
        kind: [text for pattern in getattr(w, part) for text in expand(pattern)]
        for kind, w in FREE_TEMPLATES.items()
    }
    for part in ("seen", "held_out")
)


def every_answer(question):
    """Every wording of the answer."""
    for pattern in FREE_TEMPLATES[question.kind].answers[question.variant]:
        for text in expand(pattern):
            yield re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format(**question.words))


@pytest.fixture(scope="module")
def asked():
    """One free question of each kind and truth about each scene: of all arms, and made-up ones."""
    scenes = []
    for number, (robot, task) in enumerate(CELLS):
        with Env(robot, task, cameras=(), image_size=64, distractors=number % 4) as env:
            observer, rng = SceneObserver(env, ("base", "side")), np.random.default_rng(number)
            for seed in range(4):
                env.reset(seed=seed, options={"arm": "random"})
                scenes.append((observer.observe(rearrange(env, rng)), env.robot))
            observer.close()
    scenes += [(random_scene(seed), ROBOTS["xarm7"]) for seed in range(16)]
    found, rng = [], np.random.default_rng(0)
    for scene, robot in scenes:
        alike = defaultdict(list)
        for question in free_questions(scene, robot):
            alike[question.kind, question.variant].append(question)
        found += [questions[int(rng.integers(len(questions)))] for questions in alike.values()]
    return found


def test_every_answer_states_its_key_facts_and_nothing_false(asked):
    for question in asked:
        for answer in every_answer(question):
            checked = check_facts(answer, question.facts)
            assert checked.right, (question.kind, answer, checked)
            assert checked.found == question.facts.required
    told = {(q.kind, q.variant) for q in asked}
    rest = {(kind, variant) for kind, w in FREE_TEMPLATES.items() for variant in w.answers} - told
    assert len({kind for kind, _ in told}) == len(FREE_TEMPLATES) >= 20
    assert rest <= {("free_besides", "none"), ("free_done", "done"), ("free_first_step", "done")}, rest


def test_an_invented_thing_makes_every_answer_wrong(asked):
    for question in asked:
        absent = next(f"{c} cube" for c in PALETTE if f"{c} cube" not in question.facts.things)
        for answer in islice(every_answer(question), 2):
            for claim in (f"There is also a {absent}.", "I see a banana."):
                checked = check_facts(f"{answer} {claim}", question.facts)
                assert not checked.right and checked.false


def test_a_flipped_fact_makes_an_answer_wrong(asked):
    flips = {"left": "right", "right": "left", "Yes": "No", "No": "Yes", "one": "two", "two": "three"}
    flips |= {"three": "four", "six": "seven", "seven": "six", "middle": "left", "already": "not"}
    flipped = defaultdict(int)
    for question in asked:
        kind = question.kind
        required = {part for fact in question.facts.required for part in fact.split("|")}
        labels = [label for label in question.facts.things if label in required]
        absent = next(f"{c} ball" for c in PALETTE if f"{c} ball" not in question.facts.things)
        for answer in every_answer(question):
            for label in labels:
                if label in answer:
                    assert not check_facts(answer.replace(label, absent), question.facts).right
                    flipped[kind] += 1
            word = answer.split(",")[0] if question.facts.required[0] in ("yes", "no", "no|only") else ""
            if kind in ("free_relation", "free_where") and question.variant in ("", "side"):
                word = question.words["side"]
            if kind in ("free_arms", "free_fingers", "free_joints", "free_count"):
                word = next((number for number in flips if re.search(rf"\b{number}\b", answer)), "")
            if word:
                wrong = re.sub(rf"\b{word}\b", flips[word], answer)
                assert wrong != answer and not check_facts(wrong, question.facts).right, wrong
                flipped[kind] += 1
    assert {"free_see", "free_relation", "free_where", "free_arms", "free_done", "free_strange"} <= {*flipped}
    assert len(flipped) >= 20 and sum(flipped.values()) > 500


def test_answers_of_one_truth_are_wrong_by_another(asked):
    variants = defaultdict(list)
    for question in asked:
        variants[question.kind].append(question)
    for kind in ("free_held", "free_besides", "free_can_see", "free_same_colour", "free_done"):
        for question in variants[kind][:40]:
            for other in variants[kind][:40]:
                polar = question.variant != other.variant and {question.variant, other.variant} != {
                    "start",
                    "held",
                }
                if polar:
                    answer = next(every_answer(replace(question, words={**question.words, **other.words})))
                    assert not check_facts(answer, other.facts).right, (kind, answer, other)


def test_refusals_claim_nothing_about_the_scene(asked):
    refused = [question for question in asked if question.kind in REFUSAL_TEMPLATES]
    for question in refused:
        thing = question.words.get("thing", "")
        for answer in every_answer(question):
            said = [m for clause in clauses(answer) for m in mentions(clause) if not m.denied]
            names = {" ".join([*m.colors, *m.kinds]) for m in said if OBJECT not in m.kinds}
            assert names <= {thing} and {*question.facts.things} <= {thing}
        for claim in (
            "It smells like coffee.",
            "There is a red cube.",
            "It is 20 degrees and weighs 3 grams.",
        ):
            assert not check_facts(claim, question.facts).right


def test_hidden_objects_are_neither_named_nor_required():
    hidden = replace(SCENE, objects=(SCENE.objects[0], replace(SCENE.objects[1], seen=False)))
    kinds = set()
    for question in free_questions(hidden, ROBOTS["panda"]):
        kinds.add(question.kind)
        assert "blue ball" not in question.facts.things
        assert not any("blue ball" in answer for answer in every_answer(question))
    assert not kinds & {"free_count", "free_besides", "free_left", "free_relation", "free_strange"}
    assert {"free_see", "free_describe"} <= kinds


def test_strange_things_are_known_to_the_scorer():
    for name in STRANGE:
        (mention,) = mentions(clauses(f"I see a {name}.")[0])
        assert mention.kinds == (name,)


@pytest.mark.parametrize("kind", FREE_TEMPLATES)
def test_wordings_of_a_kind(kind):
    both = SEEN[kind] + HELD_OUT[kind]
    assert scorer_of(kind) == "facts"
    assert len(SEEN[kind]) >= 4 and 1 <= len(HELD_OUT[kind]) <= 3 and len({*both}) == len(both)
    for text in both:
        assert text[-1] in ".!?" and text[0].isupper() and not re.search(r"[][|]|  | [?.!,:]", text), text
    for patterns in FREE_TEMPLATES[kind].answers.values():
        assert len(patterns) >= 2
        for text in (text for pattern in patterns for text in expand(pattern)):
            assert text[-1] in ".!?" and not re.search(r"[][|]|  | [?.!,:]", text), text
            assert len(text.split()) <= 30, text


def test_held_out_wordings_are_in_no_training_template():
    closed = {
        part: {text for w in TEMPLATES.values() for p in getattr(w, part) for text in expand(p)}
        for part in ("seen", "held_out")
    }
    seen = {text for texts in SEEN.values() for text in texts}
    held_out = {text for texts in HELD_OUT.values() for text in texts}
    assert not held_out & (seen | closed["seen"]) and not closed["held_out"] & seen
    assert sum(map(len, HELD_OUT.values())) == len(held_out), "two kinds share a held-out wording"


def config(**changes):
    base = {"robots": ("panda",), "tasks": ("words_push_cube",), "cameras": ("base",), "image_size": 64}
    return SceneCorpusConfig(
        **{**base, "scenes": 6, "first_seed": 10_000, "turns": 10, "answers": "sentence", **changes}
    )


def test_corpora_hold_free_questions_with_their_facts(tmp_path):
    build_scene_corpus(config(free=0.5), tmp_path / "train", workers=0)
    held = config(free=1.0, teach=False, wording="held_out", turns=60)
    build_scene_corpus(held, tmp_path / "held_out", workers=0)
    free = read_questions(tmp_path / "train", free=True)
    assert 15 <= len(free) <= 45 and read_questions(tmp_path / "train")
    training, new = (
        {q.messages[-1].text for q in read_questions(tmp_path / name, free=True)}
        for name in ("train", "held_out")
    )
    held = [text.replace(" an ", " a ") for texts in HELD_OUT.values() for text in texts]
    patterns = [re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(text))) for text in held]
    plain = {text.replace(" an ", " a ") for text in training}
    assert not [text for text in plain if any(p.fullmatch(text) for p in patterns)]
    assert [t for t in new if not any(p.fullmatch(t.replace(" an ", " a ")) for p in patterns)] == []
    questions = read_questions(tmp_path / "held_out", free=True)
    assert len({q.kind for q in questions}) >= 25
    for question in [*free, *questions]:
        assert question.facts is not None and check_facts(question.answer, question.facts).right
    for row in read_corpus(tmp_path / "train"):
        assert len(row.facts) == len(row.kinds)
        kept = row.select(range(2, len(row.kinds)))
        assert kept.facts == row.facts[2:]


def test_without_free_questions_a_corpus_stays_as_it_was(tmp_path):
    """Its turns are those that `scene_turns` draws from the scenes alone, and no row has facts."""
    made = config(scenes=3)
    build_scene_corpus(made, tmp_path / "none", workers=0)
    rows, sampler = read_corpus(tmp_path / "none"), _sampler(made, 0)
    for number, row in enumerate(rows):
        seed = made.first_seed + number
        rng = np.random.default_rng(seed)
        count = int(rng.integers(made.max_distractors + 1))
        with Env("panda", "words_push_cube", cameras=(), image_size=64, distractors=count) as env:
            observer = SceneObserver(env, ("base",))
            env.reset(seed=seed, options={"arm": "random"})
            scene = observer.observe(rearrange(env, rng)).in_centimetres()
            observer.close()
        turns = scene_turns(scene, made.turns, sampler, pointing=made.pointing, metric=made.metric)
        told = list(zip(row.kinds, row.messages[::2], row.messages[1::2], strict=True))
        assert [(k, q.text, a.text) for k, q, a in told if k != "control"] == [
            (turn.kind, turn.question, turn.answer) for turn in turns
        ]
    text = (tmp_path / "none" / CORPUS_FILE).read_text()
    assert all("facts" not in json.loads(line) for line in text.splitlines())
    assert not read_questions(tmp_path / "none", free=True)


def test_free_turns_are_of_different_kinds_and_depend_on_their_generator_only():
    scene, robot = random_scene(3), ROBOTS["xarm6"]
    one, two = (free_turns(scene, robot, 12, np.random.default_rng(5), "seen") for _ in range(2))
    assert one == two and len({turn.kind for turn in one}) == len(one) == 12
    assert not free_turns(scene, robot, 0, np.random.default_rng(5), "seen")
    held = phrase(next(iter(free_questions(scene, robot))), np.random.default_rng(0), "held_out")
    assert held.question in HELD_OUT[held.kind]


@pytest.mark.parametrize("change", [{"answers": "terse"}, {"free": 1.5}, {"free": -0.1}])
def test_shares_that_cannot_be_are_refused(change):
    with pytest.raises(BlmError, match="free"):
        config(**{"free": 0.5, **change})


@pytest.mark.parametrize(
    "number, said", [(1, "one cube"), (2, "two cubes"), (10, "ten cubes"), (17, "17 cubes")]
)
def test_numbers_of_objects_are_said_however_many_there_are(number: int, said: str) -> None:
    assert counted(number, "cube") == said
