"""The mixture of Stage I: its arithmetic, what is held out, which corpora are there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from blm.app.mixture import HELD_OUT, _choose, _hold_out, plan_mixture
from blm.app.preflight import check_mixture, check_stage1
from blm.app.recipe import MixtureSettings
from blm.app.recipes import RECIPES
from blm.app.stage1 import TrainingCorpus
from blm.backbone import Backbone
from blm.cli import COMMANDS, main
from blm.corpora import CONVERTERS, Conversation, write_corpus
from blm.corpora.public import PUBLIC_CORPORA, place, require_sound
from blm.training.sft.tokenize import TokenizationConfig
from blm.types import BlmError, Message
from tests.support.backbones import tiny_qwen

QWEN = RECIPES["qwen2_5_vl_7b"]().stage1


def row(number: int, group: str = "", words: int = 3) -> Conversation:
    return Conversation(
        id=f"row {number}",
        group=group or f"group {number}",
        source="made",
        kinds=("made",),
        messages=(Message("user", ("word " * words,)), Message("assistant", (f"{number}",))),
    )


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3])
def test_each_source_is_seen_weight_times_per_epoch_whatever_the_others_are(
    epochs: float, share: float
) -> None:
    sizes = {"scenes": (9_000, 1.0), "sharerobot": (100_000, 1.0), "general": (60_000, 0.3)}
    settings = replace(QWEN, epochs=epochs, mixture=MixtureSettings(replay_share=share))
    for present in (sizes, {"scenes": sizes["scenes"], "general": sizes["general"]}):
        plan = plan_mixture(present, 500, settings)
        batch = settings.training.loop.batch_size
        wanted = epochs * sum(rows * weight for rows, weight in present.values())
        assert plan.steps == math.ceil(wanted / (1 - share) / batch)
        assert sum(source.share for source in plan.sources) == pytest.approx(1)
        for source in plan.sources:
            if source.name == "replay":
                assert source.share == pytest.approx(share)
            else:
                rows, weight = present[source.name]
                passes = source.examples / rows
                assert passes == pytest.approx(weight * plan.epochs)
                assert epochs * (1 - 1e-9) <= plan.epochs <= epochs * (1 + batch / wanted)
        assert ("replay" in {source.name for source in plan.sources}) == (share > 0)


def test_steps_limit_the_epochs_and_without_epochs_they_are_the_length() -> None:
    loop = replace(QWEN.training.loop, steps=7)
    settings = replace(QWEN, training=replace(QWEN.training, loop=loop))
    assert plan_mixture({"scenes": (10_000, 1.0)}, 5, settings).steps == 7
    assert plan_mixture({"scenes": (10, 1.0)}, 5, replace(settings, epochs=0.0)).steps == 7
    with pytest.raises(BlmError, match="nothing to train on"):
        plan_mixture({}, 5, settings)


def test_pretrained_recipes_follow_the_paper_and_its_peers() -> None:
    for name in ("smol", "qwen2_5_vl_3b", "qwen2_5_vl_7b"):
        own = RECIPES[name]()
        stage1 = own.stage1
        assert 0.5 <= stage1.epochs <= 1 and own.corpus.answers == "sentence"
        assert 0.1 <= stage1.mixture.replay_share <= 1 / 3
        assert stage1.training.lora.rank or stage1.training.loop.lr <= 1e-5
    assert not any(RECIPES[name]().stage1.mixed for name in ("demo", "ci", "nano"))


def test_whole_groups_are_held_out_and_at_most_a_twentieth() -> None:
    rows = [row(number, f"group {number // 3}") for number in range(300)]
    corpus = TrainingCorpus(name="made", folder=Path(), conversations=rows)
    kept, held = _hold_out(corpus)
    assert len(held.conversations) == 15 and len(kept.conversations) == 285
    assert not {r.group for r in kept.conversations} & {r.group for r in held.conversations}
    backwards = _hold_out(replace(corpus, conversations=rows[::-1]))
    assert {r.id for r in backwards[1].conversations} == {r.id for r in held.conversations}
    assert len(_hold_out(replace(corpus, conversations=rows[:9]))[1].conversations) == 0
    many = [row(number) for number in range(9_000)]
    assert len(_hold_out(replace(corpus, conversations=many))[1].conversations) == HELD_OUT


def test_only_as_many_rows_are_kept_as_are_drawn() -> None:
    rows = [row(number) for number in range(1000)]
    chosen = _choose(rows, 90.5, seed=0, number=1)
    assert len(chosen) == 99 and len({r.id for r in chosen}) == 99
    assert chosen == _choose(rows, 90.5, seed=0, number=1) != _choose(rows, 90.5, seed=1, number=1)
    assert _choose(rows, 5000, seed=0, number=1) is rows


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC_CORPORA)
def test_every_public_corpus_says_where_to_get_it_and_how_to_place_it(name: str) -> None:
    corpus = PUBLIC_CORPORA[name]
    words = corpus.convert.split()
    assert words[0] in CONVERTERS and words[2] == f"CORPORA/{name}" and "DOWNLOAD" in words[1]
    assert corpus.origin.startswith("https://") and corpus.licence and corpus.layout
    assert f"blm corpus convert {words[0]} " in corpus.steps(Path("data"))
    assert f"data/{name}" in corpus.steps(Path("data"))


def test_names_weights_and_paths() -> None:
    found = place("robovqa:0.5", Path("corpora"))
    assert (found.name, found.folder, found.weight) == ("robovqa", Path("corpora/robovqa"), 0.5)
    assert place("robovqa", Path("x")).weight == 1.0
    own = place("/data/mine:2", Path("x"))
    assert (own.name, own.folder, own.weight) == ("mine", Path("/data/mine"), 2.0)
    for text, complaint in (("robovqa:0", "positive"), ("robovqa:nan", "positive"), ("robovqq:1", "robovqa")):
        with pytest.raises(BlmError, match=complaint):
            MixtureSettings(public=(text,))
    for public in (("robovqa", "robovqa:2"), ("/a/scenes:1",)):
        with pytest.raises(BlmError, match="twice"):
            MixtureSettings(public=public)
    with pytest.raises(BlmError, match=r"in \[0, 1\)"):
        MixtureSettings(replay_share=1.0)


def test_the_list_shows_present_missing_and_faulty_corpora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "corpus list" in COMMANDS
    write_corpus(tmp_path / "robovqa", [row(0)])
    with pytest.raises(SystemExit, match="0"):
        main(["corpus", "list", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"robovqa: present ({tmp_path}/robovqa)" in shown and "sharerobot: missing" in shown
    assert "1,027,990 rows" in shown
    (tmp_path / "agibot").mkdir()
    with pytest.raises(SystemExit, match="1"):
        main(["corpus", "list", "--folder", str(tmp_path)])
    assert "agibot: FAULTY" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "corpus.jsonl' is missing"),
        ("", "has no row"),
        ('{"messages": 3}\n', "corpus.jsonl:1: malformed"),
    ],
)
def test_a_present_but_faulty_corpus_is_an_error(tmp_path: Path, content: str | None, complaint: str) -> None:
    (tmp_path / "robovqa").mkdir()
    if content is not None:
        (tmp_path / "robovqa/corpus.jsonl").write_text(content)
    with pytest.raises(BlmError, match=complaint):
        require_sound(place("robovqa", tmp_path))


# --- before the first stage ---------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_qwen("2.5").save(tmp_path / "tiny")
    outline = Backbone.outline(tmp_path / "tiny")
    limits = TokenizationConfig(max_length=64)
    mixture = MixtureSettings(public=("robovqa:1",), corpora_folder=str(tmp_path))
    settings = replace(QWEN, mixture=mixture, training=replace(QWEN.training, limits=limits))
    write_corpus(tmp_path / "robovqa", [row(number, words=3 + 200 * (number % 2)) for number in range(8)])
    check_mixture(outline, settings)
    assert "4 of 8 sampled conversations of 'robovqa' are longer than" in capsys.readouterr().err
    tmp_path.joinpath("robovqa").rename(tmp_path / "before")
    write_corpus(tmp_path / "robovqa", [row(number, words=200) for number in range(8)])
    with pytest.raises(BlmError, match="8 of 8 sampled conversations"):
        check_mixture(outline, settings)


def test_a_nano_has_no_mixture() -> None:
    own = RECIPES["ci"]()
    with pytest.raises(BlmError, match="a nano learns its language"):
        check_stage1(replace(own, stage1=replace(own.stage1, epochs=0.5)), Path())
