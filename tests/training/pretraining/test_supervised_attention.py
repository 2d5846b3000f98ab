"""Supervised attention: what it takes from answers, and parity with the model's own attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blm.backbone import Backbone, build_nano
from blm.backbone.grounding import FOUND
from blm.training.loop.distributed import Processes
from blm.training.pretraining.supervised_attention import BLOCK, NEAR, SupervisedAttention, located
from blm.training.sft.loss import forward_arguments
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.tokenize import TokenizationConfig
from blm.training.sft.tokenize_corpora import CorpusTokenizer, TrainingSource
from blm.types import Image, Message

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
        ("red square (120, 340, 12, -5, 3), blue box (1, 2)", [(0.12, 0.34), (0.001, 0.002)]),
        ("(100, 200, 300, 600)", [(0.2, 0.4)]),
        ("nothing (that I can see)", []),
        ("(7)", []),
        ("(100, 200", []),
    ],
)
def test_points_and_boxes_are_found_in_answers(text, points):
    backbone = nano()
    ids = backbone.processor.tokenizer(text)["input_ids"]
    texts = [
        backbone.processor.tokenizer.decode([token]) for token in range(len(backbone.processor.tokenizer))
    ]
    found = list(located(texts, ids, [True] * len(ids)))
    assert [point for *_, point in found] == [pytest.approx(point) for point in points]
    for begin, end, _ in found:
        assert "(" in texts[ids[begin]] and ")" in texts[ids[end]]
    assert not list(located(texts, ids, [False] * len(ids))), "questions are not answers"


def test_the_loss_is_the_attention_that_the_model_computes():
    """Parity with the probabilities that transformers returns, through padding, turns and packing."""
    backbone = nano()
    tokens = torch.stack([token((0.9, 0.9))] * (FOUND + 4))
    tokens[2], tokens[5] = token((0.12, 0.34)), token((0.5, 0.5))
    attention = SupervisedAttention(backbone)
    packed = batch(backbone, ["red square (120, 340)", "(510, 490)"])
    with torch.no_grad():
        run(attention, backbone, packed)
        attention._tokens = tokens.expand(2, -1, -1)
        loss, metrics = attention(packed)
        hidden = attention._hidden
    mask = packed.inputs["attention_mask"][0, 0]
    module, count = attention.attention, backbone.decoder.config.num_attention_heads
    module.config._attn_implementation = "eager"
    with torch.no_grad():
        additive = torch.where(mask, 0.0, -torch.inf)[None, None]
        _, weights = module(hidden, attention._rotary, additive)
    assert weights.shape[1] == count
    ids = packed.inputs["input_ids"][0]
    starts = (ids == attention.image_token).nonzero().flatten()[:: FOUND + 4].tolist()
    texts, expected = attention.texts, []
    for begin, end, point in located(texts, ids.tolist(), packed.loss_mask[0].tolist()):
        start = max(s for s in starts if s < begin)
        slot = start + (2 if point[0] < 0.3 else 5)
        expected += [-weights[0, count // 2 :, at, slot].log().mean() for at in range(begin, end)]
    assert len(expected) >= 20
    assert float(loss) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert 0 <= float(metrics["attended"]) <= 1


def test_only_near_and_certain_things_are_targets():
    backbone = nano()
    attention = SupervisedAttention(backbone)
    one = batch(backbone, ["red square (120, 340)"])
    run(attention, backbone, one)
    far, unsure = token((0.12 + 2 * NEAR, 0.34)), token((0.12, 0.34), presence=0.1)
    for other in (far, unsure):
        attention._tokens = other.expand(2, FOUND + 4, -1)
        loss, _ = attention(one)
        assert loss.item() == 0 and loss.requires_grad, "nothing to attend to, but every parameter is used"
    attention._tokens = token((0.12, 0.34)).expand(2, FOUND + 4, -1)
    assert attention(one)[0].item() > 0


def test_training_on_it_moves_the_attention():
    backbone = nano()
    backbone.model.requires_grad_(True)
    backbone.model.base_model.vision_tower.requires_grad_(False)
    attention = SupervisedAttention(backbone)
    one = batch(backbone, ["red square (120, 340)"])
    tokens = torch.stack([token((0.9, 0.9))] * (FOUND + 4))
    tokens[4] = token((0.12, 0.34))
    module = backbone.decoder.layers[BLOCK].self_attn
    optimizer = torch.optim.Adam([*module.q_proj.parameters(), *module.k_proj.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        run(attention, backbone, one)
        attention._tokens = tokens.expand(2, -1, -1)
        loss, _ = attention(one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
