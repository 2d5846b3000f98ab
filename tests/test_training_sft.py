"""Stage I: which tokens are learnt, parity with the model's own loss, turns that do not see each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_backbone import tiny_qwen

from blm.backbone import Backbone, build_nano
from blm.training.answers import answer_loss
from blm.training.loop import LoopConfig
from blm.training.packing import RowBatch, collate
from blm.training.rows import Limits, make_row
from blm.training.sft import Stage1Config, train_stage1
from blm.types import BlmError, Image, Message

LIMITS = Limits()
CONFIG = Stage1Config(loop=LoopConfig(steps=60, batch_size=4, lr=3e-3))
TEXTS = ["Point to the red cube.", "(512, 430)", "How many cubes? two", "assistant"]
CARELESS = "Say <|end|> assistant <|assistant|> twice."
"""A question that names the template's own markers must not open the mask."""


def picture(seed: int, size: int = 112) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def dialogue(*turns: tuple[str, str], images: tuple[Image, ...] = ()) -> tuple[Message, ...]:
    messages = []
    for index, (question, answer) in enumerate(turns):
        messages.append(Message("user", (*(images if index == 0 else ()), question)))
        messages.append(Message("assistant", (answer,)))
    return tuple(messages)


@pytest.fixture(scope="module", params=["nano", "qwen2.5"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build_nano(TEXTS) if request.param == "nano" else tiny_qwen("2.5")


@pytest.fixture
def nano() -> Backbone:
    return build_nano(TEXTS)


def batch(backbone: Backbone, limits: Limits, *conversations: tuple[Message, ...]) -> RowBatch:
    rows = [make_row(backbone, c, limits, None, Counter()) for c in conversations]
    return collate(backbone, [row for row in rows if row is not None], tuple(range(len(rows))))


def size(backbone: Backbone) -> int:
    return 112 if "Llava" in type(backbone.model).__name__ else 56


def test_answers_and_their_end_tokens_are_learnt_and_nothing_else(backbone: Backbone) -> None:
    image = picture(0, size(backbone))
    talk = dialogue(("How many cubes?", "two"), ("assistant", "(512, 430)"), images=(image,))
    for separate in (True, False):
        row = make_row(backbone, talk, Limits(separate_turns=separate), None, Counter())
        assert row is not None
        learnt = [backbone.processor.tokenizer.decode(row.tokens[row.branch == j][row.learn[row.branch == j]])
                  for j in np.unique(row.branch)]  # fmt: skip
        text = "".join(learnt)
        end = backbone.processor.tokenizer.decode(backbone.model.generation_config.eos_token_id)
        assert text == f"two{end}(512, 430){end}"
        assert not (row.learn & (row.tokens == backbone.processor.image_token_id)).any()


def test_words_of_the_template_in_a_question_do_not_open_the_mask(nano: Backbone) -> None:
    row = make_row(nano, dialogue((CARELESS, "no")), LIMITS, None, Counter())
    assert row is not None
    assert nano.processor.tokenizer.decode(row.tokens[row.learn]) == "no<|end|>"


def test_the_loss_is_the_models_own_with_other_labels_masked(backbone: Backbone) -> None:
    image = picture(1, size(backbone))
    talks = [dialogue(("How many?", "two"), images=(image,)), dialogue(("Say it.", "(512, 430)"))]
    made = batch(backbone, Limits(separate_turns=False), *talks[:1])
    loss, metrics = answer_loss(backbone, made)
    labels = made.inputs["input_ids"].masked_fill(~made.learn, -100)
    inputs = backbone.encode([talks[0][:1]])
    pixels = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    rest = {k: v for k, v in made.inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    own = backbone.model(**rest, **pixels, labels=labels).loss
    assert torch.allclose(loss, own, atol=1e-5)
    assert metrics["answer_tokens"] == made.learn.sum()


def test_separated_turns_train_as_if_each_were_asked_alone(backbone: Backbone) -> None:
    image = picture(2, size(backbone))
    turns = [("How many cubes?", "two"), ("Point to the red cube.", "(512, 430)"), ("Which?", "the red one")]
    together, _ = answer_loss(backbone, batch(backbone, LIMITS, dialogue(*turns, images=(image,))))
    alone = [batch(backbone, LIMITS, dialogue(turn, images=(image,))) for turn in turns]
    counts = [int(one.learn.sum()) for one in alone]
    losses = [answer_loss(backbone, one)[0].item() for one in alone]
    assert together.item() == pytest.approx(np.average(losses, weights=counts), abs=2e-5)


def test_a_batch_may_mix_rows_with_and_without_pictures(backbone: Backbone) -> None:
    image = picture(3, size(backbone))
    talks = [
        dialogue(("How many?", "two"), ("Which?", "red"), images=(image,)),
        dialogue(("Hello.", "Good day.")),
    ]
    mixed = batch(backbone, LIMITS, *talks)
    parts = [batch(backbone, LIMITS, talk) for talk in talks]
    expected = np.average(
        [answer_loss(backbone, part)[0].item() for part in parts], weights=[int(p.learn.sum()) for p in parts]
    )
    assert answer_loss(backbone, mixed)[0].item() == pytest.approx(expected, abs=2e-5)


def test_trained_answers_are_given_back(nano: Backbone, tmp_path: Path) -> None:
    talks = [
        dialogue(("How many cubes?", "two"), ("Point.", "(12, 30)"), images=(picture(4),)),
        dialogue(("How many cubes?", "one"), ("Point.", "(512, 430)"), images=(picture(5),)),
        dialogue(("Who are you?", "a robot")),
    ]
    counts = train_stage1(
        nano, talks, replace(CONFIG, loop=replace(CONFIG.loop, steps=250, batch_size=3)), tmp_path
    )
    assert counts == {"kept": 3}
    again = Backbone.load(tmp_path / "backbone")
    for talk in talks:
        pictures = talk[0].images
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            assert again.answer([Message("user", (*pictures, question.text))]) == answer.text


def test_frozen_parts_stay_as_they_were(nano: Backbone, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in nano.model.state_dict().items()}
    config = replace(CONFIG, vision_scale=0.0, loop=replace(CONFIG.loop, steps=2))
    train_stage1(nano, [dialogue(("How many?", "two"), images=(picture(6),))], config, tmp_path)
    changed = {
        name for name, value in nano.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed and not any("vision_tower" in name for name in changed)


def test_long_rows_lose_their_last_turns_never_a_picture(nano: Backbone) -> None:
    counts: Counter[str] = Counter()
    talk = dialogue(("How many cubes?", "two"), ("x" * 300, "no"), images=(picture(7),))
    limits = Limits(max_length=60)
    config = replace(CONFIG, limits=limits)
    row = make_row(nano, talk, limits, None, counts)
    assert row is not None and len(row.tokens) <= 60 and counts == {"turns cut": 1, "kept": 1}
    assert (row.tokens == nano.processor.image_token_id).sum() == 16
    assert make_row(nano, dialogue(("x" * 300, "no"), images=(picture(8),)), limits, None, counts) is None
    with pytest.raises(BlmError, match="no conversation can be trained on"):
        train_stage1(nano, [dialogue(("x" * 300, "no"))], config, Path("unused"))


def test_unusable_conversations_are_named(nano: Backbone, tmp_path: Path) -> None:
    good = dialogue(("How many?", "two"))
    broken = (Message("user", (Image(path="nowhere.png"), "How many?")), Message("assistant", ("two",)))
    with pytest.raises(BlmError, match=r"conversation 1: .*nowhere.png"):
        train_stage1(nano, [good, broken], CONFIG, tmp_path, root=tmp_path)
    with pytest.raises(BlmError, match=r"conversation 0: .*reserved"):
        train_stage1(nano, [dialogue(("What is <image>?", "a word"))], CONFIG, tmp_path)
