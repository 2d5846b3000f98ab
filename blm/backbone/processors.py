"""Load the processors of transformers without torchvision, and save them whole."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoImageProcessor, Idefics3Processor, SmolVLMProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from blm.backbone.video import DEFAULTS, FrameProcessor, video_settings


def load_processor(source: str) -> Any:
    """Load a processor that reads images, and videos if it is one of Qwen2.5-VL or Qwen3-VL.

    It gives the same pixels whether or not torchvision is installed: images are processed with
    Pillow (torchvision's results differ by one level of 255), and videos by `FrameProcessor`. A
    processor of another family whose video part needs torchvision is loaded without that part if
    torchvision is missing; the part's settings are kept and saved again.

    SmolVLM gets the processor of Idefics3, which it descends from: they read images alike, but
    SmolVLM's own asks for num2words and a video part. Both would cut an image into up to 17 tiles
    of 64 or more tokens. That is switched off, as for frames of videos, so an image costs the same
    whatever its size.
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
    if hasattr(processor.image_processor, "do_image_splitting"):
        processor.image_processor.do_image_splitting = False
    return processor


def without_video(kind: Any) -> Any:
    """Return the processor class `kind` with an image processor and a tokenizer only, under the same name.

    Its instances may be given a `FrameProcessor` as `video_processor`, or only `video_settings` to save.
    transformers reads the parts of a processor off the signature of its constructor.
    """

    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    def to_dict(self: Any) -> dict[str, Any]:
        """Add the settings of the video part, as a whole processor has them in processor_config.json."""
        part = getattr(self, "video_processor", None)
        settings = getattr(self, "video_settings", {}) if part is None else part.settings
        return {**kind.to_dict(self), **({"video_processor": dict(settings)} if settings else {})}

    members = {"__init__": init, "to_dict": to_dict, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
