from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from blm.backbone import Backbone, build_nano, control_prompt, question_prompt, video_prompt
from blm.media import load_pixels
from blm.types import BlmError, Image, Message, UnknownNameError
from tests.support.backbones import (
    MAKERS,
    PROMPTS,
    picture,
    tiny_smolvlm,
)


@pytest.fixture(scope="module", params=sorted(MAKERS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return build_nano()


def test_tap_is_the_output_of_its_block_and_later_blocks_do_not_run(backbone: Backbone) -> None:
    inputs = backbone.encode(PROMPTS)
    seen: dict[int, torch.Tensor] = {}
    runs: list[int] = []
    hooks = []
    for index, block in enumerate(backbone.decoder.layers):
        hooks.append(block.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__(i + 1, out)))
        # H_k is what block k + 1 reads; in Qwen3-VL DeepStack features were added to block k's output.
        hooks.append(
            block.register_forward_pre_hook(
                lambda m, args, i=index: seen.__setitem__(i, args[0]) if i else None
            )
        )
    with torch.no_grad():
        backbone.model(**inputs)
    for hook in hooks:
        hook.remove()
    hooks = [
        block.register_forward_hook(lambda *_, i=index: runs.append(i + 1))
        for index, block in enumerate(backbone.decoder.layers)
    ]
    for layer in range(1, backbone.num_layers + 1):
        runs.clear()
        tapped = backbone.tap(inputs, layer)
        assert runs == list(range(1, layer + 1))
        assert torch.equal(tapped.hidden, seen[layer])
        assert tapped.hidden.shape == (*inputs["input_ids"].shape, backbone.hidden_size)
        assert tapped.mask.sum(1).tolist() == inputs["attention_mask"].sum(1).tolist()
    for hook in hooks:
        hook.remove()


def test_tap_does_not_change_the_model(backbone: Backbone) -> None:
    inputs = backbone.encode(PROMPTS)
    before, modules = backbone.fingerprint(), dict(backbone.model.named_modules())
    with torch.no_grad():
        logits = backbone.model(**inputs).logits
        backbone.tap(inputs, 1)
        assert torch.equal(backbone.model(**inputs).logits, logits)
    assert backbone.fingerprint() == before
    assert dict(backbone.model.named_modules()) == modules
    for layer in (0, backbone.num_layers + 1):
        with pytest.raises(BlmError, match="outside 1"):
            backbone.tap(inputs, layer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_prompts_of_unequal_length_equal_single_ones(backbone: Backbone, side: str) -> None:
    layer = backbone.num_layers
    batch = backbone.tap(backbone.encode(PROMPTS, side=side), layer)
    for row, prompt in enumerate(PROMPTS):
        alone = backbone.tap(backbone.encode([prompt]), layer)
        assert alone.mask.all()
        hidden = batch.hidden[row][batch.mask[row]]
        assert hidden.shape == alone.hidden[0].shape
        assert torch.allclose(hidden, alone.hidden[0], atol=2e-5), (hidden - alone.hidden[0]).abs().max()


def test_answers_do_not_depend_on_the_batch_and_match_a_plain_greedy_loop(backbone: Backbone) -> None:
    batch = backbone.answer_batch(PROMPTS, max_tokens=5)
    assert batch == [backbone.answer(prompt, max_tokens=5) for prompt in PROMPTS]
    inputs = backbone.encode(PROMPTS[:1])
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            grown = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                extra = ids.shape[1] - inputs["input_ids"].shape[1]
                grown["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
            ids = torch.cat([ids, backbone.model(**grown).logits[:, -1:].argmax(-1)], 1)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    end = backbone.processor.tokenizer.eos_token_id
    new = new[: new.index(end)] if end in new else new
    assert batch[0] == backbone.processor.decode(new, skip_special_tokens=True).strip()


def test_tap_and_answer_run_side_by_side(backbone: Backbone) -> None:
    inputs = backbone.encode(PROMPTS)
    expected = backbone.tap(inputs, 2).hidden
    answer = backbone.answer(PROMPTS[0], max_tokens=30)
    answers: list[str] = []
    chat = threading.Thread(target=lambda: answers.append(backbone.answer(PROMPTS[0], max_tokens=30)))
    chat.start()
    while chat.is_alive():
        assert torch.equal(backbone.tap(inputs, 2).hidden, expected)
    chat.join()
    assert answers == [answer]


def test_a_saved_folder_is_stock_and_gives_identical_logits(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for _ in range(2):  # the second save replaces the first
        backbone.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    again = Backbone.load(folder)
    assert torch.equal(again.probe_logits(), backbone.probe_logits())
    assert again.fingerprint() == backbone.fingerprint()
    assert again.render(PROMPTS[2], prompt=True) == backbone.render(PROMPTS[2], prompt=True)
    inputs, mine = again.encode(PROMPTS), backbone.encode(PROMPTS)
    assert all(torch.equal(inputs[name], mine[name]) for name in mine)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_freeze_and_fingerprint(name: str) -> None:
    backbone = MAKERS[name]()
    backbone.model.train()
    backbone.freeze()
    assert not any(module.training for module in backbone.model.modules())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    before, logits = backbone.fingerprint(), backbone.probe_logits()
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[3] += 1e-2
    assert backbone.fingerprint() != before
    assert not torch.equal(backbone.probe_logits(), logits)


def test_placeholders_equal_features_and_a_missing_one_is_named(backbone: Backbone) -> None:
    inputs = backbone.encode([question_prompt("a", [picture(0, 90, 40), picture(1)]), question_prompt("b")])
    placeholder = backbone.processor.image_token_id
    where = inputs["input_ids"][0] == placeholder
    count = int(where.sum())
    assert count > 0
    inputs["input_ids"][0, where.nonzero()[0]] = backbone.processor.tokenizer.pad_token_id
    with pytest.raises(BlmError, match=f"{count - 1} image placeholders but {count} image features"):
        backbone.check(inputs)


def test_images_of_a_batch_have_one_layout(backbone: Backbone) -> None:
    """So rows of several conversations can be joined along the first axis, whatever the model."""
    pictures = [picture(i) for i in range(3)]
    prompts = [question_prompt("a", pictures[:2]), question_prompt("b"), question_prompt("c", pictures[2:])]
    whole = backbone.encode(prompts)["pixel_values"]
    parts = [backbone.encode([prompts[i]])["pixel_values"] for i in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_a_smolvlm2_folder_as_on_the_hub_loads_without_tiles(tmp_path: Path) -> None:
    """The hub's folder names the processor that needs num2words and torchvision, and cuts pictures up."""
    backbone = tiny_smolvlm("smolvlm2")
    backbone.save(tmp_path / "model")
    saved = tmp_path / "model" / "processor_config.json"
    settings = json.loads(saved.read_text())
    pictures = settings.pop("image_processor") | {"image_processor_type": "SmolVLMImageProcessor"}
    pictures |= {"do_image_splitting": True, "processor_class": "SmolVLMProcessor"}
    (saved.parent / "preprocessor_config.json").write_text(json.dumps(pictures))
    saved.write_text(json.dumps({"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}))
    again = Backbone.load(tmp_path / "model")
    prompt = question_prompt("What is it?", [picture(0, 300, 200)])
    mine, theirs = backbone.encode([prompt]), again.encode([prompt])
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    assert int((theirs["input_ids"] == again.processor.image_token_id).sum()) == 4


def test_bad_input_is_refused_before_the_forward(nano: Backbone, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    PIL.Image.new("RGBA", (9, 7), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_pixels(Image(path="clear.png"), tmp_path).shape == (7, 9, 3)
    bad: list[tuple[Message, str]] = [
        (Message("user", (Image(picture(0).astype(np.float32)), "a")), "float32"),
        (Message("user", (Image(picture(0)[..., :1]), "a")), r"needed: uint8 \(height, width, 3\)"),
        (Message("user", (Image(path="broken.png"), "a")), "cannot read image .*broken.png"),
        (Message("user", (Image(path="absent.png"), "a")), "cannot read image .*absent.png"),
        (Message("user", (Image(), "a")), "neither pixels nor a path"),
        (Message("user", ("look: <image>",)), "reserved"),
        (Message("user", ("word " * 9000,)), "the context holds 4096"),
    ]
    for message, rule in bad:
        with pytest.raises(BlmError, match=rule):
            nano.encode([[message]], root=tmp_path)
    with pytest.raises(BlmError, match="relative to"):
        nano.encode([[Message("user", (Image(path="clear.png"),))]])
    with pytest.raises(BlmError, match="no messages"):
        nano.encode([[]])
    inputs = nano.encode([question_prompt("a", [picture(0)])])
    inputs["input_ids"] = inputs["input_ids"][:, 4:]
    with pytest.raises(BlmError, match="13 image placeholders but 16"):
        nano.check(inputs)


def test_an_unknown_backbone_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'qwen2_5_vl_3b'"):
        Backbone.load("qwen2.5_vl_3b")


def test_prompts_put_pictures_first_in_the_given_order() -> None:
    images = {"wrist": picture(1), "base": picture(0)}
    (message,) = control_prompt("Stack them.", "xArm 6", images)
    assert all(a.pixels is b for a, b in zip(message.images, images.values(), strict=True))
    assert isinstance(message.content[-1], str) and "Views: wrist, base." in message.text
    for word in ("xArm 6", "Stack them.", "object", "goal", "gripper", "next primitive"):
        assert word in message.text
    frames = [picture(i, 8, 8) for i in range(10)]
    (clip,) = video_prompt("What happens?", frames, rate_hz=2.0, count=4)
    assert [next(i for i, f in enumerate(frames) if f is im.pixels) for im in clip.images] == [0, 3, 6, 9]
    assert "0.0, 1.5, 3.0, 4.5 s" in clip.text
    assert len(video_prompt("?", frames[:1], 2.0)[0].images) == 1
    with pytest.raises(BlmError, match="needs frames"):
        video_prompt("?", [], 2.0)
