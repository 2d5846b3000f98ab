"""Answers in progress: whatever runs beside an answer, it is the one that it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blm.backbone import Backbone, build_nano
from blm.backbone.generation.batch import GeneratedSequence
from blm.backbone.generation.detokenizer import WINDOW, Detokenizer
from blm.backbone.generation.generator import Generation
from blm.backbone.generation.sampling import ScoreError, choose_token
from blm.backbone.prompt import question_prompt
from blm.types import BlmError, Image, Message, Sampling
from tests.support.backbones import MAKERS, PROMPTS


@pytest.fixture(scope="module", params=sorted(MAKERS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return MAKERS[request.param]()


@lru_cache
def build_nano_once() -> Backbone:
    return build_nano()


def read(
    generation: Generation, messages: Sequence[Message], ways: list[Sampling]
) -> list[GeneratedSequence]:
    """Piece by piece, as a server does."""
    prefill = generation.begin(generation.prepare(messages, ways))
    while (answers := generation.advance(prefill)) is None:
        pass
    return answers


def finish(generation: Generation) -> None:
    while generation.running:
        generation.step()


def alone(backbone: Backbone, messages: tuple[Message, ...], sampling: Sampling) -> GeneratedSequence:
    generation = Generation(backbone)
    (answer,) = generation.start([messages], [sampling])
    finish(generation)
    return answer


def test_answers_do_not_depend_on_other_running_answers(backbone: Backbone) -> None:
    ways = [Sampling(max_tokens=3), Sampling(max_tokens=9, temperature=0.8, seed=5), Sampling(max_tokens=6)]
    generation, answers = Generation(backbone), list[GeneratedSequence]()
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


def test_the_repetition_penalty_equals_that_of_transformers(backbone: Backbone) -> None:
    for prompt in PROMPTS:
        inputs = backbone.encode([prompt])
        made = backbone.model.generate(**inputs, max_new_tokens=8, do_sample=False, repetition_penalty=1.7)
        expected = made[0, inputs["input_ids"].shape[1] :].tolist()
        assert alone(backbone, prompt, Sampling(max_tokens=8, repetition_penalty=1.7)).tokens == expected


def test_a_dropped_sequence_does_not_affect_others_and_frees_memory(backbone: Backbone) -> None:
    way, generation = Sampling(max_tokens=8), Generation(backbone)
    answers = generation.start(PROMPTS, [way] * len(PROMPTS))
    generation.step()
    generation.drop(answers[0])
    assert answers[0] not in generation.running
    finish(generation)
    assert answers[1].tokens == alone(backbone, PROMPTS[1], way).tokens
    assert not generation._batches


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


def test_an_answer_ends_at_the_context_limit() -> None:
    backbone = build_nano()
    backbone.decoder.config.max_position_embeddings = len(backbone.encode([PROMPTS[1]])["input_ids"][0]) + 4
    answer = alone(backbone, PROMPTS[1], Sampling(max_tokens=100))
    assert answer.ended == "stop" or len(answer.tokens) == 4
    (answer,) = read(Generation(backbone), PROMPTS[1], [Sampling(max_tokens=100)])
    assert answer.sampling.max_tokens == 4


WRONG: list[dict[str, float]] = [
    {"max_tokens": 0},
    *({"temperature": value} for value in (-1.0, float("nan"), float("inf"))),
    *({"top_p": value} for value in (0.0, 1.5, float("nan"))),
    *({"repetition_penalty": value} for value in (0.0, -1.0, float("nan"), float("inf"))),
    *({"seed": value} for value in (2**63, -(2**63) - 1)),
]


def test_invalid_requests_are_refused() -> None:
    for wrong in WRONG:
        with pytest.raises(BlmError, match="are needed"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_the_capacity_follows_from_the_context_length(backbone: Backbone) -> None:
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


# --- reading piece by piece ---


def mixed_prompt() -> tuple[Message, ...]:
    """Turns with text and seven unlike pictures, so that pieces begin and end within pictures and between."""
    rng = np.random.default_rng(0)
    pictures = [Image(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(7)]
    return (
        Message("system", ("Be brief.",)),
        Message("user", (pictures[0], "What is this?", *pictures[1:4], "and these?")),
        Message("assistant", ("A cube.",)),
        Message("user", (*pictures[4:], "What can you do with it? " * 4)),
    )


@pytest.mark.parametrize("size", [1, 3, 7, 16, 64, 4096])
def test_chunked_prefill_equals_a_single_pass(backbone: Backbone, size: int) -> None:
    way = Sampling(max_tokens=6)
    for prompt in (mixed_prompt(), PROMPTS[1]):
        generation = Generation(backbone, piece_tokens=size)
        prefill = generation.begin(generation.prepare(prompt, [way]))
        while not prefill.advance():
            pass
        inputs = backbone.encode([prompt])
        with torch.no_grad():
            expected = backbone.model(**inputs, position_ids=backbone.position_ids(inputs)).logits[:, -1]
        assert prefill.logits is not None
        torch.testing.assert_close(prefill.logits, expected, atol=1e-4, rtol=1e-4)
        (answer,) = read(generation, prompt, [way])
        finish(generation)
        assert answer.tokens == alone(backbone, prompt, way).tokens


def test_interleaved_prefills_join_answers_of_other_lengths(backbone: Backbone) -> None:
    """Pieces of two prompts, steps of an answer and a picture in each mix; nobody's tokens change."""
    way, prompts = Sampling(max_tokens=12), (PROMPTS[1], mixed_prompt(), PROMPTS[0])
    generation = Generation(backbone, piece_tokens=5)
    answers = dict[int, GeneratedSequence]()
    prefills = {n: generation.begin(generation.prepare(prompt, [way])) for n, prompt in enumerate(prompts)}
    while prefills or generation.running:
        for number, prefill in list(prefills.items()):
            if (done := generation.advance(prefill)) is not None:
                (answers[number],) = done
                del prefills[number]
        generation.step()
    for number, prompt in enumerate(prompts):
        assert answers[number].tokens == alone(backbone, prompt, way).tokens


def test_several_answers_to_one_prompt_share_its_prefill(backbone: Backbone) -> None:
    ways = [Sampling(max_tokens=5, temperature=0.9, seed=seed) for seed in range(4)]
    generation = Generation(backbone)
    answers = read(generation, PROMPTS[0], ways)
    finish(generation)
    for answer, way in zip(answers, ways, strict=True):
        assert answer.tokens == alone(backbone, PROMPTS[0], way).tokens


def test_batches_stay_within_their_bound(backbone: Backbone) -> None:
    way = Sampling(max_tokens=30, repetition_penalty=1.3)
    length = Generation(backbone).prepare(PROMPTS[1], [way]).tokens
    generation = Generation(backbone, step_tokens=4 * (length + 8))
    answers = [answer for _ in range(3) for answer in read(generation, PROMPTS[1], [way] * 3)]
    while generation.running:
        generation.step()
        for batch in generation._batches:
            assert len(batch.sequences) == 1 or len(batch.sequences) * batch.length <= generation.step_tokens
    expected = alone(backbone, PROMPTS[1], way).tokens
    assert all(answer.tokens == expected for answer in answers)


# --- one request harms no other ---


class Failing:
    """Lets a model fail, or give bad scores, from a given call on."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        self.change: Callable[[Any], Any] | None = None
        forward = backbone.model.forward

        @wraps(forward)  # its signature is looked at
        def changed(*given: Any, **named: Any) -> Any:
            out = forward(*given, **named)
            return self.change(out) if self.change is not None else out

        monkeypatch.setattr(backbone.model, "forward", changed)


def no_memory(out: Any) -> Any:
    raise torch.OutOfMemoryError("no memory")


def bad_rows(*rows: int, value: float = float("nan")) -> Callable[[Any], Any]:
    def change(out: Any) -> Any:
        out.logits = out.logits.clone()
        out.logits[list(rows)] = value
        return out

    return change


def test_a_start_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, way = build_nano(), Sampling(max_tokens=6)
    expected = alone(backbone, PROMPTS[1], way).tokens
    failing, generation = Failing(backbone, monkeypatch), Generation(backbone)
    (other,) = read(generation, PROMPTS[1], [way])
    before = [(batch, list(batch.sequences), batch.length) for batch in generation._batches]
    for change in (no_memory, bad_rows(0), bad_rows(0, value=float("inf")), bad_rows(0, value=-float("inf"))):
        failing.change = change
        for ways in ([way], [way, replace(way, temperature=1.0)]):
            with pytest.raises((torch.OutOfMemoryError, ScoreError)):
                read(generation, PROMPTS[0], ways)
            with pytest.raises((torch.OutOfMemoryError, ScoreError)):
                generation.start([PROMPTS[0]] * len(ways), ways)
        assert [(batch, batch.sequences, batch.length) for batch in generation._batches] == before
    failing.change = None
    monkeypatch.setattr(Generation, "_join", lambda *_: no_memory(None))
    with pytest.raises(torch.OutOfMemoryError):
        read(generation, PROMPTS[0], [way])
    finish(generation)
    assert other.tokens == expected


def test_a_step_that_fails_ends_its_batch_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, way = build_nano(), Sampling(max_tokens=20)
    expected = alone(backbone, PROMPTS[1], way).tokens
    failing, generation = Failing(backbone, monkeypatch), Generation(backbone, step_tokens=1)
    first, second = read(generation, PROMPTS[1], [way, way])
    failing.change = no_memory
    generation.step()
    failing.change = None
    assert isinstance(first.error, torch.OutOfMemoryError) and second.error is None
    assert generation.running == [second]
    (third,) = read(generation, PROMPTS[1], [way])
    finish(generation)
    assert second.tokens == third.tokens == expected


def test_scores_that_are_not_finite_end_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_nano()
    for way in (Sampling(max_tokens=6), Sampling(max_tokens=6, temperature=1.0, seed=3)):
        expected = alone(backbone, PROMPTS[1], way).tokens
        with monkeypatch.context() as patch:
            failing, generation = Failing(backbone, patch), Generation(backbone)
            answers = read(generation, PROMPTS[1], [way] * 3)
            failing.change = bad_rows(1)
            generation.step()
            failing.change = None
            finish(generation)
        assert isinstance(answers[1].error, ScoreError) and answers[1].ended is None
        assert answers[0].tokens == answers[2].tokens == expected


extreme = st.sampled_from([0.0, 5e-324, 1e-320, 1e-45, 1e-38, 1e-30, 1e-8, 1e-5, 1e-3, 1.0, 2.0, 1e30, 1e308])
scores = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -float("inf"), 3e38, -3e38, 1e-45]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(
    scores,
    extreme,
    st.sampled_from([5e-324, 1e-320, 1e-46, 1e-38, 1e-8, 0.5, 1 - 1e-9, 1.0]),
    st.integers(0, 99),
)
def test_a_token_can_be_chosen_at_any_temperature(
    values: list[float], temperature: float, top_p: float, seed: int
) -> None:
    given_scores = torch.tensor(values, dtype=torch.float32)
    way = Sampling(temperature=temperature, top_p=top_p)
    draw = torch.Generator().manual_seed(seed)
    if bool(given_scores.amax() == -float("inf")):
        with pytest.raises(ScoreError):
            choose_token(given_scores, way, draw)
        return
    token = choose_token(given_scores, way, draw)
    assert values[token] > -float("inf")
    if temperature < 1e-5:
        assert given_scores[token] == given_scores.max()
    if top_p < 1e-3:
        shares = (given_scores.double() / max(temperature, 1e-5)).softmax(-1).float()
        assert shares[token] == shares.max() or not bool(shares.isfinite().all())
    with pytest.raises(ScoreError):
        choose_token(torch.cat([given_scores, torch.tensor([float("nan")])]), way, draw)


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-9])
@pytest.mark.parametrize("top_p", [1.0, 1e-320])
def test_tiny_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    backbone, way = build_nano(), Sampling(max_tokens=6, temperature=temperature, top_p=top_p, seed=1)
    assert (
        alone(backbone, PROMPTS[1], way).tokens == alone(backbone, PROMPTS[1], Sampling(max_tokens=6)).tokens
    )


# --- text ---


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_incremental_detokenization_equals_full_decoding(text: str) -> None:
    tokenizer = build_nano_once().processor.tokenizer
    tokens = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    for count in range(1, len(tokens) + 1):
        assert detokenizer.text(tokens[:count]) == tokenizer.decode(tokens[:count], skip_special_tokens=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 285), max_size=300))
def test_any_tokens_are_decoded_with_bounded_work(tokens: list[int]) -> None:
    tokenizer, longest = build_nano_once().processor.tokenizer, 0

    class Counted:
        def decode(self, some: list[int], **how: Any) -> str:
            nonlocal longest
            longest = max(longest, len(some))
            return str(tokenizer.decode(some, **how))

    detokenizer = Detokenizer(Counted())
    for count in range(1, len(tokens) + 1):
        detokenizer.text(tokens[:count])
    assert longest <= 2 * WINDOW


# --- what fits ---


def test_oversized_prompts_are_refused_before_tokenization(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = Generation(backbone)
    capacity = generation.capacity
    picture = Image(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(type(backbone), "process", lambda *_, **__: pytest.fail("it was tokenised"))
    for content, reason in (
        (("x" * (capacity.max_text_bytes + 1),), "bytes; at most"),
        (("\u20ac" * (capacity.max_text_bytes // 3 + 1),), "bytes; at most"),
        ((picture,) * (capacity.max_images + 1), "images; at most"),
    ):
        with pytest.raises(BlmError, match=reason):
            generation.prepare((Message("user", content),), [Sampling()])


def test_a_prompt_that_fills_the_context_is_refused_and_its_answer_clamped(backbone: Backbone) -> None:
    generation, count = Generation(backbone), 3
    length = generation.prepare(PROMPTS[1], [Sampling()]).tokens
    backbone.decoder.config.max_position_embeddings, before = (
        length + 2,
        backbone.decoder.config.max_position_embeddings,
    )
    try:
        fitting = generation.prepare(PROMPTS[1], [Sampling(max_tokens=4096)] * count)
        assert [way.max_tokens for way in fitting.samplings] == [2] * count
        assert fitting.cache_tokens == count * (length + 2)
        backbone.decoder.config.max_position_embeddings = length
        with pytest.raises(BlmError, match=f"the prompt has {length} tokens"):
            generation.prepare(PROMPTS[1], [Sampling()])
    finally:
        backbone.decoder.config.max_position_embeddings = before
