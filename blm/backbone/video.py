"""Video inputs, for the model families that have them: Qwen2.5-VL and Qwen3-VL.

These models merge two consecutive frames into one temporal patch and know the time of each patch:
Qwen2.5-VL from its position ids (temporal M-RoPE), Qwen3-VL from timestamps in the text. The video
processors of transformers need torchvision, which this project does not install. `FrameProcessor`
does their work on frames that were sampled elsewhere; the families' own processor classes still
write the placeholders, the timestamps and the seconds per patch.

Shapes: T frames of H x W px, P patches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_picture
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_volume
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file
from transformers.video_utils import VideoMetadata

from blm.media import load_images, split_time
from blm.types import BlmError, Image, ImageArray, Message

VideosAs = Literal["frames", "video"]
Settings = Mapping[str, Any]
"""The settings of a video processor, as in processor_config.json."""
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
"""Inputs that the vision part of a model reads."""
_COMMON: Settings = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "max_frames": 768,
    "merge_size": 2,
    "min_frames": 4,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "return_metadata": False,
    "temporal_patch_size": 2,
}
DEFAULTS: Mapping[str, Settings] = {
    "qwen2_5_vl": {
        **_COMMON,
        "do_sample_frames": False,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_video_tokens": 128_000,
        "patch_size": 14,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "video_processor_type": "Qwen2VLVideoProcessor",
    },
    "qwen3_vl": {
        **_COMMON,
        "do_sample_frames": True,
        "fps": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_video_tokens": 768,
        "patch_size": 16,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}
"""`model_type` -> default settings of the family's video processor class (transformers 5.24).

The class of Qwen2.5-VL cannot be imported without torchvision.
"""
_MODES = {2: "bilinear", 3: "bicubic"}
"""PIL's number of a resampling filter -> its name in torch."""


# --- which images are one video ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one video in a message, earliest first."""

    frames: tuple[Image, ...]
    times: tuple[float, ...]
    """Time of each frame from the start of the video [s]."""


@dataclass(frozen=True)
class Video:
    """The frames of a clip in memory."""

    frames: ImageArray
    """[T, H, W, 3] uint8."""
    times: tuple[float, ...]

    def metadata(self) -> VideoMetadata:
        """Return the times in the form that the processors of transformers read.

        Frames are numbered in seconds, so "frames per second" is 1. The sampled rate that
        Qwen2.5-VL computes is then one over the mean interval between frames.
        """
        interval = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        seconds: Any = [*self.times]
        total: Any = interval * len(self.times)
        return VideoMetadata(total_num_frames=total, fps=1.0, frames_indices=seconds)


def parts_of(content: Sequence[str | Image], videos_as: VideosAs) -> list[str | Image | Clip]:
    """Return the parts of a message; with "video", consecutive frames of one video form a clip.

    Such frames are two or more images whose paths name the same file with increasing times
    (`clip.mp4#t=0.5`), with nothing between them.
    """
    if videos_as == "frames":
        return [*content]
    parts = list[str | Image | Clip]()
    run = list[tuple[Image, float]]()
    name = ""

    def close() -> None:
        if len(run) > 1:
            parts.append(Clip(tuple(image for image, _ in run), tuple(seconds for _, seconds in run)))
        else:
            parts.extend(image for image, _ in run)
        run.clear()

    for part in content:
        path = part.path if isinstance(part, Image) else None
        file, seconds = split_time(path) if path is not None else ("", None)
        if run and (seconds is None or file != name or seconds <= run[-1][1]):
            close()
        if isinstance(part, Image) and seconds is not None:
            run.append((part, seconds))
            name = file
        else:
            parts.append(part)
    close()
    return parts


def media_of(messages: Sequence[Message], videos_as: VideosAs) -> tuple[Image | Clip, ...]:
    """Return the images and clips of a conversation in reading order."""
    parts = (part for message in messages for part in parts_of(message.content, videos_as))
    return tuple(part for part in parts if not isinstance(part, str))


def load_media(
    media: Sequence[Image | Clip], root: Path | None = None
) -> tuple[list[ImageArray], list[Video]]:
    """Return the pixels of images and of clips; paths are read below `root`.

    Raises BlmError as `load_pixels` does, and for a clip whose frames differ in size.
    """
    frames = [image for part in media for image in (part.frames if isinstance(part, Clip) else (part,))]
    loaded: Iterator[ImageArray] = iter(load_images(frames, root))
    images = list[ImageArray]()
    videos = list[Video]()
    for part in media:
        if isinstance(part, Image):
            images.append(next(loaded))
            continue
        pixels = [next(loaded) for _ in part.frames]
        if len({frame.shape for frame in pixels}) > 1:
            raise BlmError(f"the frames of '{part.frames[0].path}' and those after it differ in size")
        videos.append(Video(np.stack(pixels), part.times))
    return images, videos


# --- pixels -> patches --------------------------------------------------------------------------------------


class FrameProcessor:
    """The video processor of Qwen2.5-VL or Qwen3-VL for sampled frames, without torchvision.

    It resizes and normalises frames and cuts them into patches by the same operations in the same
    order, so its output is bit-equal on the CPU (tests/backbone/test_video.py compares it with
    recorded outputs). Resizing calls torch's antialiased uint8 `interpolate`, as torchvision does
    for tensors on the CPU.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, settings: Settings) -> None:
        """`settings` come from `video_settings`. Raises BlmError for an unsupported filter."""
        self.settings = settings
        self.patch_size: int = settings["patch_size"]
        self.temporal_patch_size: int = settings["temporal_patch_size"]
        self.merge_size: int = settings["merge_size"]
        if settings["do_resize"] and settings["resample"] not in _MODES:
            number = settings["resample"]
            raise BlmError(
                f"the video processor's 'resample' is {number}; 2 (bilinear) or 3 (bicubic) is needed"
            )

    def __call__(
        self, videos: Sequence[ImageArray], *, video_metadata: Sequence[VideoMetadata], **_: Any
    ) -> dict[str, Any]:
        """Return `pixel_values_videos` [P, 3 * patch volume], `video_grid_thw` and metadata.

        `video_grid_thw` is [videos, 3]. Each video is [T, H, W, 3] uint8 with two or more frames.
        """
        patches = [self.patches(torch.from_numpy(video)) for video in videos]
        return {
            "pixel_values_videos": torch.cat([values for values, _ in patches]),
            "video_grid_thw": torch.tensor([grid for _, grid in patches]),
            "video_metadata": list(video_metadata),
        }

    def patches(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return the patches of one video [T, H, W, 3], and their grid: time, height, width.

        An odd number of frames is completed with a copy of the last one, as the families' own
        processors do.
        """
        settings = self.settings
        pixels = frames.permute(0, 3, 1, 2).contiguous()
        size = self.size_of(*pixels.shape[:1], *pixels.shape[2:])
        if settings["do_resize"] and size != tuple(pixels.shape[2:]):
            mode = _MODES[settings["resample"]]
            pixels = F.interpolate(pixels, size, mode=mode, align_corners=False, antialias=True)
        values = self._normalised(pixels)
        if missing := -len(values) % self.temporal_patch_size:
            values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
        time = len(values) // self.temporal_patch_size
        rows, columns = (side // self.patch_size for side in values.shape[2:])
        inside = (self.merge_size, self.patch_size)
        cut = values.view(
            time,
            self.temporal_patch_size,
            3,
            rows // self.merge_size,
            *inside,
            columns // self.merge_size,
            *inside,
        )
        flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, -1)
        return flat, (time, rows, columns)

    def size_of(self, count: int, height: int, width: int) -> tuple[int, int]:
        """Return the height and width [px] to which `count` frames of this size are resized.

        Qwen2.5-VL limits the pixels of a frame, Qwen3-VL those of the whole video.
        """
        settings, factor = self.settings, self.patch_size * self.merge_size
        if not settings["do_resize"]:
            return height, width
        least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        capped, tokens = settings.get("cap_pixels_per_frame"), settings["max_video_tokens"]
        if settings["video_processor_type"] == "Qwen3VLVideoProcessor":
            if capped:
                most = count * max(min(tokens * factor**2, most // count), int(least * 1.05))
            return resize_volume(count, height, width, self.temporal_patch_size, factor, least, most)
        if capped:
            total = int(tokens * factor * factor * 0.9)
            most = max(min(most, total * self.temporal_patch_size // count), int(least * 1.05))
        return resize_picture(height, width, factor, least, most)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Return float32 values; scaling and normalisation are one step, as in transformers."""
        settings, values = self.settings, pixels.to(torch.float32)
        if not settings["do_normalize"]:
            return values * settings["rescale_factor"] if settings["do_rescale"] else values
        scale = 1.0 / settings["rescale_factor"] if settings["do_rescale"] else 1.0
        mean = torch.tensor(settings["image_mean"]) * scale
        std = torch.tensor(settings["image_std"]) * scale
        return (values - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


# --- settings -----------------------------------------------------------------------------------------------


def video_settings(source: str | Path, model_type: str) -> dict[str, Any]:
    """Return the settings of a model's video processor, complete for a family of DEFAULTS.

    They are read from the folder or hub id `source` in the order of transformers: the part of
    processor_config.json, video_preprocessor_config.json, preprocessor_config.json (Qwen2.5-VL's on
    the hub). Missing settings have the defaults of the class. For another family, only settings
    that name their class are returned, unchanged.
    """
    found: dict[str, Any] = _json(source, PROCESSOR_NAME).get("video_processor", {})
    for name in (VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        found = found or _json(source, name)
    if model_type in DEFAULTS:
        return completed(found, model_type)
    return found if "video_processor_type" in found else {}


def completed(found: Settings, model_type: str) -> dict[str, Any]:
    """Return settings as the family's video processor class writes them after reading `found`."""
    settings = {**DEFAULTS[model_type], **found}
    settings["video_processor_type"] = DEFAULTS[model_type]["video_processor_type"]
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    settings["size"] = dict(settings["size"])
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if model_type == "qwen2_5_vl":
            pixels = settings.pop(name, None)
            settings["size"] |= {} if pixels is None else {edge: pixels}
    return settings


def _json(source: str | Path, name: str) -> dict[str, Any]:
    """Return the content of a file of a folder or hub id; empty if it does not exist."""
    path = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return dict(json.loads(Path(path).read_text())) if path else {}


def reads_videos(processor: Any, model_type: str) -> bool:
    """Return whether a model's family supports video inputs and its processor has them."""
    return model_type in DEFAULTS and getattr(processor, "video_processor", None) is not None


# --- a processor's call -------------------------------------------------------------------------------------


def video_arguments(texts: Sequence[str], videos: Sequence[Video], processor: Any) -> dict[str, Any]:
    """Return the arguments for videos of a processor's call.

    Raises BlmError for a processor without a video part, and if placeholders and videos differ in
    number.
    """
    if not videos:
        return {}
    if getattr(processor, "video_processor", None) is None:
        name = type(processor).__name__
        raise BlmError(f"{name} reads no videos; give their frames as images (videos_as = 'frames')")
    placeholders = sum(text.count(processor.video_token) for text in texts)
    if placeholders != len(videos):
        raise BlmError(
            f"{placeholders} video placeholders for {len(videos)} videos: the chat template does not write "
            "one for each; give their frames as images (videos_as = 'frames')"
        )
    return {
        "videos": [video.frames for video in videos],
        "video_metadata": [video.metadata() for video in videos],
        "do_sample_frames": False,
    }


def check_videos(processor: Any, inputs: Mapping[str, Tensor]) -> None:
    """Raise BlmError unless the numbers of video placeholders and video features are equal."""
    if "video_grid_thw" not in inputs:
        return
    placeholders = int((inputs["input_ids"] == processor.video_token_id).sum())
    features = int(inputs["video_grid_thw"].prod(-1).sum()) // processor.video_processor.merge_size**2
    if placeholders != features:
        raise BlmError(
            f"{placeholders} video placeholders but {features} video features: a video is missing, extra, or "
            "was cut by truncation"
        )


# --- positions ----------------------------------------------------------------------------------------------


def token_types(processor: Any, tokens: Tensor) -> Tensor:
    """Return the type of each token: 0 (text), 1 (part of an image) or 2 (part of a video)."""
    types = (tokens == processor.image_token_id).long()
    video = getattr(processor, "video_token_id", None)
    return types if video is None else types + 2 * (tokens == video).long()


def grids_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs on which M-RoPE positions depend, besides the tokens.

    The result is empty for other models.
    """
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return {name: inputs[name] for name in names if name in inputs}
