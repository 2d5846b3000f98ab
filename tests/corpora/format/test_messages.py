"""The corpus format and curation: round trips, every fault by line, nothing lost, balance that is equal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from blm.corpora import (
    CurationConfig,
    EvaluationSet,
    Source,
    curate,
    curate_sources,
    read_corpus,
    scan_corpus,
    write_corpus,
    write_curated,
)
from blm.corpora.curation.balance import normalise, yes_no_turns
from blm.corpora.format.faults import RowError
from blm.corpora.format.messages import CORPUS_FILE, Conversation, parse_row, reserved_scenes
from blm.corpora.format.perceptual_hash import NearDuplicateIndex, perceptual_hash
from blm.media import with_pixels
from blm.types import BlmError, Image, Message, base_kind


def conversation(name="a", value=0, group="g", **changes):
    picture = np.full((4, 4, 3), value, np.uint8)
    messages = (
        Message("user", (Image(picture), "How many cubes?")),
        Message("assistant", ("2",)),
        Message("user", ("Where is the cube?",)),
        Message("assistant", ("(10, 20)",)),
    )
    fields = {"kinds": ("count", "point_base"), "messages": messages, "independent": True} | changes
    return Conversation(id=name, group=group, source="test", **fields)


def ask(name, kind, answer, picture, group=None):
    messages = (Message("user", (Image(picture), f"Is {kind} so?")), Message("assistant", (answer,)))
    return Conversation(id=name, group=group or name, source="t", kinds=(kind,), messages=messages)


def noise(seed, size=32):
    """A picture like no other."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(cells).resize((size, size), PIL.Image.Resampling.BILINEAR))


def write_lines(folder, lines):
    folder.mkdir()
    (folder / CORPUS_FILE).write_bytes(b"".join(lines))
    return folder


def line(**changes):
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine."}]}
    return json.dumps(row | changes).encode() + b"\n"


# --- the format ---------------------------------------------------------------------------------------------


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


def test_linked_media_give_the_same_corpus_and_stay_inside(tmp_path):
    write_corpus(tmp_path / "a", [conversation("a", 3), conversation("b", 7)])
    rows = read_corpus(tmp_path / "a")
    write_corpus(tmp_path / "b", rows, media=tmp_path / "a")
    assert read_corpus(tmp_path / "b") == rows
    for name in (image.path for row in rows for image in row.media):
        assert (tmp_path / "b" / name).samefile(tmp_path / "a" / name)
    outside = conversation(
        messages=(Message("user", (Image(path="../a/x.png"), "?")), Message("assistant", ("!",)))
    )
    with pytest.raises(BlmError, match="outside"):
        write_corpus(tmp_path / "c", [outside], media=tmp_path / "b")
    assert not (tmp_path / "c").exists()


def test_writing_resumes_after_a_kill(tmp_path):
    def killed():
        yield conversation("a", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "c", killed())
    (picture,) = tmp_path.glob(".c.*.part/images/*")
    picture.write_bytes(picture.read_bytes()[:20])  # and in the middle of a file
    write_corpus(tmp_path / "c", [conversation("b", 7)])
    write_corpus(tmp_path / "fresh", [conversation("b", 7)])
    names = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*")) for f in ("c", "fresh")]
    assert names[0] == names[1], "what was given up is gone"
    assert (tmp_path / "c" / CORPUS_FILE).read_bytes() == (tmp_path / "fresh" / CORPUS_FILE).read_bytes()


def test_questions_stand_alone():
    first, second = conversation().questions()
    assert (first.kind, first.answer, first.scorer) == ("count", "2", "exact")
    assert (second.scorer, second.answer) == ("point", "(10, 20)")
    assert second.messages[0].images and second.messages[0].text == "Where is the cube?"


def test_rows_of_other_programs_need_messages_only(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "a/b.png"}}
    asked = [picture, {"type": "text", "text": "What?"}]
    system = {"role": "system", "content": "Be brief."}
    plain = json.loads(line())["messages"]
    lines = [line(), b"\n", line(messages=[system, {"role": "user", "content": asked}, plain[1]], source="s")]
    text, seen = read_corpus(write_lines(tmp_path / "c", lines))
    assert (text.id, text.group, text.source, text.kinds) == ("row-1", "row-1", "messages", ("messages",))
    assert (seen.id, seen.group, seen.kinds) == ("row-3", "s/a/b.png", ("s",))
    (question,) = seen.questions()
    assert [m.role for m in question.messages] == ["system", "user"]


def test_a_text_may_hold_a_line_separator(tmp_path):
    row = json.dumps(json.loads(line(id="a\u2028b")), ensure_ascii=False).encode() + b"\n"
    assert [r.id for r in read_corpus(write_lines(tmp_path / "c", [row, line()]))] == ["a\u2028b", "row-2"]


USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine."}
BROKEN = {
    "malformed JSON": [b"{'id': 1}\n", b"[" * 10_000 + b"\n", b'{"messages": "\xff"}\n'],
    "malformed row": [
        b"[]\n",
        b"3\n",
        line(messages="none"),
        line(messages=["hello"]),
        line(messages=[{"role": "user"}]),
        line(messages=[{"role": "user", "content": None}, ANSWER]),
        line(messages=[{"role": "user", "content": "\ud800"}, ANSWER]),
        line(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}, ANSWER]),
        line(kinds="one"),
        line(id=7),
        line(group=""),
    ],
    "unknown role": [
        line(messages=[USER, {"role": "robot", "content": "I"}]),
        line(messages=[{"role": [], "content": ""}]),
    ],
    "roles out of order": [
        line(messages=[]),
        line(messages=[USER]),
        line(messages=[ANSWER, USER]),
        line(messages=[USER, USER, ANSWER]),
        line(messages=[USER, ANSWER, {"role": "system", "content": "late"}]),
    ],
    "empty question": [line(messages=[{"role": "user", "content": " \n"}, ANSWER])],
    "empty answer": [line(messages=[USER, {"role": "assistant", "content": ""}])],
    "wrong number of kinds": [line(kinds=[]), line(kinds=["a", "b"])],
    "wrong media count": [line(images=["a.png"]), line(video="a.mp4")],
    "unsupported content": [line(messages=[{"role": "user", "content": [{"type": "audio"}]}, ANSWER])],
    "truncated last line": [line()[:40], line()[:-2]],
    "duplicate id": [line(id="first")],
}


@pytest.mark.parametrize(("reason", "bad"), [(r, bad) for r, rows in BROKEN.items() for bad in rows])
def test_broken_rows_are_named_with_their_line(tmp_path, reason, bad):
    folder = write_lines(tmp_path / "c", [line(id="first"), line(), bad])
    found = list(scan_corpus(folder))
    assert [number for number, _ in found] == [1, 2, 3]
    assert isinstance(found[2][1], RowError) and found[2][1].reason == reason
    with pytest.raises(BlmError, match=rf"corpus\.jsonl:3: {reason}: "):
        read_corpus(folder)


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


@pytest.mark.parametrize("keep", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_selected_turns_keep_their_questions(keep):
    a, b = (Image(path=name) for name in ("a.png", "b.png"))
    messages = (
        Message("system", ("Be brief.",)),
        *(Message("user", ("View 1:", a, "What?")), Message("assistant", ("this",))),
        *(Message("user", ("And here?", b)), Message("assistant", ("that",))),
        *(Message("user", ("Both?",)), Message("assistant", ("no",))),
    )
    row = Conversation(
        id="x", group="g", source="s", kinds=("k0", "k1", "k2"), messages=messages, independent=True
    )
    every, part = list(row.questions()), row.select(keep)
    assert [replace(q, id="") for q in part.questions()] == [replace(every[i], id="") for i in keep]
    assert (part == row) == (keep == (0, 1, 2))


# --- curation -----------------------------------------------------------------------------------------------


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
    assert {step.name: len(step.reasons) for step in report.steps if step.reasons} == {
        "media": 1,
        "duplicates": 1,
        "leaks": 1,
    }


@pytest.fixture
def mixed(tmp_path):
    """Two sources: one of yes and no in unequal numbers, doubles and faults, one of plain text."""
    rng = np.random.default_rng(1)
    rows = [
        ask(f"r{i}", f"{kind}_{'positive' if yes else 'negative'}", "Yes." if yes else "no", noise(i))
        for i, (kind, yes) in enumerate((k, rng.random() < 0.3) for k in ["held", "done"] * 20)
    ]
    rows += [replace(rows[3], id="double"), replace(rows[4], id="leak", group="kept for tests")]
    write_corpus(tmp_path / "robot", rows)
    with (tmp_path / "robot" / CORPUS_FILE).open("ab") as file:
        file.write(b"{\n")
    texts = [line(id=f"t{i}", messages=[{"role": "user", "content": f"Say {i}"}, ANSWER]) for i in range(10)]
    write_lines(tmp_path / "general", texts)
    return [
        Source(name="robot", folder=tmp_path / "robot", weight=2.0),
        Source(name="general", folder=tmp_path / "general"),
    ]


def test_nothing_is_lost_and_balance_is_equal(mixed):
    config = CurationConfig(replay=0.25, general=("general",))
    held_out = EvaluationSet(
        name="held out", questions=list(ask("q", "x", "y", noise(0), "kept for tests").questions())
    )
    entries, report = curate_sources(mixed, config, evaluation=[held_out])
    assert report.kept + sum(report.dropped.values()) == 42 + 1 + 10
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        assert (before.rows_out, before.turns_out) == (after.rows_in, after.turns_in)
    for step in report.steps[:5]:
        assert step.rows_in - step.rows_out == sum(d.count for d in step.reasons.values())
    assert (
        report.steps[0]
        .reasons["malformed JSON"]
        .examples[0]
        .startswith(str(mixed[0].folder / CORPUS_FILE) + ":43")
    )
    assert report.yes_no.keys() == {"held", "done"}
    for counts in report.yes_no.values():
        yes, no = counts["after"]
        assert yes == no > 0 and yes >= min(counts["before"]) - 2  # a double and a leak went before
    assert sum(part.share for part in report.sources.values()) == pytest.approx(1)
    assert report.sources["general"].share == pytest.approx(0.25)
    assert {entry.conversation.id for entry in entries if entry.source.name == "general"} == {
        f"t{i}" for i in range(10)
    }


def test_curation_is_idempotent_and_a_function_of_the_seed(mixed, tmp_path):
    config = CurationConfig(max_per_kind=9)
    entries, report = curate_sources(mixed, config)
    again, _ = curate_sources(mixed[::-1], config)
    other, _ = curate_sources(mixed, replace(config, seed=1))
    ids = {entry.conversation.id for entry in entries}
    assert ids == {entry.conversation.id for entry in again}, "the order of sources does not matter"
    assert ids != {entry.conversation.id for entry in other}
    write_curated(entries, report, tmp_path / "out")
    assert json.loads((tmp_path / "out/curation.json").read_text())["kept"] == report.kept
    written = [replace(source, folder=tmp_path / "out" / source.name) for source in mixed]
    same, second = curate_sources(written, config)
    assert [e.conversation for e in same] == [e.conversation for e in entries]
    assert not second.dropped and second.answers == report.answers


def test_balance_drops_turns_and_keeps_their_pictures(tmp_path):
    rows = []
    for i in range(12):
        turns = [("held", "yes" if i < 9 else "no"), ("count", str(i))]
        messages = [
            message
            for place, (kind, answer) in enumerate(turns)
            for message in (
                Message("user", (Image(noise(i)), f"{kind}?") if place == 0 else (f"{kind}?",)),
                Message("assistant", (answer,)),
            )
        ]
        rows.append(
            Conversation(
                id=str(i), group=str(i), source="s", kinds=("held", "count"), messages=tuple(messages)
            )
        )
    write_corpus(tmp_path / "c", rows)
    entries, report = curate_sources([Source(name="c", folder=tmp_path / "c")], CurationConfig())
    kept = [entry.conversation for entry in entries]
    assert {stem: list(map(len, sides)) for stem, sides in yes_no_turns(kept).items()} == {"held": [3, 3]}
    assert len(kept) == 12 and all(row.media and row.kinds[-1] == "count" for row in kept)
    assert report.steps[-1].turns_in - report.steps[-1].turns_out == 6


def test_balance_over_each_wording(tmp_path):
    """Within a kind the words may tell the answer; balanced over wordings they do not."""
    words = {"Is it red?": (8, 2), "Is it not red?": (1, 7), "Is it there?": (3, 0), "Is it Blue?": (2, 2)}
    rows = []
    for text, counts in words.items():
        for answer, count in zip(("yes", "no"), counts, strict=True):
            for _ in range(count):
                messages = (Message("user", (Image(noise(len(rows))), text)), Message("assistant", (answer,)))
                rows.append(
                    Conversation(
                        id=str(len(rows)), group="g", source="s", kinds=("yes_no",), messages=messages
                    )
                )
    write_corpus(tmp_path / "c", rows)
    source = Source(name="c", folder=tmp_path / "c")
    entries, _ = curate_sources([source], CurationConfig(balance="question"))
    kept = [(e.conversation.messages[0].text, e.conversation.messages[1].text) for e in entries]
    for text, counts in words.items():
        assert [kept.count((text, answer)) for answer in ("yes", "no")] == [min(counts)] * 2
    entries, _ = curate_sources([source], CurationConfig(balance="kind"))
    assert len(entries) == 2 * min(sum(yes for yes, _ in words.values()), sum(no for _, no in words.values()))


def test_limits_and_near_duplicates(tmp_path):
    picture = noise(5)
    small = np.asarray(PIL.Image.fromarray(picture).resize((24, 24)))
    noisy = np.clip(picture.astype(int) + np.random.default_rng(0).integers(-1, 2, picture.shape), 0, 255)
    rows = [
        ask("a", "k", "red", picture),
        ask("noisy", "k", "Red!", noisy.astype(np.uint8)),
        ask("other answer", "k", "blue", picture),
        ask("other picture", "k", "red", picture[:, ::-1]),
        ask("big", "k", "red", noise(6, 64)),
        ask("long", "k", "red " * 50, small),
    ]
    write_corpus(tmp_path / "c", rows)
    config = CurationConfig(max_pixels=40 * 40, max_length=100, hash_distance=4)
    entries, report = curate_sources([Source(name="c", folder=tmp_path / "c")], config)
    assert [entry.conversation.id for entry in entries] == ["a", "other answer", "other picture"]
    pieces, _ = curate_sources(
        [Source(name="c", folder=tmp_path / "c")],
        replace(config, max_length=1),
        length=lambda row, folder: 1 + (folder / row.media[0].path).stat().st_size * ("long" in row.id),
    )
    assert len(pieces) == len(entries), "a length of one's own"
    reasons = {reason for step in report.steps for reason in step.reasons}
    assert reasons == {"duplicate", "longer than 100", "a picture of more than 1600 px"}


def test_a_question_about_an_evaluation_picture_is_a_leak(tmp_path):
    write_corpus(tmp_path / "test", [ask("t", "k", "yes", noise(1))])
    (held_out,) = read_corpus(tmp_path / "test")
    evaluation = EvaluationSet(name="test", questions=list(held_out.questions()), root=tmp_path / "test")
    rows = [
        ask("same question, other name", "k", "yes", noise(1)),
        ask("other question", "j", "yes", noise(1)),
        ask("other picture", "k", "yes", noise(2)),
    ]
    write_corpus(tmp_path / "c", rows)
    config = CurationConfig(balance="none")
    entries, _ = curate_sources([Source(name="c", folder=tmp_path / "c")], config, evaluation=[evaluation])
    assert [entry.conversation.id for entry in entries] == ["other question", "other picture"]


def test_near_index_equals_comparing_with_everything(rng):
    """The slow obvious version: a loop over all."""
    base = [perceptual_hash(noise(i)) for i in range(6)]
    looks = [
        replace(look, bits=look.bits ^ sum(1 << int(b) for b in rng.choice(256, int(flips), replace=False)))
        for look in base
        for flips in rng.integers(0, 7, 12)
    ]
    index = NearDuplicateIndex(3)
    for number, look in enumerate(looks):
        near = any(look.near(other, 3) for other in looks[:number])
        assert (index.find("key", (look,)) is not None) == near
        assert index.find("another key", (look,)) is None
        index.add("key", (look,), number)


def test_the_perceptual_hash_survives_scaling_and_compression(tmp_path):
    looks = [perceptual_hash(noise(seed, 96)) for seed in range(8)]
    for seed, look in enumerate(looks):
        picture = PIL.Image.fromarray(noise(seed, 96))
        picture.save(tmp_path / "a.jpg", quality=90)
        with PIL.Image.open(tmp_path / "a.jpg") as compressed:
            assert look.near(perceptual_hash(np.asarray(compressed)), 6)
        assert look.near(perceptual_hash(np.asarray(picture.resize((144, 144)))), 6)
        assert not any(look.near(other, 6) for place, other in enumerate(looks) if place != seed)


def test_names_and_texts_are_normalised():
    assert normalise("Is it  Red?\n") == normalise("is it red") != normalise("is it not red")
    assert normalise("(12, -3) cm") != normalise("(12, 3) cm")
    assert base_kind("success_positive") == base_kind("success_negative") == base_kind("success")


@pytest.mark.parametrize("change", [{"replay": 0.2}, {"general": ("a",)}, {"replay": 1.0, "general": ("a",)}])
def test_replay_needs_both_share_and_sources(change):
    with pytest.raises(BlmError, match="replay"):
        CurationConfig(**change)


def test_a_row_is_its_own_inverse(tmp_path):
    write_corpus(tmp_path / "c", [conversation("a", 3)])
    row = json.loads((tmp_path / "c" / CORPUS_FILE).read_text())
    assert parse_row(row, 1) == read_corpus(tmp_path / "c")[0]


def test_scenes_reserved_for_evaluation_are_counted_by_group():
    groups = (
        "scene/panda/push_cube/7",
        "scene/panda/push_cube/7",
        "episode/panda/push_cube/12000",
        "x/y",
        "a/b/c/1",
    )
    rows = [replace(conversation(str(i), 0), group=group) for i, group in enumerate(groups)]
    assert reserved_scenes(rows) == {"evaluation": 1}


def test_rows_tell_whether_their_scenes_were_randomized(tmp_path):
    rows = [conversation("a", training="randomized"), conversation("b", training="plain"), conversation("c")]
    write_corpus(tmp_path / "corpus", rows)
    assert [row.training for row in read_corpus(tmp_path / "corpus")] == ["randomized", "plain", "unknown"]
    stored = [json.loads(text) for text in (tmp_path / "corpus" / CORPUS_FILE).read_text().splitlines()]
    assert ["training" in row for row in stored] == [True, True, False]
    with pytest.raises(RowError, match="'training' is 'dark'; valid: plain, randomized"):
        parse_row({**stored[0], "training": "dark"}, 1)
