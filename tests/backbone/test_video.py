"""Videos as videos: pixels and prompts against recorded outputs, and tiny models end to end."""

from __future__ import annotations

import ast
import inspect
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.qwen2_vl
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from blm.backbone import Backbone, build_nano, video_prompt
from blm.backbone.generation.generator import Generation
from blm.backbone.video import (
    DEFAULTS,
    Clip,
    FrameProcessor,
    Video,
    completed,
    load_media,
    media_of,
    parts_of,
    video_settings,
)
from blm.media import frame_references, with_pixels
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import TokenizedSource
from blm.training.sft.pack import pack
from blm.training.sft.tokenize import TokenizationConfig, tokenize_conversation
from blm.training.sft.train import _require_no_videos
from blm.training.sft.vision_features import vision_modules
from blm.types import BlmError, Image, Message, Sampling
from tests.backbone.record_videos import CASES, CONFIGS, KINDS, OUT, PROMPT, TIMES, digest, frames, sample
from tests.support.backbones import MAKERS, picture, tiny_qwen
from tests.test_media import write_clip

RECORDED = json.loads(OUT.read_text())
NAMES = {"qwen2_5_vl": "2.5", "qwen3_vl": "3"}
GREY_LEVEL = 1 / 255 / 0.26
"""One level of 255 after normalisation."""


def frame(seed: int, reference: str, height: int = 64, width: int = 96) -> Image:
    return Image(picture(seed, height, width), reference)


def clip(name: str = "clip.mp4", count: int = 4, seed: int = 0) -> tuple[Image, ...]:
    return tuple(frame(seed + i, f"{name}#t={0.25 + 0.5 * i:.3f}") for i in range(count))


def asked(*content: str | Image) -> tuple[Message, ...]:
    return (Message("user", content),)


@pytest.fixture(scope="module", params=KINDS)
def qwen(request: pytest.FixtureRequest) -> Backbone:
    return tiny_qwen(NAMES[request.param])


# --- against the families' own processors -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_patches_are_those_of_the_official_video_processor(kind: str, name: str) -> None:
    shape, settings = CASES[name]
    values, grid = FrameProcessor(completed(settings, kind)).patches(torch.from_numpy(frames(*shape)))
    recorded = RECORDED[kind]["pixels"][name]
    assert [list(grid)] == recorded["grid"] and list(values.shape) == recorded["shape"]
    np.testing.assert_allclose(sample(values), recorded["sample"], rtol=0, atol=GREY_LEVEL)
    if "no resize" in name or platform.machine() == "x86_64":  # resized too: other CPUs may round otherwise
        assert digest(values) == recorded["sha256"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_those_that_the_official_class_writes(kind: str, name: str) -> None:
    recorded = RECORDED[kind]["settings"][name]
    recorded.pop("processor_class", None)  # of the file that was read; transformers 5 writes it elsewhere
    assert completed(CONFIGS[name], kind) == recorded


def test_the_recorded_version_is_the_installed_one() -> None:
    assert RECORDED["versions"]["transformers"] == version("transformers"), "run tests.backbone.record_videos"


def class_attributes(kind: str) -> dict[str, Any]:
    """The literals in the body of a video processor's class; Qwen2.5-VL's cannot be imported."""
    if kind == "qwen3_vl":
        tree = ast.parse(inspect.getsource(Qwen3VLVideoProcessor))
    else:
        folder = Path(str(transformers.models.qwen2_vl.__file__)).parent
        tree = ast.parse((folder / "video_processing_qwen2_vl.py").read_text())
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Processor")
    )
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            source = ast.unparse(node.value)
            if not any(character.isalpha() for character in source.replace("True", "").replace("False", "")):
                found[node.targets[0].id] = eval(source)  # numbers, and products of them
            elif isinstance(node.value, ast.Dict):
                found[node.targets[0].id] = eval(source)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_attributes_of_the_class(kind: str) -> None:
    attributes = class_attributes(kind)
    shared = attributes.keys() & DEFAULTS[kind].keys()
    assert {"size", "patch_size", "temporal_patch_size", "merge_size", "do_sample_frames"} <= shared
    assert {name: attributes[name] for name in shared} == {name: DEFAULTS[kind][name] for name in shared}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TIMES)
def test_prompts_are_those_of_the_official_processor(kind: str, name: str) -> None:
    backbone = tiny_qwen(NAMES[kind])
    processor = backbone.processor
    small = {"shortest_edge": 2 * 32 * 32, "longest_edge": 10**7}
    processor.video_processor = FrameProcessor(completed({"size": small}, kind))
    video = Video(frames(len(TIMES[name]), 64, 96), TIMES[name])
    inputs = backbone.process([PROMPT], [], videos=[video])
    recorded = RECORDED[kind]["prompts"][name]
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == recorded["text"]
    assert inputs["mm_token_type_ids"][0].tolist() == recorded["token_types"]
    seconds = inputs.get("second_per_grid_ts", torch.zeros(0)).tolist()
    assert seconds == pytest.approx(recorded["second_per_grid_ts"], rel=1e-6)


# --- which frames are one video -----------------------------------------------------------------------------


def test_frames_of_one_video_that_stand_together_are_a_clip() -> None:
    first, second = clip("a.mp4", 3), clip("b.mp4", 2)
    alone, later = frame(9, "b.mp4#t=7"), Image(picture(8))
    parts = parts_of([*first, *second, "text", alone, later, *clip("a.mp4", 2), *clip("a.mp4", 2)], "video")
    kinds = [len(part.frames) if isinstance(part, Clip) else type(part) for part in parts]
    assert kinds == [3, 2, str, Image, Image, 2, 2]
    assert isinstance(parts[0], Clip) and parts[0].times == (0.25, 0.75, 1.25)
    content = [*first, "text"]
    assert parts_of(content, "frames") == content
    assert not any(isinstance(p, Clip) for p in parts_of([frame(1, "a.png"), frame(2, "b.png")], "video"))


def test_frames_of_unlike_size_are_refused() -> None:
    frames_of_two_sizes = (frame(0, "a.mp4#t=0", 64, 64), frame(1, "a.mp4#t=1", 64, 96))
    with pytest.raises(BlmError, match="differ in size"):
        load_media(media_of(asked(*frames_of_two_sizes), "video"))


def test_a_video_prompt_is_one_video_where_the_family_has_them(qwen: Backbone) -> None:
    prompt = video_prompt("What happens?", [picture(i) for i in range(12)], rate_hz=2.0, count=4)
    (video,) = media_of(prompt, qwen.videos_as)
    assert isinstance(video, Clip) and video.times == (0.0, 2.0, 3.5, 5.5)
    assert prompt[0].text == "Frames at 0.0, 2.0, 3.5, 5.5 s. What happens?"
    assert len(media_of(prompt, build_nano().videos_as)) == 4


# --- models -------------------------------------------------------------------------------------------------


def test_a_video_and_a_picture_reach_the_model(qwen: Backbone) -> None:
    inputs = qwen.read([asked(*clip(), Image(picture(9)), "What happens?")])
    assert inputs["video_grid_thw"][:, 0].tolist() == [2] and len(inputs["image_grid_thw"]) == 1
    qwen.videos_as = "frames"
    try:
        as_frames = qwen.read([asked(*clip(), Image(picture(9)), "What happens?")])
    finally:
        qwen.videos_as = "video"
    assert "video_grid_thw" not in as_frames and len(as_frames["image_grid_thw"]) == 5
    without_paths = [Image(image.pixels) for image in clip()]
    plain = qwen.read([asked(*without_paths, Image(picture(9)), "What happens?")])
    assert all(torch.equal(plain[name], as_frames[name]) for name in as_frames.keys() | plain.keys())


def test_answers_and_hidden_states_are_those_of_plain_transformers(qwen: Backbone) -> None:
    conversations = [
        asked(*clip(), "What happens?"),
        asked("What can you do?"),
        asked(*clip("b.mp4", 3, seed=20), Image(picture(9)), *clip("c.mp4", 2, seed=40), "And here?"),
    ]
    together = qwen.encode(conversations)
    answers = qwen.answer_batch(conversations, max_tokens=6)
    with torch.no_grad():
        logits = qwen.model(**together).logits[:, -1]
        for number, conversation in enumerate(conversations):
            inputs = qwen.encode([conversation])
            alone = qwen.model(**inputs).logits[:, -1]
            torch.testing.assert_close(logits[number : number + 1], alone, rtol=1e-4, atol=1e-5)
            made = qwen.model.generate(**inputs, max_new_tokens=6, do_sample=False)
            text = qwen.processor.tokenizer.decode(
                made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            assert answers[number] == text.strip()
            tapped = qwen.tap(inputs, 2)
            seen = qwen.model(**inputs, output_hidden_states=True).hidden_states[2]
            assert tapped.hidden.shape == seen.shape
            if qwen.model.config.model_type == "qwen2_5_vl":  # Qwen3-VL adds DeepStack features after it
                torch.testing.assert_close(tapped.hidden, seen)


def test_answers_about_a_long_video_are_those_of_plain_transformers(qwen: Backbone) -> None:
    """Patches a minute apart have positions beyond those of the text that follows them."""
    slow = tuple(Image(image.pixels, f"clip.mp4#t={60 * i}") for i, image in enumerate(clip()))
    conversation = asked(*slow, "What happens?")
    inputs = qwen.encode([conversation])
    made = qwen.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    tokens = made[0, inputs["input_ids"].shape[1] :]
    text = qwen.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert qwen.answer(conversation, max_tokens=12) == text.strip()
    generation = Generation(qwen)
    (answer,) = generation.start([conversation], [Sampling(max_tokens=12)])
    assert answer.position == int(qwen.position_ids(inputs).max()) + 1


def test_frames_of_a_file_are_one_video_however_they_are_loaded(qwen: Backbone, tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", options={"g": "8", "bf": "2"})
    references = frame_references("clip.mp4", tmp_path, 8)
    conversation = asked(*(Image(path=reference) for reference in references), "What happens?")
    by_path = qwen.read([conversation], root=tmp_path)
    loaded = qwen.read([with_pixels(conversation, tmp_path)])
    assert by_path["video_grid_thw"][:, 0].tolist() == [4]
    assert all(torch.equal(by_path[name], loaded[name]) for name in by_path.keys() | loaded.keys())
    row = tokenize_conversation(
        qwen, (*conversation, Message("assistant", ("x",))), TokenizationConfig(), tmp_path, Counter()
    )
    assert row is not None and row.shows_video
    if "second_per_grid_ts" in by_path:  # 3 s in 8 parts, two frames a patch
        assert by_path["second_per_grid_ts"].item() == pytest.approx(2 * 3.0 / 8, abs=1e-3)


def test_a_video_in_pieces_is_read_whole(qwen: Backbone) -> None:
    prompt = asked(*clip(), Image(picture(9)), "What happens?")
    generation = Generation(qwen, piece_tokens=8)
    prefill = generation.begin(generation.prepare(prompt, [Sampling(max_tokens=6)]))
    while (answers := generation.advance(prefill)) is None:
        pass
    while generation.running:
        generation.step()
    assert generation.text(answers[0]).strip() == qwen.answer(prompt, max_tokens=6)


def test_seconds_per_patch_stay_exact_in_low_precision() -> None:
    backbone = tiny_qwen("2.5")
    backbone.model.to(torch.bfloat16)
    frames_of_clip = tuple(frame(i, f"a.mp4#t={0.1001 * i:.4f}") for i in range(4))
    inputs = backbone.encode([asked(*frames_of_clip, "What happens?")])
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].item() == pytest.approx(0.2002, rel=1e-6)


def test_times_change_the_positions(qwen: Backbone) -> None:
    """Seconds apart or far apart: position ids for Qwen2.5-VL, text for Qwen3-VL."""
    slow = tuple(Image(image.pixels, f"clip.mp4#t={10 * i}") for i, image in enumerate(clip()))
    with torch.no_grad():
        inputs = [qwen.encode([asked(*shown, "What happens?")]) for shown in (clip(), slow)]
        logits = [qwen.model(**given).logits[0, -1] for given in inputs]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"qwen2.5", "qwen3"}))
def test_other_families_get_frames(name: str) -> None:
    backbone = MAKERS[name]()
    assert backbone.videos_as == "frames"
    with_paths, without = (
        backbone.read([asked(*(Image(i.pixels, i.path if paths else None) for i in clip()), "What?")])
        for paths in (True, False)
    )
    assert all(torch.equal(with_paths[key], without[key]) for key in with_paths.keys() | without.keys())
    backbone.videos_as = "video"
    with pytest.raises(BlmError, match="reads no videos"):
        backbone.read([asked(*clip(), "What?")])


def test_bad_input_is_named(qwen: Backbone) -> None:
    with pytest.raises(BlmError, match="reserved"):
        qwen.render(asked("<|video_pad|>"), prompt=True)
    template = qwen.processor.chat_template
    qwen.processor.chat_template = template.replace("<|video_pad|>", "")
    try:
        with pytest.raises(BlmError, match="chat template"):
            qwen.read([asked(*clip(), "What?")])
    finally:
        qwen.processor.chat_template = template
    inputs = qwen.read([asked(*clip(), "What?")])
    with pytest.raises(BlmError, match="video placeholders"):
        qwen.check({**inputs, "input_ids": inputs["input_ids"][:, :10]})
    with pytest.raises(BlmError, match="resample"):
        FrameProcessor(completed({"resample": 1}, "qwen2_5_vl"))


# --- folders ------------------------------------------------------------------------------------------------


def test_a_saved_folder_has_the_whole_processor(qwen: Backbone, tmp_path: Path) -> None:
    qwen.save(tmp_path / "model")
    part = json.loads((tmp_path / "model/processor_config.json").read_text())["video_processor"]
    kind = qwen.model.config.model_type
    assert part == qwen.processor.video_processor.settings
    assert part.keys() == DEFAULTS[kind].keys()
    again = Backbone.load(tmp_path / "model")
    assert again.videos_as == "video" and again.processor.video_processor.settings == part
    conversation = [asked(*clip(), "What happens?")]
    one, other = qwen.read(conversation), again.read(conversation)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    again.save(tmp_path / "again")
    names = ("processor_config.json", "chat_template.jinja")
    for name in names:
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_read_in_the_order_of_transformers(kind: str, tmp_path: Path) -> None:
    assert video_settings(tmp_path, kind) == DEFAULTS[kind]
    files: Sequence[tuple[str, dict[str, Any]]] = (
        ("preprocessor_config.json", {"merge_size": 2, "image_mean": [0.1, 0.2, 0.3], "min_pixels": 7}),
        ("video_preprocessor_config.json", {"image_mean": [0.2, 0.2, 0.3]}),
        ("processor_config.json", {"video_processor": {"image_mean": [0.3, 0.2, 0.3]}}),
    )
    for name, content in files:
        (tmp_path / name).write_text(json.dumps(content))
        found = video_settings(tmp_path, kind)
        assert found["image_mean"] == (content.get("video_processor") or content)["image_mean"]
    assert video_settings(tmp_path, "llava") == {}
    part = {"image_mean": [0.3, 0.2, 0.3], "video_processor_type": "LlavaOnevisionVideoProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": part}))
    assert video_settings(tmp_path, "llava_onevision") == part


# --- Stage I ------------------------------------------------------------------------------------------------


def talks() -> list[tuple[Message, ...]]:
    """Turns about a video, about a video and a picture, and text."""
    answer = Message("assistant", ("It moves.",))
    more = (Message("user", ("Where to?",)), Message("assistant", ("left",)))
    return [
        (*asked(*clip(), "What happens?"), answer, *more),
        (*asked(Image(picture(9)), *clip("b.mp4", 3, seed=20), "And here?"), answer),
        more,
    ]


def test_rows_with_videos_are_trained_exactly_as_each_turn_alone(qwen: Backbone) -> None:
    qwen.model.requires_grad_(True)
    rows = [
        tokenize_conversation(qwen, talk, TokenizationConfig(), None, Counter(), independent=True)
        for talk in talks()
    ]
    assert all(row is not None for row in rows)
    kept = [row for row in rows if row is not None]
    packed = MaskedLossModel(qwen)(pack(qwen, [kept], ()))
    total, count = torch.zeros(()), 0
    for talk in talks():
        for asking, answer in zip(talk[::2], talk[1::2], strict=True):
            shown = talk[0].images if asking is not talk[0] else ()
            turn = (Message("user", (*shown, *asking.content)), answer)
            alone = tokenize_conversation(qwen, turn, TokenizationConfig(), None, Counter())
            assert alone is not None
            found = MaskedLossModel(qwen)(pack(qwen, [[alone]], ()))
            total, count = total + found.loss_sum, count + int(found.tokens)
            learnt = qwen.processor.tokenizer.decode(alone.tokens[alone.loss_mask])
            assert learnt.startswith(answer.text) and "pad" not in learnt
    assert int(packed.tokens) == count
    torch.testing.assert_close(packed.loss_sum, total, rtol=1e-4, atol=1e-4)


def test_cached_features_of_videos_give_the_loss_of_pixels(qwen: Backbone, tmp_path: Path) -> None:
    for part in vision_modules(qwen):
        part.requires_grad_(False)
    try:
        rows = [tokenize_conversation(qwen, talk, TokenizationConfig(), None, Counter()) for talk in talks()]
        kept = [row for row in rows if row is not None]
        stored = cache_features(qwen, [kept], tmp_path, ALONE)
        (cached,) = stored.examples
        assert stored.distinct == 3 and not any(row.shows_video for row in cached)
        losses = [
            MaskedLossModel(qwen, cached=given is cached)(pack(qwen, [given], ())).loss_sum
            for given in (kept, cached)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    finally:
        qwen.model.requires_grad_(True)


def test_sharded_training_refuses_videos_by_name(qwen: Backbone) -> None:
    rows = [tokenize_conversation(qwen, talk, TokenizationConfig(), None, Counter()) for talk in talks()]
    source = TokenizedSource(name="clips", examples=[row for row in rows if row is not None])
    with pytest.raises(BlmError, match="'clips' has videos"):
        _require_no_videos([source])
    _require_no_videos([TokenizedSource(name="text", examples=source.examples[2:])])


def test_shrinking_holds_for_the_frames_of_videos(qwen: Backbone) -> None:
    counts = Counter[str]()
    row = tokenize_conversation(qwen, talks()[1], TokenizationConfig(max_pixels=32 * 32), None, counts)
    assert row is not None and counts["pictures shrunk"] == 4
