"""What each model family can do: from Stage I to export, on a tiny random folder of its real classes.

`python -m tests.training.test_families` prints the table of docs/stage1.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.app.export import export_vllm
from blm.app.model import BLM
from blm.backbone import Backbone, question_prompt
from blm.evaluation.digital import evaluate_digital
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.policy.train import train_stage2
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.lora import Lora
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.pack import collate, require_exact
from blm.training.sft.parameter_groups import freeze_parts
from blm.training.sft.tokenize import TokenizationConfig, tokenize_conversation
from blm.training.sft.train import Stage1Config, TrainingSource, train_stage1
from blm.types import BlmError, Image, Message, Observation, Question
from tests.support.backbones import picture
from tests.support.families import FAMILIES, REFUSED_FAMILIES
from tests.support.hidden_states import SIDE, make_dataset
from tests.support.policy_training import POLICY

YES, NO = "yes", "no"
LOOP = LoopConfig(steps=2, batch_size=2, lr=1e-3)
STAGE1: dict[str, Stage1Config] = {
    "full": Stage1Config(loop=LOOP),
    "cached": Stage1Config(loop=LOOP, vision_scale=0.0, cache_features=True),
    "LoRA": Stage1Config(loop=LOOP, lora=Lora(rank=2), cache_features=True),
    "packed": Stage1Config(loop=LOOP, pack_length=256),
}
ABILITIES = (*STAGE1, "Stage II", "live", "chat", "action", "evaluation", "vLLM")
"""Columns of the table: Stage I in full, with cached vision features and a trained projector, with
LoRA, with packing and separated turns; Stage II from cached and from live hidden states; .."""
NOT_PACKED = {"Gemma 3"}
NOT_CACHED = {"LLaVA-OneVision"}
"""Its row break behind the projector is a trained weight too."""
NOT_EXPORTED = {"LLaVA-OneVision", "InternVL", "Gemma 3"}


def expected(family: str, ability: str) -> str:
    """What the table says."""
    refused = family in REFUSED_FAMILIES
    refused |= ability == "packed" and family in NOT_PACKED
    refused |= ability == "cached" and family in NOT_CACHED
    refused |= ability == "vLLM" and family in NOT_EXPORTED
    return NO if refused else YES


def table() -> str:
    """The table as Markdown."""
    families = (*FAMILIES, *REFUSED_FAMILIES)
    rows = [[family, *(expected(family, ability) for ability in ABILITIES)] for family in families]
    lines = [["family", *ABILITIES], ["---"] * (1 + len(ABILITIES)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conversations() -> list[tuple[Message, ...]]:
    """Pictures with several questions, two pictures, and no picture."""
    one, two = Image(picture(0)), Image(picture(1, 60, 90))

    def turn(answer: str, *question: Image | str) -> tuple[Message, Message]:
        return Message("user", question), Message("assistant", (answer,))

    return [
        (*turn("two", one, "How many cubes?"), *turn("the red one", "Which?")),
        turn("no", one, two, "Is it the same?"),
        turn("a robot", "Who are you?"),
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with BASE, the tiny model of a family, a data set of demonstrations, and its
    checkpoint."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "name").write_text(request.param)
    FAMILIES[request.param]().save(folder / "base")
    make_dataset(folder)
    yield folder


def name_of(family: Path) -> str:
    return (family / "name").read_text()


def adjusted(family: Path, config: Stage1Config) -> Stage1Config:
    """The config, with turns separated unless the family cannot, and LoRA with cached features
    unless it cannot."""
    if name_of(family) in NOT_CACHED and config.lora.rank:
        return replace(config, cache_features=False)
    if name_of(family) in NOT_PACKED and not config.pack_length:
        return replace(config, limits=TokenizationConfig(separate_turns=False))
    return config


@pytest.mark.parametrize("way", STAGE1)
def test_stage_one(family: Path, way: str, tmp_path: Path) -> None:
    backbone = Backbone.load(family / "base")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    sources = [TrainingSource(name="talks", conversations=conversations())]
    config = adjusted(family, STAGE1[way])
    if expected(name_of(family), way) == NO:
        hint = "cache_features=False" if way == "cached" else "separate_turns"
        with pytest.raises(BlmError, match=rf"{type(backbone.model).__name__}.*{hint}"):
            train_stage1(backbone, sources, config, tmp_path)
        return
    train_stage1(backbone, sources, config, tmp_path)
    after = Backbone.load(tmp_path / "backbone").model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert any("layers" in name for name in changed)
    if way == "packed":
        assert require_exact(Backbone.load(family / "base")) < 1e-4


def test_the_loss_is_the_models_own_with_pictures_and_with_cached_features(
    family: Path, tmp_path: Path
) -> None:
    backbone = Backbone.load(family / "base")
    whole = TokenizationConfig(separate_turns=False)
    talks = conversations()
    examples = [tokenize_conversation(backbone, talk, whole, None, Counter()) for talk in talks]
    kept = [example for example in examples if example is not None]
    total, tokens = 0.0, 0
    for talk, example in zip(talks, kept, strict=True):
        pixels = [image.pixels for message in talk for image in message.images]
        inputs = backbone.process([backbone.render(talk, prompt=False)], pixels)
        labels = inputs["input_ids"].masked_fill(~torch.from_numpy(example.loss_mask), -100)
        count = int(example.loss_mask.sum())
        total += backbone.model(**inputs, labels=labels).loss.item() * count
        tokens += count
    trains_projector = float(name_of(family) not in NOT_CACHED)
    freeze_parts(backbone.model, {"vision": 0.0, "projector": trains_projector, "language": 1.0})
    (cached,) = cache_features(backbone, [kept], tmp_path, ALONE).examples
    for rows, with_cache in ((kept, False), (cached, True)):
        found = MaskedLossModel(backbone, cached=with_cache)(collate(backbone, rows, (0, 1, 2)))
        assert int(found.tokens) == tokens
        assert found.loss_sum.item() == pytest.approx(total, rel=1e-5)


def test_the_features_of_a_picture_do_not_depend_on_its_shape_or_those_beside_it(family: Path) -> None:
    backbone = Backbone.load(family / "base")
    wide, square = picture(1, 60, 90), picture(2, 64, 64)
    together = backbone.encode([question_prompt("Which?", [wide, square])])
    alone = [backbone.encode([question_prompt("Which?", [seen])]) for seen in (wide, square)]
    counts = [int((one["input_ids"] == backbone.placeholder_id).sum()) for one in (*alone, together)]
    assert counts[0] + counts[1] == counts[2]
    with torch.no_grad():
        *parts, whole = (torch.cat(list(_features(backbone, one))) for one in (*alone, together))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def _features(backbone: Backbone, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    of_pictures = {
        name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")
    }
    found = backbone.model.base_model.get_image_features(**of_pictures, return_dict=True).pooler_output
    return tuple(part.flatten(0, -2) for part in found)


def stage2_config(family: Path, *, live: bool) -> PolicyTrainingConfig:
    return PolicyTrainingConfig(
        datasets=(family / "arm",),
        backbone=str(family / "base"),
        intents=HiddenStateConfig(layer=2, cameras=("base", "wrist"), workers=0, stride=2),
        loop=LoopConfig(steps=2, batch_size=2, lr=1e-3),
        policy=POLICY,
        cache=None if live else family / "cache",
        execute=3,
        held_out=0.3,
        validation_batches=1,
    )


@pytest.fixture(scope="module")
def model(family: Path) -> BLM:
    """The model after Stage II with cached hidden states."""
    return BLM.from_pretrained(train_stage2(stage2_config(family, live=False), family / "stage2", {}))


def test_stage_two_from_live_hidden_states_too(family: Path, model: BLM, tmp_path: Path) -> None:
    live = train_stage2(stage2_config(family, live=True), tmp_path, {})
    assert BLM.from_pretrained(live).backbone.fingerprint() == model.backbone.fingerprint()


def test_action(model: BLM) -> None:
    seen = {name: picture(n, SIDE, SIDE) for n, name in enumerate(("base", "wrist"))}
    observation = Observation(
        images=seen, state=np.zeros(3, np.float32), instruction="reach the dot", robot="arm", seed=0
    )
    assert np.isfinite(model.act(observation).actions).all()


def test_answers_are_those_of_the_models_own_generation(family: Path, model: BLM) -> None:
    backbone = Backbone.load(family / "stage2/checkpoint/backbone")
    prompts = [
        question_prompt("What is it?", [picture(0), picture(1, 60, 90)]),
        question_prompt("What can you do? Say it in many words, please, and slowly."),
        question_prompt("And this?", [picture(2)]),
    ]
    together = backbone.answer_batch(prompts, max_tokens=6)
    for prompt, answer in zip(prompts, together, strict=True):
        assert model.answer(prompt, max_tokens=6) == answer
        inputs = backbone.encode([prompt])
        with torch.no_grad():
            own = backbone.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = own[0, inputs["input_ids"].shape[1] :]
        assert answer == backbone.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_evaluation_in_digital_space(model: BLM, tmp_path: Path) -> None:
    questions = [
        Question(id=str(n), kind="count", messages=question_prompt("How many?", [picture(n)]), answer="two",
                 group=str(n)) for n in range(3)
    ]  # fmt: skip
    result = evaluate_digital(model.backbone, questions, tmp_path, model="tiny")
    assert len(result.predictions) == 3


def test_export_for_vllm(family: Path, model: BLM, tmp_path: Path) -> None:
    source = str(family / "stage2/checkpoint")
    if expected(name_of(family), "vLLM") == NO:
        with pytest.raises(BlmError, match="vLLM cannot serve"):
            export_vllm(source, tmp_path / "out")
        return
    assert "vllm serve" in export_vllm(source, tmp_path / "out")


@pytest.mark.parametrize("name", REFUSED_FAMILIES)
def test_other_families_are_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    REFUSED_FAMILIES[name](tmp_path)
    kind = {"PaliGemma": "paligemma"}[name]
    for load in (Backbone.load, Backbone.outline):
        with pytest.raises(BlmError, match=f"'{kind}' cannot be a backbone: it "):
            load(tmp_path)


def test_the_table_stands_in_the_manual() -> None:
    assert table() in (Path(__file__).parents[2] / "docs/stage1.md").read_text()


if __name__ == "__main__":
    print(table())
