"""Rows, packing, schedule, loss and cached features: each fast form against the plain one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from blm.backbone import Backbone, build_nano
from blm.corpora.format.turns import split_turns
from blm.media import load_pixels
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.sft import pack as packing
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.loss import MaskedLoss, MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import collate, pack, probe_conversations, probe_examples, require_exact
from blm.training.sft.parameter_groups import part_of
from blm.training.sft.prefix_attention import (
    AttentionBlock,
    _buckets,
    prefix_attention_layout,
    use_prefix_attention,
)
from blm.training.sft.tokenize import (
    TokenizationConfig,
    TokenizedExample,
    concatenate_vision_inputs,
    limit_pixels,
    tokenize_conversation,
)
from blm.training.sft.vision_features import (
    is_frozen,
    projectors_of,
    vision_features,
    vision_modules,
)
from blm.types import BlmError, Image, Message
from tests.support.backbones import MAKERS, tiny_qwen

LIMITS = TokenizationConfig()


@pytest.fixture(scope="module", params=sorted(MAKERS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return build_nano()


@pytest.fixture(autouse=True)
def all_trained(request: pytest.FixtureRequest) -> None:
    for name in {"backbone", "nano"} & set(request.fixturenames):
        request.getfixturevalue(name).model.requires_grad_(True).eval()


def picture(seed: int, height: int = 64, width: int = 64) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def talk(*parts: str | Image | tuple[str | Image, ...]) -> tuple[Message, ...]:
    """PrefixAttentionLayout of user and assistant."""
    contents = [part if isinstance(part, tuple) else (part,) for part in parts]
    return tuple(Message("assistant" if i % 2 else "user", part) for i, part in enumerate(contents))


def row(
    backbone: Backbone, messages: tuple[Message, ...], limits: TokenizationConfig = LIMITS
) -> TokenizedExample:
    made = tokenize_conversation(backbone, messages, limits, None, Counter(), independent=True)
    assert made is not None
    return made


def gradients(backbone: Backbone, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    backbone.model.zero_grad()
    loss().backward()
    return {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    size = max(value.abs().max() for value in wanted.values())
    for name in found.keys() | wanted.keys():
        a, b = (g.get(name, torch.zeros(())) for g in (found, wanted))
        assert ((a - b).abs().max() / size) < 1e-5, name


def run(
    backbone: Backbone, groups: Sequence[Sequence[TokenizedExample]], *, cached: bool = False
) -> MaskedLoss:
    return MaskedLossModel(backbone, cached=cached)(pack(backbone, groups, ()))


def plain_loss(backbone: Backbone) -> torch.Tensor:
    """Sum of cross-entropies of the probe's turns, by the model's own loss on one conversation at a time."""
    total = torch.zeros(())
    for messages in probe_conversations(backbone):
        for turn in split_turns(messages):
            alone = collate(backbone, [row(backbone, turn)], ())
            pictures = [load_pixels(image) for message in turn for image in message.images]
            inputs = backbone.process([backbone.render(turn, prompt=False)], pictures)
            labels = inputs["input_ids"].masked_fill(~alone.loss_mask, -100)
            total = total + backbone.model(**inputs, labels=labels).loss * alone.loss_mask.sum()
    return total


def test_packed_rows_give_the_logits_of_each_turn_alone(backbone: Backbone) -> None:
    assert require_exact(backbone) < 8e-5  # rounding: up to 6e-5, by processor


@pytest.mark.parametrize("order", [[[2, 1, 0]], [[0], [2, 1]]])
def test_packed_rows_give_the_loss_and_gradients_of_each_turn_alone(
    backbone: Backbone, order: list[list[int]]
) -> None:
    rows = probe_examples(backbone)
    groups = [[rows[index] for index in group] for group in order]
    wanted = gradients(backbone, lambda: plain_loss(backbone))
    found = gradients(backbone, lambda: run(backbone, groups).loss_sum)
    assert_same(found, wanted)
    assert run(backbone, groups).tokens == sum(one.loss_mask.sum() for one in rows)


@pytest.mark.parametrize("order", [[[2, 1, 0]], [[0], [2, 1]]])
def test_prefix_attention_gives_the_loss_and_gradients_of_each_turn_alone(
    backbone: Backbone, order: list[list[int]]
) -> None:
    """The mask says nothing here: all that is seen comes from the blocks."""
    rows = probe_examples(backbone)
    batch = pack(backbone, [[rows[index] for index in group] for group in order], ())
    blind = {**batch.inputs, "attention_mask": torch.zeros_like(batch.inputs["attention_mask"])}
    wanted = gradients(backbone, lambda: plain_loss(backbone))
    with use_prefix_attention(backbone):
        found = gradients(backbone, lambda: MaskedLossModel(backbone)(replace(batch, inputs=blind)).loss_sum)
    assert_same(found, wanted)
    assert backbone.decoder.config._attn_implementation == "sdpa"


def test_blocks_have_every_position_once_with_its_context() -> None:
    rng = np.random.default_rng(0)
    owner = np.array([[0] * 30 + [1] * 20, [0] * 38 + [-1] * 12])
    segment_ids = np.sort(rng.integers(0, 4, owner.shape), axis=1)
    segment_ids[0, 30:] = np.sort(rng.integers(0, 3, 20))
    made, seen = prefix_attention_layout(owner, segment_ids), np.zeros((2, 100, 100), bool)[0]
    rank = 0
    for queries, keys, masks in zip(*made[:3], strict=True):
        for block in range(len(queries)):
            for place, query in enumerate(queries[block].tolist()):
                if made.scatter[query] == rank:
                    seen[query, keys[block][masks[block, 0, place]].numpy()] = True
                rank += 1
    flat = [part.reshape(-1) for part in (owner, segment_ids, np.repeat([[0], [1]], 50, axis=1))]
    same = (flat[0][:, None] == flat[0]) & (flat[2][:, None] == flat[2]) & np.tri(100, dtype=bool)
    wanted = same & ((flat[1][:, None] == flat[1]) | (flat[1] == 0))
    real = flat[0] >= 0
    assert np.array_equal(seen[real], wanted[real])


LEAKS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "a causal mask": lambda i: i | {"attention_mask": torch.ones_like(i["attention_mask"]).tril()},
    "a padding mask": lambda i: i | {"attention_mask": torch.ones_like(i["input_ids"])},
    "no mask": lambda i: {name: value for name, value in i.items() if name != "attention_mask"},
    "positions that run on": lambda i: i | {"position_ids": torch.arange(i["input_ids"].shape[1])[None]},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_calls_that_mix_packed_examples_are_refused(
    backbone: Backbone, leak: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(*args: object) -> packing.ExampleBatch:
        made = pack(*args)  # type: ignore[arg-type]
        return replace(made, inputs=LEAKS[leak](made.inputs))

    monkeypatch.setattr(packing, "pack", leaking)
    with pytest.raises(BlmError, match=rf"{type(backbone.model).__name__} cannot be packed"):
        require_exact(backbone)


def test_models_that_take_no_such_mask_are_refused(nano: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(nano.decoder.config, "layer_types", ["sliding_attention"], raising=False)
        with pytest.raises(BlmError, match="sliding_attention"):
            require_exact(nano)
    monkeypatch.setattr(nano.model.config, "_attn_implementation_internal", "eager")
    with pytest.raises(BlmError, match="'eager' attention"):
        require_exact(nano)


@pytest.mark.parametrize("tiles", [False, True])
def test_only_answers_and_their_ends_are_learnt_wherever_the_pictures_are(
    backbone: Backbone, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles:
        if not hasattr(backbone.processor.image_processor, "do_image_splitting"):
            pytest.skip("this processor makes no tiles")
        monkeypatch.setattr(backbone.processor.image_processor, "do_image_splitting", True)
    end = backbone.processor.tokenizer.decode(backbone.model.generation_config.eos_token_id)
    dialogues = [
        talk((picture(0), "What is it?"), "a ramp", "Is it? a ramp", "no"),
        talk((picture(0), "a", picture(1), "b?"), "a ramp", "no", "no"),
        talk("Hello.", "a ramp", (picture(2), "And now?"), "no"),
        talk("Hello.", "a ramp", "a ramp", "no"),
    ]
    for messages in dialogues:
        for separate in (True, False):
            made = row(backbone, messages, TokenizationConfig(separate_turns=separate))
            learnt = backbone.processor.tokenizer.decode(made.tokens[made.loss_mask]).split(end)
            answers = [message.text for message in messages if message.role == "assistant"]
            assert [text.strip() for text in learnt] == [*answers, ""]  # SmolVLM puts a space before
            assert made.position_ids.shape[1] == len(made) == len(made.segment_ids)


def test_the_shared_prefix_ends_before_the_token_that_predicts_an_answer(nano: Backbone) -> None:
    words = "How many cubes are there in the picture?"
    made = row(nano, talk((picture(0), words), "two", words, "three", words + " Say.", "four"))
    assert set(made.segment_ids.tolist()) == {0, 1, 2, 3}
    begins = np.flatnonzero(np.diff(made.segment_ids))
    assert not made.loss_mask[begins + 1].any() and not made.loss_mask[0]
    assert (made.segment_ids == 0).sum() > 16 + 4  # the picture, and words of the question
    rows = [row(nano, talk((picture(0), q), a)) for q, a in
            [(words, "two"), (words, "three"), (words + " Say.", "four")]]  # fmt: skip
    alone = sum(run(nano, [[one]]).loss_sum.item() for one in rows)
    assert run(nano, [[made]]).loss_sum.item() == pytest.approx(alone, rel=1e-5)


def test_dialogues_without_pictures_stay_whole(nano: Backbone) -> None:
    messages = talk("I am Ann.", "Hello Ann.", "Who am I?", "Ann.")
    made = row(nano, messages)
    assert not made.segment_ids.any()
    text = nano.render(messages, prompt=False)
    assert nano.processor.tokenizer.decode(made.tokens) == text


def test_large_pictures_are_shrunk_in_proportion_and_counted(backbone: Backbone) -> None:
    counts: Counter[str] = Counter()
    big = talk((picture(0, 200, 300), picture(1, 20, 20), "What?"), "that")
    limits = TokenizationConfig(max_pixels=6000)
    assert tokenize_conversation(backbone, big, limits, None, counts) is not None
    assert counts == {"kept": 1, "pictures shrunk": 1}
    assert limit_pixels(np.zeros((200, 300, 3), np.uint8), 6000).shape == (63, 94, 3)


def examples_of(*lengths: int) -> list[TokenizedExample]:
    none = np.zeros(0, dtype=np.int64)
    return [TokenizedExample(np.zeros(n, dtype=np.int64), none, none, none) for n in lengths]


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.7, 0.2, 0.1), (1.0, 100.0)])
def test_the_mixture_follows_the_weights_and_goes_through_each_source_evenly(
    weights: tuple[float, ...],
) -> None:
    sizes = (50, 7, 13)
    sources = [
        TokenizedSource(name=str(i), examples=examples_of(*[4] * sizes[i]), weight=w)
        for i, w in enumerate(weights)
    ]
    schedule = MixtureSampler(sources, examples_per_step=6, pack_length=0, seed=3)
    steps = 900
    picked = [place for step in range(steps) for place in schedule.examples(step)]
    again = MixtureSampler(sources, examples_per_step=6, pack_length=64, seed=3)
    assert again.examples(steps - 1) == picked[-6:] and again.examples(17) == picked[17 * 6 : 18 * 6]
    for source, weight in enumerate(weights):
        mine = [row for s, row in picked if s == source]
        assert abs(len(mine) - weight / sum(weights) * len(picked)) < 4
        epochs = [mine[i : i + sizes[source]] for i in range(0, len(mine), sizes[source])]
        assert all(sorted(epoch) == list(range(sizes[source])) for epoch in epochs[:-1])
        assert epochs[0] != epochs[1]
    assert MixtureSampler(sources, examples_per_step=6, pack_length=0, seed=4).examples(0) != picked[:6]


@pytest.mark.parametrize("steps", [1, 3, 40, 1500])
def test_what_is_drawn_is_counted_by_source(steps: int) -> None:
    """The closed form equals a count of every draw, over whole and begun epochs."""
    lengths = [5, 9, 4, 30, 7], [11, 3, 8]
    sources = [
        TokenizedSource(name=name, examples=examples_of(*some), weight=weight)
        for name, some, weight in zip("ab", lengths, (2.0, 1.0), strict=True)
    ]
    sampler = MixtureSampler(sources, examples_per_step=3, pack_length=0, seed=1)
    drawn = [index for step in range(steps) for index in sampler.examples(step)]
    found = sampler.drawn(steps)
    for number, source in enumerate(sources):
        mine = [source.examples[index] for s, index in drawn if s == number]
        assert found[source.name].examples == len(mine)
        assert found[source.name].tokens == sum(map(len, mine))
        assert found[source.name].answer_tokens == sum(int(one.loss_mask.sum()) for one in mine)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 64, 100])
def test_ranks_share_the_rows_of_a_step_in_sequences_that_fit(world: int, length: int) -> None:
    rng = np.random.default_rng(0)
    source = TokenizedSource(name="a", examples=examples_of(*rng.integers(5, 60, 200), 120))
    schedule = MixtureSampler([source], examples_per_step=32, pack_length=length, seed=0, world_size=world)
    for step in range(12):
        ranks = [schedule.sequences(step, rank) for rank in range(world)]
        groups = [group for rank in ranks for group in rank]
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(place for group in groups for place in group) == sorted(schedule.examples(step))
        tokens = [sum(map(schedule.length, group)) for group in groups]
        longest = max(schedule.length(place) for group in groups for place in group)
        assert all(total <= max(length, longest) for total in tokens)
        assert length or all(len(group) == 1 for group in groups)
        if length and world == 1:
            assert sum(tokens) > 0.85 * len(tokens) * max(tokens)
    described = schedule.describe(12)
    assert described["rows of a"] == 32 and described["sequences"] <= 32


def test_rows_of_one_length_are_packed_only_where_that_pays() -> None:
    sources = [TokenizedSource(name="a", examples=examples_of(*[300] * 40))]
    assert len(MixtureSampler(sources, examples_per_step=8, pack_length=1200, seed=0).sequences(0)) == 8, (
        "nothing to gain"
    )
    sources.append(TokenizedSource(name="b", examples=examples_of(900)))
    assert len(MixtureSampler(sources, examples_per_step=8, pack_length=1, seed=0).sequences(0)) == 6


def test_bad_schedules_are_refused() -> None:
    source = TokenizedSource(name="a", examples=examples_of(3))
    with pytest.raises(BlmError, match="multiple of 2"):
        MixtureSampler([source], examples_per_step=3, pack_length=0, seed=0, world_size=2)
    with pytest.raises(BlmError, match="no examples"):
        MixtureSampler([], examples_per_step=3, pack_length=0, seed=0)
    with pytest.raises(BlmError, match="'b' has 0 examples"):
        TokenizedSource(name="b", examples=[])


def freeze_vision(backbone: Backbone, projector: bool) -> None:
    for part in vision_modules(backbone):
        part.requires_grad_(False)
    if projector:
        for part in projectors_of(backbone):
            part.requires_grad_(True)


@pytest.mark.parametrize("projector", [False, True])
def test_cached_features_give_the_same_loss_and_gradients(
    backbone: Backbone, projector: bool, tmp_path: Path
) -> None:
    freeze_vision(backbone, projector)
    rows = probe_examples(backbone)
    wanted = gradients(backbone, lambda: run(backbone, [rows]).loss_sum)
    found = cache_features(backbone, [rows], tmp_path, ALONE)
    (cached,) = found.examples
    assert (found.pictures, found.distinct) == (3, 2)
    assert all(one.processor_input is None for one in cached)
    grads = gradients(backbone, lambda: run(backbone, [cached], cached=True).loss_sum)
    assert_same(grads, wanted)
    assert bool(grads) and any(part_of(name) == "projector" for name in grads) == projector


def test_cached_tokens_of_qwen_are_in_reading_order_whatever_the_order_of_its_windows(tmp_path: Path) -> None:
    """Pictures of 4 x 4 tokens in windows of 2 x 2: the merger meets them window by window."""
    backbone = tiny_qwen("2.5")
    size = 8 * 14
    backbone.processor.image_processor.size = {"shortest_edge": size**2, "longest_edge": size**2}
    freeze_vision(backbone, projector=True)
    examples = [row(backbone, talk((picture(0, size, size), picture(1, 56, 224), "What?"), "a ramp"))]
    wanted = gradients(backbone, lambda: run(backbone, [examples]).loss_sum)
    (cached,) = cache_features(backbone, [examples], tmp_path, ALONE).examples
    found = gradients(backbone, lambda: run(backbone, [cached], cached=True).loss_sum)
    assert_same(found, wanted)
    assert any("merger" in name for name in found)
    inputs = backbone.place(concatenate_vision_inputs([examples[0].vision_inputs(backbone)]))
    given: list[torch.Tensor] = []
    hook = projectors_of(backbone)[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    vision_features(backbone, inputs)
    hook.remove()
    stored = concatenate_vision_inputs([cached[0].vision_inputs(backbone)])["tower_features"]
    assert stored.shape == given[0].shape and not torch.allclose(stored, given[0])


def test_features_of_a_trained_vision_tower_are_not_cached(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BlmError, match="cannot be cached"):
        cache_features(backbone, [probe_examples(backbone)], tmp_path, ALONE)


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_of_text_runs_the_vision_tower_on_a_dummy_image(backbone: Backbone, cached: bool) -> None:
    if cached:
        freeze_vision(backbone, True)
    model, text = MaskedLossModel(backbone, cached=cached), probe_examples(backbone)[2]
    batch = pack(backbone, [[text]], ())
    found = gradients(backbone, lambda: model(batch).loss_sum)
    trained = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    eye = [n for n in trained if not ("language_model" in n or "text_model" in n or "lm_head" in n)]
    assert set(eye) <= found.keys() and not any(found[name].any() for name in eye)
    backbone.model.requires_grad_(False)
    plain = MaskedLossModel(backbone)(batch)
    assert torch.allclose(model(batch).loss_sum, plain.loss_sum)
    runs: list[object] = []
    hook = vision_modules(backbone)[-1].register_forward_hook(lambda *_: runs.append(1))
    MaskedLossModel(backbone, sharded=True)(batch)
    hook.remove()
    assert runs


def test_a_frozen_vision_tower_stays_in_evaluation_mode(nano: Backbone) -> None:
    model = MaskedLossModel(nano)
    assert (
        model.train().training and nano.model.training and all(part.training for part in model.vision_modules)
    )
    freeze_vision(nano, projector=True)
    model.train()
    assert [part.training for part in model.vision_modules] == [
        not is_frozen(part) for part in model.vision_modules
    ]


def test_logits_are_computed_for_masked_tokens_only(nano: Backbone) -> None:
    shapes: list[torch.Size] = []
    head = nano.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    answers = run(nano, [probe_examples(nano)])
    hook.remove()
    assert shapes == [(1, int(answers.tokens), head.out_features)]


def test_turns_are_padded_in_the_cheapest_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all ways to split a few blocks; a long one is not what the short ones are padded to."""
    rng = np.random.default_rng(0)
    for call in (1, 300, 10**6):
        monkeypatch.setattr("blm.training.sft.prefix_attention.ATTENTION_CALL_COST", call)
        own = np.sort(rng.integers(1, 40, 7))
        blocks = [(np.zeros(n, np.int64), np.zeros(int(rng.integers(0, 30)), np.int64)) for n in own]

        def cost(parts: list[list[AttentionBlock]], call: int = call) -> int:
            sizes = [[tuple(map(len, block)) for block in part] for part in parts]
            most = [tuple(map(max, zip(*part, strict=True))) for part in sizes]
            return sum(call + len(part) * q * (q + s) for part, (q, s) in zip(parts, most, strict=True))

        cuts = [c for k in range(len(blocks)) for c in combinations(range(1, len(blocks)), k)]
        ways = [[blocks[a:b] for a, b in pairwise((0, *cut, len(blocks)))] for cut in cuts]
        found = _buckets(blocks)
        assert [block for part in found for block in part] == blocks
        assert cost(found) == min(map(cost, ways))
        assert len(found) == 1 or call < 10**6
