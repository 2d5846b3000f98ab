"""The command line: recipes, overrides, and answers to wrong input."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from blm.app.pipeline import Stage, read_ledger, run_stages, stage_key
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES
from blm.cli import COMMANDS, main
from blm.cli.command import CliCommand
from blm.cli.lookup import find_command, print_error
from blm.cli.runs import Demo
from blm.datasets.lerobot_writer import write_json
from blm.datasets.video import count_frames
from blm.types import BlmError


def test_every_recipe_is_complete_and_named():
    for name, make in RECIPES.items():
        assert make().name == name


def test_dotted_overrides_reach_the_recipe(tmp_path):
    arguments = [
        "--recipe",
        "ci",
        "--run",
        str(tmp_path),
        "--stage2.loop.steps",
        "7",
        "--robots",
        "panda",
        "xarm6",
    ]
    command = Demo.parse("demo", arguments)
    assert (command.recipe.stage2.loop.steps, command.recipe.robots) == (7, ("panda", "xarm6"))
    assert command.folder == tmp_path
    assert command.recipe.corpus == RECIPES["ci"]().corpus


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["colect"], "unknown command 'colect'. Did you mean 'collect'?"),
        (["train", "stage3"], "Did you mean 'train stage"),
        (["collect", "--recipe", "dmo"], "unknown recipe 'dmo'. Did you mean 'demo'?"),
        (["collect", "--robots", "pandas"], "unknown robot 'pandas'. Did you mean 'panda'?"),
        (["collect", "--tasks", "pickcube"], "unknown task 'pickcube'. Did you mean 'pick_cube'?"),
        (["collect", "--cameras", "bas"], "unknown camera 'bas'. Did you mean 'base'?"),
        (["collect", "--episodes", "3"], "name the folder to write: blm collect OUT"),
        (["collect", "OUT", "--correct"], "--policy CHECKPOINT and --correct belong together"),
        (["collect", "no/such", "--verify"], "'no/such' holds no finished collection"),
        (["train", "stage2", "--run", "x", "--stage2.loop.stepps", "3"], "--stage2.loop.steps"),
        (["eval", "physical", "--model", "exprt", "--out", "x"], "no policy 'exprt'; give a checkpoint"),
        (["eval", "physical", "--model", "zero", "--out", "x", "--protocol", "suite"], "Valid: suite24"),
        (["compare", "no/such", "no/such"], "no result at 'no/such'"),
        (["serve", "no/such/folder"], "unknown checkpoint 'no/such/folder'"),
        (["view", "no/such/folder"], "no dataset at 'no/such/folder'"),
    ],
)
def test_wrong_input_names_the_valid_choices(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert complaint in " ".join((output.err + output.out).split())


def test_brackets_in_an_error_are_printed(capsys):
    print_error(BlmError("name it: blm collect OUT [flags], not [/bold]"))
    assert "error: name it: blm collect OUT [flags], not [/bold]" in capsys.readouterr().err


def test_two_word_commands_are_found():
    assert find_command(["train", "stage1", "--x"]) == ("train stage1", ["--x"])
    assert {"demo", "serve", "doctor"} <= set(COMMANDS)


def test_doctor_reports_and_judges(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    text = capsys.readouterr().out
    assert stop.value.code == 0, text
    for name in ("python", "torch", "mujoco", "rendering", "free disk", "gpu"):
        assert name in text
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(tmp_path)])
    assert stop.value.code == 1 and "FAULT" in capsys.readouterr().out


def stages(log):
    def work(name, fail=False):
        def run(recipe, folder):
            log.append(name)
            if fail and log.count(name) == 1:
                raise RuntimeError("interrupted")

        return run

    return {
        "a": Stage("a", "first", ("corpus",), (), work("a")),
        "b": Stage("b", "second", ("stage1",), ("a",), work("b", fail=True)),
    }


def test_stages_are_skipped_continued_and_refused(tmp_path):
    log: list[str] = []
    steps, recipe = stages(log), RECIPES["ci"]()
    with pytest.raises(BlmError, match="'b' needs the result of a"):
        run_stages(steps, ["b"], recipe, tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        run_stages(steps, ["a", "b"], recipe, tmp_path)
    assert [record.done for record in read_ledger(tmp_path).values()] == [True, False]
    run_stages(steps, ["a", "b"], recipe, tmp_path)
    run_stages(steps, ["a", "b"], recipe, tmp_path)
    assert log == ["a", "b", "b"]
    with pytest.raises(
        BlmError,
        match=r"'a' is finished with corpus.scenes 40, asked for: 800",
    ):
        run_stages(steps, ["a"], RECIPES["demo"](), tmp_path)


def test_a_stage_key_follows_its_inputs():
    steps = stages([])
    ci, demo = RECIPES["ci"](), RECIPES["demo"]()
    assert stage_key(steps, steps["b"], ci, {}) != stage_key(steps, steps["b"], demo, {})
    assert stage_key(steps, steps["a"], ci, {}) == stage_key(steps, steps["a"], ci, {})


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_collect_verify_evaluate_and_compare(tmp_path, capsys):
    """The suite's commands, one small cell: what they write, print and answer the second time."""
    cell = ["--robots", "widowxai", "--tasks", "push_cube", "--episodes", "1", "--workers", "0"]
    data = str(tmp_path / "data")
    main(["collect", data, *cell, "--cameras", "base", "--image-size", "48"])
    table = capsys.readouterr().out
    assert "push_cube" in table and "100%" in table and "episodes/min" in table and "planning" in table
    with pytest.raises(SystemExit) as stop:
        main(["collect", data, "--verify", "--workers", "0"])
    assert stop.value.code == 0 and "1 of 1 episodes replayed bit for bit" in capsys.readouterr().out
    main(["view", data, "--form", "suite", "--out", str(tmp_path / "suite.png")])
    main(["view", f"{data}/widowxai", "--out", str(tmp_path / "episode.mp4")])
    assert (tmp_path / "suite.png").stat().st_size > 1000 and count_frames(tmp_path / "episode.mp4") > 20
    for model in ("expert", "zero"):
        small = [
            "--cameras",
            "base",
            "--image-size",
            "48",
            "--horizon",
            "1",
            "--execute",
            "1",
            "--videos",
            "0",
        ]
        main(["eval", "physical", "--model", model, "--out", str(tmp_path / model), *cell, *small])
        assert (tmp_path / model / "report.html").exists()
    output = capsys.readouterr().out
    assert "never_touched 1" in output
    main(["compare", str(tmp_path / "expert"), str(tmp_path / "zero")])
    assert "widowxai push_cube" in capsys.readouterr().out
    main(["eval", "physical", "--model", f"replay:{data}/widowxai", "--out", str(tmp_path / "replay"), *cell])
    assert "100%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "replay"), str(tmp_path / "replay")])
    assert "replay check" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_class_with_help_and_an_example(name):
    module, _, class_name = COMMANDS[name].target.partition(":")
    command = getattr(importlib.import_module(f"blm.cli.{module}"), class_name)
    assert issubclass(command, CliCommand)
    assert f"Example: blm {name} " in command.__doc__.replace("\n    ", " ")
    assert not COMMANDS[name].stage or COMMANDS[name].stage in STAGES


def test_the_table_of_commands_loads_no_torch():
    code = (
        "import sys, contextlib; from blm.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
