"""Answers in progress: whatever runs beside an answer, it is the one that it would be alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_backbone import MAKERS, PROMPTS

from blm.backbone import Backbone, build_nano
from blm.backbone.generation import Answer, Generation
from blm.backbone.prompt import question_prompt
from blm.types import BlmError, Message, Sampling


@pytest.fixture(scope="module", params=sorted(MAKERS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return MAKERS[request.param]()


def finish(generation: Generation) -> None:
    while generation.running:
        generation.step()


def alone(backbone: Backbone, messages: tuple[Message, ...], sampling: Sampling) -> Answer:
    generation = Generation(backbone)
    (answer,) = generation.start([messages], [sampling])
    finish(generation)
    return answer


def test_answers_that_begin_and_end_at_any_time_are_those_given_alone(backbone: Backbone) -> None:
    ways = [Sampling(max_tokens=3), Sampling(max_tokens=9, temperature=0.8, seed=5), Sampling(max_tokens=6)]
    generation, answers = Generation(backbone), list[Answer]()
    for prompt, way in zip(PROMPTS, ways, strict=True):
        answers += generation.start([prompt], [way])
        generation.step()
    finish(generation)
    for answer, prompt, way in zip(answers, PROMPTS, ways, strict=True):
        one = alone(backbone, prompt, way)
        assert (answer.tokens, answer.ended) == (one.tokens, one.ended)
        assert answer.ended == "stop" or len(answer.tokens) == way.max_tokens


def test_greedy_answers_are_those_of_transformers(backbone: Backbone) -> None:
    for prompt in PROMPTS:
        inputs = backbone.encode([prompt])
        made = backbone.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = made[0, inputs["input_ids"].shape[1] :].tolist()
        assert alone(backbone, prompt, Sampling(max_tokens=8)).tokens == expected


def test_a_penalty_of_repetition_is_that_of_transformers(backbone: Backbone) -> None:
    for prompt in PROMPTS:
        inputs = backbone.encode([prompt])
        made = backbone.model.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)
        expected = made[0, inputs["input_ids"].shape[1] :].tolist()
        assert alone(backbone, prompt, Sampling(max_tokens=8, repetition_penalty=1.7)).tokens == expected


def test_who_leaves_changes_nothing_for_the_others_and_frees_room(backbone: Backbone) -> None:
    way, generation = Sampling(max_tokens=8), Generation(backbone)
    answers = generation.start(PROMPTS, [way] * len(PROMPTS))
    generation.step()
    generation.drop(answers[0])
    assert answers[0] not in generation.running
    finish(generation)
    assert answers[1].tokens == alone(backbone, PROMPTS[1], way).tokens
    assert len(generation._cache.layers) == 0


def test_draws_follow_the_distribution() -> None:
    backbone = build_nano()
    prompt = PROMPTS[1]
    with torch.no_grad():
        logits = backbone.model(**backbone.encode([prompt])).logits[0, -1]
    for way in (Sampling(max_tokens=1, temperature=0.5), Sampling(max_tokens=1, temperature=1, top_p=0.3)):
        generation, drawn = Generation(backbone), list[int]()
        for seed in range(0, 600, 50):
            ways = [replace(way, seed=seed + n) for n in range(50)]
            drawn += [answer.tokens[0] for answer in generation.start([prompt] * 50, ways)]
        share = (logits / way.temperature).softmax(-1)
        kept = share.sort(descending=True)
        inside = kept.indices[kept.values.cumsum(-1) - kept.values < way.top_p]
        share = torch.where(torch.isin(torch.arange(len(share)), inside), share, 0)
        share = (share / share.sum()).numpy()
        found = np.bincount(drawn, minlength=len(share)) / len(drawn)
        assert not found[share == 0].any()
        error = np.sqrt(share * (1 - share) / len(drawn))
        assert (np.abs(found - share) <= 5 * error + 2 / len(drawn)).all()


def test_an_answer_ends_where_the_context_does() -> None:
    backbone = build_nano()
    backbone.decoder.config.max_position_embeddings = len(backbone.encode([PROMPTS[1]])["input_ids"][0]) + 4
    answer = alone(backbone, PROMPTS[1], Sampling(max_tokens=100))
    assert answer.ended == "stop" or len(answer.tokens) == 4


def test_nonsense_is_refused() -> None:
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(BlmError, match="are needed"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_the_capacity_is_what_the_context_holds(backbone: Backbone) -> None:
    generation = Generation(backbone)
    capacity, context = generation.capacity, backbone.decoder.config.max_position_embeddings
    assert capacity.context_tokens == min(context, 65_536)
    assert 1 <= capacity.image_tokens * capacity.max_images <= context
    text = "  ".join(["What is in the picture?"] * 20)
    tokens = len(backbone.processor.tokenizer(text)["input_ids"])
    assert len(text.encode()) <= tokens * capacity.max_text_bytes / capacity.context_tokens
    picture = np.zeros((30, 40, 3), np.uint8)
    prompt = backbone.encode([question_prompt("x", [picture])])["input_ids"]
    placeholders = int((prompt == backbone.processor.image_token_id).sum())
    assert placeholders <= generation.tokens_per_image(40, 30) <= placeholders + 3
