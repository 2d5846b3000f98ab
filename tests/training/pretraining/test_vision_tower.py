"""nano's eye: what its tokens say, and that it learns to find things from scan turns."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.app.stage1 import TrainingCorpus, prepare_stage1
from blm.backbone import build_nano
from blm.backbone.grounding import (
    DECIMAL,
    DECIMAL_SCALE,
    FOUND,
    NAME_SCALE,
    PERIODS,
    QUARTERS,
    REACH,
    STEPS,
    WORDS,
    digit_features,
    metric_position_features,
)
from blm.backbone.nano.vision_tower import CELLS, ConvVision, ConvVisionConfig
from blm.corpora.format.messages import Conversation
from blm.corpora.scenes.questions import read_scan
from blm.training.loop.loop import LoopConfig
from blm.training.loop.metrics import Meter
from blm.training.pretraining import smol as smol_pretraining
from blm.training.pretraining.nano import (
    EXTRA_COMPARISONS,
    TEXT_ONLY_SHARE,
    NanoPretrainingConfig,
    grounding_drill,
    is_nano,
    nano_sources,
    pretrain_nano,
    text_only_scene,
    without_scan_turns,
)
from blm.training.pretraining.smol import is_untaught, pretrain_smol
from blm.training.pretraining.vision_tower import (
    GroundingTargets,
    expected_points,
    grounding_targets,
    scanned_views,
    target_heatmaps,
    vision_tower_loss,
)
from blm.training.sft.train import Stage1Config
from blm.types import BlmError, Image, Message
from tests.support.smol import tiny_smol

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}


def where(x: float, y: float) -> list[int]:
    """Place from the robot of what is at this pixel [cm]."""
    return [round(60 - 40 * y / 112), round(30 - 60 * x / 112), 2]


def row(seed: int, pixels: np.ndarray, *turns: tuple[str, str]) -> Conversation:
    """A picture, a turn of this kind and answer, and a question that is none."""
    messages = []
    for index, (_, answer) in enumerate(turns):
        messages.append(Message("user", (*([Image(pixels)] if index == 0 else []), f"Ask {index}.")))
        messages.append(Message("assistant", (answer,)))
    kinds = tuple(kind for kind, _ in turns)
    return Conversation(id=f"s{seed}", group=f"s{seed}", source="t", kinds=kinds, messages=tuple(messages))


def scene(seed: int) -> Conversation:
    """Two squares of unlike colours on grey, with a scan turn and a question that is none."""
    rng = np.random.default_rng(seed)
    pixels = np.full((112, 112, 3), 128, np.uint8)
    spots = []
    for side, name in enumerate(rng.choice(sorted(COLORS), 2, replace=False)):  # they do not overlap
        x, y = int(rng.integers(8, 48)) + 56 * side, int(rng.integers(8, 104))
        pixels[y - 5 : y + 5, x - 5 : x + 5] = COLORS[str(name)]
        point, place = (round(x / 112 * 1000), round(y / 112 * 1000)), tuple(where(x, y))
        spots.append(f"{name} square {point} at {place}")
    return row(seed, pixels, ("scan_base", ", ".join(sorted(spots))), ("day", "yes"))


def moment(seed: int) -> Conversation:
    """A light bar in the upper half of a grey picture is one step, in the lower half another."""
    rng = np.random.default_rng(seed)
    pixels = np.full((112, 112, 3), 128, np.uint8)
    low = int(rng.integers(2))
    top = int(rng.integers(0, 40)) + 56 * low
    pixels[top : top + 16] = 250
    return row(seed, pixels, ("day", "no"), ("scan_step", ("lift", "lower")[low]))


def test_targets_are_distributions_with_their_mean_at_the_point():
    points = torch.tensor([[[0.5, 0.25], [-1.0, -1.0]]])
    made = target_heatmaps(points, CELLS)
    assert torch.allclose(made.sum(-1), torch.ones(1, 2))
    assert made[0, 1, -1] == 1.0
    cells = (torch.arange(CELLS) + 0.5) / CELLS
    grid = made[0, 0, :-1].unflatten(0, (CELLS, CELLS))
    assert torch.isclose((grid.sum(0) * cells).sum(), torch.tensor(0.5), atol=1e-3)
    assert torch.isclose((grid.sum(1) * cells).sum(), torch.tensor(0.25), atol=1e-3)
    assert torch.allclose(expected_points(made.clamp_min(1e-12).log())[0, 0], points[0, 0], atol=1e-3)


def test_scans_belong_to_their_pictures_and_drills_are_what_finds():
    both = scene(0)
    (view,) = scanned_views(both, Path())
    assert view.image is both.messages[0].images[0] and len(view.positions) == 2
    assert view.name == "base" and not view.step
    for x, y, *place in view.positions.values():
        assert np.abs(np.subtract(place, where(0.112 * x, 0.112 * y))).max() <= 1
    (view,) = scanned_views(moment(0), Path())
    assert view.positions is None and view.step in ("lift", "lower")


def test_a_drill_conversation_has_one_image():
    pixels = [np.full((112, 112, 3), level, np.uint8) for level in (10, 20, 30)]
    turns = {
        "point_side": "(1, 2)",
        "counting": "2",
        "scan_base": "gripper (1, 2) at (4, 5, 6)",
        "scan_side": "gripper (1, 2)",
        "scan_wrist": "nothing",
        "point_base": "(3, 4)",
        "scan_step": "lift",
    }
    made = row(0, pixels[0], *turns.items())
    first = Message("user", (*map(Image, pixels), made.messages[0].text))
    made = replace(made, messages=(first, *made.messages[1:]))
    base, side = grounding_drill(made)
    assert base.kinds == ("scan_base", "point_base") and side.kinds == ("point_side", "scan_side")
    for view, level in ((base, 10), (side, 20)):
        (image,) = view.media
        assert image.pixels.mean() == level and view.messages[0].images == (image,)
        assert [m.text for m in view.messages[1::2]] == [turns[kind] for kind in view.kinds]
    assert not list(grounding_drill(made.select([1]))), "a conversation without scans has nothing to find"


@pytest.mark.parametrize("seed", range(5))
def test_scans_are_read_as_they_are_written(seed):
    rng = np.random.default_rng(seed)
    names = ["gripper", "goal", "red cube", "white bin"]
    told = {name: tuple(rng.integers(-999, 999, 5 if rng.random() < 0.5 else 2).tolist()) for name in names}
    spots = [f"{name} {place[:2]}" + f" at {place[2:]}" * (len(place) == 5) for name, place in told.items()]
    assert read_scan(", ".join(spots)) == told
    assert read_scan("nothing") == {}


def test_the_metric_code_is_the_place_and_its_phases():
    metres = torch.rand(7, 3) * 2 - 1
    code = metric_position_features(metres / REACH)
    place, sines, cosines = code.split([3, 3 * len(PERIODS), 3 * len(PERIODS)], dim=-1)
    phases = 2 * math.pi * metres[..., None] / torch.tensor(PERIODS)
    assert torch.allclose(place, metres / REACH)
    assert torch.allclose(sines.unflatten(-1, (3, -1)), phases.sin(), atol=1e-4)
    assert torch.allclose(cosines.unflatten(-1, (3, -1)), phases.cos(), atol=1e-4)
    use_prefix_attention = metric_position_features(
        (metres + PERIODS[0]) / REACH
    )  # the longest period holds whole ones of all others
    assert torch.allclose(use_prefix_attention[..., 3:], code[..., 3:], atol=1e-4)


def test_numbers_are_spelt_as_answers_spell_them():
    values = torch.tensor([[0.0, 7.0, -12.0, 85.0, 99.0, -3.0]])
    code = digit_features(values).unflatten(-1, (-1, DECIMAL))[0]
    for value, spelt in zip(values[0].tolist(), code, strict=True):
        sign, tens, ones = (part.argmax().item() for part in spelt.split([2, 10, 10]))
        assert (-1) ** sign * (10 * tens + ones) == value and spelt.sum() == 3 * DECIMAL_SCALE
    between = digit_features(torch.tensor([19.25]))
    assert torch.allclose(
        between, 0.75 * digit_features(torch.tensor([19.0])) + 0.25 * digit_features(torch.tensor([20.0]))
    )
    number = torch.tensor([4.5], requires_grad=True)
    (digit_features(number) @ torch.arange(float(DECIMAL))).backward()
    assert number.grad.item() == DECIMAL_SCALE, "more ones: the eye can learn through it"


def labelled_pictures(count: int = 4) -> tuple[ConvVision, torch.Tensor, GroundingTargets]:
    torch.manual_seed(0)
    eye = ConvVision(
        ConvVisionConfig(things=["red cube", "goal"], steps=["lift", "lower"], views=["base", "wrist"])
    )
    told = GroundingTargets(*(torch.rand(count, 2, n) for n in (2, 3)), *[torch.arange(count) % 2] * 2)
    return eye, torch.randn(count, 3, 112, 112), told


def reached(eye: ConvVision, pixels: torch.Tensor, told: GroundingTargets) -> tuple[float, set[str]]:
    """The loss, and which heads get a gradient from it."""
    eye.zero_grad()
    loss, _ = vision_tower_loss(eye, pixels, told)
    loss.backward()
    heads = ("score", "metric", "fixed", "doing", "view")
    grads = {name: [p.grad for p in getattr(eye, name).parameters()] for name in heads}
    return loss.item(), {name for name in heads if any(g is not None and g.any() for g in grads[name])}


def test_missing_labels_have_no_gradient():
    eye, pixels, told = labelled_pictures()
    _, heads = reached(eye, pixels, told)
    assert heads == {"score", "metric", "fixed", "doing", "view"}
    none = told.step * 0 - 1
    unknown = GroundingTargets(*(torch.full_like(value, torch.nan) for value in told[:2]), none, none)
    for name, without in {"metres": "metric", "step": "doing", "view": "view"}.items():
        loss, heads = reached(eye, pixels, told._replace(**{name: getattr(unknown, name)}))
        assert math.isfinite(loss) and without not in heads and len(heads) == 4
    loss, heads = reached(eye, pixels, unknown._replace(step=told.step))
    assert math.isfinite(loss) and heads == {"doing"}
    for labels in (told, unknown, unknown._replace(step=told.step)):
        reached(eye, pixels, labels)
        unused = [name for name, p in eye.named_parameters() if p.grad is None]
        assert not unused, "processes whose images have other labels would wait for each other"


def test_metric_names_do_not_depend_on_labels():
    eye, pixels, told = labelled_pictures()
    _, every = vision_tower_loss(eye, pixels, told)
    none = GroundingTargets(
        *(torch.full_like(value, torch.nan) for value in told[:2]), *[told.step * 0 - 1] * 2
    )
    _, nothing = vision_tower_loss(eye, pixels, none)
    assert nothing.keys() == every.keys() and all(math.isfinite(value) for value in every.values())
    assert all(math.isnan(value) for value in nothing.values())
    meter = Meter(0.0)
    for log in (every, nothing):
        meter.add({name: float(value) for name, value in log.items()}, {"samples": 4.0}, 0.0)
    row = meter.row(1e-3)
    assert all(row[name] == pytest.approx(float(value)) for name, value in every.items())


def test_the_loss_is_the_mean_over_pictures():
    eye, pixels, told = labelled_pictures()
    told.points[0], told.metres[0], told.metres[1, 1], told.step[1] = torch.nan, torch.nan, torch.nan, -1
    told.points[2, 0] = -1
    told.metres[2, 0] = torch.nan
    each = [
        reached(eye, pixels[i : i + 1], GroundingTargets(*(v[i : i + 1] for v in told)))[0] for i in range(4)
    ]
    assert reached(eye, pixels, told)[0] == pytest.approx(np.mean(each), rel=1e-4)


def test_tokens_name_what_they_are_about():
    eye = ConvVision(ConvVisionConfig(things=["red cube", "red ball", "goal"]))
    with torch.no_grad():
        eye.nowhere.fill_(-1e4)  # everything is somewhere
        tokens = eye(torch.randn(2, 3, 112, 112)).last_hidden_state
    assert tokens.shape == (2, FOUND + QUARTERS, eye.config.hidden_size)
    names = tokens[0, :3, : len(eye.words)] / NAME_SCALE
    said = [{w for w, on in zip(eye.words, row, strict=True) if on > 0.5} for row in names]
    assert said == [{"red", "cube"}, {"red", "ball"}, {"goal"}]
    assert (tokens[0, FOUND:, WORDS : WORDS + QUARTERS] / NAME_SCALE).allclose(torch.eye(QUARTERS))


def test_compound_names_share_the_scores_of_their_words():
    things = ["blue cube", "red and blue peg", "red cube"]
    whole, split = (ConvVision(ConvVisionConfig(things=things, compound=on)) for on in (False, True))
    assert whole.words == ["blue", "cube", "red and blue peg", "red"]
    assert split.words == ["blue", "cube", "red", "peg"]
    assert split.mixing_matrix(split.nowhere)[:3, :4].tolist() == [[1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0]]


def test_the_light_of_the_whole_picture_reaches_every_cell():
    torch.manual_seed(0)
    tower = ConvVision(ConvVisionConfig(things=["red cube"], dilations=(1,), pooled=True))
    pixels = torch.randn(1, 3, 112, 112)
    changed = pixels.clone()
    changed[..., :16, :16] += 1
    with torch.no_grad():
        before, after = (tower.features(image)[0] for image in (pixels, changed))
        assert before[..., -1].equal(after[..., -1]), "training starts without the projection"
        tower.context.mix.weight.normal_()
        before, after = (tower.features(image)[0] for image in (pixels, changed))
        assert not before[..., -1].allclose(after[..., -1])


def test_the_sizes_of_the_first_release_stay_the_defaults():
    old, new = ConvVision(ConvVisionConfig()), build_nano().model.base_model.vision_tower
    assert len(old.coarse) == 2 and not list(old.context.parameters())
    assert len(new.coarse) == 3 and list(new.context.parameters())


def test_an_untaught_smol_learns_to_find_things_and_keeps_its_language(tmp_path, monkeypatch):
    made = []

    def build(*, image_size, seed, **vocabulary):
        made.append(tiny_smol(image_size, **vocabulary))
        return tiny_smol(image_size, **vocabulary)

    monkeypatch.setattr(smol_pretraining, "build_smol", build)
    backbone, rows = tiny_smol(64), [scene(seed) for seed in range(8)]
    unlabelled = [row(9, np.zeros((8, 8, 3), np.uint8), ("day", "no"))]
    pretrain_smol(backbone, [(unlabelled, Path())], LOOP, tmp_path)
    assert is_untaught(backbone) and not made
    pretrain_smol(backbone, [(rows, Path())], LOOP, tmp_path)
    assert not is_untaught(backbone)
    known = backbone.model.model.vision_tower.config
    assert known.things == sorted(f"{color} square" for color in COLORS) and known.views == ["base"]
    log = [json.loads(text) for text in (tmp_path / "eye/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    before = made[0].model.state_dict()
    after = backbone.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.vision_tower.") for name in changed)


LOOP = LoopConfig(steps=12, batch_size=8, lr=3e-3, clip=5.0, log_every=1)


def test_too_many_words_or_steps_are_refused():
    with pytest.raises(BlmError, match=f"at most {WORDS - FOUND} words"):
        ConvVisionConfig(things=[f"thing{index}" for index in range(WORDS)])
    with pytest.raises(BlmError, match=f"at most {STEPS} steps"):
        ConvVisionConfig(steps=[f"step{index}" for index in range(STEPS + 1)])


def test_an_untrained_vision_tower_returns_features():
    backbone = build_nano()
    pictures = torch.stack([torch.zeros(3, 112, 112), torch.ones(3, 112, 112)])
    dark, light = backbone.model.base_model.vision_tower(pictures).last_hidden_state
    assert not torch.allclose(dark, light)


@pytest.mark.slow
def test_pretraining_finds_things_in_new_pictures(tmp_path):
    torch.set_num_threads(1)
    rows = [make(seed) for seed in range(120) for make in (scene, moment)]
    config = NanoPretrainingConfig(
        eye=LoopConfig(steps=120, batch_size=16, lr=3e-3, clip=5.0, save_every=1000),
        drill=LoopConfig(steps=2, batch_size=4),
    )
    backbone = pretrain_nano([(rows, tmp_path)], config, tmp_path / "run")
    eye = backbone.model.base_model.vision_tower
    assert eye.config.things == ["blue square", "green square", "red square"]
    assert eye.config.steps == ["lift", "lower"]

    views = [view for seed in range(1000, 1030) for view in scanned_views(scene(seed), tmp_path)]
    views += [view for seed in range(1000, 1030) for view in scanned_views(moment(seed), tmp_path)]
    pictures = [view.image.pixels for view in views]
    inputs = backbone.processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        _, log = vision_tower_loss(eye, inputs["pixel_values"], grounding_targets(views, eye.config))
    told = [place[2:] for view in views for place in (view.positions or {}).values()]
    guess = np.median([math.dist(where(56, 56), place) for place in told])
    assert log["pixels_off"] < 3.0  # chance is above 30
    assert log["mm_off"] < 10 * 0.5 * guess  # always to guess the middle of all places gives 10 * guess
    assert log["steps_right"] > 0.8


def test_a_trained_nano_is_pretrained_again_only_if_asked(tmp_path):
    brief = LoopConfig(steps=1, batch_size=2)
    config = NanoPretrainingConfig(eye=brief, drill=brief)
    corpus = [TrainingCorpus(name="t", folder=tmp_path, conversations=[scene(seed) for seed in range(4)])]
    backbone, _ = prepare_stage1(None, corpus, Stage1Config(loop=brief), config, tmp_path / "first")
    first = backbone.fingerprint()
    prepare_stage1(backbone, corpus, Stage1Config(loop=brief), config, tmp_path / "same")
    assert backbone.fingerprint() == first
    prepare_stage1(
        backbone, corpus, Stage1Config(loop=brief), replace(config, again=True), tmp_path / "again"
    )
    assert backbone.fingerprint() != first
    unknown = row(9, np.zeros((112, 112, 3), np.uint8), ("scan_base", "pink square (1, 2)"))
    other = [replace(corpus[0], conversations=[unknown])]
    with pytest.raises(BlmError, match="no heat map or class for pink square"):
        prepare_stage1(
            backbone, other, Stage1Config(loop=brief), replace(config, again=True), tmp_path / "no"
        )


def test_stage_one_omits_scan_turns():
    row = scene(0)
    assert any(kind.startswith("scan") for kind in row.kinds)
    rest = without_scan_turns(row)
    assert rest.kinds == tuple(kind for kind in row.kinds if not kind.startswith("scan"))
    assert rest.media == row.media, "the pictures come with the first turn that is left"
    only = row.select([turn for turn, kind in enumerate(row.kinds) if kind.startswith("scan")])
    assert without_scan_turns(only) == only, "a conversation keeps at least one turn"


def test_text_only_scenes_compare_distances():
    places = {"gripper": (40, 3, 12), "red cube": (50, -4, 2), "blue ball": (55, 20, 2), "bin": (30, -20, 0)}
    scan = ", ".join(f"{name} (1, 2) at {place}" for name, place in places.items())
    turns = ("scan_base", scan), ("counting", "<think>blue ball, red cube</think>2")
    words = text_only_scene(row(0, np.zeros((112, 112, 3), np.uint8), *turns))
    again = text_only_scene(row(0, np.zeros((112, 112, 3), np.uint8), *turns))
    assert words == again, "drawn by the name"
    assert words.kinds[0] == "counting" and len(words.kinds) == 1 + EXTRA_COMPARISONS
    for kind, question, answer in zip(
        words.kinds[1:], words.messages[2::2], words.messages[3::2], strict=True
    ):
        mark, *compared = re.findall(r"([a-z][a-z ]*) \(", answer.text.removeprefix("<think>"))
        assert {*compared} == {"red cube", "blue ball"}, "what has no colour is no object"
        assert mark in question.text
        best = max if kind == "comparing_farthest" else min
        far = {name: math.dist(places[name], places[mark]) for name in compared}
        assert answer.text.split("</think>")[1] == best(far, key=far.__getitem__)


def test_text_only_scenes_list_positions_in_words():
    told_places = "gripper (10, 20) at (40, 3, 12), red cube (30, 40) at (50, -4, 2)"
    seen = row(
        0,
        np.zeros((112, 112, 3), np.uint8),
        ("point_base", "(10, 20)"),
        (
            "metric_gripper_distance",
            "<think>gripper (40, 3, 12), red cube (50, -4, 2): (10, -7, -10)</think>16 cm",
        ),
        ("scan_base", told_places),
        ("scan_wrist", "red cube (70, 80)"),
        ("counting", "<think>red cube</think>1"),
    )
    words = text_only_scene(seen)
    assert words.kinds == ("metric_gripper_distance", "counting") and not words.media
    assert words.messages[0].text == "gripper (40, 3, 12), red cube (50, -4, 2)\nAsk 1."
    assert [m.text for m in words.messages[1::2]] == [seen.messages[n].text for n in (3, 9)]
    assert text_only_scene(seen.select([0, 2])) is None, "nothing follows"
    assert text_only_scene(seen.select([1, 4])) is None, "nothing is told"

    loop = LoopConfig(steps=2, batch_size=4)
    first, words = nano_sources([([seen, seen.select([0])], Path("scenes"), 3.0)], loop)
    assert first.weight == 3.0 and words.weight == pytest.approx(
        3.0 * TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE)
    )
    assert len(first.conversations) == 2 and len(words.conversations) == 1
    assert nano_sources([([seen.select([0])], Path("scenes"), 3.0)], loop)[0].weight == 3.0
    *_, words = nano_sources([([seen] * 9, Path("a"), 1.0), ([seen] * 9, Path("b"), 1.0)], loop)
    assert len(words.conversations) == TEXT_ONLY_SHARE * 8, "no more than training will read"
    assert is_nano(build_nano())


def test_positions_are_float32_under_autocast():
    """bfloat16 has 8 bits: at 100 it rounds to halves, and digits of positions would change."""
    torch.manual_seed(0)
    names = ("red cube", "green cube", "blue cube", "red ball", "green ball", "blue ball")
    tower = ConvVision(ConvVisionConfig(things=names, channels=8)).eval()
    features = 3 * torch.randn(2, tower.config.channels, CELLS * CELLS)
    summary = torch.randn(2, tower.config.summary_size)
    with torch.no_grad():
        exact = tower.find(features, summary, FOUND)
        with torch.autocast("cpu", torch.bfloat16):
            found = tower.find(features, summary, FOUND)
    assert torch.equal(found.names, exact.names)
    assert found.points.dtype is torch.float32
    torch.testing.assert_close(found.points, exact.points, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.presence, exact.presence, atol=1e-5, rtol=0)
