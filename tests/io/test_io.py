"""Files and folders through kills at every step, two writers at once, full disks and other people's data."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm import io
from blm.types import BlmError
from tests.support.kills import killed_at


def each_kill(work, check, *, exchange: bool = True, most: int = 200) -> int:
    """Kill `work` at its first step, its second, ..; `check` each time; return the number of kills."""
    for step in range(1, most):
        if not killed_at(step, work, exchange=exchange):
            return step - 1
        check()
    raise AssertionError("it never ends")


def tree(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in io.files_below(folder)}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# --- files ---


def test_a_killed_writer_leaves_the_old_or_the_new_file_and_the_next_one_cleans_up(tmp_path):
    file = tmp_path / "state.json"
    io.write_json(file, {"version": 0})
    seen = set()

    def check():
        seen.add(io.read_json(file)["version"])
        io.write_json(file, {"version": 0})
        assert hidden(tmp_path) == []

    kills = each_kill(lambda: io.write_json(file, {"version": 1, "more": "x" * 100}), check)
    assert kills >= 4 and seen == {0, 1}


def test_a_file_that_is_new_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "text.txt"
    each_kill(
        lambda: io.write_text(file, "all of it"),
        lambda: (not file.exists() or file.read_text() == "all of it") or pytest.fail("half a file"),
    )
    io.write_text(file, "all of it")
    assert tree(tmp_path) == {"new/text.txt": "all of it"}


def test_permissions_follow_the_umask_and_those_of_the_file_before(tmp_path):
    before = os.umask(0o027)
    try:
        io.write_text(tmp_path / "a", "")
        (tmp_path / "b").write_text("")
        (tmp_path / "b").chmod(0o604)
        io.write_text(tmp_path / "b", "new")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes == [0o640, 0o604]


def test_a_link_stays_a_link_and_what_it_names_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/real")
    io.write_text(tmp_path / "link", "one")
    io.write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far/real").read_text() == "two"
    assert hidden(tmp_path) == []


def test_an_error_in_the_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    io.write_json(file, 1)
    with pytest.raises(ZeroDivisionError), io.replacing(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        io.write_json(file, object())
    assert tree(tmp_path) == {"a.json": "1\n"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_named(tmp_path, code):
    refused = pytest.raises(BlmError, match=r"cannot write to '.*': the (disk|file system)")
    with refused, io.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))
    assert tree(tmp_path) == {}


def test_a_read_error_is_not_reported_as_a_write_error(tmp_path):
    with pytest.raises(FileNotFoundError), io.replacing(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    with pytest.raises(FileNotFoundError), io.new_folder(tmp_path / "b"):
        (tmp_path / "missing").read_text()


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(BlmError, match="a folder is where a file should be"):
        io.write_text(tmp_path / "a", "")


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path):
    def write(number):
        for _ in range(20):
            io.write_text(tmp_path / "a", f"{number}" * 5000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "a").read_text())) == 1 and hidden(tmp_path) == []


def test_the_temporary_file_of_a_living_process_stays(tmp_path):
    with io.replacing(tmp_path / "a") as mine:
        mine.write_text("mine")
        io.write_text(tmp_path / "a", "another's")
        assert mine.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "mine"


def test_files_with_like_names_that_are_not_ours_stay(tmp_path):
    names = (
        ".a.part",
        ".a.tmp",
        ".a.123-4-5.part",
        "a.tmp",
        ".a.zzzzzzzz-1-1-1.part",
        ".b.00000000-1-1-1.part",
    )
    for name in names:
        (tmp_path / name).write_text("theirs")
    io.write_text(tmp_path / "a", "ours")
    assert tree(tmp_path) == {"a": "ours", **dict.fromkeys(names, "theirs")}


# --- folders ---


def fill(folder: Path, version: int) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.txt").write_text(f"{version}")
    (folder / "sub/b.txt").write_text(f"{version}")


def replace(target: Path, version: int) -> None:
    with io.new_folder(target, written=lambda folder: {"a.txt", "sub/b.txt"}) as work:
        fill(work, version)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_killed_swap_leaves_the_old_or_the_new_folder(tmp_path, exchange):
    target = tmp_path / "made"
    replace(target, 0)
    (target / "notes.txt").write_text("mine")
    seen = set()

    def check():
        io.recover_folder(target)
        found = tree(target)
        assert len({found["a.txt"], found["sub/b.txt"]}) == 1 and found["notes.txt"] == "mine"
        seen.add(found["a.txt"])
        replace(target, 0)
        assert hidden(tmp_path) == []

    kills = each_kill(lambda: replace(target, 1), check, exchange=exchange)
    assert kills > 15 and seen == {"0", "1"}


def test_a_killed_new_folder_is_whole_or_missing(tmp_path):
    target = tmp_path / "deep/made"
    for resume in (False, True):

        def make(resume=resume):
            with io.new_folder(target, resume=resume) as work:
                fill(work, 1)

        def check(make=make):
            if target.exists():
                io.recover_folder(target)
                assert tree(target) == {"a.txt": "1", "sub/b.txt": "1"}
                with io.new_folder(target, written=io.files_below) as work:
                    fill(work, 1)
            else:
                make()
            assert hidden(tmp_path) == []
            (target / "a.txt").unlink(), (target / "sub/b.txt").unlink()
            (target / "sub").rmdir(), target.rmdir()

        assert each_kill(make, check) > 5
        assert tree(target) == {"a.txt": "1", "sub/b.txt": "1"}
        with pytest.raises(BlmError, match="made' exists; move it away"):
            make()
        for name in io.files_below(target):
            (target / name).unlink()
        (target / "sub").rmdir(), target.rmdir()


def test_a_resumed_call_gets_the_stored_files(tmp_path):
    def die(folder):
        with io.new_folder(folder, resume=True) as work:
            (work / "picture").write_text("large")
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        die(tmp_path / "made")
    os.waitpid(child, 0)
    with io.new_folder(tmp_path / "made", resume=True) as work:
        assert tree(work).pop("picture") == "large"
    assert tree(tmp_path / "made") == {"picture": "large"} and hidden(tmp_path) == []


def test_an_error_leaves_no_half_folder(tmp_path):
    for resume in (False, True):
        with pytest.raises(ZeroDivisionError), io.new_folder(tmp_path / "made", resume=resume) as work:
            fill(work, 1)
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@contextmanager
def unproved(target):
    def refuse(folder):
        raise BlmError(f"'{folder}' is not ours")

    with io.new_folder(target, written=refuse) as work:
        yield work


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "data").write_text("precious")
    for way in (io.new_folder, unproved):
        with pytest.raises(BlmError), way(target) as work:
            fill(work, 1)
    assert tree(tmp_path) == {"theirs/data": "precious"}


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with (
        pytest.raises(BlmError, match=r"another process put a folder"),
        io.new_folder(tmp_path / "made") as work,
    ):
        fill(work, 1)
        (tmp_path / "made").mkdir()
        (tmp_path / "made/data").write_text("precious")
    assert tree(tmp_path) == {"made/data": "precious"} and hidden(tmp_path) == []


def test_other_files_in_a_replaced_folder_are_kept(tmp_path):
    target = tmp_path / "made"
    replace(target, 1)
    (target / "notes/deep").mkdir(parents=True)
    (target / "notes/deep/n.txt").write_text("mine")
    (target / "link").symlink_to("/nowhere")
    with io.new_folder(target, written=lambda folder: {"a.txt"}) as work:
        fill(work, 2)
    found = io.files_below(target)
    assert found == ["a.txt", "link", "notes/deep/n.txt", "sub/b.txt", "sub/b.txt.kept"]
    assert (target / "sub/b.txt.kept").read_text() == "1" and (target / "link").is_symlink()


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    replace(tmp_path / "disk/real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "disk/real")
    replace(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/real/a.txt").read_text() == "2"
    assert hidden(tmp_path) == []


def test_two_processes_that_replace_one_folder_leave_one_whole_one(tmp_path):
    target = tmp_path / "made"
    replace(target, 0)
    children = []
    for version in (1, 2, 3):
        if (child := os.fork()) == 0:
            try:
                for _ in range(15):
                    replace(target, version)
            except BlmError:
                pass
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    io.recover_folder(target)
    found = tree(target)
    assert found["a.txt"] == found["sub/b.txt"]
    replace(target, 9)
    assert tree(target) == {"a.txt": "9", "sub/b.txt": "9"} and hidden(tmp_path) == []


# --- removing ---


def test_only_marked_folders_are_removed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/data").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for name in ("theirs", "link", "nothing"):
        with pytest.raises(BlmError, match="nothing in it shows that this program created it"):
            io.remove_own(tmp_path / name)
    assert tree(tmp_path / "theirs") == {"data": "precious"}


def test_links_inside_are_removed_and_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/data").write_text("precious")
    work = io.work_folder(tmp_path / "work", "staging", {})
    (work / "folder").symlink_to(tmp_path / "theirs")
    (work / "file").symlink_to(tmp_path / "theirs/data")
    assert io.remove_own(work)
    assert tree(tmp_path) == {"theirs/data": "precious"}


def test_files_of_others_in_a_work_folder_stay(tmp_path):
    work = io.work_folder(tmp_path / "work", "staging", {})
    (work / "a/b").mkdir(parents=True)
    (work / "a/b/part.npz").write_text("")
    (work / "a/notes.txt").write_text("mine")
    assert not io.remove_own(work, lambda name: name.suffix == ".npz")
    assert set(tree(work)) == {"a/notes.txt", io.MARK}
    (work / "a/notes.txt").unlink()
    assert io.remove_own(work, lambda name: name.suffix == ".npz") and not work.exists()


def test_a_killed_removal_can_be_finished(tmp_path):
    def make():
        work = io.work_folder(tmp_path / "work", "staging", {})
        fill(work, 1)

    def check():
        if (tmp_path / "work").exists():
            io.remove_own(tmp_path / "work")
        make()

    make()
    assert each_kill(lambda: io.remove_own(tmp_path / "work"), check) > 3


def test_a_work_folder_belongs_to_its_settings_and_to_us(tmp_path):
    io.work_folder(tmp_path / "work", "staging", {"size": 1})
    io.work_folder(tmp_path / "work", "staging", {"size": 1})
    with pytest.raises(BlmError, match="unfinished work of other settings"):
        io.work_folder(tmp_path / "work", "staging", {"size": 2})
    with pytest.raises(BlmError, match="did not create it"):
        io.work_folder(tmp_path / "work", "shards", {"size": 1})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/data").write_text("precious")
    with pytest.raises(BlmError, match="did not create it"):
        io.work_folder(tmp_path / "theirs", "staging", {})
    assert tree(tmp_path / "theirs") == {"data": "precious"}


def test_a_run_folder_is_held_by_one_process(tmp_path):
    with io.lock_folder(tmp_path / "run"):
        if (child := os.fork()) == 0:
            try:
                with io.lock_folder(tmp_path / "run"):
                    os._exit(1)
            except BlmError as error:
                os._exit(0 if "another process is using" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0
    with io.lock_folder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


# --- any order of things ---

names = st.sampled_from(["a", "b/c", "b/d", "e"])


@settings(max_examples=40, deadline=None)
@given(
    before=st.dictionaries(names, st.text("xyz"), min_size=1),
    mine=st.sets(names),
    after=st.dictionaries(names, st.text("xyz")),
)
def test_no_file_is_lost_that_we_did_not_write(tmp_path_factory, before, mine, after):
    target = tmp_path_factory.mktemp("any") / "made"
    for name, text in before.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    with io.new_folder(target, written=lambda folder: mine) as work:
        for name, text in after.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
    found = tree(target)
    assert {name: found[name] for name in after} == after
    for name, text in before.items():
        if name not in mine:
            assert found[f"{name}.kept" if name in after else name] == text
    assert json.dumps(found) and len(found) == len(after) + len(set(before) - mine)
