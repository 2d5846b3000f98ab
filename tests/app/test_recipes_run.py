"""Every recipe's own settings, on tiny models of its backbone's real class, through the command line.

Flags only shrink: numbers of episodes, scenes and steps, and the sizes of the policy. What the
recipes say about Stage I (what is trained, packing, cached features, LoRA, activation
checkpointing) and about Stage II stays as it is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from blm.app.pipeline import read_ledger
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES, write_report
from blm.cli import main
from blm.corpora import read_corpus
from blm.io import read_json, read_json_lines
from blm.policy.policy import CheckpointPolicy
from tests.support.recipes import TINY, collect_and_ask, flags_of, prepare, shrink, write_public

PRETRAINED = tuple(TINY)
"""The recipes that train on a mixture."""
FAST, SLOW = ("smol", "qwen2_5_vl_7b"), pytest.mark.slow
"""The settings of the 3B recipe for Stage I are those of the 7B; the others pretrain a nano for longer."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Form of the answers -> a run folder with demonstrations and questions, made when first asked for."""
    folder = tmp_path_factory.mktemp("data")
    return cache(lambda answers: collect_and_ask(folder / answers, answers))


@pytest.fixture(autouse=True)
def small_probes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models hardly ever end an answer. In fast tests replay keeps its first tokens."""
    shrink(monkeypatch.setattr, cut=request.node.get_closest_marker("slow") is None)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in FAST else SLOW) for name in RECIPES]
)
def test_stage_one_and_stage_two_of_every_recipe_run_as_written(
    recipe: str, data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = RECIPES[recipe]()
    shutil.copytree(data(own.corpus.answers), tmp_path / "run")
    prepare(recipe, tmp_path)
    flags = flags_of(recipe, tmp_path)
    main(["train", "stage1", *flags])
    printed = "".join(capsys.readouterr())
    main(["train", "stage2", *flags])
    assert CheckpointPolicy.load(tmp_path / "run/stage2/checkpoint").contract.cameras == ("base", "wrist")
    out = tmp_path / "run/stage1"
    assert (out / "adapter").exists() == bool(own.stage1.training.lora.rank)
    assert own.stage1.mixed == (recipe in PRETRAINED) == (out / "mixture.json").exists()
    if own.stage1.mixed:
        check_mixture_of(own, out, printed)
        report = write_report(tmp_path / "run", "blm demo").read_text()
        assert "What Stage I was trained on" in report and "Language retention" in report


def check_mixture_of(own: Recipe, out: Path, printed: str) -> None:
    """Sources, missing corpora, losses and retention of a run are named, printed and stored."""
    record, wanted = read_json(out / "mixture.json"), own.stage1.mixture
    names = [source["name"] for source in record["sources"]]
    assert names == ["scenes", "general", "replay"]
    missing = {corpus.name for corpus in wanted.placed} - {"general"}
    assert {corpus["name"] for corpus in record["missing"]} == missing
    for corpus in record["missing"]:
        assert f"missing corpus '{corpus['name']}'" in printed and corpus["advice"] in printed
        assert f"{out.parents[1]}/corpora/{corpus['name']}" in corpus["advice"]
    assert record["steps"] == 2 and record["sources"][2]["example_share"] == pytest.approx(
        wanted.replay_share, abs=2 / 8
    )
    rows = read_json_lines(out / "log.jsonl")
    for name in names:
        assert rows[-1][f"loss of {name}"] > 0
    retention = read_json(out / "retention.json")
    assert rows[-1]["kl"] == pytest.approx(retention["text"]["kl"], rel=0.2, abs=1e-3)
    assert len(retention["rows"]["tuned"]) == 260 and "perplexity of held-out text" in printed


def test_a_present_corpus_is_trained_on_with_its_weight_for_the_epochs_asked_for(
    data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half an epoch of 38 + 2 x 58 conversations and one example in five of replay."""
    shutil.copytree(data("sentence"), tmp_path / "run")
    write_public(tmp_path / "own/mine", 60)
    prepare("qwen2_5_vl_3b", tmp_path)
    flags = flags_of("qwen2_5_vl_3b", tmp_path)
    flags += ["--stage1.training.loop.steps", "1000", "--stage1.mixture.scenes", "0"]
    flags += ["--stage1.mixture.public", "general:1", f"{tmp_path}/own/mine:2", "robovqa:1"]
    main(["train", "stage1", *flags])
    record = read_json(tmp_path / "run/stage1/mixture.json")
    general, mine, replay = record["sources"]
    assert [general["rows"], mine["rows"], replay["rows"]] == [38, 58, 19]  # 5 % in whole groups are held out
    epoch = (38 + 2 * 58) / 0.8
    assert record["steps"] == math.ceil(0.5 * epoch / 4)
    assert record["epochs"] == pytest.approx(record["steps"] * 4 / epoch)
    drawn = 4 * record["steps"]
    for source, share in ((general, 0.8 * 38 / 154), (mine, 0.8 * 116 / 154), (replay, 0.2)):
        assert source["examples"] == pytest.approx(share * drawn, abs=2)
    for name in ("example_share", "token_share", "answer_token_share"):
        assert sum(source[name] for source in record["sources"]) == pytest.approx(1)
    assert [corpus["name"] for corpus in record["missing"]] == ["robovqa"]
    assert f"{record['steps']} steps of 4 examples: {record['epochs']:.3g} epochs" in capsys.readouterr().err
    shown = [row.kinds for row in read_corpus(tmp_path / "run/replay")]
    assert len(shown) == 20 and 0 < shown.count(("replay_picture",)) < 20


def test_a_faulty_corpus_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    prepare("qwen2_5_vl_3b", tmp_path)
    flags = flags_of("qwen2_5_vl_3b", tmp_path)
    file = tmp_path / "corpora/general/corpus.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"messages": 3}', *lines[2:]]))
    with pytest.raises(SystemExit):
        main(["demo", *flags])
    (tmp_path / "corpora/robovqa").mkdir()
    with pytest.raises(SystemExit):
        main(["demo", *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_whole_loop_of_every_recipe_runs_to_its_report(recipe: str, tmp_path: Path) -> None:
    prepare(recipe, tmp_path)
    main(["demo", *flags_of(recipe, tmp_path)])
    assert all(record.done for record in read_ledger(tmp_path / "run").values())
    assert read_ledger(tmp_path / "run").keys() == STAGES.keys()
    page = (tmp_path / "run/report.html").read_text()
    assert "not run" not in page
    assert ("Language retention" in page) == (recipe in PRETRAINED)
