"""Run folders of stages: refused before anything is written, corrected where nothing is finished."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blm.app.pipeline import LEDGER, RECIPE, Stage, differences, read_ledger, run_stages, settings_of
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES
from blm.io import lock_folder
from blm.training.loop.distributed import Processes
from blm.types import BlmError
from tests.support.meeting import in_processes

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


def with_loop(**changes: Any) -> Any:
    """The recipe with other settings of Stage I's loop."""
    training = CI.stage1.training
    changed = replace(training, loop=replace(training.loop, **changes))
    return replace(CI, stage1=replace(CI.stage1, training=changed))


NEUTRAL_CHANGES = {"accumulate": 2, "shard": True, "log_every": 3, "save_every": 7, "title": "other"}


@pytest.mark.parametrize("name", NEUTRAL_CHANGES)
def test_settings_of_how_a_stage_runs_change_neither_its_result_nor_those_that_read_it(tmp_path, name):
    ran: list[str] = []
    made = stages(lambda recipe, folder: None)
    made["b"] = replace(made["b"], run=lambda recipe, folder: ran.append("b"))
    made["c"] = Stage("c", "third", ("stage2",), ("b",), lambda recipe, folder: ran.append("c"))
    run_stages(made, ["a", "b"], CI, tmp_path)
    changed = replace(with_loop(**{name: NEUTRAL_CHANGES[name]}), workers=5)
    run_stages(made, ["a", "b", "c"], changed, tmp_path)
    run_stages(made, ["a", "b", "c"], CI, tmp_path)
    assert ran == ["b", "c"]
    with pytest.raises(
        BlmError, match=r"'b' is finished with stage1.training.loop.lr [\d.]+, asked for: 0.5\n"
    ):
        run_stages(made, ["c"], with_loop(lr=0.5, accumulate=3), tmp_path)


def test_an_unfinished_stage_continues_in_place_with_other_splitting(tmp_path):
    def interrupted(recipe: Any, folder: Path) -> None:
        (folder / "stage1").mkdir(exist_ok=True)
        (folder / "stage1/half").write_text(str(recipe.stage1.training.loop.accumulate))
        raise BlmError("out of memory")

    one = {"b": Stage("b", "second", ("stage1",), (), interrupted, ("stage1",))}
    done = {"b": replace(one["b"], run=lambda recipe, folder: None)}
    with pytest.raises(BlmError, match="out of memory"):
        run_stages(one, ["b"], CI, tmp_path)
    run_stages(done, ["b"], with_loop(accumulate=4), tmp_path)
    assert (tmp_path / "stage1/half").exists() and not list(tmp_path.glob("*unfinished*"))


def test_a_cache_stays_when_settings_change_that_do_not_affect_it(tmp_path):
    def interrupted(recipe: Any, folder: Path) -> None:
        for name in ("stage2", "intents"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "half").write_text("")
        raise BlmError("the loss is not finite")

    own = replace(STAGES["stage2"], needs=(), check=None, run=interrupted)
    lower = replace(CI.stage2.loop, lr=1e-5)
    for recipe in (CI, replace(CI, stage2=replace(CI.stage2, loop=lower))):
        with pytest.raises(BlmError, match="not finite"):
            run_stages({"stage2": own}, ["stage2"], recipe, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*unfinished*")) == ["stage2.unfinished-1"]
    with pytest.raises(BlmError, match="not finite"):
        run_stages({"stage2": own}, ["stage2"], replace(CI, stage2=replace(CI.stage2, layer=2)), tmp_path)
    assert (tmp_path / "intents.unfinished-1").exists()


def test_a_check_is_made_before_anything_is_written_and_not_of_finished_stages(tmp_path):
    def refused(recipe: Any, folder: Path) -> None:
        if recipe is not CI:
            raise BlmError("this cannot be")

    checked = stages()
    checked["b"] = replace(checked["b"], check=refused)
    with pytest.raises(BlmError, match="this cannot be"):
        run_stages(checked, ["a", "b"], OTHER, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_stages(checked, ["a", "b"], CI, tmp_path / "run")
    run_stages(checked, ["a", "b"], replace(CI, workers=3), tmp_path / "run")


def test_settings_that_older_run_folders_lack_change_no_key_while_they_have_their_default() -> None:
    own = settings_of(STAGES["stage2"], CI)["stage2"]
    assert "precision" not in own["loop"] and not {"dropout", "state_noise"} & own["policy"].keys()
    assert not {"dims", "pool", "tune", "cotrain"} & own.keys()
    training = settings_of(STAGES["stage1"], CI)["stage1"]["training"]
    assert "precision" not in training["loop"] and training["lora"]["dropout"] == 0.0
    stage2 = replace(CI.stage2, policy=replace(CI.stage2.policy, dropout=0.2))
    assert settings_of(STAGES["stage2"], replace(CI, stage2=stage2))["stage2"]["policy"]["dropout"] == 0.2


def test_several_processes_run_a_stage_together_and_the_first_keeps_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes are threads here; tests/app/test_recipe_processes.py launches real ones."""
    mine, ran = threading.local(), list[int]()
    monkeypatch.setattr(Processes, "join", lambda device="cpu": mine.processes)
    made = stages()
    made["b"] = replace(made["b"], run=lambda recipe, folder: ran.append(mine.processes.rank), together=True)

    def run(names: list[str], recipe: Recipe = CI) -> Callable[[Processes], None]:
        def work(processes: Processes) -> None:
            mine.processes = processes
            run_stages(made, names, recipe, tmp_path)

        return work

    (complaint,) = {*in_processes(2, run(["a", "b"]))}
    assert "process 0 of 2: a in" in complaint and "run in one process, but 2 were launched" in complaint
    assert complaint.endswith("run these stages: b") and not written(tmp_path)
    mine.processes = Processes(0, 1, torch.device("cpu"))
    run_stages(made, ["a"], CI, tmp_path)
    assert in_processes(3, run(["a", "b"])) == [None] * 3
    assert sorted(ran) == [0, 1, 2] and read_ledger(tmp_path)["b"].done
    assert capsys.readouterr().err.count("second") == 1
    assert in_processes(2, run(["b"])) == [None] * 2 and len(ran) == 3, "it is done"
    for complaint in in_processes(2, run(["b"], OTHER)):
        assert "'a' is finished with corpus.turns 4, asked for: 9" in complaint
    with lock_folder(tmp_path):
        assert all("another process is using" in found for found in in_processes(2, run(["b"])))
