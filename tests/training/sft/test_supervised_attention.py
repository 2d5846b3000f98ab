"""Supervised attention: what it takes from answers, and parity with the model's own attention."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from blm.backbone import Backbone, build_nano
from blm.backbone.grounding import FOUND, NAME_SCALE, REACH, map_words
from blm.backbone.grounding import VIEWS as VIEW_COUNT
from blm.backbone.prompt import control_prompt, order_of
from blm.training.loop.distributed import Processes
from blm.training.sft.loss import forward_arguments
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.supervised_attention import (
    METRIC_AT,
    NAMED_BLOCK,
    NEAR,
    ROLE_BLOCK,
    SequenceText,
    SupervisedAttention,
)
from blm.training.sft.tokenize import TokenizationConfig
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.types import BlmError, Image, Message
from tests.support.families import tiny_llava

THINGS = ["blue square", "green square", "red square"]


def nano() -> Backbone:
    torch.set_num_threads(1)
    return build_nano(["List all. red square (120, 340) blue box"], things=THINGS)


def token(point: tuple[float, float], presence: float = 1.0) -> torch.Tensor:
    """A token of the vision tower whose thing is at a point."""
    value = torch.zeros(build_nano().model.config.vision_config.hidden_size)
    at = 68  # names of 64 words and 4 quarters
    value[at : at + 3] = presence * torch.tensor([1.0, 2 * point[0] - 1, 2 * point[1] - 1])
    return value


def batch(backbone: Backbone, answers: list[str], **limits: bool) -> ExampleBatch:
    """Conversations about one image each, in one sequence."""
    rng = np.random.default_rng(0)
    rows = [
        (Message("user", (Image(rng.integers(0, 256, (112, 112, 3), np.uint8)), "List all."))),
        *[m for text in answers for m in (Message("assistant", (text,)), Message("user", ("Where?",)))],
    ][:-1]
    source = TrainingSource(name="t", conversations=[rows, rows])
    tokenizer = CorpusTokenizer(
        backbone, TokenizationConfig(**limits), Processes.join(backbone.model.device), skip_bad=False
    )
    return pack(backbone, [list(tokenizer.tokenize(source).examples)], (0, 1))


def run(attention: SupervisedAttention, backbone: Backbone, one: ExampleBatch) -> None:
    """Run the model on a batch, watched."""
    with attention.watch(), use_prefix_attention(backbone):
        arguments = forward_arguments(backbone, one.inputs)
        backbone.model.base_model(**arguments, prefix_layout=one.prefix_layout, use_cache=False)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("red square (120, 340)", [(0.12, 0.34)]),
        ("red square (120, 340), blue box (1, 2)", [(0.12, 0.34), (0.001, 0.002)]),
        ("red square (12, 5, 3), blue box y 4", []),
        ("(100, 200, 300, 600)", [(0.2, 0.4)]),
        ("nothing (that I can see)", []),
        ("(7)", []),
        ("(100, 200", []),
    ],
)
def test_points_and_boxes_are_found_in_answers(text, points):
    tokenizer = nano().processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    found = list(SequenceText(texts, ids).located([True] * len(ids)))
    assert [one.point for one in found] == [pytest.approx(point) for point in points]
    for positions, _, _ in found:
        assert "(" in texts[ids[positions[0]]] and ")" in texts[ids[positions[-1] + 1]]
    assert not list(SequenceText(texts, ids).located([False] * len(ids))), "questions are not answers"


def weights_of_model(attention: SupervisedAttention, packed: ExampleBatch, block: int) -> torch.Tensor:
    """The attention probabilities [heads, L, L] that transformers computes in a block."""
    hidden, rotary = attention.inputs[block]
    module = attention.blocks[block].self_attn
    given = packed.inputs["attention_mask"]
    mask = (
        given[0, 0]
        if given.ndim == 4
        else torch.ones(given.shape[1], given.shape[1], dtype=torch.bool).tril()
    )
    kind, module.config._attn_implementation = module.config._attn_implementation, "eager"
    with torch.no_grad():
        _, weights = module(hidden, rotary, torch.where(mask, 0.0, -torch.inf)[None, None])
    module.config._attn_implementation = kind
    return weights[0]


def test_the_loss_is_the_attention_that_the_model_computes():
    """Parity with the probabilities that transformers returns, through turns and packing."""
    backbone = nano()
    tokens = torch.stack([token((0.9, 0.9))] * (FOUND + 4))
    tokens[2], tokens[5] = token((0.12, 0.34)), token((0.5, 0.5))
    attention = SupervisedAttention(backbone)
    packed = batch(backbone, ["red square (120, 340)", "(510, 490)"])
    with torch.no_grad():
        run(attention, backbone, packed)
        attention.image_tokens = tokens.expand(2, -1, -1)
        loss, metrics = attention(packed)
    weights = weights_of_model(attention, packed, NAMED_BLOCK)
    ids = packed.inputs["input_ids"][0]
    starts = (ids == attention.image_token).nonzero().flatten()[:: FOUND + 4].tolist()
    expected = []
    text = SequenceText(attention.texts, ids.tolist())
    for positions, _, point in text.located(packed.loss_mask[0].tolist()):
        slot = max(s for s in starts if s < positions[0]) + (2 if point[0] < 0.3 else 5)
        expected += [-weights[len(weights) // 2 :, at, slot].log().mean() for at in positions]
    assert len(expected) >= 20
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert float(metrics["attended"]) == pytest.approx(math.exp(-loss.item()), rel=1e-4)


def test_only_near_and_certain_things_are_targets():
    backbone = nano()
    attention = SupervisedAttention(backbone)
    one = batch(backbone, ["red square (120, 340)"])
    run(attention, backbone, one)
    for other in (token((0.12 + 2 * NEAR, 0.34)), token((0.12, 0.34), presence=0.1)):
        attention.image_tokens = other.expand(2, FOUND + 4, -1)
        loss, metrics = attention(one)
        assert loss.item() == 0 and math.isnan(metrics["attended"])
    attention.image_tokens = token((0.12, 0.34)).expand(2, FOUND + 4, -1)
    assert attention(one)[0].item() > 0


def test_a_point_is_looked_for_in_the_view_that_its_turn_names():
    texts = list("<|user|>In the side view, where?<|end|><|assistant|>(1, 2)<|end|><|user|>base: and (3, 4)?")
    texts += list("<|assistant|>(5, 6). side: (7, 8)<|user|>Where?<|assistant|>(9, 10)")
    found = SequenceText(texts, range(len(texts)), ("base", "side")).located([True] * len(texts))
    assert [one.view for one in found] == ["side", "base", "base", "side", ""]


def metric_token(
    backbone: Backbone, name: str, place: tuple[float, float, float], camera: int
) -> torch.Tensor:
    """A token of a thing with a name, at a place in the robot's frame [cm], seen by a camera."""
    tower = backbone.model.base_model.vision_tower
    value = token((0.5, 0.5))
    for word in map_words(name, tower.config.compound):
        value[tower.words.index(word)] = NAME_SCALE
    value[METRIC_AT : METRIC_AT + 3] = torch.tensor(place) / (100 * REACH)
    value[-VIEW_COUNT + camera] = 1
    return value


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red square (31, -7, 2), blue square (58, 4, 0): (27, 11, -2)", [3, 4]),
        ("red square y -7", [3]),
        ("(58, 4, 0) cm", [4]),
        ("(58, 40, 0) cm", []),  # nothing is there
        ("green square (31, -7, 2)", []),  # not seen
        ("27 cm", []),
    ],
)
def test_positions_in_the_robots_frame_are_read_from_the_token_of_the_thing(answer, expected):
    """Parity: the loss is that of the token with the name, in the first view of a known camera."""
    backbone = nano()
    attention, one = SupervisedAttention(backbone), batch(backbone, [answer])
    with torch.no_grad():
        run(attention, backbone, one)
    tokens = torch.stack([metric_token(backbone, "green square", (0, 0, 0), 1)] * (FOUND + 4))
    tokens[3] = metric_token(backbone, "red square", (31, -7, 2), 1)
    tokens[4] = metric_token(backbone, "blue square", (58, 4, 0), 1)
    attention.image_tokens = tokens.expand(2, -1, -1)
    loss, _ = attention(one)
    if not expected:
        assert loss.item() == 0
        return
    weights = weights_of_model(attention, one, NAMED_BLOCK)
    ids = one.inputs["input_ids"][0]
    starts = (ids == attention.image_token).nonzero().flatten()[:: FOUND + 4].tolist()
    text = SequenceText(attention.texts, ids.tolist())
    losses = []
    for number, found in enumerate(text.measured(one.loss_mask[0].tolist())):
        slot = max(s for s in starts if s < found.at[0]) + expected[number % len(expected)]
        losses += [-weights[len(weights) // 2 :, at, slot].log().mean() for at in found.at]
        predicted = "".join(attention.texts[token] for token in ids[found.at[0] + 1 : found.at[-1] + 2])
        assert re.fullmatch(r" ?-?\d+(, -?\d+, -?\d+\))?,?", predicted), "the numbers, and nothing else"
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


VIEWS = {"base": {"object": (0.2, 0.3), "gripper": (0.7, 0.1)}, "wrist": {"goal": (0.4, 0.8)}}


def control(backbone: Backbone) -> ExampleBatch:
    """A control prompt with the order query_last, and its answer, as scene corpora have it."""
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (112, 112, 3), np.uint8) for view in VIEWS}
    written = [
        f"{view}: "
        + ", ".join(f"{role} ({1000 * x:.0f}, {1000 * y:.0f})" for role, (x, y) in roles.items())
        + "."
        for view, roles in VIEWS.items()
    ]
    prompt = control_prompt("Push it: now.", "panda", images, order="query_last")
    assert order_of(prompt[0]) == "query_last"
    rows = (*prompt, Message("assistant", (f"{' '.join(written)} next: approach",)))
    source = TrainingSource(name="t", conversations=[rows])
    tokenizer = CorpusTokenizer(
        backbone, TokenizationConfig(), Processes.join(backbone.model.device), skip_bad=False
    )
    return pack(backbone, [list(tokenizer.tokenize(source).examples)], (0,))


def test_roles_are_read_from_control_prompts_and_their_answers():
    backbone = nano()
    attention, one = SupervisedAttention(backbone), control(backbone)
    ids = one.inputs["input_ids"][0].tolist()
    roles = list(SequenceText(attention.texts, ids).roles())
    assert [role.view for role in roles] == [-2, -2, -2, -1, -1, -1]
    expected = [VIEWS[view].get(role) for view in VIEWS for role in ("object", "goal", "gripper")]
    assert [role.point for role in roles] == [point and pytest.approx(point) for point in expected]
    words = ["object", "goal", "gripper"] * 2
    for role, word in zip(roles, words, strict=True):
        before = "".join(attention.texts[token] for token in ids[: role.at + 1])
        assert before.endswith(word), "the position at which the whole word is known"


def test_roles_attend_to_their_view_and_hold_the_position():
    backbone = nano()
    attention, one = SupervisedAttention(backbone), control(backbone)
    run(attention, backbone, one)
    tokens = torch.stack([token((0.9, 0.9))] * (FOUND + 4)).repeat(2, 1, 1)
    tokens[0, 3], tokens[0, 4], tokens[1, 3] = token((0.2, 0.3)), token((0.7, 0.1)), token((0.4, 0.8))
    attention.image_tokens = tokens
    roles = list(SequenceText(attention.texts, one.inputs["input_ids"][0].tolist()).roles())
    visible = [role for role in roles if role.point]
    weights = weights_of_model(attention, one, ROLE_BLOCK)
    ids = one.inputs["input_ids"][0]
    first, second = (ids == attention.image_token).nonzero().flatten()[:: FOUND + 4].tolist()
    slots = [first + 3, first + 4, second + 3]
    half = weights[len(weights) // 2 :]
    expected = [-half[:, role.at, slot].log().mean() for role, slot in zip(visible, slots, strict=True)]
    _, metrics = attention(one)
    assert float(metrics["roles_attended"]) == pytest.approx(torch.stack(expected).mean().neg().exp().item())
    # states that hold the truth have no error
    states = attention.states.detach().clone()
    for role in roles:
        x, y = role.point or (0.0, 0.0)
        there = math.sqrt(states.shape[-1] - x**2 - y**2)  # a root mean square of 1
        states[0, role.at] = attention.readout @ torch.tensor([x, y, there if role.point else -there])
    attention.states = states
    _, metrics = attention(one)
    assert float(metrics["role_error"]) == pytest.approx(0, abs=1e-5)


def test_training_on_it_moves_the_attention_and_the_states():
    backbone = nano()
    backbone.model.requires_grad_(True)
    backbone.model.base_model.vision_tower.requires_grad_(False)
    attention, one = SupervisedAttention(backbone), control(backbone)
    tokens = torch.stack([token((0.9, 0.9))] * (FOUND + 4)).repeat(2, 1, 1)
    tokens[0, 3], tokens[0, 4], tokens[1, 3] = token((0.2, 0.3)), token((0.7, 0.1)), token((0.4, 0.8))
    optimizer = torch.optim.Adam(backbone.decoder.parameters(), lr=1e-3)
    measured = []
    for _ in range(50):
        run(attention, backbone, one)
        attention.image_tokens = tokens
        loss, metrics = attention(one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measured.append({name: float(value) for name, value in metrics.items()})
    assert measured[-1]["attended"] > 2 * measured[0]["attended"]
    assert measured[-1]["roles_attended"] > 2 * measured[0]["roles_attended"]
    assert measured[-1]["role_error"] < 0.5 * measured[0]["role_error"]


def test_other_models_are_refused():
    with pytest.raises(BlmError, match="needs image tokens that each are about a thing"):
        SupervisedAttention(tiny_llava())
