"""Load the processors of transformers without torchvision, and save them whole."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, Idefics3Processor, SmolVLMProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from blm.backbone.families import one_tile_a_picture, require_processor
from blm.backbone.video import DEFAULTS, FrameProcessor, video_settings


def load_processor(source: str) -> Any:
    """Load a processor of images, and of videos for Qwen2.5-VL and Qwen3-VL.

    It returns the same pixels with and without torchvision: images are processed with Pillow
    (torchvision's results differ by one level of 255), and videos by `FrameProcessor`. If the
    processor of another family has a video part that needs torchvision, and torchvision is missing,
    it is loaded without that part; the part's settings are kept and saved again.

    SmolVLM gets the processor of Idefics3, its ancestor: both process images alike, but SmolVLM's
    own requires num2words and a video part. Both would split an image into up to 17 tiles of 64 or
    more tokens. Splitting is disabled, as it is for frames of videos, so an image costs the same at
    every size.
    """
    config = AutoConfig.from_pretrained(source)
    kind: Any = PROCESSOR_MAPPING[type(config)]
    if kind is SmolVLMProcessor:
        kind = Idefics3Processor
    own = config.model_type in DEFAULTS
    if "video_processor" in kind.get_attributes() and (own or not is_torchvision_available()):
        processor = without_video(kind).from_pretrained(source)
        settings = video_settings(source, config.model_type)
        processor.video_settings = settings
        if own:
            processor.video_processor = FrameProcessor(settings)
    else:
        processor = kind.from_pretrained(source)
    if is_torchvision_available():
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    require_processor(processor)
    one_tile_a_picture(processor)
    return processor


def without_video(kind: Any) -> Any:
    """Return the processor class `kind` with only an image processor and a tokenizer.

    It keeps its name. Its instances may be given a `FrameProcessor` as `video_processor`, or only
    `video_settings` to save. transformers reads the parts of a processor off the signature of its
    constructor.
    """

    def init(
        self: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        image_seq_length: int | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
    ) -> None:
        given = {
            "image_seq_length": image_seq_length,  # InternVL
            "num_image_tokens": num_image_tokens,  # LLaVA-OneVision, also the next two
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "vision_aspect_ratio": vision_aspect_ratio,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, "video_processor": None}
        kind.__init__(self, **parts, chat_template=chat_template, **settings)

    def to_dict(self: Any) -> dict[str, Any]:
        """Add the settings of the video part, in the form of processor_config.json."""
        part = getattr(self, "video_processor", None)
        settings = getattr(self, "video_settings", {}) if part is None else part.settings
        return {**kind.to_dict(self), **({"video_processor": dict(settings)} if settings else {})}

    members = {"__init__": init, "to_dict": to_dict, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
