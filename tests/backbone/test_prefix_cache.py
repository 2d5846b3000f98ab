"""The prefix cache: H_k with and without it, and what it forgets."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from blm.backbone import Backbone, control_prompt, question_prompt
from blm.backbone.model import HiddenStates, Inputs
from blm.backbone.pooling import tap_pooled
from blm.backbone.prefix_cache import PrefixCache, why_not_exact
from blm.training.sft.lora import Lora, add_adapters, merge_adapters
from blm.types import BlmError, Message
from tests.support.backbones import MAKERS, picture
from tests.support.families import FAMILIES

LAYER = 2
PANDA, XARM = ("push the cube.", "panda"), ("Pick up the red cube and move it to the goal.", "xarm6")
EXACT = {**MAKERS, **{name: FAMILIES[name] for name in ("LLaVA", "InternVL")}}


@pytest.fixture(scope="module")
def smol() -> Backbone:
    return MAKERS["smol"]()


@pytest.fixture
def read_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of the texts that are read, rather than taken from a cache."""
    lengths, original = list[int](), PrefixCache._read

    def spied(cache: PrefixCache, text: list[int]) -> object:
        lengths.append(len(text))
        return original(cache, text)

    monkeypatch.setattr(PrefixCache, "_read", spied)
    return lengths


def prompt(task: tuple[str, str] = PANDA, seed: int = 0) -> tuple[Message, ...]:
    views = {"base": picture(2 * seed), "wrist": picture(2 * seed + 1)}
    return control_prompt(*task, views, order="text_first")


def read(backbone: Backbone, *prompts: tuple[Message, ...]) -> Inputs:
    return backbone.read(prompts, side="right")


def size(states: torch.Tensor) -> float:
    return float(states.float().square().mean().sqrt())


def require_close(found: HiddenStates, wanted: HiddenStates, tolerance: float = 1e-5) -> None:
    """Compare hidden states; the tolerance is relative to their size (RMS)."""
    assert torch.equal(found.mask, wanted.mask) and found.hidden.dtype == wanted.hidden.dtype
    assert found.hidden.shape == wanted.hidden.shape
    real = wanted.hidden[wanted.mask]
    assert (found.hidden[found.mask] - real).abs().max() <= tolerance * size(real)


@pytest.mark.parametrize("name", EXACT)
def test_hidden_states_equal_those_without_a_cache(name: str, read_texts: list[int]) -> None:
    """Also in a batch of robots with different texts, one of which is cached."""
    backbone = EXACT[name]()
    cache = PrefixCache(backbone, LAYER)
    for inputs in (
        read(backbone, prompt()),
        read(backbone, prompt(seed=1)),
        read(backbone, prompt(XARM), prompt(seed=2), prompt(XARM, seed=3)),
    ):
        require_close(cache.tap(inputs), backbone.tap(inputs, LAYER))
    assert len(cache) == 2 and len(read_texts) == 2
    last = backbone.tap(inputs, LAYER).hidden[1, inputs["attention_mask"][1].bool()][-1]
    other = cache.tap(read(backbone, prompt(("push the ball.", "panda"), seed=2))).hidden[0, -1]
    assert (other - last).abs().max() > 1e-3 * size(last), "the text matters to what follows it"
    assert read_texts[1] > read_texts[0] > len("Views: base, wrist.") / 3


def test_a_cached_text_gives_the_same_bits(smol: Backbone) -> None:
    inputs = read(smol, prompt(), prompt(XARM, seed=1))
    cache = PrefixCache(smol, LAYER)
    first = cache.tap(inputs)
    assert torch.equal(cache.tap(inputs).hidden, first.hidden)
    assert torch.equal(PrefixCache(smol, LAYER, max_bytes=0).tap(inputs).hidden, first.hidden)
    assert (first.hidden[~first.mask] == 0).all() and not first.mask.all()


def test_the_text_is_the_same_in_all_frames_and_the_rest_is_short(smol: Backbone) -> None:
    ids = [read(smol, prompt(seed=seed))["input_ids"][0].tolist() for seed in (0, 1)]
    begin = [one.index(smol.placeholder_id) for one in ids]
    assert begin[0] == begin[1] and ids[0][: begin[0]] == ids[1][: begin[1]]
    old = control_prompt(*PANDA, {"base": picture(0), "wrist": picture(1)})
    assert read(smol, old)["input_ids"][0].tolist().index(smol.placeholder_id) < begin[0] / 5


def test_pictures_of_different_sizes(smol: Backbone) -> None:
    """Each prompt of a batch continues after its own text and has its own length (Qwen-VL)."""
    backbone = MAKERS["qwen3"]()
    wide = control_prompt(*XARM, {"base": picture(4, 112, 56)}, order="text_first")
    inputs = read(backbone, prompt(), wide)
    require_close(PrefixCache(backbone, LAYER).tap(inputs), backbone.tap(inputs, LAYER))


def test_pooling_is_the_same() -> None:
    backbone = MAKERS["smolvlm"]()
    inputs = read(backbone, prompt(), prompt(XARM, seed=1))
    found = tap_pooled(backbone, inputs, LAYER, 2, PrefixCache(backbone, LAYER))
    require_close(found, tap_pooled(backbone, inputs, LAYER, 2))


def test_bfloat16_rounds_more() -> None:
    """The tolerance of half precision: 8 bits of mantissa, relative to the size of H_k."""
    backbone = MAKERS["smolvlm"]()
    exact = backbone.tap(read(backbone, prompt()), LAYER)
    backbone.model.bfloat16()
    inputs = read(backbone, prompt())
    found, wanted = PrefixCache(backbone, LAYER).tap(inputs), backbone.tap(inputs, LAYER)
    rounding = size(wanted.hidden.float() - exact.hidden)
    assert found.hidden.dtype == torch.bfloat16
    assert size(found.hidden - wanted.hidden) < 2 * rounding < 0.05 * size(exact.hidden)


def test_the_least_recently_used_text_is_forgotten(smol: Backbone, read_texts: list[int]) -> None:
    tasks = [("go left.", "panda"), ("go right", "panda"), ("go back.", "panda")]
    largest = 0
    for task in tasks:
        one = PrefixCache(smol, LAYER)
        one.tap(read(smol, prompt(task)))
        largest = max(largest, one.nbytes)
    cache = PrefixCache(smol, LAYER, max_bytes=2 * largest)
    del read_texts[:]
    for number in (0, 1, 0, 2, 0, 2):  # the third forgets the second
        cache.tap(read(smol, prompt(tasks[number])))
    assert len(read_texts) == 3 and len(cache) == 2 and cache.nbytes <= 2 * largest
    cache.tap(read(smol, prompt(tasks[1])))
    assert len(read_texts) == 4
    cache.clear()
    assert len(cache) == 0 == cache.nbytes


def grow(backbone: Backbone) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        backbone.decoder.layers[0].mlp.down_proj.weight += 0.1


def grow_unseen(backbone: Backbone) -> None:
    """A change that torch does not count."""
    backbone.decoder.layers[0].mlp.down_proj.weight.data += 0.1


def install(backbone: Backbone) -> None:
    """What `TunedBackbone` does with averaged weights."""
    layer = backbone.decoder.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.1)


def merge(backbone: Backbone) -> None:
    """Merge adapters that were trained, without a tap in between."""
    adapted = add_adapters(backbone, Lora(rank=2), projector=False, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    merge_adapters(backbone, adapted, None)
    backbone.freeze()


def halve(backbone: Backbone) -> None:
    backbone.model.bfloat16()


@pytest.mark.parametrize("change", [grow, grow_unseen, install, merge, halve])
def test_changed_weights_empty_it(change: object) -> None:
    backbone = MAKERS["smol"]()
    cache, inputs = PrefixCache(backbone, LAYER), read(backbone, prompt())
    before = cache.tap(inputs).hidden
    assert callable(change)
    change(backbone)
    found = cache.tap(inputs)
    require_close(found, backbone.tap(inputs, LAYER), 0.1 if change is halve else 1e-5)
    assert torch.equal(found.hidden, PrefixCache(backbone, LAYER).tap(inputs).hidden)
    after, text = found.hidden, int((inputs["input_ids"][0] == backbone.placeholder_id).int().argmax())
    assert not torch.equal(before[0, :text], after[0, :text].to(before.dtype))


def test_weights_behind_the_tap_do_not_matter(smol: Backbone, read_texts: list[int]) -> None:
    cache, inputs = PrefixCache(smol, 1), read(smol, prompt())
    cache.tap(inputs)
    with torch.no_grad():
        smol.decoder.layers[1].mlp.down_proj.weight *= 1
    cache.tap(inputs)
    assert len(read_texts) == 1


def test_it_is_not_used_in_training_mode(smol: Backbone, read_texts: list[int]) -> None:
    cache, inputs = PrefixCache(smol, LAYER), read(smol, prompt())
    cache.tap(inputs)
    smol.model.train()
    try:
        assert torch.equal(cache.tap(inputs).hidden, smol.tap(inputs, LAYER).hidden)
    finally:
        smol.model.eval()
    assert len(cache) == 0 and len(read_texts) == 1


def test_threads_share_it(smol: Backbone) -> None:
    every = [read(smol, prompt((f"push cube {n % 3}.", "panda"), seed=n)) for n in range(12)]
    wanted = [PrefixCache(smol, LAYER).tap(inputs).hidden for inputs in every]
    one = PrefixCache(smol, LAYER)
    one.tap(every[0])
    cache = PrefixCache(smol, LAYER, max_bytes=2 * one.nbytes)  # smaller than the three texts
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: cache.tap(inputs).hidden, every))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(cache) <= 2


def test_a_model_that_it_would_change_is_refused() -> None:
    gemma = FAMILIES["Gemma 3"]()
    assert "in both directions" in why_not_exact(gemma)
    with pytest.raises(BlmError, match="the texts of a 'gemma3' cannot be cached: the tokens of a picture"):
        PrefixCache(gemma, LAYER)
    nano = MAKERS["nano"]()
    assert not why_not_exact(nano)
    nano.decoder.config.sliding_window = 16
    with pytest.raises(BlmError, match="a sliding window of 16 tokens"):
        PrefixCache(nano, LAYER)
    nano.decoder.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(BlmError, match="its blocks include linear_attention"):
        PrefixCache(nano, LAYER)


def test_wrong_layers_and_prompts_are_refused(smol: Backbone) -> None:
    with pytest.raises(BlmError, match="layer 9 is outside 1"):
        PrefixCache(smol, 9)
    with pytest.raises(BlmError, match="a prompt without a picture"):
        PrefixCache(smol, LAYER).tap(read(smol, prompt(), question_prompt("What can you do?")))
