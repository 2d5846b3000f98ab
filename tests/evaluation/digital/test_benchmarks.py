"""Every benchmark: from a folder in its published layout to questions, and what is said of a bad folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from blm.cli.sharerobot import SplitShareRobot
from blm.evaluation.digital import BENCHMARKS, evaluate_digital
from blm.evaluation.digital.benchmarks.easy_vqa import load_split
from blm.evaluation.digital.benchmarks.erqa import options_in
from blm.evaluation.digital.benchmarks.pointing import with_convention
from blm.evaluation.digital.benchmarks.published import EGOTHINK_KINDS, SHAREROBOT_KINDS, SIX
from blm.evaluation.digital.benchmarks.sharerobot import evenly_spaced_frames
from blm.evaluation.digital.benchmarks.sharerobot_split import (
    HELD,
    KINDS,
    SPLIT,
    TRAINING,
    SplitConfig,
    read_split,
    split_sharerobot,
)
from blm.evaluation.digital.judge import MatchJudge
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.media import load_pixels, with_pixels
from blm.types import BlmError, Message, Question
from tests.support.benchmarks import (
    FIXTURES,
    THEIR_REQUEST,
    VARIANTS,
    make_cosmos,
    make_fixture,
    make_sharerobot,
    picture,
    sharerobot_rows,
    write_clip,
    write_json,
)

LOADED = sorted(set(BENCHMARKS) - {"scene", "scene_free"})
COUNTS = {"egothink": 24, "sharerobot": 40, "refspatial": 4, "easy_vqa": 6}
"""Questions in each made folder; three in the others."""
CASES = [*((name, name, FIXTURES[name]) for name in LOADED), *((v, *VARIANTS[v]) for v in VARIANTS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """All made folders, to be read only."""
    root = tmp_path_factory.mktemp("benchmarks")
    for case, _, make in CASES:
        make(root / case)
    return {case: root / case for case, _, _ in CASES}


def load(name: str, folder: Path) -> list[Question]:
    return BENCHMARKS[name].questions(folder)


@pytest.mark.parametrize(("case", "name"), [case[:2] for case in CASES])
def test_questions_are_whole(case, name, folders):
    benchmark, folder = BENCHMARKS[name], folders[case]
    questions = load(name, folder)
    assert len(questions) == COUNTS.get(name, 3)
    assert len({question.id for question in questions}) == len(questions)
    assert questions == load(name, folder)  # reading again changes nothing
    shown: dict[str, set[str]] = {}
    for question in questions:
        assert [m.role for m in question.messages] == ["user"] and question.messages[0].images
        assert question.messages[0].text.strip() and question.answer and question.kind
        assert all(image.path and image.pixels is None for image in question.messages[0].images)
        loaded = with_pixels(question.messages, folder)
        assert all(image.pixels is not None for image in loaded[0].images)
        if question.scorer == "choice":
            letters = [chr(65 + index) for index in range(len(question.options))]
            assert question.answer in letters and len(letters) >= 2
        assert (question.scorer == "points") == (question.mask is not None)
        for image in question.messages[0].images:
            shown.setdefault(str(image.path).partition("#t=")[0], set()).add(question.group)
    assert all(len(groups) == 1 for groups in shown.values())  # one picture, one cluster
    assert set(benchmark.long) <= {question.kind for question in questions}


class Oracle:
    """Knows every answer by the words and the pictures of its question, and says what it was asked with."""

    def __init__(self, questions: list[Question], folder: Path) -> None:
        self.answers = {}
        for question in questions:
            said = question.answer
            if question.mask is not None:
                white = load_pixels(question.mask, folder)[..., 0] > 127
                said = "[(250, 250), (100, 50)]" if white[0, 0] else "[(750, 750)]"
            self.answers[self.key(with_pixels(question.messages, folder)[-1])] = said
        self.systems: set[str] = set()
        self.limits: set[int] = set()

    @staticmethod
    def key(message: Message) -> tuple[str, ...]:
        pictures = (
            hashlib.sha256(np.asarray(image.pixels).tobytes()).hexdigest() for image in message.images
        )
        return message.text, *pictures

    def answer(self, messages, *, max_tokens: int = 128) -> str:
        self.systems.add("".join(m.text for m in messages if m.role == "system"))
        self.limits.add(max_tokens)
        return self.answers[self.key(messages[-1])]


class Silent(Oracle):
    def answer(self, messages, *, max_tokens: int = 128) -> str:
        return ""


@pytest.mark.parametrize(("case", "name"), [case[:2] for case in CASES])
def test_end_to_end(case, name, folders, tmp_path):
    """From the published folder to the result: the answers themselves score 1, silence scores 0."""
    benchmark, folder = BENCHMARKS[name], folders[case]
    questions = load(name, folder)
    for score, make in ((1.0, Oracle), (0.0, Silent)):
        chat = make(questions, folder)
        result = evaluate_digital(
            chat,
            questions,
            tmp_path / make.__name__,
            model="made",
            benchmark=benchmark,
            judge=MatchJudge(),
            config=DigitalEvalConfig(root=folder),
        )
        assert result.summary.headline.rate == pytest.approx(score)
        assert result.summary.overall.n == len(questions)
        if make is Oracle:
            assert chat.systems == {benchmark.system}
            assert chat.limits == {benchmark.max_tokens, *benchmark.long.values()}


def test_kinds_are_those_of_the_paper(folders):
    for name, kinds in (("egothink", EGOTHINK_KINDS), ("sharerobot", SHAREROBOT_KINDS)):
        assert {question.kind for question in load(name, folders[name])} == set(kinds)
    assert set(SIX) < set(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_record_and_missing_folder(name, tmp_path):
    benchmark = BENCHMARKS[name]
    assert benchmark.name == name and benchmark.title and benchmark.licence
    assert re.search(r"hf download|git clone|pip install|blm corpus", benchmark.get)
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "none", empty):  # an existing folder without the data says the same
        with pytest.raises(BlmError) as error:
            benchmark.questions(folder)
        assert benchmark.get in str(error.value) and str(folder) in str(error.value)


def test_scene_questions_are_given(tmp_path):
    folder = make_fixture("scene", tmp_path / "corpus")
    for name in ("scene", "scene_free"):
        with pytest.raises(BlmError, match="come from a corpus"):
            load(name, folder)


def test_cosmos_asks_as_published(folders):
    first, second, third = load("robovqa", folders["robovqa"])
    assert BENCHMARKS["robovqa"].system == "Answer the questions."
    assert first.messages[0].text == (
        "What is next?\n(A) lift\n(B) push\n(C) pull\n(D) wait\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.answer, second.answer, third.answer) == ("C", "B", "A")
    assert first.options == ("lift", "push", "pull", "wait") and second.options == ("yes", "no")
    assert first.group != second.group == third.group  # two questions about one clip
    assert first.id != second.id != third.id


@pytest.mark.parametrize(("rate", "frames"), [(1, 1), (1, 2), (2, 3), (2, 12)])
def test_no_frame_of_a_clip_is_shown_twice(tmp_path, rate, frames):
    """A clip with few frames a second gives as many pictures as it has frames, in their order."""
    make_fixture("robofail", tmp_path)
    write_clip(tmp_path / "robofail/clips/clip-0.mp4", 0, seconds=frames / rate, rate=rate)
    (first, *_) = load("robofail", tmp_path)
    shown = [load_pixels(image, tmp_path) for image in first.messages[0].images]
    assert len(shown) == min(frames, 8)
    brightness = [int(pixels[..., 1].mean()) for pixels in shown]
    assert brightness == sorted(set(brightness))


def test_cosmos_shows_four_frames_a_second_and_at_most_eight(folders):
    short, long, _ = load("agibot", folders["agibot"])
    assert len(short.messages[0].images) == 4 and len(long.messages[0].images) == 8
    paths = [str(image.path) for image in long.messages[0].images]
    assert all(path.startswith("agibot/clips/clip-1.mp4#t=") for path in paths)
    pictures = [load_pixels(image, folders["agibot"]) for image in long.messages[0].images]
    brightness = [float(np.mean(pixels)) for pixels in pictures]
    assert brightness == sorted(brightness) and brightness[-1] > brightness[0] + 50  # in order of time


def test_egothink_dimensions_lengths_and_mean(folders):
    benchmark, questions = BENCHMARKS["egothink"], load("egothink", folders["egothink"])
    kinds = [kind for kind, _ in itertools.groupby(question.kind for question in questions)]
    assert len(kinds) == 12 and kinds[:3] == ["activity", "forecast", "location"]
    assert benchmark.max_tokens == 30 and benchmark.long == {"assistance": 300, "navigation": 300}
    assert benchmark.average == "kinds" and {question.scorer for question in questions} == {"judge"}
    texts = {question.kind: question.messages[0].text for question in questions}
    assert "briefly" in texts["activity"] and "in detail" in texts["navigation"]


def test_sharerobot_kinds_scorers_and_groups(folders):
    questions = load("sharerobot", folders["sharerobot"])
    assert {question.kind for question in questions} == set(KINDS)
    for question in questions:
        sign = question.kind.rpartition("_")[2]
        if sign in ("positive", "negative"):
            assert question.answer == {"positive": "yes", "negative": "no"}[sign]
            assert question.scorer == "exact" and question.messages[0].text.endswith("Answer yes or no.")
        else:
            assert question.scorer == "judge"
            assert question.messages[0].text.startswith(f"{question.kind} <step")
        assert "<image>" not in question.messages[0].text
        assert question.group in question.id and "#episode_" in question.group


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 30])
def test_spread_takes_both_ends(count):
    values = [str(number) for number in range(count)]
    chosen = evenly_spaced_frames(values, 8)
    assert len(chosen) == min(8, count) and chosen[0] == "0" and chosen[-1] == values[-1]
    assert chosen == sorted(set(chosen), key=int)


def test_erqa_interleaves(folders):
    for case in ("erqa", "erqa_lines"):
        plain, mixed, again = load("erqa", folders[case])
        content = mixed.messages[0].content
        assert [isinstance(part, str) for part in content] == [True, False, True, False, True]
        assert content[2] == "the first or " and str(content[4]).startswith("the second?")
        shown = [load_pixels(image, folders[case]) for image in mixed.messages[0].images]
        assert all(np.array_equal(shown[n], picture(n + 1)) for n in (0, 1))
        assert not isinstance(plain.messages[0].content[0], str)  # zeros: pictures first
        assert plain.group == again.group != mixed.group
        assert mixed.options == ("The first", "The second", "Neither")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Go? Choices: A. Up. B. Down. Please answer directly.", ("Up", "Down")),
        ("Go? Choices:\nA. Up\nB. Vitamin C. tablets\nC. No", ("Up", "Vitamin", "tablets\nC. No")),
        ("Which plan? A. B. C. Choices: A. A B. B C. C", ("A", "B", "C")),
        ("Go? Options: A. Up. B. Down.", ("Up", "Down")),
        ("No choices here", ()),
    ],
)
def test_options_in_a_question(text, options):
    assert options_in(text) == options


def test_points_are_asked_in_one_convention(folders):
    for case, name in (("where2place", "where2place"), ("refspatial", "refspatial")):
        for question in load(name, folders[case]):
            assert THEIR_REQUEST not in question.messages[0].text
            assert "from 0 to 1000" in question.messages[0].text
            number = int(question.id.rpartition("/")[2])
            white = load_pixels(question.mask, folders[case])[..., 0] > 127
            assert white[0, 0] == (number % 2 == 0) and white[-1, -1] == (number % 2 == 1)


@pytest.mark.parametrize(
    ("convention", "form", "words"),
    [
        ("unit", "[(x, y)]", "from 0 to 1 over"),
        ("pixels", "[(x, y)]", "are pixels"),
        ("yx1000", "[(y, x)]", "from 0 to 1000 over"),
    ],
)
def test_points_can_be_asked_in_another_convention(convention, form, words, folders):
    for question in load("refspatial", folders["refspatial"]):
        text = with_convention(question, convention).messages[0].text
        assert form in text and words in text and text.startswith("Please point out the square next to")
        assert with_convention(question, "thousandths") == question
    several = with_convention(load("where2place", folders["where2place"])[0], "yx1000").messages[0].text
    assert "[(y1, x1), (y2, x2), ...]" in several
    with pytest.raises(BlmError, match="unknown coordinates 'feet'"):
        with_convention(question, "feet")


def test_refspatial_leaves_unseen_out(folders):
    kinds = {question.kind for question in load("refspatial", folders["refspatial_parquet"])}
    assert kinds == {"location", "placement"} and BENCHMARKS["refspatial"].average == "kinds"


def test_unpacked_pictures_are_written_once(tmp_path):
    folder = make_fixture("erqa", tmp_path / "erqa")
    load("erqa", folder)
    files = {file: file.stat().st_mtime_ns for file in (folder / "unpacked").iterdir()}
    assert len(files) == 3  # of four: two are equal
    load("erqa", folder)
    assert files == {file: file.stat().st_mtime_ns for file in (folder / "unpacked").iterdir()}


def test_folder_that_takes_no_pictures(tmp_path):
    folder = make_fixture("erqa", tmp_path / "erqa")
    (folder / "unpacked").write_text("in the way")
    with pytest.raises(BlmError, match=r"cannot write to '.*unpacked': a file is where a folder should be"):
        load("erqa", folder)


def test_easy_vqa_of_the_package():
    folder = Path(pytest.importorskip("easy_vqa").__file__).parent
    questions = load("easy_vqa", folder)
    assert len(questions) == 9673 and len({question.group for question in questions}) == 1000
    assert {question.kind for question in questions} == {"yes_no", "shape", "colour"}
    assert len({question.answer for question in questions}) == 13
    assert len(load_split(folder, "train")) == 38575


# ----------------------------------------------------------------------------------------------- bad data


def rewrite(file: Path, change) -> None:
    rows = json.loads(file.read_text())
    change(rows)
    write_json(file, rows)


BAD_COSMOS = {
    "letter 'E'|'E' is not the letter": lambda rows: rows[1]["qa_pairs"][0].update(correct_answer="E"),
    "two|'AB' is not the letter": lambda rows: rows[1]["qa_pairs"][0].update(correct_answer="AB"),
    "no answer|field 'correct_answer' is missing": lambda rows: rows[1]["qa_pairs"][0].pop("correct_answer"),
    "no text|field 'question' is ''": lambda rows: rows[1]["qa_pairs"][0].update(question=""),
    "gap|has the letters A, C": lambda rows: rows[1]["qa_pairs"][0].update(index2ans={"A": "x", "C": "y"}),
    "one|two or more options": lambda rows: rows[1]["qa_pairs"][0].update(index2ans={"A": "x"}),
    "gone|clips/none.mp4' is not in": lambda rows: rows[1].update(video="clips/none.mp4"),
    "out|is outside": lambda rows: rows[1].update(video="../../x.mp4"),
    "text|it is 'x'; needed: an object": lambda rows: rows.__setitem__(1, "x"),
    "pair|qa_pairs holds 'x'": lambda rows: rows[1].update(qa_pairs=["x"]),
}


@pytest.mark.parametrize("case", BAD_COSMOS)
def test_bad_row_is_named(case, tmp_path):
    make_cosmos(tmp_path, "robofail")
    file = tmp_path / "robofail/robofail_benchmark_qa_pairs.json"
    rewrite(file, BAD_COSMOS[case])
    with pytest.raises(BlmError, match=re.escape(case.partition("|")[2])) as error:
        load("robofail", tmp_path)
    assert f"{file}, row 2" in str(error.value)


@pytest.mark.parametrize("content", ["", "[", "[]", "{}", "3", "\xff\xfe"])
def test_file_without_rows(content, tmp_path):
    make_cosmos(tmp_path, "robofail")
    file = tmp_path / "robofail/robofail_benchmark_qa_pairs.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(BlmError, match=r"cannot read|has no rows") as error:
        load("robofail", tmp_path)
    assert str(file) in str(error.value)


def test_broken_clip_is_named(tmp_path):
    make_cosmos(tmp_path, "robofail")
    (tmp_path / "robofail/clips/clip-1.mp4").write_bytes(b"no video")
    with pytest.raises(BlmError, match=r"row 2: cannot read video .*clip-1"):
        load("robofail", tmp_path)


def test_cut_lines_and_cut_parquet(tmp_path):
    folder = make_fixture("where2place", tmp_path / "w")
    file = folder / "point_questions.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(BlmError, match=r"point_questions.jsonl': row 3"):
        load("where2place", folder)
    folder = make_fixture("erqa", tmp_path / "e")
    file = next((folder / "data").iterdir())
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(BlmError, match=r"cannot read .*parquet"):
        load("erqa", folder)


def test_questions_without_clips(tmp_path):
    make_cosmos(tmp_path, "agibot")
    shutil.rmtree(tmp_path / "agibot/clips")
    with pytest.raises(BlmError, match=r"has questions but no clips.*process_raw_data.py"):
        load("agibot", tmp_path)


def test_unknown_and_missing_dimension(tmp_path):
    folder = make_fixture("egothink", tmp_path / "e")
    shutil.copytree(folder / "Activity", folder / "Dreams")
    with pytest.raises(BlmError, match=r"Dreams' is not a dimension.*Reasoning/situated"):
        load("egothink", folder)
    shutil.rmtree(folder / "Dreams")
    shutil.rmtree(folder / "Object/existence")
    with pytest.raises(BlmError, match=r"Object/existence/annotations.json' is missing"):
        load("egothink", folder)


def test_missing_pictures_are_named(tmp_path):
    for name, file, place in (
        ("egothink", "Forecast/images/2.jpg", "Forecast/annotations.json, row 2"),
        ("where2place", "masks/01.jpg", "point_questions.jsonl, row 2"),
        ("refspatial", "Placement/mask/0.png", "Placement/question.json, row 1"),
        ("easy_vqa", "data/test/images/1.png", "data/test/questions.json, row 4"),
    ):
        folder = make_fixture(name, tmp_path / name)
        (folder / file).unlink()
        with pytest.raises(BlmError) as error:
            load(name, folder)
        assert place in str(error.value) and Path(file).name in str(error.value)


def test_bad_sharerobot_rows(tmp_path):
    folder = make_fixture("sharerobot", tmp_path / "s")
    file = folder / "planning/test/planning_task.json"
    rows = json.loads(file.read_text())
    for change, message in (
        ({"task": "Dreaming_Task"}, "task 'Dreaming_Task' is unknown; valid: discriminative"),
        ({"image": rows[2]["image"][:2]}, "3 <image> marks for 2 pictures"),
        ({"conversations": rows[2]["conversations"][::-1]}, "turns are from gpt, human"),
        ({"conversations": "x"}, "field 'conversations' is 'x'"),
        ({"image": [f"{name}x" for name in rows[2]["image"]]}, "frame_0.pngx' is not in"),
    ):
        write_json(file, [*rows[:2], rows[2] | change, *rows[3:]])
        with pytest.raises(BlmError, match=re.escape(message)) as error:
            load("sharerobot", folder)
        assert f"{file}, row 3" in str(error.value)


def test_bad_erqa_and_easy_vqa_rows(tmp_path):
    folder = tmp_path / "lines"
    VARIANTS["erqa_lines"][1](folder)
    rows = [json.loads(line) for line in (folder / "erqa.jsonl").read_text().splitlines()]
    for change, message in (
        ({"visual_indices": [3]}, "visual_indices [3] for 2 pictures"),
        ({"answer": "E"}, "answer 'E' is not the letter of an option; valid: A, B, C"),
        ({"question": "Which?"}, "lists no options"),
        ({"images": []}, "field 'images' is '[]'"),
    ):
        changed = [rows[0], rows[1] | change]
        (folder / "erqa.jsonl").write_text("\n".join(json.dumps(row) for row in changed))
        with pytest.raises(BlmError, match=re.escape(message)):
            load("erqa", folder)
    folder = make_fixture("easy_vqa", tmp_path / "easy")
    for value, message in (
        (["a", "green", 0], "'green' is not in answers"),
        (["a"], "needed: [question,"),
    ):
        write_json(folder / "data/test/questions.json", [value])
        with pytest.raises(BlmError, match=re.escape(message)):
            load("easy_vqa", folder)


# ------------------------------------------------------------------------------------- the ShareRobot split


@pytest.fixture
def published(tmp_path) -> Path:
    """Training files of twelve episodes with three questions of each kind; the last one lacks a kind."""
    folder = tmp_path / "share"
    make_sharerobot(folder, "train", range(12), templates=3, frames=2)
    file = folder / "planning/train/planning_task.json"
    write_json(file, sharerobot_rows("planning", range(11), 3, 2))
    return folder


def test_split_is_exact_disjoint_and_asked(published):
    summary = split_sharerobot(published, SplitConfig(episodes=4))
    assert summary.questions == 4 * 2 * 10 and summary.training_episodes == 8
    held, left = (set(json.loads((published / name).read_text())["ids"]) for name in (SPLIT, TRAINING))
    assert len(held) == 4 and not held & left and len(held | left) == 12
    questions = load("sharerobot", published)
    assert {question.group for question in questions} == held
    for kind in KINDS:
        for episode in held:
            assert sum(q.kind == kind and q.group == episode for q in questions) == 2
    assert len({(q.kind, q.messages) for q in questions}) == 80  # no template twice


def move_away(folder: Path) -> None:
    """What a user does with an old split, as the error says."""
    for number, name in enumerate((SPLIT, TRAINING, HELD)):
        (folder / name).rename(folder / f"old-{number}-{len(list(folder.iterdir()))}")


def test_a_list_of_others_in_the_place_of_a_split_is_kept(published):
    (published / TRAINING).write_text('["mine"]')
    with pytest.raises(BlmError, match=r"training.json' exists with other content; move it away"):
        split_sharerobot(published, SplitConfig(episodes=4))
    assert (published / TRAINING).read_text() == '["mine"]' and not (published / HELD).exists()
    (published / TRAINING).rename(published / "theirs.json")
    split_sharerobot(published, SplitConfig(episodes=4))
    (published / SPLIT).unlink()  # as after a kill before the last file
    assert split_sharerobot(published, SplitConfig(episodes=4)).questions == 80


def test_split_is_a_function_of_seed_and_data(published):
    def draw(folder: Path, **changes) -> bytes:
        split_sharerobot(folder, SplitConfig(episodes=4, **changes))
        files = [folder / TRAINING, *sorted((folder / HELD).iterdir())]
        assert len(files) == 11
        drawn = b"".join(file.read_bytes() for file in files)
        move_away(folder)
        return drawn

    first = draw(published)
    assert draw(published) == first != draw(published, seed=1)
    for file in (published / "planning/train").iterdir():  # the order of the rows is nothing
        rewrite(file, list.reverse)
    assert draw(published) == first


def test_split_excludes_what_was_trained_on(published):
    split_sharerobot(published, SplitConfig(episodes=4))
    old = read_split(published)
    move_away(published)
    used = {str(row.data["id"]).partition("rt_frames_success/")[2] for row in old}
    split_sharerobot(published, SplitConfig(episodes=4), exclude=used)
    assert not used & set(json.loads((published / SPLIT).read_text())["ids"])
    move_away(published)
    with pytest.raises(BlmError, match=r"7 of 12 episodes .* needed: 8"):
        split_sharerobot(published, SplitConfig(episodes=8), exclude=used)


def test_leak_is_refused(published):
    split_sharerobot(published, SplitConfig(episodes=4))
    file = published / TRAINING
    content = json.loads(file.read_text())
    leaked = json.loads((published / SPLIT).read_text())["ids"][0]
    for name in (leaked, f"/mnt/elsewhere/rt_frames_success/{leaked}"):  # however it is written
        write_json(file, content | {"ids": [*content["ids"], name]})
        with pytest.raises(BlmError, match="1 held-out episodes are also trained on"):
            load("sharerobot", published)
    file.unlink()
    with pytest.raises(BlmError, match=r"cannot read .*training.json"):  # no list, no proof
        load("sharerobot", published)


def test_split_sees_pictures_of_other_episodes(published):
    """A row that shows frames of a second episode makes both unfit: its id alone would not tell."""
    file = published / "planning/train/success_(positive)_task.json"
    rows = json.loads(file.read_text())
    rows[0]["image"] = rows[-1]["image"]
    write_json(file, rows)
    with pytest.raises(BlmError, match="10 of 12 episodes"):  # 12, less one without a kind, less episode 0
        split_sharerobot(published, SplitConfig(episodes=11))


def test_split_is_not_overwritten_nor_cut(published):
    split_sharerobot(published, SplitConfig(episodes=1))
    with pytest.raises(BlmError, match=r"split.json' exists"):
        split_sharerobot(published, SplitConfig(episodes=1))
    rewrite(published / HELD / "planning.json", list.pop)
    with pytest.raises(BlmError, match=r"split.json' does not fit the 19 rows"):
        load("sharerobot", published)


def test_held_out_rows_convert_like_the_published_ones(published, tmp_path):
    """So that the leak check of curation knows them: it compares groups."""
    from blm.corpora import convert, read_corpus

    split_sharerobot(published, SplitConfig(episodes=4))
    groups = {}
    for part in ("train", "heldout"):
        convert("sharerobot", published / "planning" / part, tmp_path / part)
        groups[part] = {conversation.group for conversation in read_corpus(tmp_path / part)}
    assert groups["heldout"] == {question.group for question in load("sharerobot", published)}
    left = set(json.loads((published / TRAINING).read_text())["ids"])
    assert groups["train"] - groups["heldout"] == left


def test_split_command(published, capsys):
    SplitShareRobot.parse("sharerobot", [str(published), "--episodes", "3", "--seed", "5"]).run([])
    printed = capsys.readouterr().out
    assert "60 questions held out (3 x 2 x 10 kinds, seed 5)" in printed and "9 episodes left" in printed
    assert len(load("sharerobot", published)) == 60


def test_clip_without_length_still_shows_a_frame(tmp_path):
    make_cosmos(tmp_path, "robofail")
    write_clip(tmp_path / "robofail/clips/clip-0.mp4", 0, seconds=0.125)
    assert len(load("robofail", tmp_path)[0].messages[0].images) == 1
