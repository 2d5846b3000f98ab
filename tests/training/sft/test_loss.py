"""The loss in chunks of tokens: its value and gradients are those of all logits at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from blm.backbone import Backbone, build_nano
from blm.training.sft import loss as stage1_loss
from blm.training.sft.lora import Lora, add_adapters
from blm.training.sft.loss import MaskedLoss, MaskedLossModel, _HeadLoss
from blm.training.sft.pack import pack, probe_examples
from blm.training.sft.prefix_attention import prefix_attention_forward, prefix_attention_layout
from tests.support.backbones import MAKERS
from tests.support.families import FAMILIES

EVERY = MAKERS | {"Gemma 3": FAMILIES["Gemma 3"]}


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def computed(backbone: Backbone, at_once: int, *, bf16: bool = False) -> tuple[MaskedLoss, dict[str, Tensor]]:
    """The loss and the gradients of all trained parameters."""
    examples = probe_examples(backbone)
    sequences = (
        [examples] if backbone.model.config.model_type != "gemma3" else [[one] for one in examples[1:2]]
    )
    batch = pack(backbone, sequences, ())
    backbone.model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        patch.setattr(stage1_loss, "LOGITS_AT_ONCE", at_once)
        found = MaskedLossModel(backbone)(batch)
    found.loss_sum.backward()
    trained = {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}
    return found, {name: value.clone() for name, value in trained.items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], rounding: float) -> None:
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= rounding * wanted[name].abs().max() + 1e-9, name


@contextmanager
def adapters(backbone: Backbone) -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        add_adapters(backbone, Lora(rank=2), projector=False, seed=0)
    yield


@pytest.mark.parametrize("name", sorted(EVERY))
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(name: str) -> None:
    backbone = EVERY[name]()
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    whole, wanted = computed(backbone, 10**9)
    for tokens in (1, 5):
        parts, found = computed(backbone, tokens * vocabulary)
        assert torch.allclose(parts.loss_sum, whole.loss_sum, rtol=1e-6)
        assert parts[1:] == whole[1:] and int(whole.tokens) > 5
        assert_close(found, wanted, 5e-4)


def test_chunks_with_adapters_and_a_frozen_head() -> None:
    backbone = MAKERS["qwen2.5"]()
    with adapters(backbone):
        whole, wanted = computed(backbone, 10**9)
        parts, found = computed(backbone, 1)
    assert all("lora" in name for name in found)
    assert torch.allclose(parts.loss_sum, whole.loss_sum, rtol=1e-6)
    assert_close(found, wanted, 5e-4)


@pytest.mark.parametrize("name", ["nano", "qwen3"])
def test_chunks_under_autocast(name: str) -> None:
    backbone = MAKERS[name]()
    whole, wanted = computed(backbone, 10**9, bf16=True)
    parts, found = computed(backbone, 1, bf16=True)
    assert torch.allclose(parts.loss_sum, whole.loss_sum, rtol=1e-6)
    apart = torch.cat([(found[name] - value).flatten() for name, value in wanted.items()])
    assert apart.norm() < 0.02 * torch.cat([value.flatten() for value in wanted.values()]).norm()


def test_all_logits_never_exist_at_once() -> None:
    """Neither forward nor backward; a chunk is smaller than the head's weight here."""
    backbone = build_nano()
    backbone.model.resize_token_embeddings(2_000)
    weight = backbone.model.get_output_embeddings().weight
    tokens = torch.randn(400, weight.shape[1])
    output = type(backbone.model.base_model(input_ids=torch.ones(1, 2, dtype=torch.long)))()
    for at_once, largest in ((10**9, 2_000 * 400), (2_000 * 4, weight.numel())):
        with pytest.MonkeyPatch.context() as patch, Largest() as seen:
            patch.setattr(stage1_loss, "LOGITS_AT_ONCE", at_once)
            sums, _ = MaskedLossModel(backbone)._sums(output, tokens.requires_grad_(), torch.arange(400))
            sums.backward()
        assert seen.elements == largest


def test_logits_that_the_model_limits_behind_its_head() -> None:
    text = {"model_type": "gemma2", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 8, "projection_dim": 16}
    config = PaliGemmaConfig(
        text_config={**text, "final_logit_softcapping": 0.5}, vision_config=vision, image_token_id=49
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).eval()
    ids = torch.randint(0, 40, (1, 12))
    limited = model(input_ids=ids).logits[0, :-1]
    assert limited.abs().max() < 0.5
    output = model.base_model(input_ids=ids)
    loss, correct = _HeadLoss(model, output)(output.last_hidden_state[0, :-1], ids[0, 1:])
    assert torch.equal(loss, F.cross_entropy(limited.float(), ids[0, 1:], reduction="sum"))
    assert correct == (limited.argmax(-1) == ids[0, 1:]).sum()


def test_repeated_heads_attend_as_grouped_queries_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six heads of queries over two of keys and values, two turns behind a prefix, and padding."""
    examples = torch.tensor([[0] * 9 + [1] * 4 + [-1] * 3]).numpy()
    turns = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2 + [0] * 7]).numpy()
    layout = prefix_attention_layout(examples, turns)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (6, 2, 2))
    found = []
    for repeated in (False, True):
        monkeypatch.setattr(
            "blm.training.sft.prefix_attention.repeats_heads", lambda _, repeated=repeated: repeated
        )
        mixed, _ = prefix_attention_forward(
            torch.nn.Identity(), query, key, value, None, scaling=0.3, prefix_layout=layout
        )
        gradients = torch.autograd.grad(mixed.square().sum(), (query, key, value))
        found.append((mixed, *gradients))
    for grouped, repeated in zip(*found, strict=True):
        assert torch.allclose(grouped, repeated, atol=1e-6)
