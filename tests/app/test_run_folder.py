"""Run folders of stages: refused before anything is written, corrected where nothing is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blm.app.pipeline import LEDGER, RECIPE, Stage, differences, read_ledger, run_stages
from blm.app.recipes import RECIPES
from blm.io import lock_folder
from blm.types import BlmError

CI = RECIPES["ci"]()
OTHER = replace(CI, corpus=replace(CI.corpus, turns=9))


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stages(act: Callable[[Any, Path], None] = lambda recipe, folder: None) -> dict[str, Stage]:
    def first(recipe: Any, folder: Path) -> None:
        (folder / "first").mkdir(exist_ok=True)
        (folder / "first/turns").write_text(str(recipe.corpus.turns))
        act(recipe, folder)

    return {
        "a": Stage("a", "first", ("corpus",), (), first, ("first",)),
        "b": Stage("b", "second", ("stage1",), ("a",), lambda recipe, folder: None),
    }


def refuse(recipe: Any, folder: Path) -> None:
    raise BlmError("this flag is refused")


def test_a_finished_stage_of_other_settings_is_refused_before_anything_is_written(tmp_path):
    run_stages(stages(), ["a"], CI, tmp_path)
    before = written(tmp_path)
    for names in (["a"], ["b"], ["a", "b"]):  # also where the finished stage is only read
        with pytest.raises(BlmError, match=r"'a' is finished with corpus.turns 4, asked for: 9"):
            run_stages(stages(), names, OTHER, tmp_path)
        assert written(tmp_path) == before
    run_stages(stages(), ["a", "b"], CI, tmp_path)


def test_a_missing_input_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BlmError, match="'b' needs the result of a"):
        run_stages(stages(), ["b"], CI, tmp_path)
    assert written(tmp_path) == {}


def test_a_refused_flag_can_be_corrected(tmp_path):
    for recipe in (OTHER, replace(OTHER, image_size=64), CI):
        with pytest.raises(BlmError, match="this flag is refused"):
            run_stages(stages(refuse), ["a"], recipe, tmp_path)
    run_stages(stages(), ["a"], CI, tmp_path)
    assert (
        read_ledger(tmp_path)["a"].done
        and json.loads((tmp_path / RECIPE).read_text())["corpus"]["turns"] == 4
    )


def test_unfinished_work_of_other_settings_moves_aside_and_is_not_used(tmp_path):
    with pytest.raises(BlmError, match="refused"):
        run_stages(stages(refuse), ["a"], OTHER, tmp_path)
    run_stages(stages(), ["a"], CI, tmp_path)
    assert (tmp_path / "first/turns").read_text() == "4"
    assert (tmp_path / "first.unfinished-1/turns").read_text() == "9"


def test_a_run_with_equal_settings_resumes(tmp_path):
    with pytest.raises(BlmError, match="refused"):
        run_stages(stages(refuse), ["a"], CI, tmp_path)
    (tmp_path / "first/half").write_text("done")
    run_stages(stages(), ["a"], CI, tmp_path)
    assert (tmp_path / "first/half").exists() and not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("name", [RECIPE, LEDGER])
@pytest.mark.parametrize("content", ['{"eggs": 3}', "[1, 2]", "a pancake", '{"a": {"b": 1}}'])
def test_files_of_others_are_kept(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(BlmError, match=name):
        run_stages(stages(), ["a"], CI, tmp_path)
    assert written(tmp_path) == {name: content.encode()}


def test_a_ledger_of_an_older_version_shows_the_differences(tmp_path):
    run_stages(stages(), ["a"], CI, tmp_path)
    ledger = json.loads((tmp_path / LEDGER).read_text())
    del ledger["a"]["settings"]
    (tmp_path / LEDGER).write_text(json.dumps(ledger))
    with pytest.raises(BlmError, match=r"corpus.turns 4, asked for: 9"):
        run_stages(stages(), ["a"], OTHER, tmp_path)


def test_a_run_folder_admits_one_process(tmp_path):
    with lock_folder(tmp_path), pytest.raises(BlmError, match="another process is using"):
        run_stages(stages(), ["a"], CI, tmp_path)


def test_differences_are_named_and_short():
    assert [*differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})] == [("a.c", "2", "3")]
    ((_, old, _),) = differences({"a": "x" * 1000}, {"a": ""})
    assert len(old) == 60
