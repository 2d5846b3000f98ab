"""Stage I: which tokens are learnt, parity with the model's own loss, turns that do not see each other."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from blm.backbone import Backbone, build_nano
from blm.io import read_json, read_json_lines
from blm.training.loop.distributed import DataShard
from blm.training.loop.loop import LoopConfig
from blm.training.sft.lora import Lora, add_adapters
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.pack import ExampleBatch, collate
from blm.training.sft.parameter_groups import freeze_parts, part_of, train_tower
from blm.training.sft.tokenize import TokenizationConfig, tokenize_conversation
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import BlmError, Image, Message
from tests.support.backbones import MAKERS, tiny_qwen

LIMITS = TokenizationConfig()
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


def source(*talks: tuple[Message, ...], root: Path | None = None, **fields: Any) -> TrainingSource:
    apart = [True] * len(talks)
    return TrainingSource(
        **{"name": "made", "conversations": talks, "root": root, "independent": apart, **fields}
    )


@pytest.fixture(scope="module", params=["nano", "qwen2.5"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build_nano(TEXTS) if request.param == "nano" else tiny_qwen("2.5")


@pytest.fixture
def nano() -> Backbone:
    return build_nano(TEXTS)


def batch(
    backbone: Backbone, limits: TokenizationConfig, *conversations: tuple[Message, ...]
) -> ExampleBatch:
    rows = [
        tokenize_conversation(backbone, c, limits, None, Counter(), independent=True) for c in conversations
    ]
    return collate(backbone, [row for row in rows if row is not None], tuple(range(len(rows))))


def mean_loss(backbone: Backbone, batch: ExampleBatch) -> torch.Tensor:
    answers = MaskedLossModel(backbone)(batch)
    return answers.loss_sum / answers.tokens


def size(backbone: Backbone) -> int:
    return 112 if "Llava" in type(backbone.model).__name__ else 56


def test_answers_and_their_end_tokens_are_learnt_and_nothing_else(backbone: Backbone) -> None:
    image = picture(0, size(backbone))
    talk = dialogue(("How many cubes?", "two"), ("assistant", "(512, 430)"), images=(image,))
    for separate in (True, False):
        row = tokenize_conversation(
            backbone,
            talk,
            TokenizationConfig(separate_turns=separate),
            None,
            Counter(),
            independent=True,
        )
        assert row is not None
        segments = [row.segment_ids == number for number in np.unique(row.segment_ids)]
        learnt = [
            backbone.processor.tokenizer.decode(row.tokens[own][row.loss_mask[own]]) for own in segments
        ]
        text = "".join(learnt)
        end = backbone.processor.tokenizer.decode(backbone.model.generation_config.eos_token_id)
        assert text == f"two{end}(512, 430){end}"
        assert not (row.loss_mask & (row.tokens == backbone.processor.image_token_id)).any()


def test_words_of_the_template_in_a_question_do_not_open_the_mask(nano: Backbone) -> None:
    row = tokenize_conversation(nano, dialogue((CARELESS, "no")), LIMITS, None, Counter())
    assert row is not None
    assert nano.processor.tokenizer.decode(row.tokens[row.loss_mask]) == "no<|end|>"


def test_the_loss_is_the_models_own_with_other_labels_masked(backbone: Backbone) -> None:
    image = picture(1, size(backbone))
    talks = [dialogue(("How many?", "two"), images=(image,)), dialogue(("Say it.", "(512, 430)"))]
    made = batch(backbone, TokenizationConfig(separate_turns=False), *talks[:1])
    answers = MaskedLossModel(backbone)(made)
    labels = made.inputs["input_ids"].masked_fill(~made.loss_mask, -100)
    inputs = backbone.encode([talks[0][:1]])
    pixels = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    rest = {k: v for k, v in made.inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    own = backbone.model(**rest, **pixels, labels=labels).loss
    assert torch.allclose(answers.loss_sum / answers.tokens, own, atol=1e-5)
    assert answers.tokens == made.loss_mask.sum()


def test_separated_turns_train_as_if_each_were_asked_alone(backbone: Backbone) -> None:
    image = picture(2, size(backbone))
    turns = [("How many cubes?", "two"), ("Point to the red cube.", "(512, 430)"), ("Which?", "the red one")]
    together = mean_loss(backbone, batch(backbone, LIMITS, dialogue(*turns, images=(image,))))
    alone = [batch(backbone, LIMITS, dialogue(turn, images=(image,))) for turn in turns]
    counts = [int(one.loss_mask.sum()) for one in alone]
    losses = [mean_loss(backbone, one).item() for one in alone]
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
        [mean_loss(backbone, part).item() for part in parts], weights=[int(p.loss_mask.sum()) for p in parts]
    )
    assert mean_loss(backbone, mixed).item() == pytest.approx(expected, abs=2e-5)


def test_trained_answers_are_reproduced(nano: Backbone, tmp_path: Path) -> None:
    red, blue = (Image(np.full((112, 112, 3), color, np.uint8)) for color in ((220, 30, 30), (30, 30, 220)))
    talks = [
        dialogue(("How many cubes?", "two"), ("Point.", "(12, 30)"), images=(red,)),
        dialogue(("How many cubes?", "one"), ("Point.", "(512, 430)"), images=(blue,)),
        dialogue(("Who are you?", "a robot")),
    ]
    config = replace(CONFIG, loop=replace(CONFIG.loop, steps=160, batch_size=3))
    counts = train_stage1(nano, [source(*talks)], config, tmp_path)
    assert counts == {"kept": 3}
    again = Backbone.load(tmp_path / "backbone")
    for talk in talks:
        pictures = talk[0].images
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            assert again.answer([Message("user", (*pictures, question.text))]) == answer.text


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
@pytest.mark.parametrize("name", ["nano", "qwen3"])
def test_frozen_parts_stay_as_they_were_and_the_others_move(name: str, part: str, tmp_path: Path) -> None:
    backbone = MAKERS[name]()
    before = {key: value.clone() for key, value in backbone.model.named_parameters()}
    config = replace(CONFIG, loop=replace(CONFIG.loop, steps=2), **{f"{part}_scale": 0.0})
    talk = dialogue(("How many?", "two"), images=(picture(6, size(backbone)),))
    train_stage1(backbone, [source(talk)], config, tmp_path)
    after = dict(backbone.model.named_parameters())
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    frozen = {key for key in before if part_of(key) == part}
    assert frozen and frozen <= same
    moved = {part_of(key) for key in before.keys() - same}
    assert moved == {"vision", "projector", "language"} - {part}
    assert all(value.requires_grad == (key not in frozen) for key, value in after.items())


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_parameter_of_every_architecture_has_a_part(name: str) -> None:
    numbers = freeze_parts(MAKERS[name]().model, {"vision": 1.0, "projector": 0.5, "language": 2.0})
    assert all(count > 0 for count in numbers.values())


def test_a_scale_without_effect_is_refused() -> None:
    model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(2, 2)})
    with pytest.raises(BlmError, match=r"vision_scale is 0.0, but .* no vision"):
        freeze_parts(model, {"vision": 0.0, "projector": 1.0, "language": 1.0})
    with pytest.raises(BlmError, match=r"'strange.weight' .* belongs to none"):
        freeze_parts(torch.nn.ModuleDict({"strange": torch.nn.Linear(2, 2)}), {"vision": 1.0})
    with pytest.raises(BlmError, match=r"vision_scale is 1.0, but .* no vision"):
        train_tower(model, 1.0)
    with pytest.raises(BlmError, match=r"\['w_proj'\] .* valid: .*'q_proj'"):
        add_adapters(build_nano(TEXTS), Lora(rank=2, targets=("w_proj",)), projector=False, seed=0)


@pytest.mark.parametrize("name", ["nano", "qwen3"])
def test_merged_adapters_answer_as_adapters_beside_the_base_do(name: str, tmp_path: Path) -> None:
    backbone, base = MAKERS[name](), MAKERS[name]()
    talk = dialogue(("How many?", "two"), images=(picture(6, size(backbone)),))
    inputs = backbone.encode([talk[:1]])
    before = backbone.model(**inputs).logits
    config = replace(CONFIG, loop=replace(CONFIG.loop, steps=5), lora=Lora(rank=4, dropout=0.1))
    train_stage1(backbone, [source(talk)], config, tmp_path)
    forward_arguments = backbone.model(**inputs).logits
    again = Backbone.load(tmp_path / "backbone").model(**inputs).logits
    with warnings.catch_warnings(action="ignore"):  # peft asks transformers by an old name
        beside = peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()(**inputs).logits
    assert not torch.allclose(forward_arguments, before, atol=1e-3)
    assert torch.equal(forward_arguments, again) and torch.allclose(forward_arguments, beside, atol=1e-4)
    assert not any("lora" in key or "modules_to_save" in key for key in backbone.model.state_dict())
    kept = [key for key, value in MAKERS[name]().model.named_parameters() if part_of(key) == "vision"]
    weights = dict(backbone.model.named_parameters())
    assert all(
        torch.equal(weights[key], dict(MAKERS[name]().model.named_parameters())[key]) for key in kept[:9]
    )


@pytest.mark.parametrize("name", ["nano", "qwen2.5", "qwen3"])
def test_a_tower_is_trained_beside_adapters(name: str, tmp_path: Path) -> None:
    backbone, base = MAKERS[name](), MAKERS[name]()
    talk = dialogue(("How many?", "two"), images=(picture(6, size(backbone)),))
    loop = replace(CONFIG.loop, steps=2)
    config = replace(CONFIG, loop=loop, lora=Lora(rank=2), vision_scale=0.5, projector_scale=0.0)
    train_stage1(backbone, [source(talk)], config, tmp_path)
    before = dict(base.model.named_parameters())
    saved = dict(Backbone.load(tmp_path / "backbone").model.named_parameters())
    changed = {key for key, value in saved.items() if not torch.equal(value, before[key])}
    parts = {part_of(key) for key in changed}
    assert parts == {"vision", "language"}, "adapters are merged, the tower is trained, the projector is not"
    tower = [key for key in saved if part_of(key) == "vision"]
    assert len(changed.intersection(tower)) > len(tower) / 2


def test_epochs_are_passes_over_all_examples(tmp_path: Path) -> None:
    talks = [dialogue((f"How many {number}?", "two")) for number in range(6)]
    config = replace(CONFIG, loop=LoopConfig(epochs=1.5, batch_size=4, lr=1e-3, log_every=1))
    train_stage1(build_nano(TEXTS), [source(*talks)], config, tmp_path)
    assert len(read_json_lines(tmp_path / "log.jsonl")) == 3, "ceil(1.5 * 6 / 4) steps"
    assert read_json(tmp_path / "drawn.json")["made"]["examples"] == 12
    with pytest.raises(BlmError, match="give one of both"):
        LoopConfig(steps=1, epochs=1.0, batch_size=1)
    with pytest.raises(BlmError, match="give one of both"):
        LoopConfig(batch_size=1)


def test_recomputed_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    talk = dialogue(("How many?", "two"), ("Which?", "the red one"), images=(picture(6, 56),))
    weights = []
    for recompute in (False, True):
        backbone = tiny_qwen("2.5")
        config = replace(CONFIG, loop=replace(CONFIG.loop, steps=2), checkpoint_blocks=recompute)
        train_stage1(backbone, [source(talk)], config, tmp_path / str(recompute))
        assert not backbone.model.is_activation_checkpointing
        weights.append(backbone.model.state_dict())
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_cached_features_train_as_pictures_do(tmp_path: Path) -> None:
    talks = [dialogue(("How many?", "two"), images=(picture(6),)), dialogue(("Who?", "a robot"))]
    weights = []
    for cached in (False, True):
        backbone = build_nano(TEXTS)
        loop = replace(CONFIG.loop, steps=3, lr=3e-4)
        config = replace(CONFIG, loop=loop, vision_scale=0.0, cache_features=cached)
        counts = train_stage1(backbone, [source(*talks)], config, tmp_path / str(cached))
        assert counts["distinct pictures"] == cached
        weights.append(backbone.model.state_dict())
    # Adam's first steps enlarge rounding where a gradient is about zero; the rate is six times this
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=5e-5) for name in weights[0])


@pytest.mark.parametrize("pack_length", [0, 200])
def test_the_mixture_has_the_weights_asked_for(pack_length: int, tmp_path: Path, nano: Backbone) -> None:
    seen: Counter[str] = Counter()

    def count(*arguments: Any, **options: Any) -> None:
        next_batch = arguments[2]
        for step in range(50):
            seen.update(str(name).split()[0] for name in next_batch(step, DataShard()).ids)

    config = replace(CONFIG, pack_length=pack_length)
    rare, often = dialogue(("How many?", "two")), dialogue(("Who?", "a robot"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blm.training.sft.train.run_loop", count)
        train_stage1(
            nano,
            [source(rare, name="own", weight=1.0), source(*[often] * 9, name="replay", weight=3.0)],
            config,
            tmp_path,
        )
    assert sum(seen.values()) == 50 * 4 and abs(seen["own"] - 50) <= 2


def test_long_rows_lose_their_last_turns_never_a_picture(nano: Backbone) -> None:
    counts: Counter[str] = Counter()
    talk = dialogue(("How many cubes?", "two"), ("x" * 300, "no"), images=(picture(7),))
    limits = TokenizationConfig(max_length=60)
    config = replace(CONFIG, limits=limits)
    row = tokenize_conversation(nano, talk, limits, None, counts, independent=True)
    assert row is not None and len(row.tokens) <= 60 and counts == {"turns cut": 1, "kept": 1}
    assert (row.tokens == nano.processor.image_token_id).sum() == 16
    assert (
        tokenize_conversation(nano, dialogue(("x" * 300, "no"), images=(picture(8),)), limits, None, counts)
        is None
    )
    with pytest.raises(BlmError, match="no conversation of 'made' can be trained on"):
        train_stage1(nano, [source(dialogue(("x" * 300, "no")))], config, Path("unused"))


def test_unusable_conversations_are_named(nano: Backbone, tmp_path: Path) -> None:
    good = dialogue(("How many?", "two"))
    broken = (Message("user", (Image(path="nowhere.png"), "How many?")), Message("assistant", ("two",)))
    with pytest.raises(BlmError, match=r"made, conversation 1: .*nowhere.png"):
        train_stage1(nano, [source(good, broken, root=tmp_path)], CONFIG, tmp_path)
    with pytest.raises(BlmError, match=r"made, conversation 0: .*reserved"):
        train_stage1(nano, [source(dialogue(("What is <image>?", "a word")))], CONFIG, tmp_path)


def test_bad_rows_are_skipped_only_when_asked_and_then_printed(
    nano: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = (Message("user", (Image(path="nowhere.png"), "How many?")), Message("assistant", ("two",)))
    talks = source(dialogue(("How many?", "two")), broken, locations=["a.jsonl:1", "a.jsonl:2"])
    with pytest.raises(BlmError, match=r"a.jsonl:2: .*nowhere.png.*; skip_bad"):
        train_stage1(nano, [talks], CONFIG, tmp_path)
    config = replace(CONFIG, skip_bad=True, loop=replace(CONFIG.loop, steps=1))
    counts = train_stage1(nano, [talks], config, tmp_path)
    assert counts == {"kept": 1, "skipped, bad": 1} == read_json(tmp_path / "rows.json")
    assert "skipped a.jsonl:2" in capsys.readouterr().err
    with pytest.raises(BlmError, match="another backbone, source made"):
        train_stage1(nano, [source(dialogue(("How many?", "one")))], config, tmp_path)
